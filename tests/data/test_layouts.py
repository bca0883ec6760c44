"""The layouts in which people have ImageNet, as tiny files of the real formats."""

import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
from PIL import Image
from scipy.io import savemat

from workflow_scripts.config import Dataset
from workflow_scripts.data.catalog import Catalog, Look
from workflow_scripts.data.imagenet import class_title, contradiction, wnids
from workflow_scripts.data.preprocess import load_squares
from workflow_scripts.data.sources import BadImage, Split
from workflow_scripts.errors import DataError

CLASSES = ("n01440764", "n01751748", "n09193705")  # the last two are those of the first validation images
VALIDATION = ("n01751748", "n09193705", "n02105855", "n04263257", "n03125729")
LONG_AGO = 1_000_000_000


def picture(label: int, index: int, **options: Any) -> bytes:
    return support.encoded(support.draw(label, index), "JPEG", **options)


def train_files() -> dict[str, dict[str, bytes]]:
    return {
        name: {f"{name}_{index}.JPEG": picture(label, index) for index in (10, 9, 100)}
        for label, name in enumerate(CLASSES)
    }


def write_tar(path: Path, files: Mapping[str, bytes], mtime: int = LONG_AGO) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), mtime
            tar.addfile(member, io.BytesIO(content))
    return path


def folders(root: Path) -> Path:
    for name, files in train_files().items():
        (root / name).mkdir(parents=True)
        for file, content in files.items():
            (root / name / file).write_bytes(content)
            os.utime(root / name / file, (LONG_AGO, LONG_AGO))
    return root


def class_tars(root: Path) -> Path:
    for name, files in train_files().items():
        write_tar(root / f"{name}.tar", files)
    return root


def webdataset(root: Path, label: str = "cls", shift: int = 0) -> Path:
    samples = [(name, file, c) for name, files in train_files().items() for file, c in files.items()]
    for shard in range(2):
        files: dict[str, bytes] = {}
        for number, (name, _, content) in enumerate(samples[shard::2]):
            index = wnids().index(name) + shift
            files[f"{number:05d}.jpg"] = content
            if label == "cls":
                files[f"{number:05d}.cls"] = str(index).encode()
            else:
                facts = {"label": index, "filename": f"{name}_1.JPEG"} if label == "json" else {"wnid": name}
                files[f"{number:05d}.json"] = json.dumps(facts).encode()
        write_tar(root / f"imagenet-train-{shard:04d}.tar", files)
    return root


def parquet(root: Path, shift: int = 0, paths: bool = True, names: Iterable[str] | None = None) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    root.mkdir(parents=True, exist_ok=True)
    samples = [(name, file, c) for name, files in train_files().items() for file, c in files.items()][::-1]
    for part in range(2):
        rows = samples[part::2]
        images = [{"bytes": content, "path": file if paths else None} for _, file, content in rows]
        labels = [wnids().index(name) + shift for name, _, _ in rows]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(images, kind), "label": pa.array(labels, pa.int64())})
        if names is not None:
            info = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(table, root / f"train-{part:05d}-of-00002.parquet", row_group_size=2)
    return root


TRAIN = {"imagefolder": folders, "class-tars": class_tars, "webdataset": webdataset, "parquet": parquet}


def flat(root: Path, labels: str = "csv") -> Path:
    """Five flat validation images and a file with their classes."""
    (root / "val").mkdir(parents=True)
    for number in range(1, 6):
        (root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(picture(number, number))
    stems = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 6)]
    if labels == "csv":
        lines = ["ImageId,PredictionString", *(f"{s},{w} 85 1 499 272" for s, w in zip(stems, VALIDATION, strict=True))]
        (root / "LOC_val_solution.csv").write_text("\n".join(lines))
    elif labels in ("wnid", "index"):
        told = VALIDATION if labels == "wnid" else [wnids().index(wnid) for wnid in VALIDATION]
        lines = [f"{stem}.JPEG {label}" for stem, label in zip(stems, told, strict=True)]
        (root / "val_map.txt").write_text("\n".join(lines))
    else:
        devkit(root / "ILSVRC2012_devkit_t12" / "data", sort=labels == "devkit, wrong order")
    return root / "val"


def devkit(folder: Path, sort: bool = False) -> None:
    """The development kit: ids in an order of their own, and inner nodes of the tree after the 1000 classes."""
    folder.mkdir(parents=True)
    order = list(wnids()) if sort else list(np.random.default_rng(0).permutation(wnids()))
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(number, str(wnid), "a, b", 0) for number, wnid in enumerate([*order, "n00001740"], 1)]
    savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=kind)})
    own = list(np.random.default_rng(0).permutation(wnids()))
    truth = "".join(f"{own.index(wnid) + 1}\n" for wnid in VALIDATION)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)


def catalog(train: Path, test: Path, source: str = "imagenet", look: Look = "noted", **settings: Any) -> Catalog:
    dataset = Dataset(source=source, root=train, test_root=test, classes=CLASSES[1:], **settings)  # type: ignore[arg-type]
    return Catalog(dataset, train.parent / "cache", look)


def contents(listed: Catalog, split: Split = "train") -> dict[str, set[str]]:
    source: Any = listed.source
    return {
        name: {hashlib.sha256(source.read(entry)).hexdigest() for entry in listed.entries(name, split)}
        for name in listed.classes
    }


def expected() -> dict[str, set[str]]:
    files = train_files()
    return {name: {hashlib.sha256(c).hexdigest() for c in files[name].values()} for name in CLASSES[1:]}


# ---------------------------------------------------------------- training images


@pytest.mark.parametrize("kind", TRAIN)
def test_every_layout_holds_the_same_images(kind: str, tmp_path: Path) -> None:
    listed = catalog(TRAIN[kind](tmp_path / "train"), folders(tmp_path / "val"))
    assert contents(listed) == expected()
    assert listed.source.classes() == list(CLASSES)
    assert "2 classes, 6 images" in listed.describe()["train"]
    pixels = [
        part
        for name in listed.classes
        for _, part in load_squares(
            listed.source, name, listed.entries(name, "train"), resolution=16, crop="adm", workers=4, batch=2
        )
    ]
    assert np.concatenate(pixels).shape == (6, 16, 16, 3)


@pytest.mark.parametrize("kind", ["class-tars", "webdataset", "parquet"])
def test_a_layout_can_be_named(kind: str, tmp_path: Path) -> None:
    """Without ``imagenet`` or a subset of it, label indices stand for themselves."""
    train, test = TRAIN[kind](tmp_path / "train"), folders(tmp_path / "val")
    listed = Catalog(Dataset(source=kind, root=train, test_root=test), tmp_path / "cache")  # type: ignore[arg-type]
    assert listed.classes == (list(CLASSES) if kind == "class-tars" else ["0", "65", "970"])


def test_unpacking_or_touching_a_tar_changes_no_fingerprint(tmp_path: Path) -> None:
    tars, unpacked, test = class_tars(tmp_path / "tars"), folders(tmp_path / "unpacked"), folders(tmp_path / "val")
    for kind in ("stat", "content"):
        before = catalog(tars, test, fingerprint=kind)
        prints = [before.fingerprint(name, "train") for name in before.classes]
        os.utime(tars / f"{CLASSES[1]}.tar")
        for root in (tars, unpacked):
            again = catalog(root, test, fingerprint=kind)
            assert [again.fingerprint(name, "train") for name in again.classes] == prints


@pytest.mark.parametrize("label", ["json", "wnid"])
def test_shards_may_tell_classes_in_json(label: str, tmp_path: Path) -> None:
    listed = catalog(webdataset(tmp_path / "train", label), folders(tmp_path / "val"))
    assert contents(listed) == expected()


def test_content_of_shared_files_is_hashed_once(tmp_path: Path) -> None:
    listed = catalog(webdataset(tmp_path / "train"), folders(tmp_path / "val"), fingerprint="content")
    first = [listed.fingerprint(name, "train") for name in listed.classes]
    again = catalog(tmp_path / "train", tmp_path / "val", fingerprint="content")
    again.source.splits["train"].read = None  # type: ignore[union-attr, assignment, method-assign]
    assert [again.fingerprint(name, "train") for name in again.classes] == first


WRONG_INDEX = {
    "shards that tell file names": (lambda root: webdataset(root, "json", shift=1), "its labels are in another order"),
    "parquet that tells file names": (lambda root: parquet(root, shift=1), "its labels are in another order"),
    "parquet that tells titles": (
        lambda root: parquet(root, paths=False, names=[class_title(w) for w in (*wnids()[1:], wnids()[0])]),
        "calls label 0 'goldfish'",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG_INDEX.values(), ids=WRONG_INDEX)
def test_a_wrong_class_index_is_detected(make: Any, message: str, tmp_path: Path) -> None:
    train, test = make(tmp_path / "train"), folders(tmp_path / "val")
    with pytest.raises(DataError, match=f"(?i){message}"):
        catalog(train, test).fingerprint(CLASSES[1], "train")


def test_titles_that_agree_are_accepted(tmp_path: Path) -> None:
    train = parquet(tmp_path / "train", paths=False, names=[class_title(wnid) for wnid in wnids()])
    assert contents(catalog(train, folders(tmp_path / "val"))) == expected()


def test_an_image_in_the_folder_of_another_class_is_named(tmp_path: Path) -> None:
    train = folders(tmp_path / "train")
    (train / CLASSES[0] / f"{CLASSES[0]}_9.JPEG").rename(train / CLASSES[1] / f"{CLASSES[0]}_9.JPEG")
    with pytest.raises(DataError, match=rf"{CLASSES[0]}_9\.JPEG: lies in class {CLASSES[1]} \(sea snake\).*tench"):
        catalog(train, folders(tmp_path / "val")).count(CLASSES[1], "train")


# ---------------------------------------------------------------- validation images


@pytest.mark.parametrize("labels", ["csv", "wnid", "index", "devkit"])
@pytest.mark.parametrize("packed", [False, True])
def test_flat_validation_images_find_their_classes(labels: str, packed: bool, tmp_path: Path) -> None:
    test = flat(tmp_path / "imagenet", labels)
    if packed:
        files = {path.name: path.read_bytes() for path in test.iterdir()}
        test = write_tar(tmp_path / "imagenet" / "ILSVRC2012_img_val.tar", files)
    listed = catalog(class_tars(tmp_path / "train"), test)
    for number, name in enumerate(listed.classes, 1):
        assert [entry.key for entry in listed.entries(name, "test")] == [f"ILSVRC2012_val_{number:08d}.JPEG"]
    assert "2 classes, 2 images" in listed.describe()["test"]


def test_a_wrong_order_of_validation_labels_is_detected(tmp_path: Path) -> None:
    test = flat(tmp_path / "imagenet", "devkit, wrong order")
    with pytest.raises(DataError, match=r"ILSVRC2012_val_0000000\d\.JPEG: lies in class .*but is an image of n"):
        catalog(class_tars(tmp_path / "train"), test).count(CLASSES[1], "test")


def test_wrong_counts_of_validation_images_are_told(tmp_path: Path) -> None:
    train, test = class_tars(tmp_path / "train"), flat(tmp_path / "imagenet", "devkit")
    (test / "ILSVRC2012_val_00000002.JPEG").unlink()
    with pytest.raises(DataError, match=r"has 5 labels, but .*val holds 4 images; there is a label for .*00000002"):
        catalog(train, test).count(CLASSES[1], "test")
    (test / "ILSVRC2012_val_00000002.JPEG").write_bytes(picture(2, 2))
    (test / "ILSVRC2012_val_00000006.JPEG").write_bytes(picture(6, 6))
    with pytest.raises(DataError, match=r"holds 6 images; there is no label for ILSVRC2012_val_00000006\.JPEG"):
        catalog(train, test).count(CLASSES[1], "test")


def test_labels_that_are_missing_are_asked_for(tmp_path: Path) -> None:
    train, test = class_tars(tmp_path / "train"), flat(tmp_path / "imagenet", "devkit")
    (tmp_path / "imagenet/ILSVRC2012_devkit_t12/data/meta.mat").unlink()
    with pytest.raises(DataError, match=r"meta\.mat tells, and that is missing"):
        catalog(train, test)
    (tmp_path / "imagenet/ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt").unlink()
    with pytest.raises(DataError, match=r"nothing near it says their classes.*dataset\.test_labels"):
        catalog(train, test)


# ---------------------------------------------------------------- damage


def test_a_tar_that_was_cut_short_is_named(tmp_path: Path) -> None:
    train, test = class_tars(tmp_path / "train"), folders(tmp_path / "val")
    path = train / f"{CLASSES[1]}.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        boundary = tar.getmembers()[1].offset
    for size in (len(whole) // 30, boundary, boundary + 700, 100):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"class {CLASSES[1]}: .*\.tar: cannot be read as an uncompressed tar"):
            catalog(train, test).count(CLASSES[1], "train")


KINDS = {
    "cmyk": Image.open(io.BytesIO(picture(1, 1))).convert("CMYK"),
    "grey": Image.open(io.BytesIO(picture(1, 1))).convert("L"),
    "palette": Image.open(io.BytesIO(picture(1, 1))).quantize(16),
    "16 bit": Image.fromarray(np.full((20, 20), 30000, np.uint16)),
}


def test_every_kind_of_image_is_read_from_a_tar_and_a_bad_one_is_named(tmp_path: Path) -> None:
    name = CLASSES[1]
    files = {
        f"{name}_{index}.JPEG": support.encoded(image, "JPEG" if image.mode in ("CMYK", "L") else "PNG")
        for index, image in enumerate(KINDS.values())
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    files[f"{name}_8.JPEG"] = support.encoded(support.draw(1, 2).resize((30, 20)), "JPEG", exif=exif)
    files[f"{name}_9.JPEG"] = picture(1, 1)[:300]
    train, test = class_tars(tmp_path / "train"), folders(tmp_path / "val")
    write_tar(train / f"{name}.tar", files)
    listed = catalog(train, test)
    entries = listed.entries(name, "train")
    loaded = [listed.source.load(entry, name) for entry in entries[:-1]]
    assert [image.mode for image in loaded] == ["RGB"] * 5
    assert loaded[-1].size == (20, 30), "turned upright"
    with pytest.raises(BadImage, match=rf"{name}\.tar:{name}_9\.JPEG \(class {name}\): cannot be decoded"):
        listed.source.load(entries[-1], name)


def test_an_image_that_changed_after_it_was_listed_is_refused(tmp_path: Path) -> None:
    train, test = class_tars(tmp_path / "tars"), folders(tmp_path / "folders")
    for root in (train, test):
        listed = catalog(root, test)
        entry = listed.entries(CLASSES[1], "train")[0]
        if root == train:
            write_tar(train / f"{CLASSES[1]}.tar", {"x.JPEG": b"0" * 5000, **train_files()[CLASSES[1]]})
        else:
            Path(entry.path).write_bytes(picture(5, 5))
        with pytest.raises(DataError, match=r"changed since it was listed\. Run the same command again"):
            listed.source.load(entry, CLASSES[1])


UNKNOWN = {
    "nothing": (lambda root: root.mkdir(), "no layout that is known"),
    "a tar of tars": (
        lambda root: write_tar(root / "ILSVRC2012_img_train.tar", {"n01440764.tar": b"x"}),
        r"is a tar of tars\. Unpack it once",
    ),
    "two layouts": (lambda root: class_tars(folders(root)), "class-tars and imagefolder.*dataset.source"),
    "not there": (lambda root: None, "dataset.root: .*is not there"),
    "flat training images": (lambda root: flat(root).rename(root.parent / "x"), "no layout that is known"),
}


@pytest.mark.parametrize(("make", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_cannot_be_a_training_set_is_told(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "train")
    with pytest.raises(DataError, match=message):
        catalog(tmp_path / "train", folders(tmp_path / "val"))


# ---------------------------------------------------------------- notes


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what was just written count as written long ago."""
    monkeypatch.setattr("workflow_scripts.data.notes.SETTLED_NS", -(10**12))


@pytest.mark.parametrize("kind", TRAIN)
def test_an_unchanged_layout_is_not_listed_again(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    train, test = TRAIN[kind](tmp_path / "train"), folders(tmp_path / "val")
    before = catalog(train, test)
    prints = [before.fingerprint(name, split) for name in before.classes for split in ("train", "test")]  # type: ignore
    for listing in ("list_folder", "list_tar", "tar_members", "_open_parquet"):
        monkeypatch.setattr(f"workflow_scripts.data.layouts.{listing}", None)
    again = catalog(train, test)
    assert [again.fingerprint(name, split) for name in again.classes for split in ("train", "test")] == prints  # type: ignore
    assert [again.entries(name, "train") for name in again.classes] == [
        before.entries(name, "train") for name in before.classes
    ]


def test_what_changes_in_a_folder_is_seen_and_an_edit_in_place_with_rescan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    train, test, name = folders(tmp_path / "train"), folders(tmp_path / "val"), CLASSES[1]
    first = catalog(train, test).fingerprint(name, "train")
    (train / name / f"{name}_11.JPEG").write_bytes(picture(1, 11))
    second = catalog(train, test).fingerprint(name, "train")
    (train / name / f"{name}_11.JPEG").write_bytes(picture(1, 12))
    assert catalog(train, test).fingerprint(name, "train") == second != first
    third = catalog(train, test, look="rescan").fingerprint(name, "train")
    assert third != second
    assert catalog(train, test).fingerprint(name, "train") == third


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", ["imagefolder", "flat"])
def test_an_image_edited_in_place_is_refused_once_and_then_listed_anew(
    kind: str, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    train, test, name = folders(tmp_path / "train"), folders(tmp_path / "val"), CLASSES[1]
    if kind == "flat":
        test = flat(tmp_path / "flat")
    first = catalog(train, test)
    before, other = (first.fingerprint(of, split) for of in (name, CLASSES[2]))
    Path(first.entries(name, split)[0].path).write_bytes(picture(5, 5))
    second = catalog(train, test)
    assert second.fingerprint(name, split) == before, "its folder did not change"
    with pytest.raises(DataError, match="Run the same command again"):
        second.source.load(second.entries(name, split)[0], name)
    third = catalog(train, test)
    assert third.fingerprint(name, split) != before and third.fingerprint(CLASSES[2], split) == other
    third.source.load(third.entries(name, split)[0], name)


def test_an_empty_image_that_is_filled_in_place_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    train, test, name = folders(tmp_path / "train"), folders(tmp_path / "val"), CLASSES[1]
    image = min((train / name).iterdir())
    content = image.read_bytes()
    image.write_bytes(b"")
    with pytest.raises(DataError, match="zero bytes"):
        catalog(train, test).fingerprint(name, "train")
    image.write_bytes(content)
    catalog(train, test).fingerprint(name, "train")


def test_a_folder_that_changed_just_now_is_not_noted(tmp_path: Path) -> None:
    train, test, name = folders(tmp_path / "train"), folders(tmp_path / "val"), CLASSES[1]
    catalog(train, test).fingerprint(name, "train")
    assert not list(tmp_path.glob("cache/listings/*"))
    time.sleep(2.1)
    catalog(train, test).fingerprint(name, "train")
    assert len(list(tmp_path.glob("cache/listings/*"))) == 1


def test_a_damaged_note_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    train, test, name = folders(tmp_path / "train"), folders(tmp_path / "val"), CLASSES[1]
    before = catalog(train, test).fingerprint(name, "train")
    for note in tmp_path.glob("cache/listings/*"):
        note.write_text("{")
    assert catalog(train, test).fingerprint(name, "train") == before


@pytest.mark.parametrize("kind", ["imagefolder", "class-tars"])
def test_a_deep_look_names_bytes_that_changed_unseen(kind: str, tmp_path: Path) -> None:
    train, test, name = TRAIN[kind](tmp_path / "train"), folders(tmp_path / "val"), CLASSES[1]
    assert catalog(train, test, look="deep").changed_bytes() == []
    path = train / name / f"{name}_9.JPEG" if kind == "imagefolder" else train / f"{name}.tar"
    before, times = path.read_bytes(), path.stat()
    image = train_files()[name][f"{name}_9.JPEG"]
    path.write_bytes(before.replace(image, image[:-9] + b"#" + image[-8:]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    (place,) = catalog(train, test, look="deep").changed_bytes()
    assert place.endswith(f"{name}_9.JPEG")


def test_file_names_speak_of_their_class() -> None:
    assert contradiction("n01440764_10026.JPEG", "n01440764") is None
    assert contradiction("n02105855_2933_n02105855.JPEG", "n02105855") is None
    assert contradiction("n01440764_10026.JPEG", "n01443537") == "n01440764"
    assert contradiction("ILSVRC2012_val_00000001_n01751748.JPEG", "n01440764") == "n01751748"
    assert contradiction("ILSVRC2012_val_00000002.JPEG", "n01440764") == "n09193705"
    assert contradiction("n01440764_10026.JPEG", "tench") is None
    assert contradiction("anything.png", "n01440764") is None
    assert (class_title("n02123045"), class_title("my class, mine")) == ("tabby", "my class")
