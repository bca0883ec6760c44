"""The layouts in which people have ImageNet: class folders, class tars, flat images and labels, WebDataset, parquet.

Nothing is unpacked. What a folder, tar or shard holds is listed once and noted (:mod:`workflow_scripts.data.notes`); an
image is then read at its place. What identifies an image without reading it:

=============  ==============================================================================================
class folders  file name, size, mtime
class tars     member's name, size and mtime in the tar: copying, touching or unpacking the tar changes nothing
flat           as class folders or class tars, whichever the images lie in
WebDataset     shard and member's name, size and mtime in the shard
parquet        file, row, and the compressed size of the group of rows it lies in
=============  ==============================================================================================
"""

from __future__ import annotations

import json
import os
import tarfile
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from workflow_scripts.data.imagenet import class_names, class_title, contradiction, wnids
from workflow_scripts.data.notes import Note, Notes, State, state_of
from workflow_scripts.data.sources import ChangedImage, ImageEntry, Split, decode, is_image, list_folder, read_file
from workflow_scripts.data.validation_labels import ValidationLabels
from workflow_scripts.errors import DataError
from workflow_scripts.store.digests import digest

Summary = Mapping[str, Any]


def summarise(entries: Sequence[ImageEntry]) -> dict[str, Any]:
    """Return what a plan needs of a class: ``count``, the ``empty`` images' places, and ``stat``, the cheap fingerprint."""
    return {
        "count": len(entries),
        "empty": [entry.place for entry in entries if entry.size == 0],
        "stat": digest([[entry.key, entry.size, entry.mtime_ns] for entry in entries]),
    }


class Layout:
    """The images of one split in one layout.

    Args:
        path: folder or file.
        split: which split, and so which of several files in a folder.
        notes: where listings are remembered.
    """

    title = ""

    def __init__(self, path: Path, split: Split, notes: Notes):
        self.path, self.split, self.notes = path, split, notes

    def classes(self) -> list[str]:
        """Return the names of the classes that have images, sorted."""
        raise NotImplementedError

    def note(self, class_name: str) -> Note:
        """Return a class's summary (head) and entries as rows (body)."""
        raise NotImplementedError

    def entries(self, class_name: str) -> list[ImageEntry]:
        """Return a class's images, sorted by key."""
        return [ImageEntry(*row) for row in self.note(class_name).body]

    def state(self, class_name: str) -> State:
        """Return what changes when the files that hold a class do."""
        raise NotImplementedError

    def together(self, class_name: str) -> list[str]:
        """Return the classes whose images are best read along with a class's."""
        return [class_name]

    def read(self, entry: ImageEntry) -> bytes:
        """Return an image's bytes."""
        return read_file(entry)

    def forget(self, class_name: str) -> None:
        """Drop what is noted of a class, so that it is listed anew."""
        self.notes.forget(self._about(class_name))

    def noted_in(self, class_name: str) -> list[Path]:
        """Return the files in which notes on a class are."""
        return [self.notes.place(self._about(class_name))]

    def _about(self, what: str) -> str:
        return f"{type(self).__name__} {self.split} {what} in {self._resolved}"

    @cached_property
    def _resolved(self) -> Path:
        return self.path.resolve()


def _noted(entries: Sequence[ImageEntry], class_name: str) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """Return a note's head and body, after checking that no image is named after another class."""
    for entry in entries:
        if other := contradiction(entry.key, class_name):
            raise DataError(
                f"{entry.place}: lies in class {class_name} ({class_title(class_name)}), but is an image of {other} "
                f"({class_title(other)}). The labels are in another order, or the image is misplaced. Labels count the sorted "
                "WordNet ids from 0; only the development kit's ground truth has an order of its own, and needs its meta.mat."
            )
    return summarise(entries), [astuple(entry) for entry in entries]


# ---------------------------------------------------------------- one folder or tar per class


class ClassFolders(Layout):
    """``path/CLASS/*.JPEG``."""

    title = "class folders"

    def classes(self) -> list[str]:
        """Return the names of the class folders, sorted."""
        with os.scandir(self.path) as found:
            names = sorted(entry.name for entry in found if entry.is_dir() and not entry.name.startswith("."))
        if not names:
            raise DataError(f"{self.path}: holds no class folders. Expected {self.path}/CLASS/IMAGE.jpg.")
        return names

    def state(self, class_name: str) -> State:
        """Return the folder's state, which does not change when a file in it is edited in place."""
        try:
            return state_of([self.path / class_name])
        except OSError:
            return []

    def note(self, class_name: str) -> Note:
        """List the folder, unless no name in it changed."""
        folder = self.path / class_name
        return self.notes.get(
            self._about(class_name), self.state(class_name), lambda: _noted(list_folder(folder, class_name), class_name)
        )


class ClassTars(Layout):
    """``path/CLASS.tar``, each with the images of one class: ImageNet's training images as downloaded."""

    title = "one tar per class"

    def classes(self) -> list[str]:
        """Return the tars' names without suffix, sorted."""
        return sorted(path.stem for path in _files(self.path, ".tar"))

    def state(self, class_name: str) -> State:
        """Return the tar's state."""
        try:
            return state_of([self.path / f"{class_name}.tar"])
        except OSError as error:
            path = self.path / f"{class_name}.tar"
            raise DataError(
                f"class {class_name}: {path} cannot be read ({error.strerror}). Each class needs this tar."
            ) from None

    def note(self, class_name: str) -> Note:
        """Read the tar's headers, unless it is unchanged."""
        path = self.path / f"{class_name}.tar"
        return self.notes.get(
            self._about(class_name),
            self.state(class_name),
            lambda: _noted(list_tar(path, f"class {class_name}: "), class_name),
        )


def list_tar(path: Path, prefix: str = "") -> list[ImageEntry]:
    """Return the images in a tar, sorted by file name."""
    entries: dict[str, ImageEntry] = {}
    for _, member in tar_members(path, prefix):
        key = os.path.basename(member.name)
        if not is_image(key) or key.startswith("."):
            continue
        if key in entries:
            raise DataError(f"{prefix}{path}: holds {key} twice. Pack it again, or unpack it.")
        entries[key] = _member(path, member, key)
    return [entries[key] for key in sorted(entries)]


def tar_members(path: Path, prefix: str = "") -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the files of an uncompressed tar, in order.

    Raises:
        DataError: if it is compressed, no tar, or cut short.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    yield tar, member
            if tar.offset >= path.stat().st_size:  # no block of zeros after the last member
                raise tarfile.ReadError("it has no end")
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{prefix}{path}: cannot be read as an uncompressed tar ({error}). If it is compressed, decompress it; if it was "
            "cut short, fetch it again."
        ) from None


def _member(path: Path, member: tarfile.TarInfo, key: str) -> ImageEntry:
    return ImageEntry(key, member.size, round(member.mtime * 10**9), os.fspath(path), member.offset_data)


# ---------------------------------------------------------------- images of all classes in the same files


class Mixed(Layout):
    """Files that hold images of many classes, which are listed all at once."""

    @cached_property
    def files(self) -> list[Path]:
        """The files that hold the images and labels, sorted."""
        raise NotImplementedError

    def labelled(self) -> Iterator[tuple[str, ImageEntry]]:
        """Yield every image with its class."""
        raise NotImplementedError

    def classes(self) -> list[str]:
        """Return the classes that the labels name, sorted."""
        return list(self.notes.get(self._about("all classes"), self._state, self._list).head)

    def state(self, class_name: str) -> State:
        """Return the state of all files."""
        return self._state

    def note(self, class_name: str) -> Note:
        """List all files, unless they are unchanged."""

        def make() -> tuple[Any, Any]:
            self._list()
            return _noted(self._listed.get(class_name, []), class_name)

        return self.notes.get(self._about(class_name), self._state, make)

    def together(self, class_name: str) -> list[str]:
        """Return all classes."""
        return self.classes()

    def noted_in(self, class_name: str) -> list[Path]:
        """Return the files in which notes on a class, and on which classes there are, are."""
        return [*super().noted_in(class_name), self.notes.place(self._about("all classes"))]

    @cached_property
    def _state(self) -> State:
        return state_of(self.files)

    @cached_property
    def _listed(self) -> dict[str, list[ImageEntry]]:
        listed: dict[str, list[ImageEntry]] = {}
        for class_name, entry in self.labelled():
            listed.setdefault(class_name, []).append(entry)
        return {name: sorted(listed[name], key=lambda entry: entry.key) for name in sorted(listed)}

    def _list(self) -> tuple[Any, Any]:
        """List everything, and note it class by class."""
        began = time.time_ns()
        for class_name, entries in self._listed.items():
            self.notes.put(self._about(class_name), self._state, *_noted(entries, class_name), began)
        return list(self._listed), []


class Flat(Mixed):
    """ImageNet's validation images in one folder or tar, with a file that says which class each is of."""

    title = "flat images"

    def __init__(self, path: Path, split: Split, notes: Notes, labels: Path | None):
        super().__init__(path, split, notes)
        self.labels = ValidationLabels.find(path, labels)
        self.title = f"flat images, classes from {self.labels.path}"

    @cached_property
    def files(self) -> list[Path]:
        """The folder or tar, and the files with the labels."""
        return [self.path, *self.labels.files]

    def labelled(self) -> Iterator[tuple[str, ImageEntry]]:
        """Yield every image with its class, after checking that there are as many images as labels."""
        entries = list_folder(self.path, "of the test images") if self.path.is_dir() else list_tar(self.path)
        classes = self.labels.classes([entry.key for entry in entries], self.path)
        return zip(classes, entries, strict=True)


class WebDataset(Mixed):
    """WebDataset shards: ``KEY.jpg`` (.jpeg, .png, .webp) beside ``KEY.cls`` or ``KEY.json`` in tars."""

    title = "WebDataset shards"

    def __init__(self, path: Path, split: Split, notes: Notes, names: Sequence[str] | None):
        super().__init__(path, split, notes)
        self._names = names

    @cached_property
    def files(self) -> list[Path]:
        """The shards of the split."""
        return _of_split(self.path, ".tar", self.split)

    def labelled(self) -> Iterator[tuple[str, ImageEntry]]:
        """Yield every image with its class."""
        for path in self.files:
            sample: dict[str, Any] = {}
            for tar, member in tar_members(path):
                folder, name = os.path.split(member.name)
                key, _, suffix = name.partition(".")
                if sample and sample["key"] != (folder, key):
                    yield self._sample(path, sample)
                    sample = {}
                sample["key"] = (folder, key)
                if is_image(f"x.{suffix.lower()}"):
                    sample["image"] = _member(path, member, f"{path.name}/{member.name}")
                elif suffix in ("cls", "json"):
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    sample[suffix] = content.read()
            if sample:
                yield self._sample(path, sample)

    def _sample(self, path: Path, sample: Mapping[str, Any]) -> tuple[str, ImageEntry]:
        place = f"{path}:{os.path.join(*sample['key'])}"
        if "image" not in sample:
            raise DataError(f"{place}: has no .jpg, .jpeg, .png or .webp. Repair or remove the shard.")
        try:
            facts = json.loads(sample["json"]) if "json" in sample else {}
            label = sample["cls"].decode().strip() if "cls" in sample else facts.get("wnid", facts.get("label"))
        except (ValueError, AttributeError) as error:
            raise DataError(f"{place}: its label cannot be read ({error}). Repair or remove the shard.") from None
        if label is None:
            raise DataError(f'{place}: has no label. Expected a .cls, or a .json with "label" or "wnid".')
        class_name = _class_of(label, self._names, place)
        for fact in ("wnid", "filename"):
            if isinstance(told := facts.get(fact), str):
                _agree(told, class_name, place)
        return class_name, sample["image"]


class Parquet(Mixed):
    """A Hugging Face export: parquet files with a column of ``{bytes, path}`` and a column of label indices."""

    title = "parquet files"

    def __init__(self, path: Path, split: Split, notes: Notes, names: Sequence[str] | None):
        super().__init__(path, split, notes)
        self._names = names

    @cached_property
    def files(self) -> list[Path]:
        """The parquet files of the split."""
        return _of_split(self.path, ".parquet", self.split)

    def labelled(self) -> Iterator[tuple[str, ImageEntry]]:
        """Yield every row with its class; the images' bytes are not read."""
        for path in self.files:
            file = _open_parquet(path)
            image, label = _columns(file, path)
            names = self._label_names(file, label, path)
            table = file.read(columns=[label, f"{image}.path"])
            paths = table[image].combine_chunks().field("path").to_pylist()
            start = 0
            for size, rows in _groups(file, f"{image}.bytes"):
                for row in range(start, start + rows):
                    place = f"{path}:{row}"
                    class_name = _class_of(table[label][row].as_py(), names, place)
                    if paths[row] is not None:
                        _agree(paths[row], class_name, place)
                    yield class_name, ImageEntry(f"{path.name}/{row:07d}", size, 0, os.fspath(path), row)
                start += rows

    def read(self, entry: ImageEntry) -> bytes:
        """Return an image's bytes, from the last few groups of rows that were read."""
        path = Path(entry.path)
        assert entry.offset is not None
        with _READING:
            starts = _starts(path)
            group = bisect_right(starts, entry.offset) - 1
            content: bytes | None = _group(path, group)[entry.offset - starts[group]].as_py()
        return content or b""

    def _label_names(self, file: Any, label: str, path: Path) -> Sequence[str] | None:
        """Return the classes' names by index, checked against those that the file tells, if it does."""
        told = _told_names(file, label)
        if self._names is None:
            return told
        synonyms = class_names()
        for index, (wnid, title) in enumerate(zip(self._names, told or (), strict=False)):
            if title != wnid and title.split(",")[0].strip() not in [s.strip() for s in synonyms[wnid].split(",")]:
                raise DataError(
                    f"{path}: calls label {index} {title!r}, but ImageNet's class {index} is {wnid} ({class_title(wnid)}). "
                    "Its labels are in another order than that of the sorted WordNet ids."
                )
        return self._names


_READING = threading.Lock()


@lru_cache(maxsize=8)
def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow, which is not installed.") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error}). Fetch it again.") from None


def _columns(file: Any, path: Path) -> tuple[str, str]:
    """Return the names of the columns that hold images and labels."""
    schema = file.schema_arrow
    images = [f.name for f in schema if f.type.num_fields and f.type.get_field_index("bytes") >= 0]
    labels = [name for name in schema.names if name in ("label", "labels", "cls")]
    if not images or not labels:
        raise DataError(
            f"{path}: has the columns {', '.join(schema.names)}. Expected `image`, a struct of bytes and path, and `label`."
        )
    return images[0], labels[0]


def _told_names(file: Any, label: str) -> list[str] | None:
    """Return the class names that `datasets` keeps in the schema's metadata."""
    try:
        features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
        return list(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _groups(file: Any, column: str) -> list[tuple[int, int]]:
    """Return the compressed size of a column, and the number of rows, of each group of rows."""
    meta = file.metadata
    place = [meta.schema.column(i).path for i in range(meta.num_columns)].index(column)
    groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
    return [(group.column(place).total_compressed_size, group.num_rows) for group in groups]


@cache
def _starts(path: Path) -> list[int]:
    meta = _open_parquet(path).metadata
    return [0, *accumulate(meta.row_group(number).num_rows for number in range(meta.num_row_groups))][:-1]


@lru_cache(maxsize=4)
def _group(path: Path, number: int) -> Any:
    file = _open_parquet(path)
    image, _ = _columns(file, path)
    try:
        return file.read_row_group(number, columns=[f"{image}.bytes"])[image].combine_chunks().field("bytes")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}). Fetch it again.") from None


def _class_of(label: Any, names: Sequence[str] | None, place: str) -> str:
    """Return the class that a label stands for: an index into the names, or a name."""
    text = str(label)
    if names is None:
        return text
    if text in names:
        return text
    if not text.isdecimal() or int(text) >= len(names):
        raise DataError(f"{place}: has label {text}. Expected an index from 0 to {len(names) - 1}, or a class's name.")
    return names[int(text)]


def _agree(told: str, class_name: str, place: str) -> None:
    if other := contradiction(told, class_name):
        raise DataError(
            f"{place}: is labelled {class_name} ({class_title(class_name)}), but calls itself {told}, an image of {other} "
            f"({class_title(other)}). Its labels are in another order than that of the sorted WordNet ids."
        )


# ---------------------------------------------------------------- which layout it is


def _files(folder: Path, suffix: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == suffix and not path.name.startswith("."))


def _of_split(path: Path, suffix: str, split: Split) -> list[Path]:
    """Return the files of a split: those that are called after it, if any are called after a split."""
    if path.is_file():
        return [path]
    found = _files(path, suffix) or _files(path / "data", suffix)
    words: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("val",)}
    named = {name: [p for p in found if any(w in p.name.lower() for w in words[name])] for name in words}
    if any(named.values()):
        found = named[split]
    if not found:
        raise DataError(f"{path}: holds no {suffix} file called after {' or '.join(words[split])}. Expected some.")
    return found


def detect(path: Path, key: str) -> str:
    """Return the kind of layout that a path holds: imagefolder, class-tars, flat, webdataset or parquet.

    Args:
        key: the configuration's key that names the path.

    Raises:
        DataError: if it is none of them, or two at once.
    """
    if path.is_file() and path.suffix == ".parquet":
        return "parquet"
    if path.is_file() and path.suffix == ".tar":
        _, first = next(tar_members(path), (None, None))
        if first is not None and first.name.endswith(".tar"):
            raise _tar_of_tars(path, key)
        return "flat" if "ILSVRC2012" in path.name else "webdataset"
    if not path.is_dir():
        raise DataError(f"dataset.{key}: {path} is not there. Give the folder (or the tar) that holds the images.")
    with os.scandir(path) as scan:
        found = [entry for entry in scan if not entry.name.startswith(".")]
    tars = [entry.name for entry in found if entry.name.endswith(".tar")]
    kinds = []
    if any(entry.name.endswith(".parquet") for entry in found):
        kinds.append("parquet")
    if "ILSVRC2012_img_train.tar" in tars and len(tars) == 1:
        raise _tar_of_tars(path / tars[0], key)
    if tars:
        known = set(wnids())
        kinds.append("class-tars" if any(name.removesuffix(".tar") in known for name in tars) else "webdataset")
    if any(is_image(entry.name) for entry in found):
        kinds.append("flat")
    if not kinds and (path / "data").is_dir() and _files(path / "data", ".parquet"):
        kinds.append("parquet")
    elif any(entry.is_dir() and (not kinds or entry.name in wnids()) for entry in found):
        kinds.append("imagefolder")
    if len(kinds) == 1:
        return kinds[0]
    raise DataError(
        f"dataset.{key}: {path} holds {'images in no layout that is known' if not kinds else ' and '.join(kinds)}. Expected "
        "one of: class folders, one tar per class, WebDataset shards, parquet files, or flat validation images."
        f"{' Move one of them elsewhere, or name the one to use in dataset.source.' if kinds else ''}"
    )


def _tar_of_tars(path: Path, key: str) -> DataError:
    return DataError(
        f"dataset.{key}: {path} is a tar of tars. Unpack it once (`tar -xf {path.name}` makes 1000 tars, which need no "
        "unpacking) and give their folder."
    )


def open_layout(
    kind: str, path: Path, split: Split, notes: Notes, *, names: Sequence[str] | None = None, labels: Path | None = None
) -> Layout:
    """Return the layout of a kind at a path.

    Args:
        names: the classes that label indices stand for; None: as the files say, or the indices themselves.
        labels: the file with the labels of flat images; None: look for one.
    """
    if kind == "flat":
        if split == "train":
            raise DataError(f"dataset.root: {path} holds images and no classes. Expected one folder or tar per class.")
        return Flat(path, split, notes, labels)
    if kind in ("webdataset", "parquet"):
        mixed: type[WebDataset] | type[Parquet] = WebDataset if kind == "webdataset" else Parquet
        return mixed(path, split, notes, names)
    return ClassTars(path, split, notes) if kind == "class-tars" else ClassFolders(path, split, notes)


class Layouts:
    """A source whose training and test images each have a layout of their own."""

    def __init__(self, train: Layout, test: Layout):
        self.splits: dict[Split, Layout] = {"train": train, "test": test}

    def classes(self) -> list[str]:
        """Return the classes that have training images, sorted."""
        return self.splits["train"].classes()

    def summary(self, class_name: str, split: Split) -> Summary:
        """Return a class's ``count``, the places of ``empty`` images, and ``stat``, its cheap fingerprint."""
        head: Summary = self.splits[split].note(class_name).head
        return head

    def entries(self, class_name: str, split: Split) -> list[ImageEntry]:
        """Return the images of a class, sorted by key."""
        return self.splits[split].entries(class_name)

    def read(self, entry: ImageEntry) -> bytes:
        """Return an image's bytes."""
        return self._read(entry)

    def load(self, entry: ImageEntry, class_name: str) -> Image.Image:
        """Decode one image to RGB, upright according to its EXIF orientation."""
        try:
            return decode(entry, class_name, self._read)
        except ChangedImage:
            for layout in self.splits.values():
                layout.forget(class_name)
            raise

    def _read(self, entry: ImageEntry) -> bytes:
        reader = next((s for s in self.splits.values() if isinstance(s, Parquet)), None)
        if entry.path.endswith(".parquet") and reader is not None:
            return reader.read(entry)
        return read_file(entry)
