"""Digests: the names of results, computed from what they are made of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts.store.files import write_atomically

PREFIX = 16


def digest(recipe: Any) -> str:
    """Return the SHA-256 of the canonical JSON of a recipe (sorted keys, no NaN) in hexadecimal."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def note_on(folder: Path, cache: Path) -> Path:
    """Return where the digests of a folder's files are remembered."""
    return cache / f"{digest(os.fspath(folder.resolve()))[:PREFIX]}.json"


def file_digests(paths: Sequence[Path], cache: Path) -> list[str]:
    """Return the SHA-256 of files' bytes, remembered in ``cache`` by path, size and mtime.

    Files that are asked for together are remembered together, in one note named after the first one's folder.
    """
    note = note_on(paths[0].parent, cache) if paths else cache
    try:
        content = json.loads(note.read_text())
        known: dict[str, Any] = content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        known = {}
    seen: dict[str, Any] = {}
    for path in paths:
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns]
        remembered = known.get(path.name)
        if isinstance(remembered, list) and len(remembered) == 3 and remembered[:2] == state:
            seen[path.name] = remembered
        else:
            with path.open("rb") as file:
                seen[path.name] = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
    if seen != known:
        write_atomically(note, json.dumps(seen))
    return [str(seen[path.name][2]) for path in paths]
