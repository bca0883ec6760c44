"""ImageNet's classes, and the subsets of them that the field works with.

``imagenet.json`` holds the 1000 WordNet ids in their sorted order, which is torchvision's and DiT's class index, and the class
lists of the subsets in label order, which for some (ImageWoof, ImageNet-100) is not sorted.
"""

from __future__ import annotations

import json
from functools import cache
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


def class_names() -> dict[str, str]:
    """Return the names of all classes, synonyms separated by commas, by WordNet id in the order of the class index."""
    return dict(_table()["classes"])
