"""What is written is read by those who are to read it: torchvision, webdataset, datasets and safetensors."""

import json
import os
import re
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import DatasetCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from workflow_scripts.data.imagenet import subset_classes, wnids
from workflow_scripts.errors import StoreError
from workflow_scripts.formats import writers
from workflow_scripts.formats.card import Description
from workflow_scripts.formats.writers import ImageSet, write

CLASSES = ("zebra", "ant v1.2", "Müll")  # not sorted, a dot, a space, a letter that is not ASCII
IPC = 4
SIDE = 20


def pixels_of(name: str, ipc: int = IPC) -> np.ndarray:
    return np.random.default_rng([ord(letter) for letter in name]).integers(
        0, 256, (ipc, SIDE, SIDE, 3), dtype=np.uint8
    )


def description(**changes: Any) -> Description:
    classes = changes.get("classes", CLASSES)
    return replace(
        Description(
            title="A run",
            method="mgd3",
            summary="Each image is pulled to one mode.",
            paper="MGD3, ICML 2025",
            parameters={"kind": "diffusion", "guidance": [{"term": "mode", "scale": 0.1}]},
            ipc=IPC,
            seed=1,
            classes=classes,
            digest="ab" * 32,
            results=dict.fromkeys(classes, "cd" * 32),
            resolution=SIDE,
            backbone={"name": "facebook/DiT-XL-2-256", "denoiser": "12" * 32, "vae": "34" * 32, "dtype": "bfloat16"},
            licences={"denoiser": "CC-BY-NC-4.0", "vae": "MIT"},
            real_images={
                "source": "ImageNet (imagewoof)",
                "images": 9,
                "resolution": SIDE,
                "crop": "adm",
                "resample": "bicubic",
                "flip": "none",
            },
            clustering={},
            software=("torch 2",),
        ),
        **changes,
    )


def image_set(**changes: Any) -> ImageSet:
    return ImageSet(**{"description": description(), "read": pixels_of, **changes})


@pytest.fixture
def load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return lambda *names, **options: datasets.load_dataset(*names, cache_dir=str(tmp_path / "cache"), **options)


def members(path: str) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


# ---------------------------------------------------------------- the clients


def test_torchvision_reads_an_imagefolder(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    write(image_set(), "imagefolder", tmp_path / "set")
    found = ImageFolder(str(tmp_path / "set"))
    facts = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert found.class_to_idx == {row["folder"]: row["sorted"] for row in facts["classes"]}
    assert [row["class"] for row in facts["classes"]] == list(CLASSES)
    assert len(found) == len(CLASSES) * IPC
    for index, (picture, label) in enumerate(found):
        name = found.classes[label]
        assert np.array_equal(picture, pixels_of(name)[index % IPC])
    assert "another order than this" in (tmp_path / "set" / "README.md").read_text()


def test_folders_by_label_make_torchvision_count_as_the_run_does(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    classes = tuple(f"class {number}" for number in range(12))[::-1]
    images = image_set(description=description(classes=classes), label_folders=True)
    write(images, "imagefolder", tmp_path / "set")
    found = ImageFolder(str(tmp_path / "set"))
    assert [folder.partition("-")[2] for folder in found.classes] == list(classes)
    assert "arrives at the same labels" in (tmp_path / "set" / "README.md").read_text()


@pytest.mark.parametrize("filter", ["lanczos", "bicubic", "box"])
def test_images_are_scaled_by_the_named_filter(tmp_path: Path, filter: Any) -> None:
    write(image_set(size=14, resample=filter), "imagefolder", tmp_path / "set")
    found = Image.open(tmp_path / "set" / "zebra" / "0002.png")
    expected = Image.fromarray(pixels_of("zebra")[2]).resize((14, 14), Image.Resampling[filter.upper()])
    assert np.array_equal(found, expected)
    facts = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert facts["image"] == {"side": 14, "resample": filter} and facts["resolution"] == SIDE


def test_webdataset_reads_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wds = pytest.importorskip("webdataset")
    monkeypatch.setattr(writers, "SHARD", 5)
    write(image_set(), "webdataset", tmp_path / "set")
    shards = sorted(map(str, (tmp_path / "set").glob("train-*.tar")))
    assert [len(members(shard)) for shard in shards] == [15, 15, 6]
    samples = list(wds.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    labels = [sample["cls"] for sample in samples]
    assert len({sample["__key__"] for sample in samples}) == len(CLASSES) * IPC
    assert sorted(labels) != labels, "classes are mixed"
    for sample in samples:
        name, index = CLASSES[sample["cls"]], int(sample["__key__"].split("_")[1])
        assert sample["json"] == {"label": sample["cls"], "class": name, "title": name}
        assert np.array_equal(sample["png"], pixels_of(name)[index])
    assert {path.name for path in (tmp_path / "set").iterdir()} == {
        "README.md",
        "dataset.json",
        *(Path(shard).name for shard in shards),
    }
    write(image_set(), "webdataset", tmp_path / "again")
    assert [Path(shard).read_bytes() for shard in shards] == [
        (tmp_path / "again" / Path(shard).name).read_bytes() for shard in shards
    ]


def test_datasets_reads_the_folder_and_its_card(tmp_path: Path, load_dataset: Any) -> None:
    write(image_set(), "huggingface", tmp_path / "set")
    found = load_dataset(str(tmp_path / "set"), split="train")
    assert found.features["label"].names == list(CLASSES)
    assert len(found) == len(CLASSES) * IPC
    for index, row in enumerate(found.sort("label")):
        name = CLASSES[index // IPC]
        assert (row["label"], row["class"], row["title"]) == (index // IPC, name, name)
    assert {row["image"].tobytes() for row in found} == {one.tobytes() for name in CLASSES for one in pixels_of(name)}


def test_datasets_reads_the_folder_without_the_card(tmp_path: Path, load_dataset: Any) -> None:
    write(image_set(), "huggingface", tmp_path / "set")
    found = load_dataset("imagefolder", data_dir=str(tmp_path / "set"))["train"]
    rows = {(row["image"].tobytes(), row["label"]) for row in found}
    assert rows == {(one.tobytes(), label) for label, name in enumerate(CLASSES) for one in pixels_of(name)}


@pytest.mark.parametrize("format", ["imagefolder", "webdataset"])
def test_datasets_reads_the_other_folders_too(tmp_path: Path, load_dataset: Any, format: Any) -> None:
    write(image_set(), format, tmp_path / "set")
    found = load_dataset(str(tmp_path / "set"), split="train")
    assert len(found) == len(CLASSES) * IPC
    names = sorted(CLASSES) if format == "imagefolder" else CLASSES
    column, label = ("image", "label") if format == "imagefolder" else ("png", "cls")
    rows = {(row[column].tobytes(), row[label]) for row in found}
    assert rows == {(one.tobytes(), label) for label, name in enumerate(names) for one in pixels_of(name)}


@pytest.mark.parametrize("size", [None, 7])
def test_safetensors_reads_the_file(tmp_path: Path, size: int | None) -> None:
    path = tmp_path / "set.safetensors"
    write(image_set(size=size), "safetensors", path)
    arrays = load_file(path)
    side = size or SIDE
    assert arrays["images"].shape == (12, 3, side, side) and str(arrays["images"].dtype) == "torch.uint8"
    assert arrays["labels"].tolist() == [0] * IPC + [1] * IPC + [2] * IPC
    if size is None:
        assert np.array_equal(arrays["images"][5].permute(1, 2, 0), pixels_of(CLASSES[1])[1])
    with safe_open(path, "numpy") as file:
        assert json.loads(file.metadata()["classes"]) == list(CLASSES)
        assert json.loads(file.metadata()["dataset"])["image"]["side"] == side


# ---------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("format", ["imagefolder", "webdataset", "huggingface", "safetensors"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, format: Any) -> None:
    def fail(name: str) -> np.ndarray:
        if name == CLASSES[-1]:
            raise StoreError("damaged")
        return pixels_of(name)

    with pytest.raises(StoreError, match="damaged"):
        write(image_set(read=fail), format, tmp_path / "place" / "set")
    assert not list((tmp_path / "place").iterdir())
    write(image_set(), format, tmp_path / "place" / "set")
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["set"]


@pytest.mark.parametrize("format", ["imagefolder", "safetensors"])
def test_what_is_there_stays(tmp_path: Path, format: Any) -> None:
    path = tmp_path / "set"
    write(image_set(), format, path)
    before = path.stat().st_mtime_ns
    write(image_set(read=lambda name: pytest.fail("read again")), format, path)
    assert path.stat().st_mtime_ns == before
    for other in (image_set(size=8), image_set(description=description(digest="ff" * 32))):
        with pytest.raises(StoreError, match="something else"):
            write(other, format, path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(StoreError, match="mine: is there already"):
        write(image_set(), format, tmp_path / "mine")


# ---------------------------------------------------------------- the card


def read_card(tmp_path: Path, format: Any = "huggingface", **changes: Any) -> tuple[dict[str, Any], str]:
    path = tmp_path / f"card-{abs(hash(str(changes)))}"
    images = image_set(description=description(**changes), read=lambda name: pixels_of(name, 1)[:, :1, :1])
    write(replace(images, size=1), format, path)
    card = DatasetCard((path / "README.md").read_text())
    return card.data.to_dict(), card.text


def test_a_card_says_where_the_images_are_from(tmp_path: Path) -> None:
    front, text = read_card(tmp_path, classes=subset_classes("imagewoof"))
    assert front["license"] == "cc-by-nc-4.0" and front["size_categories"] == ["n<1K"]
    assert front["task_categories"] == ["image-classification"]
    assert front["source_datasets"] == ["ILSVRC/imagenet-1k"]
    for said in (
        "Non-commercial use only",
        "denoiser CC-BY-NC-4.0, autoencoder MIT",
        "facebook/DiT-XL-2-256, in bfloat16",
        "MGD3, ICML 2025",
        "scale: 0.1",
        "ab" * 32,
        "12" * 32,
        "adm crop to 20 px",
        "| 0 | `n02096294` | Australian terrier |",
    ):
        assert said in text, said


@pytest.mark.parametrize(
    ("changes", "licence", "name"),
    [
        ({"licences": {"denoiser": "MIT", "vae": "MIT"}}, "mit", None),
        ({"licences": {"denoiser": "unknown", "vae": "MIT"}}, "unknown", None),
        ({"licences": {"denoiser": "trained with Stillhouse", "vae": "MIT"}}, "unknown", None),
        ({"licences": {"denoiser": "House-Rules-1", "vae": "MIT"}}, "other", "house-rules-1"),
        ({"parameters": {"kind": "coreset"}}, "other", "that-of-the-real-images"),
    ],
)
def test_the_licence_is_one_that_the_hub_takes(
    tmp_path: Path, changes: dict[str, Any], licence: str, name: str | None
) -> None:
    front, text = read_card(tmp_path, **changes)
    assert front["license"] == licence and front.get("license_name") == name
    assert "Non-commercial" not in text
    assert ("synthetic" in front["tags"]) == ("parameters" not in changes)


@pytest.mark.parametrize(("ipc", "size"), [(333, "n<1K"), (334, "1K<n<10K"), (3334, "10K<n<100K")])
def test_size_categories(tmp_path: Path, ipc: int, size: str) -> None:
    assert read_card(tmp_path, ipc=ipc)[0]["size_categories"] == [size]


def test_many_classes_are_not_listed_on_the_card(tmp_path: Path) -> None:
    _, text = read_card(tmp_path, classes=subset_classes("imagenet1k")[:50])
    assert "tench" not in text


def test_the_loading_example_of_each_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the card shows is what a reader types."""
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    for package in ("datasets", "webdataset"):
        pytest.importorskip(package)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    formats: tuple[Any, ...] = ("imagefolder", "webdataset", "huggingface")
    for format in formats:
        write(image_set(), format, tmp_path / format)
        text = (tmp_path / format / "README.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        scope: dict[str, Any] = {}
        exec(code.replace("FOLDER", str(tmp_path / format)), scope)
        first = next(iter(scope["train"]))
        assert isinstance(first["image"] if isinstance(first, dict) else first[0], Image.Image)


# ---------------------------------------------------------------- DD-Ranking, which needs an environment of its own

DD_RANKING = """
import sys
import torch
import ddranking.metrics.hard_label as hard_label
from torchvision import transforms

real, out, *sets = sys.argv[1:]
torch.set_num_threads(1)
hard_label.REAL_DATA_ACC_CACHE["ImageWoof-ConvNet-3"] = 100.0
hard_label.save_results = lambda *_: None  # in 0.2.0 it fails on columns of unequal length
normal = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
)
evaluator = hard_label.LabelRobustScoreHard(
    dataset="ImageWoof", real_data_path=real, ipc=5, model_name="ConvNet-3", data_aug_func=None, step_size=20,
    num_eval=1, im_size=(32, 32), num_epochs=10, real_batch_size=50, syn_batch_size=10, num_workers=0, device="cpu",
    custom_train_trans=normal, custom_val_trans=normal, random_data_path=out, save_path=out + "/scores.csv",
)
for path in sets:
    print("RECOVERY", evaluator.compute_metrics(image_path=path, syn_lr=0.01)["hard_label_recovery_mean"])
"""


@pytest.mark.skipif(
    "DD_RANKING_PYTHON" not in os.environ,
    reason="ddranking wants numpy < 2: name a Python that has it (uv venv X; uv pip install --python X ddranking) in "
    "DD_RANKING_PYTHON",
)
def test_dd_ranking_evaluates_a_set(tmp_path: Path) -> None:
    """It numbers ImageWoof's classes in their published order and folders in sorted order: folders must go by label."""
    woof = subset_classes("imagewoof")

    def draw(name: str, count: int, seed: int) -> np.ndarray:
        """A colour for each class, and noise."""
        number = wnids().index(name)
        colour = np.random.default_rng(number).integers(40, 216, 3)
        noise = np.random.default_rng([number, seed]).normal(0, 25, (count, 32, 32, 3))
        return np.clip(colour + noise, 0, 255).astype(np.uint8)

    own = description(classes=woof, ipc=5, resolution=32)
    for folders in ("label", "class"):
        images = image_set(description=own, read=lambda name: draw(name, 5, 0), label_folders=folders == "label")
        write(images, "imagefolder", tmp_path / folders)
    for split, count in (("train", 6), ("val", 2)):
        for name in wnids():
            (folder := tmp_path / "real" / split / name).mkdir(parents=True)
            for index, pixels in enumerate(draw(name, count if name in woof else 1, count)):
                Image.fromarray(pixels).save(folder / f"{index}.png", compress_level=0)
    (tmp_path / "out").mkdir()
    command = [
        os.environ["DD_RANKING_PYTHON"],
        "-c",
        DD_RANKING,
        *(tmp_path / n for n in ("real", "out", "label", "class")),
    ]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert told.returncode == 0, told.stderr
    by_label, by_class = (float(lost) for lost in re.findall(r"RECOVERY (\S+)", told.stdout))
    assert by_label < 50 < by_class, "percent lost against 100; chance loses 90"
