"""Digests: the names of results, computed from what they are made of."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from workflow_scripts.store.files import write_atomically

PREFIX = 16


def digest(recipe: Any) -> str:
    """Return the SHA-256 of the canonical JSON of a recipe (sorted keys, no NaN) in hexadecimal."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path, cache: Path) -> str:
    """Return the SHA-256 of a file's bytes, remembered in ``cache`` by path, size and mtime."""
    stat = path.stat()
    seen = [os.fspath(path.resolve()), stat.st_size, stat.st_mtime_ns]
    note = cache / f"{digest(seen[0])[:PREFIX]}.json"
    try:
        known = json.loads(note.read_text())
        if known["seen"] == seen:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError):
        pass
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if stat.st_size > 1 << 20:  # hashing a smaller file costs no more than looking it up
        write_atomically(note, json.dumps({"seen": seen, "sha256": sha256}))
    return sha256
