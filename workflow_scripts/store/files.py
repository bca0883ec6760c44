"""Whole-or-not-at-all writes of small files."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from workflow_scripts.errors import StoreError

TEMPORARY = ".tmp-"


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file so that it appears under its name only when complete and, if it shall be durable, on disk.

    Raises:
        StoreError: if the disk is full, over quota or read-only; what was there before stays.
    """
    temporary = path.parent / f"{TEMPORARY}{path.name}.{uuid.uuid4().hex}"
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    _sync(path)


def sync_tree(root: Path) -> None:
    """Make a file, or everything in a directory, durable."""
    if root.is_file():
        _sync(root)
    for directory, _, files in os.walk(root, topdown=False):
        for name in files:
            _sync(Path(directory, name))
        sync_directory(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn the operating system's errors of a disk that takes no more into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EROFS,
            errno.EACCES,
            errno.ENOTDIR,
            errno.EEXIST,
        ):
            raise StoreError(
                f"{path}: cannot be written ({error.strerror}). Nothing already stored is harmed: free some space "
                "(`stillhouse gc` lists what no run needs) or point `results` elsewhere, then run the same command again."
            ) from error
        raise
