"""status: what it counts, what it reckons, and what it says."""

import io
import json
import os
import platform
import time
from pathlib import Path

import pytest
import support
from rich.console import Console

from workflow_scripts.operations.progress import Progress, Snapshot
from workflow_scripts.operations.queue import Queued, parse
from workflow_scripts.operations.status import duration, status, to_html, to_text
from workflow_scripts.recipes import Recipes
from workflow_scripts.store.attempts import Attempts
from workflow_scripts.store.claims import STALE, Claims
from workflow_scripts.store.events import Events
from workflow_scripts.store.results import Result

ME = {"host": platform.node(), "pid": os.getpid()}
AWAY = {"host": "gpu-17", "pid": 4}


class Told:
    """A run that is good for planning, and workers' events made up."""

    def __init__(self, site: support.Site):
        self.config = site.config({"compare": ["random", "dit"], "ipc": [1, 4], "seeds": [0], "shards": 2})
        self.recipes = Recipes(self.config)
        self.queue: list[Queued] | None = None

    def events(self, stage: str, shard: str, **start: object) -> Events:
        job = self.recipes.job(stage, shard)
        events = Events(self.config.results, stage, shard, job.digest[:16])
        events.path = events.path.with_name(f"{events.path.stem}-{time.monotonic_ns()}.jsonl")
        events.tell(
            "start", **{"run": "tiny", "digest": job.digest, "job": None, "gpu": True, "deadline": None, **start}
        )
        return events

    def make(self, result: Result, events: Events, seconds: float = 2.0) -> None:
        path = self.recipes.store.path(result)
        path.mkdir(parents=True)
        (path / "zarr.json").touch()
        events.tell("done", name=result.class_name, place=result.place, seconds=seconds)

    def progress(self) -> Progress:
        return Progress(self.recipes, ask=lambda: self.queue)

    def look(self) -> Snapshot:
        return self.progress().look()


@pytest.fixture
def told(plan_site) -> Told:
    return Told(plan_site(support.WIDE))


def stage(snapshot: Snapshot, name: str) -> tuple[int, int, int, int]:
    found = next(stage for stage in snapshot.stages if stage.stage == name)
    return found.done, found.running, found.set_aside, found.missing


def age(path: Path, seconds: float) -> None:
    """Let a file of events or a claim be so old."""
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line | {"time": line["time"] - seconds}) + "\n" for line in lines))
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_run_that_has_not_begun(told: Told) -> None:
    snapshot = told.look()
    assert stage(snapshot, "encode") == (0, 0, 0, 8)
    assert stage(snapshot, "sample") == (0, 0, 0, 8 * 2 * 2)
    assert (snapshot.workers, snapshot.seconds_left, snapshot.gpu_hours, snapshot.finished) == ([], None, 0, False)


def test_done_running_set_aside_and_missing(told: Told) -> None:
    results = told.recipes.stage_results("encode", "000")
    events = told.events("encode", "000", **ME)
    told.make(results[0], events)
    told.make(results[1], events, seconds=6.0)
    attempts = Attempts(told.recipes.store.root / "attempts")
    for _ in range(3):
        attempts.add(results[3].place, ArithmeticError("no dog"), counted=True)
    attempts.add(told.recipes.latents("hen").place, ArithmeticError("once"), counted=True)
    with Claims(told.recipes.store.root / "claims") as claims:
        claims.take(results[2].place)
        snapshot = told.look()
    assert stage(snapshot, "encode") == (2, 1, 1, 4)
    (worker,) = snapshot.workers
    assert (worker.stage, worker.shard, worker.made, worker.in_hand) == ("encode", "000", 2, (results[2].class_name,))
    (aside,) = snapshot.set_aside
    assert (aside.of, aside.failures) == (results[3].class_name, 3)

    encode = snapshot.stages[0]
    assert encode.images_per_second == pytest.approx(2 * support.COUNT / 8.0)
    assert encode.seconds_left == pytest.approx(5 * 4.0), (
        "five are left, of four seconds each; what is set aside is not"
    )
    assert snapshot.seconds_left == encode.seconds_left
    assert set(snapshot.unmeasured) == {"sample", "export", "evaluate", "measure", "report"}


def test_images_weigh_by_ipc(told: Told) -> None:
    """An image takes three seconds: 16 classes' results at IPC 4 and at IPC 1, of which a pair is there."""
    events = told.events("sample", "dit-000", **ME)
    for result in told.recipes.stage_results("sample", "dit-000")[:2]:
        told.make(result, events, seconds=3.0 * result.recipe["ipc"])
    told.events("sample", "dit-001", **ME)
    sample = next(stage for stage in told.look().stages if stage.stage == "sample")
    assert sample.images_per_second == pytest.approx(1 / 3)
    assert sample.workers == 2
    assert sample.work_left == pytest.approx(3.0 * (2 * 8 * 5 - 5))
    assert sample.seconds_left == pytest.approx(sample.work_left / 2)


def test_only_new_lines_are_read_and_half_a_line_waits(told: Told) -> None:
    progress = told.progress()
    events = told.events("encode", "000", **ME)
    assert len(progress.look().workers) == 1
    results = told.recipes.stage_results("encode", "000")
    told.make(results[0], events)
    with events.path.open("a") as file:
        file.write('{"time": 1.0, "event": "do')
    assert stage(progress.look(), "encode") == (1, 0, 0, 7)
    with events.path.open("a") as file:
        file.write("ne\n")  # no JSON, as a full disk leaves behind
    told.make(results[1], events)
    assert stage(progress.look(), "encode") == (2, 0, 0, 6)
    events.tell("stop", status=0)
    assert not progress.look().workers


def test_manifests_stand_for_their_results(told: Told) -> None:
    progress = told.progress()
    assert stage(progress.look(), "encode") == (0, 0, 0, 8)
    path = told.config.results / told.recipes.job("encode", "001").manifest
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert stage(progress.look(), "encode") == (4, 0, 0, 4)
    assert stage(told.look(), "encode") == (4, 0, 0, 4)


def test_a_worker_elsewhere_lives_as_long_as_it_gives_signs(told: Told) -> None:
    events = told.events("encode", "000", **AWAY)
    assert len(told.look().workers) == 1, "it has just begun"
    age(events.path, STALE + 60)
    assert not told.look().workers
    with Claims(told.recipes.store.root / "claims") as claims:
        place = told.recipes.stage_results("encode", "000")[0].place
        claims.take(place)
        claim = told.recipes.store.root / "claims" / f"{place}.json"
        claim.write_text(json.dumps(json.loads(claim.read_text()) | AWAY))
        (worker,) = told.look().workers
        assert worker.quiet > STALE, "its class takes long, and its claim is fresh"
        age(claim, STALE + 60)
        assert stage(told.look(), "encode") == (0, 0, 0, 8)
    (broken,) = told.look().broken
    assert (broken.stage, broken.shard, broken.error) == ("encode", "000", "ended without a word on gpu-17")


def test_slurm_knows_better(told: Told) -> None:
    job = told.recipes.job("sample", "dit-001")
    comment = f"rule_sample_wildcards_dit-001_{job.digest[:16]}"
    events = told.events("encode", "000", **AWAY, job="41")
    told.queue = [
        Queued("41", "41", "RUNNING", "gpu-17", 600.0, "None", "x", "rule_encode"),
        Queued("42", "42", "PENDING", "", 0.0, "Resources", "x", comment),
        Queued("43", "43", "RUNNING", "cpu-1", 700.0, "None", "stillhouse-tiny", ""),
        Queued("44", "44", "RUNNING", "cpu-1", 700.0, "None", "stillhouse-tiny2", "another run"),
    ]
    age(events.path, STALE + 60)
    snapshot = told.look()
    assert [worker.job for worker in snapshot.workers] == ["41"], "silent for long, but SLURM says that it runs"
    assert [job.number for job in snapshot.jobs] == ["42", "43"]
    printed = text(snapshot)
    assert "pending (Resources): sample" in printed and "gpu-17" in printed and "other jobs pending: 1" in printed

    told.events("encode", "000", **AWAY, job="41")
    assert len(told.look().workers) == 1, "SLURM started the job again; the first process is gone"
    told.queue = []
    assert not told.look().workers


def test_hours(told: Told) -> None:
    age(told.events("encode", "000", **AWAY).path, 3600)
    second = told.events("encode", "001", **AWAY, gpu=False)
    second.tell("stop", status=1, reason="no space left\nand more")
    age(second.path, 7200)
    snapshot = Progress(told.recipes, planned_gpu_hours=4.5, ask=lambda: None).look()
    assert (snapshot.gpu_hours, snapshot.other_hours) == (pytest.approx(0, abs=1e-3), pytest.approx(0, abs=1e-3))
    running = told.events("encode", "000", **ME)
    age(running.path, 1800)
    snapshot = Progress(told.recipes, planned_gpu_hours=4.5, ask=lambda: None).look()
    assert snapshot.gpu_hours == pytest.approx(0.5, abs=0.01)
    assert "0.50 of 4.50 planned" in text(snapshot)
    assert any(broken.error == "no space left" for broken in snapshot.broken)
    age(told.events("evaluate", "random-ipc1-000", **ME, processes=4).path, 1800)
    snapshot = Progress(told.recipes, ask=lambda: None).look()
    assert snapshot.gpu_hours == pytest.approx(0.5 + 4 * 0.5, abs=0.01), "of each process that shares the job"


def text(snapshot: Snapshot) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(to_text(snapshot))
    return console.export_text()


def test_the_page_reloads_itself_until_all_is_there(
    told: Told, copied: support.Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told.events("encode", "000", host="<b>", pid=4)
    page = to_html(told.look(), reload=15)
    assert '<meta http-equiv="refresh" content="15">' in page
    assert "&lt;b&gt;" in page and "<td><b>" not in page
    path = tmp_path / "page" / "status.html"
    status(Progress(Recipes(copied.config()), ask=lambda: None), every=0.1, as_json=False, page=path)  # ends by itself
    assert "refresh" not in path.read_text() and str(path) in capsys.readouterr().out.replace("\n", "")


def test_json_tells_everything(told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    status(told.progress(), every=None, as_json=True, page=None)
    content = json.loads(capsys.readouterr().out)
    assert content["stages"][0] | {"done": 0, "missing": 8, "total": 8} == content["stages"][0]
    assert {"workers", "jobs", "set_aside", "gpu_hours", "planned_gpu_hours", "finished"} <= content.keys()


def test_squeue_is_read() -> None:
    lines = (
        "41|40_1|RUNNING|gpu-17|1-02:03:04|None|stillhouse-x.compact|(null)\n42|42|PENDING||0:00|Resources|y|a|b\nodd\n"
    )
    first, second = parse(lines)
    assert (first.number, first.id, first.node, first.age) == ("41", "40_1", "gpu-17", 86400 + 2 * 3600 + 3 * 60 + 4)
    assert (second.state, second.reason, second.comment) == ("PENDING", "Resources", "a|b")


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.4, "4 s"), (125, "2 min 5 s"), (3700, "1 h 1 min"), (180_000, "2 d 2 h"), (-3, "0 s")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_teachers_and_stored_labels_count_each_for_itself(plan_site) -> None:
    """A backbone that is there stands for neither."""
    soft = {"evaluation.protocols": ["soft-fkd"], "evaluation.teacher.fit": {}}
    config = plan_site().config({"compare": ["dit"], "ipc": [1, 4], "seeds": [0], **soft})
    snapshot = Progress(Recipes(config), ask=lambda: None).look()
    jobs = Recipes(config).jobs()
    for name in ("teacher", "relabel"):
        count = sum(job.stage == name for job in jobs)
        assert count and stage(snapshot, name) == (0, 0, 0, count)
