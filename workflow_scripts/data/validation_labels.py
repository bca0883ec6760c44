"""Which class each of ImageNet's validation images is of, from any of the files that people have."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts.data.imagenet import wnids
from workflow_scripts.errors import DataError

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
NAMES = ("LOC_val_solution.csv", "val_map.txt", "val.txt", GROUND_TRUTH)
FOLDERS = (".", "ILSVRC2012_devkit_t12/data", "devkit/data", "data", "meta")


class ValidationLabels:
    """The classes of images, by file name or, in the development kit's ground truth, by number.

    Three forms are known. ``NAME WNID`` or ``NAME,WNID ...`` per line (Kaggle's ``LOC_val_solution.csv`` among them); ``NAME
    INDEX``, where the index counts the sorted WordNet ids from 0; and the ground truth, which has one number per line in an
    order of its own, for which ``meta.mat`` must lie beside it.

    Attributes:
        path: the file.
        files: it, and the ``meta.mat`` that it needs.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._lines = [line for line in path.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"dataset.test_labels: {path} cannot be read ({error}).") from None
        self._numbers = all(line.strip().isdecimal() for line in self._lines)
        self._meta = path.with_name("meta.mat")
        self.files = [path, self._meta] if self._numbers else [path]
        if self._numbers and not self._meta.is_file():
            raise DataError(
                f"{path}: its numbers have an order of their own, which {self._meta} tells, and that is missing. It is in the "
                "development kit (ILSVRC2012_devkit_t12, in data/)."
            )

    @classmethod
    def find(cls, images: Path, given: Path | None) -> ValidationLabels:
        """Return the labels in the given file, or in one that lies near the images."""
        if given is not None:
            return cls(given)
        near = [base / folder for base in dict.fromkeys((images, images.parent)) for folder in FOLDERS]
        for path in (folder / name for folder in near for name in NAMES):
            if path.is_file():
                return cls(path)
        raise DataError(
            f"dataset.test_root: {images} holds images and no class folders, and nothing near it says their classes. Put "
            f"{', '.join(NAMES[:-1])} or the development kit's {GROUND_TRUTH} with its meta.mat beside it, or name such a file "
            "in dataset.test_labels."
        )

    def classes(self, names: Sequence[str], images: Path) -> list[str]:
        """Return the class of each of the images, given their file names.

        Raises:
            DataError: if an image has no label, a label no image, or a label is none of ImageNet's.
        """
        known = self._by_number() if self._numbers else self._by_name()
        lacking = sorted(name for name in names if _stem(name) not in known)
        lost = sorted(known.keys() - {_stem(name) for name in names})
        if lacking or lost:
            what = f"no label for {lacking[0]}" if lacking else f"a label for {lost[0]}, which is not there"
            raise DataError(
                f"{self.path}: has {len(known)} labels, but {images} holds {len(names)} images; there is {what}. Fetch what is "
                "missing, or name the right file in dataset.test_labels."
            )
        return [known[_stem(name)] for name in names]

    def _by_name(self) -> dict[str, str]:
        order, known = wnids(), {}
        for number, line in enumerate(self._lines, 1):
            words = re.split(r"[\s,]+", line.strip())
            if words[0] == "ImageId":
                continue
            if len(words) < 2:
                raise DataError(f"{self.path}, line {number}: {line!r}. Expected a file name and its WordNet id.")
            label = words[1]
            if label.isdecimal() and int(label) < len(order):
                label = order[int(label)]
            if label not in order:
                raise DataError(f"{self.path}, line {number}: {label} is no class of ImageNet-1K.")
            known[_stem(os.path.basename(words[0]))] = label
        return known

    def _by_number(self) -> dict[str, str]:
        classes = self._ilsvrc_ids()
        known = {}
        for number, line in enumerate(self._lines, 1):
            if (label := int(line)) not in classes:
                raise DataError(f"{self.path}, line {number}: {label} is no class of {self._meta}.")
            known[f"ILSVRC2012_val_{number:08d}"] = classes[label]
        return known

    def _ilsvrc_ids(self) -> dict[int, str]:
        """Return the development kit's own class numbers, 1 to 1000, with their WordNet ids."""
        from scipy.io import loadmat  # here, because a planner that has notes does not need it

        try:
            synsets = loadmat(self._meta, squeeze_me=True)["synsets"]
            classes = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
            raise DataError(f"{self._meta}: cannot be read ({error}). Fetch the development kit again.") from None
        leaves = {number: wnid for number, wnid in classes.items() if number <= len(wnids())}
        if set(leaves.values()) != set(wnids()):
            raise DataError(f"{self._meta}: its first {len(wnids())} synsets are not the classes of ImageNet-1K.")
        return leaves


def _stem(name: str) -> str:
    """Return a file name without suffix: labels are told with or without it."""
    return os.path.splitext(name)[0] if os.path.splitext(name)[1].lower() in (".jpeg", ".jpg", ".png") else name
