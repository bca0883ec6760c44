"""The catalog: what images each class has, and the fingerprint that stands for them in every digest."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import support

from workflow_scripts.config import Dataset
from workflow_scripts.data.catalog import Catalog
from workflow_scripts.errors import DataError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    support.make_folder(tmp_path / "images" / "train", support.CLASSES, 6)
    support.make_folder(tmp_path / "images" / "test", support.CLASSES, 2, offset=100)
    return tmp_path / "images"


def catalog(images: Path, **settings: Any) -> Catalog:
    dataset = Dataset(source="imagefolder", root=images / "train", test_root=images / "test", **settings)
    return Catalog(dataset, images.parent / "cache")


def prints(images: Path, **settings: Any) -> dict[str, str]:
    listed = catalog(images, **settings)
    return {
        f"{split} {name}": listed.fingerprint(name, split) for name in listed.classes for split in ("train", "test")
    }


def first(images: Path, name: str = "bee") -> Path:
    return min((images / "train" / name).iterdir())


def test_classes_are_those_asked_for_in_that_order(images: Path) -> None:
    assert catalog(images).classes == ["ant", "bee", "cat"]
    assert catalog(images, classes=("cat", "ant")).classes == ["cat", "ant"]
    with pytest.raises(DataError, match=r"dataset\.classes: no images for dog, elk in .*train; there is ant, bee, cat"):
        catalog(images, classes=("elk", "ant", "dog"))
    with pytest.raises(DataError, match=r"dataset\.classes: names a class twice"):
        catalog(images, classes=("ant", "ant"))


def test_an_empty_class_is_named(images: Path) -> None:
    (images / "train" / "dog").mkdir()
    (images / "train" / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"class dog: has no train image\. Add images .*dataset\.classes"):
        catalog(images).entries("dog", "train")
    catalog(images, classes=("ant", "bee")).entries("bee", "train")


def test_a_class_without_test_images_is_named(images: Path) -> None:
    shutil.rmtree(images / "test" / "bee")
    with pytest.raises(DataError, match=r"class bee: .*test/bee cannot be listed"):
        catalog(images).entries("bee", "test")
    (images / "test" / "bee").mkdir()
    with pytest.raises(DataError, match="class bee: has no test image"):
        catalog(images).entries("bee", "test")


def test_an_image_of_zero_bytes_is_named_when_the_run_is_planned(images: Path) -> None:
    os.truncate(first(images), 0)
    with pytest.raises(DataError, match=rf"{first(images)} \(class bee\): zero bytes\. .*on_bad_image: skip"):
        catalog(images).fingerprint("bee", "train")
    assert len(catalog(images, on_bad_image="skip").entries("bee", "train")) == 6
    os.truncate(sorted((images / "train" / "bee").iterdir())[1], 0)
    with pytest.raises(DataError, match="zero bytes, and 1 more like it"):
        catalog(images).fingerprint("bee", "train")


# ---------------------------------------------------------------- fingerprints


@pytest.mark.parametrize("kind", ["stat", "content"])
def test_a_fingerprint_covers_its_class_and_split_only(kind: str, images: Path) -> None:
    before = prints(images, fingerprint=kind)
    assert len(set(before.values())) == len(before)
    assert prints(images, fingerprint=kind) == before
    support.draw(5, 5).save(images / "train" / "bee" / "new.png")
    after = prints(images, fingerprint=kind)
    assert {key for key in before if before[key] != after[key]} == {"train bee"}
    (images / "train" / "bee" / "new.png").unlink()
    assert prints(images, fingerprint=kind) == before


@pytest.mark.parametrize("kind", ["stat", "content"])
def test_a_fingerprint_covers_names_and_content(kind: str, images: Path) -> None:
    before = prints(images, fingerprint=kind)
    first(images).rename(first(images).with_name("zzz.png"))
    renamed = prints(images, fingerprint=kind)
    assert renamed["train bee"] != before["train bee"]
    content = first(images).read_bytes()
    first(images).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # as long as before
    assert prints(images, fingerprint=kind)["train bee"] not in (renamed["train bee"], before["train bee"])


def test_touching_a_file_changes_stat_only(images: Path) -> None:
    stat, content = prints(images), prints(images, fingerprint="content")
    os.utime(first(images), ns=(1, 1))
    assert prints(images, fingerprint="content") == content
    assert {key for key, value in prints(images).items() if value != stat[key]} == {"train bee"}


def test_moving_the_images_changes_nothing(images: Path) -> None:
    stat, content = prints(images), prints(images, fingerprint="content")
    moved = images.rename(images.with_name("moved"))
    assert prints(moved) == stat
    assert prints(moved, fingerprint="content") == content
    copied = images.with_name("copied")
    shutil.copytree(moved, copied, copy_function=shutil.copyfile)  # with new modification times
    assert prints(copied, fingerprint="content") == content
    assert prints(copied) != stat


def test_the_content_of_a_big_file_is_hashed_again_when_it_changes(images: Path) -> None:
    big = images / "train" / "bee" / "big.png"
    big.write_bytes(bytes(3 << 20))
    before = prints(images, fingerprint="content")
    assert prints(images, fingerprint="content") == before
    big.write_bytes(bytes((3 << 20) - 1) + b"\1")
    assert prints(images, fingerprint="content")["train bee"] != before["train bee"]


def test_content_that_is_known_is_not_read_again(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning ImageNet must not read 140 GB each time: hashes are cached by size and mtime (design.md, section 3)."""
    before = prints(images, fingerprint="content")
    read: list[str] = []
    hash_of = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: (read.append(file.name), hash_of(file, name))[1])
    assert prints(images, fingerprint="content") == before
    assert len(read) == 0, f"{len(read)} of 24 files were read again, though neither size nor mtime changed"


def test_bad_images_do_not_matter_to_a_fingerprint(images: Path) -> None:
    """Whether a bad image stops the run or is left out, the images are the same ones."""
    assert prints(images, on_bad_image="skip") == prints(images, on_bad_image="fail")
