"""The catalog: what images each class has, and the fingerprint that stands for them in every digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from workflow_scripts.config import Dataset
from workflow_scripts.data.digits_photo import DigitsPhoto
from workflow_scripts.data.layouts import Layouts, Summary, detect, open_layout, summarise
from workflow_scripts.data.notes import Notes, State
from workflow_scripts.data.sources import ChangedImage, Digits, ImageEntry, Source, Split
from workflow_scripts.errors import DataError
from workflow_scripts.store.digests import PREFIX, digest
from workflow_scripts.store.files import write_atomically

Look = Literal["noted", "rescan", "deep"]
SPLITS: tuple[Split, ...] = ("train", "test")


def open_source(dataset: Dataset, notes: Notes) -> Source:
    """Return the source that a dataset section describes.

    Raises:
        DataError: if a path is missing, or holds what is no layout or two at once.
    """
    if dataset.source == "digits":
        return Digits()
    if dataset.source == "digits-photo":
        return DigitsPhoto(**dataset.generate.model_dump())
    assert dataset.root is not None and dataset.test_root is not None  # the configuration saw to that
    if dataset.source == "imagefolder":
        kinds = ["imagefolder", "imagefolder"]
        for key, path in (("root", dataset.root), ("test_root", dataset.test_root)):
            if not path.is_dir():
                raise DataError(
                    f"dataset.{key}: {path} is not a folder. Give the folder that holds one folder of images per class."
                )
    else:
        train = detect(dataset.root, "root") if dataset.source == "imagenet" else dataset.source
        kinds = [train, detect(dataset.test_root, "test_root")]
        if not dataset.root.exists():
            raise DataError(f"dataset.root: {dataset.root} is not there. Give the folder that holds the images.")
    names = dataset.label_names
    return Layouts(
        open_layout(kinds[0], dataset.root, "train", notes, names=names),
        open_layout(kinds[1], dataset.test_root, "test", notes, names=names, labels=dataset.test_labels),
    )


class Catalog:
    """The images of a run, listed once per class and split, and only for the classes that are asked for.

    Args:
        cache: folder for notes on what was listed and hashed.
        look: ``noted`` takes an unchanged folder's or file's note for true; ``rescan`` asks for every file's size and
            mtime; ``deep`` does that and, where bytes are hashed, hashes all of them again.

    Attributes:
        source: where images are read from.
        classes: the run's classes in label order.
    """

    def __init__(self, dataset: Dataset, cache: Path, look: Look = "noted"):
        self.dataset = dataset
        self.source: Source = open_source(dataset, Notes(cache / "listings", fresh=look != "noted"))
        self._cache, self._deep = cache, look == "deep"
        self._hashed: dict[tuple[str, Split], list[str]] = {}
        self._changed: list[str] = []
        known = self.source.classes()
        chosen = dataset.chosen_classes
        self.classes = known if chosen is None else list(chosen)
        if missing := sorted(set(self.classes) - set(known)):
            key = "classes" if dataset.subset is None else "subset"
            raise DataError(
                f"dataset.{key}: no images for {', '.join(missing[:5])} in {dataset.root or dataset.source}; "
                f"there is {', '.join(known[:10])}"
            )
        if len(set(self.classes)) != len(self.classes):
            raise DataError("dataset.classes: names a class twice")
        self.entries = lru_cache(maxsize=64)(self._entries)
        self.summary = lru_cache(maxsize=None)(self._summary)
        self.fingerprint = lru_cache(maxsize=None)(self._fingerprint)

    def count(self, class_name: str, split: Split) -> int:
        """Return how many images a class has."""
        return int(self.summary(class_name, split)["count"])

    def describe(self) -> dict[Split, str]:
        """Say for each split in which layout it was found, where, and how many images the run takes from it."""
        if not isinstance(self.source, Layouts):
            return {}
        return {
            split: f"{layout.title} in {layout.path}, {len(self.classes):,} classes, "
            f"{sum(self.count(name, split) for name in self.classes):,} images"
            for split, layout in self.source.splits.items()
        }

    def notes(self) -> Iterator[Path]:
        """Yield the files that hold, or would hold, what was found out about the run's images."""
        for split, layout in self.source.splits.items() if isinstance(self.source, Layouts) else ():
            for name in self.classes:
                yield from layout.noted_in(name)
                yield self._hash_path(name, split)

    def changed_bytes(self) -> list[str]:
        """Hash every image of the run, and return the places of those whose bytes changed though nothing else did.

        Those are compared whose bytes were hashed before. ``fingerprint: stat`` cannot see such a change.
        """
        for split in SPLITS if isinstance(self.source, Layouts) else ():
            for name in self.classes:
                if (name, split) not in self._hashed:
                    self._hash(name, split)
        return self._changed

    def _entries(self, class_name: str, split: Split) -> list[ImageEntry]:
        self.summary(class_name, split)
        return self.source.entries(class_name, split)

    def _summary(self, class_name: str, split: Split) -> Summary:
        if isinstance(self.source, Layouts):
            summary = self.source.summary(class_name, split)
        else:
            summary = summarise(self.source.entries(class_name, split))
        if not summary["count"]:
            raise DataError(
                f"class {class_name}: has no {split} image. Add images to its folder, or leave it out with dataset.classes."
            )
        if self.dataset.on_bad_image == "fail" and (empty := summary["empty"]):
            if isinstance(self.source, Layouts):  # filling the file in place does not change its folder
                self.source.splits[split].forget(class_name)
            raise DataError(
                f"{empty[0]} (class {class_name}): zero bytes{f', and {len(empty) - 1} more like it' if empty[1:] else ''}. "
                "Replace or remove it, or set dataset.on_bad_image: skip to leave such images out."
            )
        return summary

    def _fingerprint(self, class_name: str, split: Split) -> str:
        summary = self.summary(class_name, split)
        if not isinstance(self.source, Layouts) or self.dataset.fingerprint == "stat":
            return str(summary["stat"])
        if (class_name, split) not in self._hashed:
            self._hash(class_name, split)
        keys = [entry.key for entry in self.entries(class_name, split)]
        return digest([[key, sha256] for key, sha256 in zip(keys, self._hashed[class_name, split], strict=True)])

    def _hash(self, class_name: str, split: Split) -> None:
        """Hash the bytes of a class's images, unless that was done and is noted, and remember where they changed.

        Images that lie in the same files as those of other classes are read along with those, each file once.
        """
        assert isinstance(self.source, Layouts)
        layout = self.source.splits[split]
        jobs: list[tuple[ImageEntry, dict[str, Any]]] = []
        hashes: dict[str, tuple[list[ImageEntry], State, dict[str, Any], dict[str, Any]]] = {}
        for name in [n for n in layout.together(class_name) if n in set(self.classes)]:
            entries, before = self.entries(name, split), self._hash_note(name, split)
            # Files are known by size and mtime; what lies in a tar or parquet file is known while that file is unchanged.
            state = layout.state(name) if entries and entries[0].offset is not None else []
            known = before.get("images", {}) if not self._deep and before.get("state") == state else {}
            images: dict[str, Any] = {}
            for entry in entries:
                if known.get(entry.key, [])[:2] == [entry.size, entry.mtime_ns]:
                    images[entry.key] = known[entry.key]
                else:
                    jobs.append((entry, images))
            hashes[name] = (entries, state, images, before)
        for entry, images in sorted(jobs, key=lambda job: (job[0].path, job[0].offset or 0)):
            try:
                sha256 = hashlib.sha256(layout.read(entry)).hexdigest()
            except ChangedImage:
                for name in hashes:
                    layout.forget(name)
                raise
            images[entry.key] = [entry.size, entry.mtime_ns, sha256]
        for name, (entries, state, images, before) in hashes.items():
            older = before.get("images", {})
            self._changed += [
                entry.place
                for entry in entries
                if older.get(entry.key, [])[:2] == images[entry.key][:2] and older[entry.key] != images[entry.key]
            ]
            content = {"state": state, "images": images}
            if content != before:
                write_atomically(self._hash_path(name, split), json.dumps(content))
            self._hashed[name, split] = [images[entry.key][2] for entry in entries]

    def _hash_note(self, class_name: str, split: Split) -> dict[str, Any]:
        try:
            content = json.loads(self._hash_path(class_name, split).read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _hash_path(self, class_name: str, split: Split) -> Path:
        assert isinstance(self.source, Layouts)
        about = f"sha256 of {split} {class_name} in {self.source.splits[split].path.resolve()}"
        return self._cache / "hashes" / f"{digest(about)[:PREFIX]}.json"
