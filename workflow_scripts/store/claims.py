"""Claims: which worker has which result in hand, so that two workers share a shard instead of doing it twice.

A claim is a small file below ``store/claims`` that its owner touches every few seconds. Claims only save work: without them
results are the same, because a result's place and content follow from its recipe and commits are atomic.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow_scripts.store.events import slurm_job
from workflow_scripts.store.files import TEMPORARY, write_atomically

PULSE = 20.0
STALE = 180.0  # many pulses, because a network file system may show a file's time a minute late


@dataclass(frozen=True)
class Left:
    """What a worker that is gone had in hand.

    Attributes:
        told: it had been told to stop, so that its end says nothing about the result.
        alone: it had nothing else in hand.
    """

    owner: str
    told: bool
    alone: bool


class Claims:
    """This process's claims below one directory; use as a context manager.

    Args:
        told: whether this process has been told to stop.
    """

    def __init__(self, root: Path, told: Callable[[], bool] = lambda: False):
        self.root = root
        self._told = told
        self._mine = {"host": platform.node(), "pid": os.getpid(), "job": slurm_job(), "started": time.time()}
        self._mine["token"] = uuid.uuid4().hex
        self._held: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._pulse, daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._thread.join()
        for place in list(self._held):
            self.release(place)

    def take(self, place: str, *, alone: bool = False) -> Left | bool:
        """Claim a result: True, or False if another worker has it in hand, or what one that is gone has left.

        Where the disk takes no claims, everything is free.
        """
        path, left = self._path(place), None
        content = {**self._mine, "alone": alone, "told": False}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            return True
        for _ in range(2):
            try:
                file = path.open("x")
            except FileExistsError:
                if (left := self._left(path)) is None:
                    return False
                self._remove(path)
                continue
            except OSError:
                return True
            try:
                with file:
                    file.write(json.dumps(content))
            except OSError:
                self._remove(path)
                return left or True
            with self._lock:
                self._held[place] = content
            return left or True
        return False

    def release(self, place: str) -> None:
        """Give a claim back, unless another worker has taken it over."""
        with self._lock:
            held = self._held.pop(place, None)
        if held is not None and self._read(self._path(place)).get("token") == held["token"]:
            self._path(place).unlink(missing_ok=True)

    def owner(self, place: str) -> str:
        """Say who has a result in hand."""
        return _describe(self._read(self._path(place)))

    def _path(self, place: str) -> Path:
        return self.root / f"{place}.json"

    @staticmethod
    def _remove(path: Path) -> None:
        """Remove what an owner has left. It is renamed first, so that one of two who see it removes it."""
        gone = path.with_name(f"{TEMPORARY}{path.name}.{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            path.rename(gone)
            gone.unlink()

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _left(self, path: Path) -> Left | None:
        """Return what a claim's owner has left, if it is gone."""
        claim = self._read(path)
        try:
            age = self._now(path.parent) - path.stat().st_mtime
        except FileNotFoundError:
            return Left("nobody", told=True, alone=False)  # given back this moment
        except OSError:
            return None
        same_host = claim.get("host") == self._mine["host"]
        same_job = claim.get("job") is not None and claim.get("job") == self._mine["job"]
        gone = (
            age > STALE
            or (same_host and not _lives(claim["pid"], self._mine["token"] != claim.get("token")))
            or (same_job and not same_host and claim["started"] < self._mine["started"])  # SLURM started this job again
        )
        return Left(_describe(claim), bool(claim.get("told")), bool(claim.get("alone"))) if gone else None

    @staticmethod
    def _now(folder: Path) -> float:
        """Return the time by the clock that gives files theirs."""
        probe = folder / f"{TEMPORARY}now.{uuid.uuid4().hex}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _pulse(self) -> None:
        """Touch the claims from time to time, and note in them at once that this process was told to stop."""
        last = time.monotonic()
        while not self._closed.wait(0.5):
            due = time.monotonic() - last >= PULSE
            last = time.monotonic() if due else last
            with self._lock, contextlib.suppress(Exception):  # a claim that is lost costs time, never a result
                for place, held in self._held.items():
                    if self._told() and not held["told"]:
                        held["told"] = True
                        write_atomically(self._path(place), json.dumps(held), durable=False)
                    elif due:
                        os.utime(self._path(place))


def _lives(pid: int, other: bool) -> bool:
    """Say whether a process of this machine lives; this one holds no claim of which it does not know."""
    if pid == os.getpid():
        return not other
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _describe(claim: dict[str, Any]) -> str:
    job = f", SLURM job {claim['job']}" if claim.get("job") else ""
    return f"{claim.get('host', 'unknown host')} (process {claim.get('pid', '?')}{job})"
