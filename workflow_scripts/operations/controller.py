"""A run's controller as a job: Snakemake in a process of its own, started again where SLURM or the time limit ended it."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit

from workflow_scripts.errors import StillhouseError
from workflow_scripts.operations.queue import queue
from workflow_scripts.store.events import slurm_job
from workflow_scripts.store.files import write_atomically


class Interruptible:
    """A callable that runs commands, and that submitit starts again after a time limit or a preemption.

    submitit's signal and a preemption's reach every process of a SLURM step, but end only a command that does not ignore them:
    so commands are started ignoring them, and ended by :meth:`checkpoint`, or by SLURM with this process.
    """

    _child: subprocess.Popen[bytes] | None = None

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """End what runs, and say what is to be started anew."""
        child, self._child = self._child, None
        if child is not None:
            self.end(child)
        return submitit.helpers.DelayedSubmission(self)

    def end(self, child: subprocess.Popen[bytes]) -> None:
        """End a command."""
        raise NotImplementedError

    def run(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
        """Run a command; return its exit status."""
        child = self._child = subprocess.Popen(command, env=environment, preexec_fn=_ignore_notices)
        try:
            while (status := child.poll()) is None:  # wait() would hold a lock that checkpoint needs
                time.sleep(0.1)
            return status
        except KeyboardInterrupt:  # which the command has got as well
            child.wait()
            raise
        finally:
            self._child = None


def _ignore_notices() -> None:
    for notice in (signal.SIGUSR2, signal.SIGTERM):  # which Snakemake hears once it runs jobs
        signal.signal(notice, signal.SIG_IGN)


class Controller(Interruptible):
    """Runs Snakemake to its end.

    Args:
        arguments: for ``snakemake``.
        record: file that says which controller works on the run.
    """

    def __init__(self, arguments: Sequence[str], record: Path):
        self.arguments = list(arguments)
        self.record = record

    def __call__(self) -> None:
        """Run Snakemake, after removing the lock that a controller of this run left behind when it was killed.

        Raises:
            StillhouseError: if another controller of the run lives, the lock stays, or Snakemake ends with an error.
        """
        snakemake = [sys.executable, "-m", "snakemake", *self.arguments]
        if self._take_over():
            if self.run([*snakemake, "--unlock"], _environment()):
                raise StillhouseError("the last controller of this run was killed, and its lock could not be removed")
            print("stillhouse: the last controller of this run was killed; its lock is removed", flush=True)
        status = self.run(snakemake, _environment())
        if status >= 0:  # killed by a signal, it left its lock to the next controller
            self.record.unlink(missing_ok=True)
        if status:
            raise StillhouseError(f"snakemake ended with exit status {status}; what it said is above")

    def end(self, child: subprocess.Popen[bytes]) -> None:
        """Kill Snakemake: told to stop it would wait for its jobs, or cancel them; killed it lets them go on."""
        child.kill()
        child.wait()

    def _take_over(self) -> bool:
        """Note that this is the run's controller; say whether there was one that did not end by itself."""
        me = {"job": slurm_job(), "host": platform.node(), "pid": os.getpid()}
        try:
            last = json.loads(self.record.read_text())
        except (OSError, ValueError):
            last = None
        if last is not None and _lives(last, me):
            raise StillhouseError(
                f"{_name(last)} controls this run already. End it, or delete {self.record} if it is not there any more."
            )
        write_atomically(self.record, json.dumps(me))
        return last is not None


def _lives(other: Mapping[str, Any], me: Mapping[str, Any]) -> bool:
    """Say whether another controller is there; an earlier life of this job is not."""
    if other["job"] is not None:
        jobs = queue()
        return other["job"] != me["job"] and (jobs is None or any(job.number == other["job"] for job in jobs))
    if other["host"] != me["host"]:
        return True
    if other["pid"] == me["pid"]:
        return False
    try:
        os.kill(other["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _name(controller: Mapping[str, Any]) -> str:
    if controller["job"] is not None:
        return f"SLURM job {controller['job']}"
    return f"process {controller['pid']} on {controller['host']}"


def _environment() -> dict[str, str]:
    """Return an environment in which jobs inherit nothing from the job of their controller."""
    inside = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")
    return {key: value for key, value in os.environ.items() if key == "SLURM_CONF" or not key.startswith(inside)}
