"""What jobs did and when: JSON lines that a job appends to a file of its own, for ``stillhouse status`` and for people.

``results/events/<stage>/<shard>.<digest>.<host>-<pid>-<time>.jsonl`` has one writer, the process. Each line has ``time``
(seconds since 1970), ``event``, ``stage`` and ``shard``, and further:

- ``start``: ``run``, ``digest`` of the job, ``host``, ``pid``, ``job`` (SLURM's number, or null), ``gpu`` (whether it has
  one), ``processes`` (that share the work, each with a GPU; this one speaks for all), ``deadline`` (or null)
- ``missing``: how many results are ``missing`` of the ``total``
- ``done``: ``name`` (class or training), ``place`` below the store, ``seconds``
- ``failed``: ``name``, ``place``, ``error``; ``counted`` if nothing else was in hand
- ``stop``: exit ``status`` and, unless it is 0, the ``reason``
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

_STARTED = f"{time.time():.0f}"


def slurm_job() -> str | None:
    """Return the number of the SLURM job that this process belongs to."""
    return os.environ.get("SLURM_JOB_ID")


class Events:
    """Appends to this process's file of events of one job.

    Attributes:
        path: the file.
    """

    def __init__(self, results: Path, stage: str, shard: str, digest: str):
        self._head = {"stage": stage, "shard": shard}
        name = f"{shard}.{digest}.{platform.node()}-{os.getpid()}-{_STARTED}.jsonl"
        self.path = results / "events" / stage / name

    def tell(self, event: str, **facts: Any) -> None:
        """Append an event. A disk that takes no more is left to those whose writes matter."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **self._head, **facts}) + "\n"
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(line)
