"""ImageNet's classes, and the subsets of them that the field works with.

``imagenet.json`` holds the 1000 WordNet ids in their sorted order, which is torchvision's and DiT's class index, and the class
lists of the subsets in label order, which for some (ImageWoof, ImageNet-100) is not sorted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((Path(__file__).parent / "imagenet.json").read_text())
    return table


def subset_names() -> list[str]:
    """Return the names of all subsets; ``imagenet1k`` is the whole."""
    return list(_table()["subsets"])


def subset_classes(name: str) -> tuple[str, ...]:
    """Return the WordNet ids of a subset in label order."""
    wnids = list(_table()["classes"])
    return tuple(wnids[index] for index in _table()["subsets"][name]["indices"])


@cache
def wnids() -> tuple[str, ...]:
    """Return the 1000 WordNet ids in the order of the class index: sorted."""
    return tuple(_table()["classes"])


def class_title(name: str) -> str:
    """Return what people call a class: the first synonym of a WordNet id, and any other name as it is."""
    return str(_table()["classes"].get(name, name)).split(",")[0]


def titled(name: str) -> str:
    """Return a class's name, and what people call it if that is something else."""
    title = class_title(name)
    return name if title == name else f"{name} ({title})"


def order_difference(expected: Sequence[str], found: Sequence[str]) -> str | None:
    """Say where a list of classes first differs from the one that is expected, or None if it does not."""
    for place, (right, wrong) in enumerate(zip_longest(expected, found)):
        if right != wrong:
            named = [
                f"label {place} is {titled(wrong) if wrong else 'missing'}",
                f"expected {titled(right) if right else 'no more'}",
            ]
            return f"{', '.join(named)} ({len(found)} classes, expected {len(expected)})"
    return None


# The classes of the first validation images, by which a wrong order of labels shows itself.
FIRST_VALIDATION = {
    f"ILSVRC2012_val_{number:08d}": wnid
    for number, wnid in enumerate(("n01751748", "n09193705", "n02105855", "n04263257", "n03125729"), 1)
}
_WNID = re.compile(r"(?<![0-9A-Za-z])n\d{8}(?!\d)")


def contradiction(file_name: str, class_name: str) -> str | None:
    """Return the class that an image's file name speaks of, if it is another one of ImageNet than ``class_name``.

    Training images are called after their class (``n01440764_10026.JPEG``), validation images sometimes
    (``ILSVRC2012_val_00000001_n01751748.JPEG``), and of a few validation images the class is known.
    """
    if not _WNID.fullmatch(class_name):
        return None
    named = _WNID.findall(file_name)
    if not named and (known := FIRST_VALIDATION.get(file_name.split(".")[0])) is not None:
        named = [known]
    return None if not named or class_name in named else str(named[-1])


def class_names() -> dict[str, str]:
    """Return the names of all classes, synonyms separated by commas, by WordNet id in the order of the class index."""
    return dict(_table()["classes"])
