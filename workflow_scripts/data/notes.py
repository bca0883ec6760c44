"""Notes on files: what was found out about them, remembered until they change."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from workflow_scripts.errors import DataError, StoreError
from workflow_scripts.store.digests import PREFIX, digest
from workflow_scripts.store.files import write_atomically

State = list[list[int]]
SETTLED_NS = 2_000_000_000  # a change this recent may be followed by one that leaves the same times behind


class Note:
    """What is known of some files: a short ``head``, and a long ``body`` that is read when it is asked for."""

    def __init__(self, head: Any, path: Path, body: Any = None):
        self.head, self._path = head, path
        if body is not None:
            self.body = body

    @cached_property
    def body(self) -> Any:
        """The note's second line."""
        try:
            with self._path.open() as file:
                if json.loads(file.readline())["head"] == self.head:
                    return json.loads(file.readline())
        except (OSError, ValueError, KeyError):
            pass
        raise DataError(f"{self._path}: the images changed just now. Run the same command again.")


class Notes:
    """Notes in a folder, one file each: a line for the files' state and the head, and a line for the body.

    A folder's state is its inode and its times of change, which move when a name in it is added, removed or renamed, but
    not when a file in it is edited in place. A note is not kept while its files changed less than two seconds ago.

    Args:
        fresh: take no older note for true.
    """

    def __init__(self, folder: Path, *, fresh: bool = False):
        self._folder, self._fresh = folder, fresh
        self._made: set[Path] = set()

    def get(self, about: str, state: State, make: Callable[[], tuple[Any, Any]]) -> Note:
        """Return the note about something, made anew by ``make() -> head, body`` if the state is another one."""
        path = self.place(about)
        if not self._fresh or path in self._made:
            with contextlib.suppress(OSError, ValueError, KeyError), path.open() as file:
                first = json.loads(file.readline())
                if first["state"] == state:
                    return Note(first["head"], path)
        began = time.time_ns()
        head, body = make()
        self.put(about, state, head, body, began)
        return Note(head, path, body)

    def put(self, about: str, state: State, head: Any, body: Any, began: int) -> None:
        """Keep a note, unless the files changed too shortly before their state was asked for."""
        if max((max(times) for _, _, *times in state), default=0) > began - SETTLED_NS:
            return
        path = self.place(about)
        with contextlib.suppress(StoreError):  # a note that cannot be kept is made again
            lines = (json.dumps({"about": about, "state": state, "head": head}), json.dumps(body))
            write_atomically(path, "\n".join(lines), durable=False)
            self._made.add(path)

    def forget(self, about: str) -> None:
        """Drop a note that turned out not to be true."""
        with contextlib.suppress(OSError):
            self.place(about).unlink()

    def place(self, about: str) -> Path:
        """Return the file that a note is, or would be."""
        return self._folder / f"{digest(about)[:PREFIX]}.json"


def state_of(paths: Iterable[Path]) -> State:
    """Return what changes when files or the names in folders change: inode, size, mtime and ctime of each.

    The ctime is there because programs that unpack archives set the mtime back.
    """
    found = []
    for path in paths:
        stat = os.stat(path)
        found.append([stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    return found
