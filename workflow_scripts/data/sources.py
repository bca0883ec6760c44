"""Image sources: which classes and images there are, and how one image is read.

A source lists :class:`ImageEntry` objects without opening any image; only :meth:`Source.load` decodes.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from workflow_scripts.errors import DataError

Split = Literal["train", "test"]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


class BadImage(DataError):
    """An image that cannot be decoded."""

    def __init__(self, path: str, class_name: str, reason: str):
        super().__init__(
            f"{path} (class {class_name}): {reason}. Replace or remove the image, or set dataset.on_bad_image: skip to leave "
            "such images out (they are counted and listed in the report)."
        )
        self.path, self.class_name, self.reason = path, class_name, reason


class ChangedImage(DataError):
    """An image that is not what was listed: results must not be filed under what it was."""

    def __init__(self, place: str):
        super().__init__(
            f"{place}: changed since it was listed. Run the same command again, which lists its class anew. If more was edited "
            "in place, run `stillhouse plan --rescan` first."
        )


@dataclass(frozen=True)
class ImageEntry:
    """One image of a class: its key inside the class, what identifies its content cheaply, and where its bytes are.

    Attributes:
        offset: None if ``path`` is the image's own file; else where the image is in it: the byte at which a tar's member
            begins, or the row of a parquet file.
    """

    key: str
    size: int
    mtime_ns: int
    path: str
    offset: int | None = None

    @property
    def place(self) -> str:
        """The image's place as people are told it."""
        return self.path if self.offset is None else f"{self.path}:{self.key}"


class Source(Protocol):
    """A labelled set of images."""

    def classes(self) -> list[str]:
        """Return all class names, sorted."""

    def entries(self, class_name: str, split: Split) -> list[ImageEntry]:
        """Return the images of a class, sorted by key."""

    def load(self, entry: ImageEntry, class_name: str) -> Image.Image:
        """Decode one image to RGB.

        Raises:
            BadImage: if it cannot be decoded whole.
        """


class ImageFolder:
    """``root/class/*.{jpg,jpeg,png,webp}``, in any case, for training, and the same under ``test_root``."""

    def __init__(self, root: Path, test_root: Path):
        self._roots: dict[Split, Path] = {"train": root, "test": test_root}
        for key, path in (("root", root), ("test_root", test_root)):
            if not path.is_dir():
                raise DataError(
                    f"dataset.{key}: {path} is not a folder. Give the folder that holds one folder of images per class."
                )

    def classes(self) -> list[str]:
        """Return the names of the class folders, sorted."""
        root = self._roots["train"]
        with os.scandir(root) as found:
            names = sorted(entry.name for entry in found if entry.is_dir() and not entry.name.startswith("."))
        if not names:
            raise DataError(f"{root}: holds no class folders. Expected {root}/CLASS/IMAGE.jpg.")
        return names

    def entries(self, class_name: str, split: Split) -> list[ImageEntry]:
        """Return the images of a class folder, sorted by file name."""
        return list_folder(self._roots[split] / class_name, class_name)

    def load(self, entry: ImageEntry, class_name: str) -> Image.Image:
        """Decode one file to RGB, upright according to its EXIF orientation."""
        return decode(entry, class_name, read_file)


def list_folder(folder: Path, class_name: str) -> list[ImageEntry]:
    """Return the images right in a folder, sorted by file name."""
    try:
        with os.scandir(folder) as found:
            files = [entry for entry in found if is_image(entry.name) and entry.is_file()]
    except OSError as error:
        raise DataError(
            f"class {class_name}: {folder} cannot be listed ({error.strerror}). Each class needs this folder."
        ) from None
    entries = []
    for file in sorted(files, key=lambda file: file.name):
        stat = file.stat()
        entries.append(ImageEntry(file.name, stat.st_size, stat.st_mtime_ns, file.path))
    return entries


def is_image(name: str) -> bool:
    """Say whether a file is an image by its name."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def read_file(entry: ImageEntry) -> bytes:
    """Return the bytes of an image that is a file or a tar's member.

    Raises:
        ChangedImage: if it is not what was listed any more.
        OSError: if it cannot be read.
    """
    with Path(entry.path).open("rb") as file:
        if entry.offset is None:
            stat = os.fstat(file.fileno())
            same = (stat.st_size, stat.st_mtime_ns) == (entry.size, entry.mtime_ns)
            content = file.read()
        else:
            file.seek(entry.offset - tarfile.BLOCKSIZE)
            header = file.read(tarfile.BLOCKSIZE)
            try:
                same = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size == entry.size
            except tarfile.HeaderError:
                same = False
            content = file.read(entry.size)
    if not same:
        raise ChangedImage(entry.place)
    return content


def decode(entry: ImageEntry, class_name: str, read: Callable[[ImageEntry], bytes]) -> Image.Image:
    """Read and decode one image to RGB, upright according to its EXIF orientation.

    Raises:
        BadImage: if it cannot be decoded whole.
        ChangedImage: if it is not what was listed any more.
    """
    try:
        with Image.open(io.BytesIO(read(entry))) as image:
            return to_rgb(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "zero bytes" if entry.size == 0 else f"cannot be decoded ({error})"
        raise BadImage(entry.place, class_name, reason) from None


# EXIF 2.3, tag Orientation: how to turn the stored picture upright.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image of any mode to 8-bit RGB, upright according to its EXIF orientation.

    The orientation is applied here because Pillow's ``exif_transpose`` also rewrites the other tags and stumbles on wrong ones.
    """
    image.load()
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # unreadable EXIF raises whatever its parser stumbles on; the picture itself is fine
        turn = None
    if image.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


class Digits:
    """The 1797 handwritten digits that ship with scikit-learn: 8x8 pixels, 10 classes, split 70/30 within each class.

    An image's place in the split follows from a hash of its class and index, so it is the same everywhere and for ever.
    """

    test_share = 0.3

    @cached_property
    def _images(self) -> np.ndarray:
        return (np.minimum(self._table[:, :-1].reshape(-1, 8, 8), 15.9375) * 16).astype(np.uint8)

    @cached_property
    def _table(self) -> np.ndarray:
        # The file is read directly because importing scikit-learn would cost the planner a second.
        with gzip.open(self._path, "rt") as file:
            return np.loadtxt(file, delimiter=",", dtype=np.float32)

    @cached_property
    def _path(self) -> Path:
        spec = importlib.util.find_spec("sklearn")
        if spec is None or spec.origin is None:
            raise DataError("dataset.source: digits needs scikit-learn, which is not installed.")
        return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"

    def classes(self) -> list[str]:
        """Return "0" to "9"."""
        return [str(digit) for digit in range(10)]

    def entries(self, class_name: str, split: Split) -> list[ImageEntry]:
        """Return the images of a digit; keys are indices into the bundled table."""
        indices = np.flatnonzero(self._table[:, -1] == int(class_name))
        shuffled = sorted(indices, key=lambda index: hashlib.sha256(f"digits/{class_name}/{index}".encode()).digest())
        held_out = round(self.test_share * len(shuffled))
        chosen = shuffled[:held_out] if split == "test" else shuffled[held_out:]
        return [ImageEntry(f"{index:04d}", 64, 0, f"{self._path.name}[{index}]") for index in sorted(chosen)]

    def load(self, entry: ImageEntry, class_name: str) -> Image.Image:
        """Return one 8x8 digit as RGB."""
        return Image.fromarray(self._images[int(entry.key)]).convert("RGB")
