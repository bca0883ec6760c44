"""Failed attempts at a result, kept beside the store: after so many the result is set aside until someone looks at it."""

from __future__ import annotations

import json
import platform
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workflow_scripts.store.events import slurm_job
from workflow_scripts.store.files import write_atomically


@dataclass(frozen=True)
class Failure:
    """One failed attempt.

    Attributes:
        error: the exception in one line, or how the worker ended.
        traceback: where it was raised; empty if the worker ended without a word.
        counted: the result was in hand alone, so that the failure is its own.
    """

    error: str
    traceback: str
    counted: bool
    time: str
    host: str
    job: str | None


class Attempts:
    """The failures of results below one directory, by the results' places."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, place: str) -> Path:
        """Return the file that holds a result's failures."""
        return self.root / f"{place}.json"

    def failures(self, place: str) -> list[Failure]:
        """Return the failures so far; a file that cannot be read says nothing."""
        try:
            return [Failure(**failure) for failure in json.loads(self.path(place).read_text())["failures"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def counted(self, place: str) -> int:
        """Return how many failures were the result's own."""
        return sum(failure.counted for failure in self.failures(place))

    def add(self, place: str, error: BaseException | str, *, counted: bool) -> list[Failure]:
        """Keep a failure; return all there are.

        Raises:
            StoreError: if the disk takes no more.
        """
        if isinstance(error, BaseException):
            text = "".join(traceback.format_exception(error))
            error = " ".join(traceback.format_exception_only(error)[-1].split())
        else:
            text = ""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        found = [*self.failures(place), Failure(error, text, counted, now, platform.node(), slurm_job())]
        content: dict[str, Any] = {"place": place, "failures": [asdict(failure) for failure in found]}
        write_atomically(self.path(place), json.dumps(content, indent=1))
        return found

    def withdraw(self, place: str) -> None:
        """Take the last failure back."""
        if kept := self.failures(place)[:-1]:
            content = {"place": place, "failures": [asdict(failure) for failure in kept]}
            write_atomically(self.path(place), json.dumps(content, indent=1))
        else:
            self.clear(place)

    def clear(self, place: str) -> bool:
        """Forget a result's failures; say whether there were any."""
        try:
            self.path(place).unlink()
        except FileNotFoundError:
            return False
        return True
