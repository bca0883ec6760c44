"""This user's jobs in SLURM's queue."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from workflow_scripts.stages.notice import parse_seconds

FIELDS = {"number": "%A", "id": "%i", "state": "%T", "node": "%N", "age": "%M", "reason": "%r", "name": "%j"}


@dataclass(frozen=True)
class Queued:
    """A job that waits or runs.

    Attributes:
        number: unique, as the job itself sees it in SLURM_JOB_ID.
        id: as people write it: ARRAY_INDEX for a task of an array.
        state: such as RUNNING or PENDING.
        node: where it runs; empty while it waits.
        age: seconds since it started.
        reason: why it waits.
        comment: what Snakemake's executor says of it, with the wildcards of its rule.
    """

    number: str
    id: str
    state: str
    node: str
    age: float
    reason: str
    name: str
    comment: str


def queue() -> list[Queued] | None:
    """Ask SLURM for this user's jobs; None where there is no SLURM, or no answer."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--me", "--noheader", "--format=" + "|".join([*FIELDS.values(), "%k"])]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse(ended.stdout)


def parse(text: str) -> list[Queued]:
    """Read what squeue prints; the comment comes last, because it may hold anything."""
    jobs = []
    for line in text.splitlines():
        parts = line.split("|", len(FIELDS))
        if len(parts) == len(FIELDS) + 1:
            values = dict(zip(FIELDS, parts, strict=False))
            age = parse_seconds(values.pop("age")) or 0.0
            jobs.append(Queued(**values, age=age, comment=parts[-1]))
    return jobs
