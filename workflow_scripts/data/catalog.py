"""The catalog: what images each class has, and the fingerprint that stands for them in every digest."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from workflow_scripts.config import Dataset
from workflow_scripts.data.digits_photo import DigitsPhoto
from workflow_scripts.data.sources import Digits, ImageEntry, ImageFolder, Source, Split
from workflow_scripts.errors import DataError
from workflow_scripts.store.digests import digest, file_digests


def open_source(dataset: Dataset) -> Source:
    """Return the source that a dataset section describes."""
    if dataset.source == "digits":
        return Digits()
    if dataset.source == "digits-photo":
        return DigitsPhoto(**dataset.generate.model_dump())
    assert dataset.root is not None and dataset.test_root is not None  # the configuration saw to that
    return ImageFolder(dataset.root, dataset.test_root)


class Catalog:
    """The images of a run, listed once per class and split, and only for the classes that are asked for.

    Attributes:
        source: where images are read from.
        classes: the run's classes in label order.
    """

    def __init__(self, dataset: Dataset, cache: Path):
        self.dataset = dataset
        self.source: Source = open_source(dataset)
        self._cache = cache
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
        self.entries = lru_cache(maxsize=None)(self._entries)
        self.fingerprint = lru_cache(maxsize=None)(self._fingerprint)

    def _entries(self, class_name: str, split: Split) -> list[ImageEntry]:
        entries = self.source.entries(class_name, split)
        if not entries:
            raise DataError(
                f"class {class_name}: has no {split} image. Add images to its folder, or leave it out with dataset.classes."
            )
        if self.dataset.on_bad_image == "fail" and (empty := [entry.path for entry in entries if entry.size == 0]):
            raise DataError(
                f"{empty[0]} (class {class_name}): zero bytes{f', and {len(empty) - 1} more like it' if empty[1:] else ''}. "
                "Replace or remove it, or set dataset.on_bad_image: skip to leave such images out."
            )
        return entries

    def _fingerprint(self, class_name: str, split: Split) -> str:
        entries = self.entries(class_name, split)
        if self.dataset.source != "imagefolder" or self.dataset.fingerprint == "stat":
            return digest([[entry.key, entry.size, entry.mtime_ns] for entry in entries])
        hashes = file_digests([Path(entry.path) for entry in entries], self._cache)
        return digest([[entry.key, sha256] for entry, sha256 in zip(entries, hashes, strict=True)])
