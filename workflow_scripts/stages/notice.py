"""When this process has to stop: it was told to by SIGTERM (preemption, scancel, time limit), or its time is nearly up."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from types import FrameType

from workflow_scripts.errors import StillhouseError

RESERVE = 30.0  # seconds to keep for the end of the job
UNFINISHED = 75  # EX_TEMPFAIL: the same command goes on where this one stopped


class Unfinished(StillhouseError):
    """A job stopped in good order with work left; the same command goes on where it stopped. Exit status 75."""


class Notice:
    """Whether this process has to stop, and why.

    Attributes:
        told: a signal came.
        deadline: on the monotonic clock; None if there is none.
    """

    def __init__(self) -> None:
        self.told = False
        self.deadline: float | None = None

    def give(self, minutes: float | None) -> None:
        """Set the deadline: so many minutes from now, or when SLURM will end this process's job."""
        left = slurm_seconds_left() if minutes is None else 60 * minutes
        self.deadline = None if left is None else time.monotonic() + left

    def seconds_left(self) -> float | None:
        """Return the seconds until the deadline."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def due(self, seconds: float) -> bool:
        """Say whether there is no time for a further piece of work if the longest so far took so many seconds."""
        left = self.seconds_left()
        return self.told or (left is not None and left < 1.25 * seconds + RESERVE)

    def reason(self) -> str:
        """Say why work stops."""
        return "it was told to by SIGTERM" if self.told else "its time is nearly up"

    def stopped(self, where: str) -> Unfinished:
        """Return the error with which work ends that goes on where it stopped."""
        return Unfinished(f"stopped in good order {where}, because {self.reason()}. The same command goes on there.")

    @contextlib.contextmanager
    def heard(self) -> Iterator[Notice]:
        """Take SIGTERM as a notice, and further ones too: SLURM's step and srun both send one. Only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def note(signum: int, frame: FrameType | None) -> None:
            self.told = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)


NOTICE = Notice()  # signals and time limits come to the whole process


def slurm_seconds_left() -> float | None:
    """Ask SLURM how long the job that this process belongs to may still run; None if there is no job, limit or answer."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("squeue") is None:
        return None
    try:
        command = ["squeue", "--noheader", f"--jobs={job}", "--format=%A %L"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = (line.split() for line in ended.stdout.splitlines())
    left = {line[0]: line[1] for line in lines if len(line) == 2}  # one array task has the number of the whole array
    return parse_seconds(left.get(job, ""))


def parse_seconds(text: str) -> float | None:
    """Read a time as SLURM writes it, ``[days-]hours:minutes:seconds`` or ``minutes:seconds``; None for UNLIMITED."""
    days, dash, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        total = int(days) * 86400 if dash else 0
    except ValueError:
        return None
    if len(parts) == 1:
        return float(total + parts[0] * (3600 if dash else 60))
    for part, unit in zip(reversed(parts), (1, 60, 3600), strict=False):
        total += part * unit
    return float(total)
