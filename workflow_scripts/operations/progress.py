"""How far a run is, how fast it goes and who works on it.

Read from what lies in the results directory: manifests and results, the events that workers append, their claims, and the
failures that they noted. So it is known while jobs run and after they died, without a service. Where there is SLURM, it is
asked as well.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from workflow_scripts.operations.queue import Queued, queue
from workflow_scripts.operations.retry import Aside
from workflow_scripts.operations.survey import STAGES
from workflow_scripts.recipes import CLASS_STAGES, PACK, Job, Recipes
from workflow_scripts.stages.notice import UNFINISHED
from workflow_scripts.stages.publish import publish, report_folder
from workflow_scripts.store.attempts import Attempts
from workflow_scripts.store.claims import STALE
from workflow_scripts.store.digests import PREFIX
from workflow_scripts.store.results import RECORD, Result

FULL_LOOK = 300.0
"""Seconds after which a watcher looks at the results themselves again; in between it believes the events."""


@dataclass(frozen=True)
class Unit:
    """One thing that a stage makes.

    Attributes:
        name: class, set or training, for people.
        images: that it takes to make, real or synthetic; 0 where none are counted.
    """

    stage: str
    job: str
    name: str
    images: int


@dataclass(eq=False)
class Worker:
    """One process of one job, or the first of those that share the job's work, as its events tell it.

    Attributes:
        started, last: time of its first and of its last event.
        status: exit status, None if it did not tell its end.
        made: place and seconds of everything that it made.
    """

    stage: str
    shard: str
    path: Path
    digest: str = ""
    run: str = ""
    host: str = ""
    pid: int = 0
    job: str | None = None
    gpu: bool = False
    processes: int = 1
    deadline: float | None = None
    started: float = 0.0
    last: float = 0.0
    status: int | None = None
    reason: str = ""
    made: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class StageProgress:
    """A stage in numbers; done, running, set_aside and missing add up to all that it makes.

    Attributes:
        workers: that work on it now.
        images_per_second: of one worker, from all that was made so far; None before anything was, or where none are counted.
        seconds_left: until the workers of now have made what is left; None without workers or a rate.
        work_left: seconds of one worker that are left; None without a rate.
    """

    stage: str
    done: int
    running: int
    set_aside: int
    missing: int
    workers: int
    images_per_second: float | None
    seconds_left: float | None
    work_left: float | None

    @property
    def total(self) -> int:
        """All that the stage makes."""
        return self.done + self.running + self.set_aside + self.missing


@dataclass(frozen=True)
class Active:
    """A worker that is at work.

    Attributes:
        age, quiet: seconds since it started, and since its last event.
        seconds_left: until its time limit.
        in_hand: what it works on.
    """

    stage: str
    shard: str
    host: str
    pid: int
    job: str | None
    age: float
    quiet: float
    seconds_left: float | None
    made: int
    in_hand: tuple[str, ...]


@dataclass(frozen=True)
class Broken:
    """A job whose last worker ended in an error, and that has no manifest yet."""

    stage: str
    shard: str
    error: str


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        time: seconds since 1970.
        jobs: of the run in SLURM's queue that no active worker stands for: waiting, starting, or a controller.
        gpu_hours, other_hours: that workers of this run have taken, those included whose results were made again.
        planned_gpu_hours: of the whole run; None if nobody knows.
        seconds_left: until all is made, if as many workers as now go on; None if that cannot be said.
        unmeasured: stages with work left of which nothing was made yet, so that ``seconds_left`` leaves them out.
        page: the report, if there is one.
    """

    run: str
    time: float
    stages: list[StageProgress]
    workers: list[Active]
    jobs: list[Queued]
    set_aside: list[Aside]
    broken: list[Broken]
    gpu_hours: float
    other_hours: float
    planned_gpu_hours: float | None
    seconds_left: float | None
    unmeasured: list[str]
    page: str | None

    @property
    def finished(self) -> bool:
        """Whether all is there."""
        return all(stage.done == stage.total for stage in self.stages)


class Events:
    """Reads the events of all jobs, each line once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._offsets: dict[Path, int] = {}
        self._workers: dict[Path, Worker] = {}

    def read(self) -> list[Worker]:
        """Read what was appended since the last time; return every worker that ever told something."""
        for path, size in self._files():
            if size > self._offsets.get(path, 0):
                self._read(path)
        return list(self._workers.values())

    def _files(self) -> Iterator[tuple[Path, int]]:
        for folder in sorted(self._folder.glob("*/")):
            for entry in os.scandir(folder):
                if entry.name.endswith(".jsonl"):
                    yield Path(entry.path), entry.stat().st_size

    def _read(self, path: Path) -> None:
        offset = self._offsets.get(path, 0)
        with path.open("rb") as file:
            file.seek(offset)
            whole, newline, _ = file.read().rpartition(b"\n")  # the last line may be half written
        self._offsets[path] = offset + len(whole) + len(newline)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
                worker = self._workers.setdefault(path, Worker(event["stage"], event["shard"], path))
                _take(worker, event)
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short by a full disk


def _take(worker: Worker, event: Mapping[str, Any]) -> None:
    worker.last = event["time"]
    worker.started = worker.started or event["time"]
    if event["event"] == "start":
        for key in ("digest", "run", "host", "pid", "job", "gpu", "processes", "deadline"):
            if key in event:
                setattr(worker, key, event[key])
    elif event["event"] == "done":
        worker.made.append((event["place"], event["seconds"]))
    elif event["event"] == "stop":
        worker.status, worker.reason = event["status"], event.get("reason", "")


class Progress:
    """Looks at a run again and again, at little cost.

    Args:
        planned_gpu_hours: what the whole run was planned to take.
        ask: for SLURM's queue.
    """

    def __init__(
        self,
        recipes: Recipes,
        planned_gpu_hours: float | None = None,
        ask: Callable[[], list[Queued] | None] = queue,
    ):
        self._recipes = recipes
        self._config = recipes.config
        self._planned = planned_gpu_hours
        self._ask = ask
        self._events = Events(self._config.results / "events")
        self._there: set[str] = set()
        self._looked = float("-inf")

    @property
    def _jobs(self) -> list[Job]:
        return [job for job, _ in self._made_by]

    @cached_property
    def _made_by(self) -> list[tuple[Job, dict[str, Unit]]]:
        """Every job and what it makes, by place below the store or the results."""
        return [(job, dict(self._units_of(job))) for job in self._recipes.jobs()]

    @cached_property
    def _units(self) -> dict[str, Unit]:
        """All that the run makes, each once."""
        return {place: unit for _, units in self._made_by for place, unit in units.items()}

    def look(self) -> Snapshot:
        """Return the run as it is now."""
        workers = [worker for worker in self._events.read() if self._mine(worker)]
        self._see(workers)
        now = time.time()
        in_hand = {place: owner for place, owner in self._claims(now) if place not in self._there}
        jobs = self._ask()
        at_work = _at_work(workers, set(in_hand.values()), jobs, now)
        set_aside = {aside.place: aside for aside in self._set_aside() if aside.place not in in_hand}
        stages = self._stages(workers, at_work, in_hand, set_aside)
        unmeasured = [stage.stage for stage in stages if stage.missing + stage.running and stage.work_left is None]
        work_left = sum(stage.work_left or 0.0 for stage in stages)
        hours = {True: 0.0, False: 0.0}
        for worker in workers:
            seconds = (now if worker in at_work else worker.last) - worker.started
            hours[worker.gpu] += worker.processes * seconds / 3600
        page = publish(self._config, self._recipes.job("report", "report"))
        return Snapshot(
            run=self._config.run,
            time=now,
            stages=stages,
            workers=[self._active(worker, in_hand, now) for worker in at_work],
            jobs=self._queued(jobs or [], workers, at_work),
            set_aside=[set_aside[place] for place in sorted(set_aside)],
            broken=list(self._broken(workers, at_work)),
            gpu_hours=hours[True],
            other_hours=hours[False],
            planned_gpu_hours=self._planned,
            seconds_left=work_left / len(at_work) if at_work and work_left else None,
            unmeasured=unmeasured,
            page=None if page is None else str(page),
        )

    # ---------------------------------------------------------------- what exists

    def _units_of(self, job: Job) -> Iterator[tuple[str, Unit]]:
        recipes, stage, shard = self._recipes, job.stage, job.shard
        if stage in CLASS_STAGES:
            for result in recipes.stage_results(stage, shard):
                yield result.place, Unit(stage, shard, result.name, self._images(result))
        elif stage == "export":
            for made in recipes.sets(shard):
                name = f"{made.method} IPC {made.ipc} seed {made.seed}"
                yield f"datasets/{recipes.set_directory(made).name}", Unit(stage, shard, name, 0)
        elif stage == "measure":
            for made in recipes.sets(shard):
                name = f"{made.method} IPC {made.ipc} seed {made.seed}"
                yield f"measure/{recipes.measure_path(made).stem}", Unit(stage, shard, name, 0)
        elif stage == "evaluate":
            for training in recipes.trainings_of(shard):
                yield recipes.training_place(training), Unit(stage, shard, training.name, 0)
        else:
            yield f"{stage}/{shard}", Unit(stage, shard, shard, 0)

    def _images(self, result: Result) -> int:
        """Count the images that a result takes: those that are encoded or inverted, or those that are made."""
        if result.stage in ("encode", "invert"):
            flips = 2 if self._config.encode.flip == "both" else 1
            return flips * self._recipes.catalog.count(result.class_name, "train")
        return int(result.recipe["ipc"]) if result.stage in ("sample", "match") else 0

    def _see(self, workers: Iterable[Worker]) -> None:
        """Note what exists: by looking, or, if that was not long ago, by what was told since."""
        if time.monotonic() - self._looked < FULL_LOOK:
            self._there |= {place for worker in workers for place, _ in worker.made}
            for job, units in self._made_by:
                if not self._there.issuperset(units) and self._whole(job):
                    self._there.update(units)
            return
        listed: dict[str, set[str]] = {}

        def exists(place: str) -> bool:
            """Ask a directory once for all it holds; results appear there whole."""
            folder, _, name = place.rpartition("/")
            if folder not in listed:
                try:
                    listed[folder] = set(os.listdir(self._recipes.store.root / folder))
                except OSError:
                    listed[folder] = set()
            return (f"{name}.json" if folder in ("evaluate", "measure") else name) in listed[folder]

        self._there = set()
        for job, units in self._made_by:
            if self._whole(job):
                self._there.update(units)
            elif job.stage in (*CLASS_STAGES, "evaluate", "measure"):
                self._there.update(filter(exists, units))
            elif job.stage == "export":
                self._there.update(place for place in units if (self._config.results / place).exists())
            elif self._made_in_one(job).exists():
                self._there.update(units)
        self._looked = time.monotonic()

    def _made_in_one(self, job: Job) -> Path:
        """Return what a job makes that makes one thing."""
        recipes = self._recipes
        if job.stage == "teacher":
            return recipes.teacher_record(job.shard)
        if job.stage == "relabel":
            return recipes.labels_path(recipes.labels[job.shard]) / RECORD
        if job.stage == "report":
            return report_folder(self._config, job) / "index.html"
        return recipes.backbone.path if job.stage == "fit_backbone" else self._config.results / job.manifest

    def _whole(self, job: Job) -> bool:
        return (self._config.results / job.manifest).exists()

    # ---------------------------------------------------------------- who works

    def _mine(self, worker: Worker) -> bool:
        return worker.run == self._config.run or worker.digest in self._digests

    @cached_property
    def _digests(self) -> set[str]:
        return {job.digest for job in self._jobs}

    def _claims(self, now: float) -> Iterator[tuple[str, tuple[str, int]]]:
        """Yield what workers have in hand, and the host and process of each."""
        root = self._recipes.store.root / "claims"
        for path in root.rglob("[!.]*.json"):
            try:
                claim, age = json.loads(path.read_text()), now - path.stat().st_mtime
                owner = (claim["host"], claim["pid"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
            place = path.relative_to(root).as_posix().removesuffix(".json")
            if place in self._units and age < STALE and _may_live(*owner):
                yield place, owner

    def _active(self, worker: Worker, in_hand: Mapping[str, tuple[str, int]], now: float) -> Active:
        mine = [self._units[place].name for place, owner in in_hand.items() if owner == (worker.host, worker.pid)]
        return Active(
            worker.stage,
            worker.shard,
            worker.host,
            worker.pid,
            worker.job,
            age=now - worker.started,
            quiet=now - worker.last,
            seconds_left=None if worker.deadline is None else worker.deadline - now,
            made=len(worker.made),
            in_hand=tuple(sorted(set(mine))),
        )

    def _queued(self, jobs: list[Queued], workers: list[Worker], at_work: list[Worker]) -> list[Queued]:
        """Return the run's jobs in the queue that no active worker stands for."""
        shown = {worker.job for worker in at_work}
        known = {worker.job for worker in workers}
        marks = [job.digest[:PREFIX] for job in self._jobs]
        name = job_name(self._config.run)

        def of_this_run(job: Queued) -> bool:
            named = job.name == name or job.name.startswith(f"{name}.")
            return named or job.number in known or any(mark in job.comment for mark in marks)

        return [job for job in jobs if job.number not in shown and of_this_run(job)]

    # ---------------------------------------------------------------- how fast

    def _stages(
        self,
        workers: Iterable[Worker],
        at_work: Iterable[Worker],
        in_hand: Mapping[str, object],
        set_aside: Mapping[str, object],
    ) -> list[StageProgress]:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        left: Counter[str] = Counter()  # images, or items where no images are counted
        for place, unit in self._units.items():
            state = (
                "done"
                if place in self._there
                else "running"
                if place in in_hand
                else "set_aside"
                if place in set_aside
                else "missing"
            )
            counts[unit.stage][state] += 1
            left[unit.stage] += (unit.images or 1) if state in ("running", "missing") else 0
        seconds: defaultdict[str, float] = defaultdict(float)
        made: Counter[str] = Counter()
        images: Counter[str] = Counter()
        for place, spent in (one for worker in workers for one in worker.made):
            if (known := self._units.get(place)) is not None:
                seconds[known.stage] += spent
                made[known.stage] += known.images or 1
                images[known.stage] += known.images
        busy = Counter(worker.stage for worker in at_work)
        stages = []
        for stage in (name for name in STAGES if name in counts):
            work = left[stage] * seconds[stage] / made[stage] if made[stage] else None if left[stage] else 0.0
            stages.append(
                StageProgress(
                    stage,
                    done=counts[stage]["done"],
                    running=counts[stage]["running"],
                    set_aside=counts[stage]["set_aside"],
                    missing=counts[stage]["missing"],
                    workers=busy[stage],
                    images_per_second=images[stage] / seconds[stage] if images[stage] and seconds[stage] else None,
                    seconds_left=work / busy[stage] if work and busy[stage] else None,
                    work_left=work,
                )
            )
        return stages

    # ---------------------------------------------------------------- what failed

    def _set_aside(self) -> Iterator[Aside]:
        """Yield what failed too often to be tried again; only what failed is looked for, so that this costs little."""
        attempts = Attempts(self._recipes.store.root / "attempts")
        for path in attempts.root.rglob("[!.]*.json"):
            place = path.relative_to(attempts.root).as_posix().removesuffix(".json")
            unit = self._units.get(place)
            if unit is None or place in self._there:
                continue
            failures = attempts.failures(place)
            count = sum(failure.counted for failure in failures)
            if count >= self._config.compute.attempts:
                yield Aside(unit.stage, unit.job, unit.name, count, failures[-1].error, str(path), place)

    def _broken(self, workers: list[Worker], at_work: list[Worker]) -> Iterator[Broken]:
        """Yield the jobs whose last worker ended in an error and that have no manifest."""
        unfinished = {job.digest for job in self._jobs if not self._whole(job)}
        lacking = {unit.stage for place, unit in self._units.items() if place not in self._there}
        last: dict[tuple[str, str, str], Worker] = {}
        for worker in sorted(workers, key=lambda worker: worker.started):
            packed = worker.shard.rpartition("-")[2] == PACK and worker.stage in lacking
            if packed or worker.digest in unfinished:
                last[worker.stage, worker.shard, worker.digest] = worker
        for (stage, shard, _), worker in sorted(last.items()):
            if worker in at_work or worker.status in (0, UNFINISHED):
                continue
            job = f", SLURM job {worker.job}" if worker.job else ""
            error = worker.reason.splitlines()[0] if worker.reason else f"ended without a word on {worker.host}{job}"
            yield Broken(stage, shard, error)


def job_name(run: str) -> str:
    """Return the name of a run's controller in SLURM's queue; those of its other jobs begin with it and a dot."""
    return f"stillhouse-{run}"


def _at_work(
    workers: Iterable[Worker], owners: set[tuple[str, int]], jobs: list[Queued] | None, now: float
) -> list[Worker]:
    """Return the workers that have not ended, as far as can be told from here."""
    running = None if jobs is None else {job.number for job in jobs if job.state in ("RUNNING", "COMPLETING")}
    newest: dict[str, float] = {}
    for worker in workers:
        if worker.job is not None:  # a job that SLURM started again has the same number
            newest[worker.job] = max(newest.get(worker.job, 0.0), worker.started)

    def works(worker: Worker) -> bool:
        if worker.status is not None or not _may_live(worker.host, worker.pid):
            return False
        if worker.job is not None and running is not None:
            return worker.job in running and worker.started >= newest[worker.job]
        if worker.host == platform.node() or (worker.host, worker.pid) in owners:
            return True
        overdue = worker.deadline is not None and now > worker.deadline
        return not overdue and now - worker.last < STALE

    return sorted(filter(works, workers), key=lambda worker: (STAGES.index(worker.stage), worker.shard, worker.started))


def _may_live(host: str, pid: int) -> bool:
    """Say whether a process may still be there; of other machines that is not known."""
    if host != platform.node():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
