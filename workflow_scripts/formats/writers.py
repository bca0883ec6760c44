"""The writers of distilled sets, one per format, and the one way in which all of them are written: whole or not at all."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

from workflow_scripts.data.imagenet import class_title
from workflow_scripts.data.preprocess import Resample, square
from workflow_scripts.errors import StoreError
from workflow_scripts.formats import Format
from workflow_scripts.formats.card import Description, card, facts
from workflow_scripts.store.files import TEMPORARY, explain_full_disk, sync_directory, sync_tree

FACTS = "dataset.json"
SHARD = 1000
"""Images per WebDataset shard: about 100 MB at 256 pixels."""


@dataclass(frozen=True)
class ImageSet:
    """A distilled set and how it shall be written.

    Attributes:
        read: the images of a class, uint8 (ipc, H, W, 3).
        size: side in pixels to scale to with ``resample``; default: as they are.
        label_folders: name class folders so that their sorted order is that of the labels.
        workers: threads that scale and compress.
        watch: passes the classes on while it shows how far they are; called with their number and the set's name too.
    """

    description: Description
    read: Callable[[str], np.ndarray]
    size: int | None = None
    resample: Resample = "lanczos"
    label_folders: bool = False
    workers: int = 4
    watch: Callable[[Iterable[str], int, str], Iterable[str]] = lambda names, *_: names

    @property
    def side(self) -> int:
        """Side in pixels of the images as written."""
        return self.size or self.description.resolution

    @property
    def folders(self) -> tuple[str, ...]:
        """The classes' folders, in label order."""
        names = self.description.classes
        digits = len(str(len(names) - 1))
        return tuple(f"{i:0{digits}d}-{name}" for i, name in enumerate(names)) if self.label_folders else names

    def each(self) -> Iterator[np.ndarray]:
        """Read class after class, in label order."""
        names = self.description.classes
        for name in self.watch(names, len(names), f"write {self.description.name}"):
            yield self.read(name)

    def facts(self, format: Format) -> dict[str, Any]:
        """Return the content of ``dataset.json``."""
        scaled = self.side != self.description.resolution
        content: dict[str, Any] = facts(
            self.description, format, self.side, self.resample if scaled else None, self.folders
        )
        return content

    def scale(self, pixels: np.ndarray) -> np.ndarray:
        """Bring one image (H, W, 3) to the wanted size."""
        if len(pixels) == self.side:
            return pixels
        return square(Image.fromarray(pixels), self.side, "resize", self.resample)


def write(images: ImageSet, format: Format, path: Path) -> None:
    """Write a set beside ``path`` and rename it into place when whole.

    Raises:
        StoreError: if something else is there already, or the disk takes no more.
    """
    if path.exists():
        if _written(path, format) == json.loads(json.dumps(images.facts(format))):
            return
        raise StoreError(f"{path}: is there already and is something else. Delete it, or choose another --to.")
    temporary = path.parent / f"{TEMPORARY}{path.name}.{uuid.uuid4().hex}"
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            WRITERS[format](images, temporary)
            sync_tree(temporary)
            temporary.rename(path)
            sync_directory(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.unlink(missing_ok=True)
            raise


def _written(path: Path, format: Format) -> Any:
    """Read what a set that lies somewhere says of itself."""
    try:
        if format == "safetensors":
            with safe_open(path, "numpy") as file:
                return json.loads(file.metadata()["dataset"])
        return json.loads((path / FACTS).read_text())
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


# ---------------------------------------------------------------- folders of PNGs


def _imagefolder(images: ImageSet, folder: Path) -> None:
    for _ in _pngs(images, folder):
        pass
    _describe(images, "imagefolder", folder)


def _huggingface(images: ImageSet, folder: Path) -> None:
    """Write ``train/CLASS/0000.png`` and ``train/metadata.jsonl``, which has the labels."""
    names = images.description.classes
    lines = [
        {"file_name": path.relative_to(folder / "train").as_posix(), **_row(names[label], label)}
        for label, path in _pngs(images, folder / "train")
    ]
    (folder / "train" / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    _describe(images, "huggingface", folder)


def _row(name: str, label: int) -> dict[str, Any]:
    return {"label": label, "class": name, "title": class_title(name)}


def _pngs(images: ImageSet, folder: Path) -> Iterator[tuple[int, Path]]:
    """Write each class's images to its folder, and yield every image's label and path."""

    def save(pixels: np.ndarray, path: Path) -> None:
        Image.fromarray(images.scale(pixels)).save(path)

    with ThreadPoolExecutor(images.workers) as pool:
        for label, (own, pixels) in enumerate(zip(images.folders, images.each(), strict=True)):
            paths = [folder / own / f"{index:04d}.png" for index in range(len(pixels))]
            (folder / own).mkdir(parents=True)
            list(pool.map(save, pixels, paths))
            yield from ((label, path) for path in paths)


def _describe(images: ImageSet, format: Format, folder: Path) -> None:
    """Write ``dataset.json`` and the card."""
    content = images.facts(format)
    (folder / FACTS).write_text(json.dumps(content, indent=1))
    (folder / "README.md").write_text(card(images.description, content))


# ---------------------------------------------------------------- WebDataset


def _webdataset(images: ImageSet, folder: Path) -> None:
    """Write ``train-000000.tar`` and so on: PNG, label (``cls``) and ``json`` per image, in an order that mixes classes.

    The order is drawn from the set's digest. PNGs lie in a folder of their own until they are in a shard.
    """
    loose = folder / "loose"
    pictures = list(_pngs(images, loose))
    random = np.random.default_rng(int(images.description.digest, 16))
    order = random.permutation(len(pictures))
    for shard, start in enumerate(range(0, len(order), SHARD)):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in order[start : start + SHARD]:
                label, path = pictures[number]
                key = f"{label:04d}_{path.stem}"  # without the class's name, which may have dots
                row = _row(images.description.classes[label], label)
                _add(tar, f"{key}.png", path.read_bytes())
                _add(tar, f"{key}.cls", str(label).encode())
                _add(tar, f"{key}.json", json.dumps(row).encode())
    shutil.rmtree(loose)
    _describe(images, "webdataset", folder)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


# ---------------------------------------------------------------- one tensor file


def _safetensors(images: ImageSet, path: Path) -> None:
    """Write ``images`` uint8 (n, 3, side, side) and ``labels`` int64 (n,), class after class, without holding them all.

    The library writes only what is in memory as a whole. The format is a length, a JSON header, and the arrays' bytes.
    """
    description, side = images.description, images.side
    labels = np.repeat(np.arange(len(description.classes), dtype="<i8"), description.ipc).tobytes()
    size = description.count * 3 * side * side
    header = {
        "__metadata__": {
            "dataset": json.dumps(images.facts("safetensors")),
            "classes": json.dumps(description.classes),
            "licence": json.dumps(dict(description.licences)),
        },
        "labels": {"dtype": "I64", "shape": [description.count], "data_offsets": [0, len(labels)]},
        "images": {
            "dtype": "U8",
            "shape": [description.count, 3, side, side],
            "data_offsets": [len(labels), len(labels) + size],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + labels)
        for pixels in _scaled(images):
            file.write(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).data)


def _scaled(images: ImageSet) -> Iterable[np.ndarray]:
    with ThreadPoolExecutor(images.workers) as pool:
        for pixels in images.each():
            yield np.stack(list(pool.map(images.scale, pixels)))


WRITERS: dict[Format, Callable[[ImageSet, Path], None]] = {
    "imagefolder": _imagefolder,
    "webdataset": _webdataset,
    "huggingface": _huggingface,
    "safetensors": _safetensors,
}
