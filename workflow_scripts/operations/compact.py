"""``stillhouse submit --compact``: scattered invalid classes as one array of balanced workers.

Snakemake's jobs are whole shards: 37 invalid classes in 30 shards are 30 jobs for each stage. Here each worker gets some
classes and takes them through all stages, one after another, with the programs that Snakemake's rules run; whoever ends
last writes the manifests and exports the sets, so that Snakemake finds only the evaluation and the report left to do.
"""

from __future__ import annotations

import heapq
import importlib
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from types import FrameType

from workflow_scripts.config import MatchingMethod, MTTObjective, load_resolved
from workflow_scripts.errors import StillhouseError
from workflow_scripts.operations.controller import Interruptible
from workflow_scripts.operations.progress import Snapshot
from workflow_scripts.operations.site_profile import Profile
from workflow_scripts.recipes import CLASS_STAGES, Job, Pack, Recipes
from workflow_scripts.stages.common import write_manifest
from workflow_scripts.stages.notice import UNFINISHED
from workflow_scripts.store.claims import Claims
from workflow_scripts.store.digests import PREFIX

STAGES = ("encode", "cluster", "invert", "sample", "match")
"""What can be made for some classes alone, in order."""
WORTHWHILE = 1800.0
"""Seconds of work for which it is worth to start a worker."""
PATIENCE = 90.0
"""Seconds that a worker has for the class in hand when its job is to end."""


@dataclass(frozen=True)
class Share:
    """The classes of one worker, and the seconds that they will take it."""

    classes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Packing:
    """How the missing results of a run are shared out.

    Attributes:
        results: how many are missing.
        shards: in how many of Snakemake's jobs they are.
        stages: of which stages.
        left_out: stages with missing results that cannot be made for some classes alone.
    """

    shares: list[Share]
    results: int
    shards: int
    stages: list[str]
    left_out: list[str]


def pack(recipes: Recipes, seconds: Mapping[str, float], most: int, exactly: int | None = None) -> Packing:
    """Share the classes that miss something out to workers.

    Args:
        seconds: that one result of each stage takes.
        most: workers.
        exactly: so many workers, however little there is to do.

    Raises:
        StillhouseError: if there is no backbone yet.
    """
    load: defaultdict[str, float] = defaultdict(float)
    places: set[str] = set()
    stages, left_out = dict[str, None](), dict[str, None]()
    jobs = 0
    for job in recipes.jobs():
        if job.stage not in CLASS_STAGES or (recipes.config.results / job.manifest).exists():
            continue
        missing = [result for result in recipes.stage_results(job.stage, job.shard) if not recipes.store.exists(result)]
        if missing and not _by_class(recipes, job):
            left_out[job.stage] = None
            continue
        jobs += bool(missing)
        for result in missing:
            if result.place not in places:
                places.add(result.place)
                load[result.class_name] += seconds[job.stage]
                stages[job.stage] = None
    if load and not recipes.backbone.path.exists():
        raise StillhouseError(
            "the backbone is not fitted yet: `snakemake --until fit_backbone` first, then the same command again"
        )
    workers = exactly or min(most, ceil(sum(load.values()) / WORTHWHILE))
    shares = balance(load, max(1, min(workers, len(load))))
    return Packing(shares, len(places), jobs, [stage for stage in STAGES if stage in stages], list(left_out))


def _by_class(recipes: Recipes, job: Job) -> bool:
    """Say whether the results of a job's classes can be made apart."""
    if job.stage == "match":
        method = recipes.config.methods[recipes.match_set(job.shard)[0].method]
        return isinstance(method, MatchingMethod) and not isinstance(method.objective, MTTObjective)
    return job.stage in STAGES


def balance(load: Mapping[str, float], workers: int) -> list[Share]:
    """Share classes out so that no worker has much more to do than another: the longest first, to whom has least."""
    heap: list[tuple[float, int, list[str]]] = [(0.0, number, []) for number in range(workers)]
    for name in sorted(load, key=lambda name: (-load[name], name)):
        seconds, number, classes = heapq.heappop(heap)
        heapq.heappush(heap, (seconds + load[name], number, [*classes, name]))
    ordered = sorted(heap, key=lambda entry: entry[1])
    return [Share(tuple(sorted(classes)), seconds) for seconds, _, classes in ordered]


def describe(packing: Packing) -> str:
    """Say how the work is shared out."""
    classes = sum(len(share.classes) for share in packing.shares)
    minutes = [share.seconds / 60 for share in packing.shares]
    text = (
        f"{packing.results} missing results of {classes} classes, which are in {packing.shards} jobs of snakemake, go to "
        f"{len(packing.shares)} worker{'s' if len(packing.shares) > 1 else ''} with {min(minutes):.0f} to {max(minutes):.0f} "
        "minutes of work each."
    )
    if not packing.results:
        text = "All images are there; one worker writes what is left of the manifests and exports the sets."
    if packing.left_out:
        text += f" Left to snakemake, because it is made for all classes together: {', '.join(packing.left_out)}."
    return text


def seconds_per_result(snapshot: Snapshot, profile: Profile) -> dict[str, float]:
    """Return what a result of each stage takes: as measured in this run, or else as the profile says."""
    known = {stage: profile.number(stage, "seconds_per_item", 60.0) for stage in STAGES}
    for stage in snapshot.stages:
        left = stage.missing + stage.running
        if stage.stage in known and stage.work_left and left:
            known[stage.stage] = stage.work_left / left
    return known


class PackWorker(Interruptible):
    """Takes classes through all stages, then finishes what has become whole.

    Args:
        resolved: the run's complete configuration.
    """

    def __init__(self, resolved: Path, classes: Sequence[str]):
        self.resolved = resolved
        self.classes = list(classes)

    def __call__(self) -> None:
        """Do the work.

        Raises:
            StillhouseError: if a stage fails, or this job is told to end, or gets nowhere within its time.
        """
        self._told = False
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            failed = [name for stage, shard in self._jobs() if (name := self._work(stage, shard))]
        finally:
            signal.signal(signal.SIGTERM, before)
        finish(Recipes(load_resolved(self.resolved)))
        if failed:
            raise StillhouseError(f"{', '.join(failed)}: ended in an error, which is above and in results/logs")

    def end(self, child: subprocess.Popen[bytes]) -> None:
        """Let the worker finish the class in hand, if that does not take too long."""
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """Hear SIGTERM, which the command gets from SLURM as well."""
        self._told = True

    def _jobs(self) -> Iterator[tuple[str, str]]:
        """Yield the stages' jobs in which something is missing, each when those before it are done."""
        if not self.classes:
            return
        recipes = self._recipes()
        for job in (recipes.job(stage, shard) for stage in STAGES for shard in recipes.shards_of(stage)):
            if _by_class(recipes, job) and self._missing(job.stage, job.shard):
                yield job.stage, job.shard

    def _recipes(self) -> Pack:
        return Pack(load_resolved(self.resolved), self.classes)

    def _missing(self, stage: str, shard: str) -> int:
        recipes = self._recipes()
        return sum(not recipes.store.exists(result) for result in recipes.stage_results(stage, shard))

    def _work(self, stage: str, shard: str) -> str:
        """Run a stage's program, again and again if it stops in good order; return its name if it fails."""
        recipes = self._recipes()
        log = recipes.config.results / "logs" / stage / f"{shard}.{recipes.job(stage, shard).digest[:PREFIX]}.log"
        command = [sys.executable, "-m", f"workflow_scripts.stages.{stage}", "--resolved", str(self.resolved)]
        command += ["--shard", shard, "--log", str(log), "--classes", *self.classes]
        while True:
            print(f"stillhouse: {stage} {shard}, {len(self.classes)} classes, log {log}", flush=True)
            before = self._missing(stage, shard)
            status = self.run(command)
            if status == 0:
                return ""
            if self._told:
                raise StillhouseError("this job was told to end; the same command goes on where it stopped")
            if status != UNFINISHED:
                return f"{stage} {shard}"
            if self._missing(stage, shard) >= before:
                raise StillhouseError(
                    f"{stage} {shard}: nothing got done before the time limit; ask for --minutes more"
                )
            _go_on_in_a_new_job()


def _go_on_in_a_new_job() -> None:
    """Do to this process what SLURM does before a time limit; returns where no executor listens."""
    if callable(signal.getsignal(signal.SIGUSR2)):
        os.kill(os.getpid(), signal.SIGUSR2)
        signal.pause()


def finish(recipes: Recipes) -> list[Job]:
    """Write the manifests of jobs whose results all exist, and export the sets whose images do; return those jobs.

    The stages' own programs do it, with nothing left to compute. Of workers that end at the same time one exports a set.
    """
    results = recipes.config.results
    done = []
    with Claims(recipes.store.root / "claims") as claims:
        for job in recipes.jobs():
            if (results / job.manifest).exists() or not _whole(recipes, job):
                continue
            place = f"manifests/{job.stage}/{job.shard}"
            if claims.take(place) is False:
                continue
            try:
                work = importlib.import_module(f"workflow_scripts.stages.{job.stage}").work
                write_manifest(results, job, work(recipes, job.shard))
            finally:
                claims.release(place)
            done.append(job)
    return done


def _whole(recipes: Recipes, job: Job) -> bool:
    if job.stage in CLASS_STAGES:
        return all(map(recipes.store.exists, recipes.stage_results(job.stage, job.shard)))
    needed = (recipes.config.results / recipes.job(*key).manifest for key in job.needs)
    return job.stage == "export" and all(path.exists() for path in needed)
