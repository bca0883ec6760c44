"""Controllers and compact arrays, by submitit's executors for one machine."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import submitit
import support

from workflow_scripts.config import RunConfig
from workflow_scripts.errors import ConfigError, StillhouseError
from workflow_scripts.operations import compact, controller
from workflow_scripts.operations.compact import PackWorker, balance, finish, pack
from workflow_scripts.operations.controller import Controller
from workflow_scripts.operations.queue import Queued
from workflow_scripts.operations.site_profile import Profile
from workflow_scripts.operations.submit import Request, send, wait
from workflow_scripts.recipes import CLASS_STAGES, Pack, Recipes

SECONDS = dict.fromkeys(compact.STAGES, 100.0)
# Stands in for ``python -m snakemake``: notes how it was called, and lives as long as a file is there.
FAKE = """\
import os, pathlib, sys, time
with open("calls", "a") as file:
    print(os.getpid(), *sys.argv[1:], sorted(key for key in os.environ if key.startswith(("SLURM_", "SUBMITIT_"))), file=file)
while pathlib.Path("hold").exists() and "--unlock" not in sys.argv:
    time.sleep(0.05)
sys.exit(int(pathlib.Path("status").read_text()) if pathlib.Path("status").exists() else 0)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a stand-in for Snakemake."""
    (tmp_path / "snakemake.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(support.ROOT)]))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return [line.partition(" ")[2] for line in path.read_text().splitlines()] if path.exists() else []


# ---------------------------------------------------------------- the controller


def test_a_controller_runs_snakemake_to_its_end(folder: Path) -> None:
    record = folder / "controller.json"
    Controller(["--cores", "2"], record)()
    assert calls(folder) == ["--cores 2 []"], "its children inherit nothing from its job"
    assert not record.exists()
    (folder / "status").write_text("3")
    with pytest.raises(StillhouseError, match="exit status 3"):
        Controller([], record)()
    assert not record.exists(), "Snakemake has removed its lock itself"


def test_the_lock_of_a_killed_controller_is_removed_and_that_of_a_living_one_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = folder / "controller.json"
    host = os.uname().nodename

    def left_by(**who: object) -> None:
        record.write_text(json.dumps({"job": None, "host": host, "pid": 1, **who}))

    gone = subprocess.Popen(["true"])
    gone.wait()
    left_by(pid=gone.pid)
    Controller(["--cores", "1"], record)()
    assert calls(folder) == ["--cores 1 --unlock []", "--cores 1 []"]
    (folder / "calls").unlink()

    monkeypatch.setattr(controller, "queue", lambda: None)
    for who in ({"pid": os.getppid()}, {"host": "elsewhere"}, {"job": "12"}):
        left_by(**who)
        with pytest.raises(StillhouseError, match="controls this run already"):
            Controller([], record)()
    assert not calls(folder)

    monkeypatch.setattr(controller, "queue", lambda: [Queued("12", "12", "RUNNING", "n1", 1.0, "", "x", "")])
    with pytest.raises(StillhouseError, match="SLURM job 12 controls"):
        Controller([], record)()
    monkeypatch.setattr(controller, "queue", list)
    Controller([], record)()
    assert len(calls(folder)) == 2, "a job that is not in the queue is gone"
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    left_by(job="12", host="elsewhere")
    Controller([], record)()
    assert len(calls(folder)) == 4, "SLURM has started this job again"


def test_whoever_comes_after_a_killed_snakemake_removes_its_lock(folder: Path) -> None:
    record = folder / "controller.json"
    (folder / "hold").touch()
    running = subprocess.Popen(
        [sys.executable, "-c", f"from {controller.__name__} import *; Controller([], Path({str(record)!r}))()"],
        stderr=subprocess.PIPE,
    )
    support.wait_until(lambda: len(calls(folder)) == 1)
    pid = int((folder / "calls").read_text().split()[0])
    os.kill(pid, signal.SIGTERM)  # a preemption signals every process of the job, and kills them some time later
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(0.5)
    os.kill(pid, signal.SIGKILL)
    assert "exit status -9" in running.communicate()[1].decode()
    assert record.exists()

    (folder / "hold").unlink()
    (folder / "status").write_text("1")
    with pytest.raises(StillhouseError, match="could not be removed"):
        Controller([], record)()
    assert record.exists() and calls(folder)[1:] == ["--unlock []"]
    (folder / "status").unlink()
    Controller([], record)()
    assert calls(folder)[2:] == ["--unlock []", "[]"]


def test_an_interrupted_controller_starts_again(folder: Path) -> None:
    """submitit's signal kills Snakemake, which does not hear it itself; the job starts anew and takes over."""
    (folder / "hold").touch()
    (job,) = send(
        [Controller(["--cores", "1"], folder / "controller.json")], Request("x", 60), "local", folder / "logs"
    )
    support.wait_until(lambda: len(calls(folder)) == 1)
    pid = int((folder / "calls").read_text().split()[0])
    os.kill(pid, signal.SIGUSR2)  # SLURM signals every process of the job
    task = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(task, signal.SIGUSR2)
    support.wait_until(lambda: len(calls(folder)) == 3)
    assert calls(folder)[1:] == ["--cores 1 --unlock []", "--cores 1 []"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    (folder / "hold").unlink()
    assert job.result() is None
    assert not (folder / "controller.json").exists()


# ---------------------------------------------------------------- sharing out


def test_work_is_balanced() -> None:
    load = {f"c{number:02d}": float(1 + number % 7) for number in range(37)}
    shares = balance(load, 5)
    assert sorted(name for share in shares for name in share.classes) == sorted(load)
    seconds = [share.seconds for share in shares]
    assert sum(seconds) == sum(load.values())
    assert max(seconds) - min(seconds) <= 1, "with these classes they come out even"
    assert [len(share.classes) for share in balance({"a": 10, "b": 1, "c": 1}, 2)] == [1, 2]


def test_scattered_classes_are_packed(plan_site, tmp_path: Path) -> None:
    site = plan_site(support.WIDE)
    config = site.config({"shards": 8, "compare": ["mgd3"], "ipc": [1], "seeds": [0]})
    recipes = Recipes(config)
    for job in recipes.jobs():
        for result in recipes.stage_results(job.stage, job.shard) if job.stage in CLASS_STAGES else ():
            if result.class_name not in ("bee", "dog", "gnu") or (job.stage, result.class_name) == ("encode", "gnu"):
                path = recipes.store.path(result)
                path.mkdir(parents=True)
                (path / "zarr.json").touch()
    packing = pack(recipes, SECONDS, most=64)
    assert packing.results == 3 * 3 - 1
    assert packing.shards == 8, "as many jobs as snakemake would start"
    assert packing.stages == ["encode", "cluster", "sample"]
    assert [share.classes for share in packing.shares] == [("bee", "dog", "gnu")], "too little work for two workers"
    assert [share.seconds for share in pack(recipes, SECONDS, 64, exactly=2).shares] == [500, 300]
    assert len(pack(recipes, SECONDS, 64, exactly=9).shares) == 3
    assert len(pack(recipes, dict.fromkeys(compact.STAGES, 1800.0), most=2).shares) == 2
    assert "8 missing results of 3 classes, which are in 8 jobs" in compact.describe(packing)


def test_what_is_made_for_all_classes_together_is_left_to_snakemake(plan_site) -> None:
    config = plan_site().config({"compare": ["random", "ld3m-mtt"], "ipc": [1], "seeds": [0]})
    packing = pack(Recipes(config), SECONDS, most=64)
    assert packing.stages == ["encode", "sample"]
    assert packing.left_out == ["experts", "match"]


def test_a_class_that_the_run_does_not_have(plan_site) -> None:
    with pytest.raises(ConfigError, match="class zebu"):
        Pack(plan_site().config(), ["bee", "zebu"])


# ---------------------------------------------------------------- working


def small(site: support.Site, overrides: Mapping[str, object] | None = None) -> RunConfig:
    return site.config({"shards": 3, "compare": ["mgd3"], "ipc": [1], "seeds": [0], **(overrides or {})})


@pytest.fixture
def preloaded(programs: support.Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let packs start the stages' programs from a process that has imported the libraries already."""

    def run(self: PackWorker, command: list[str]) -> int | None:
        assert command[:2] == [sys.executable, "-m"]
        return programs.stage(command[2].rpartition(".")[2], *command[3:]).wait().code

    monkeypatch.setattr(PackWorker, "run", run)


def resolved(config: RunConfig, folder: Path) -> Path:
    (folder / "run.json").write_text(config.canonical())
    return folder / "run.json"


def test_packs_make_what_shards_make(
    site: support.Site, tmp_path: Path, finished: tuple[support.Site, support.Done], preloaded: None
) -> None:
    """Two workers of three classes, one after the other; what is left then is judging the sets."""
    config = small(site)
    workers = [PackWorker(resolved(config, tmp_path), classes) for classes in (["ant", "cat"], ["bee"])]
    first, second = send(workers, Request("x", 60), "debug", tmp_path / "logs")
    wait([first], "debug")
    recipes = Recipes(config)
    missing = {job.stage for job in recipes.jobs() if not (config.results / job.manifest).exists()}
    assert {job.shard for job in finish(recipes)} == set(), "the first worker has done that"
    assert missing == {"encode", "cluster", "sample", "export", "evaluate", "measure", "report"}, (
        "bee is in a shard of its own"
    )
    wait([second], "debug")
    left = [job.stage for job in recipes.jobs() if not (config.results / job.manifest).exists()]
    assert set(left) == {"evaluate", "measure", "report"}
    places = support.stored(config.results)
    assert len(places) == 3 * 3
    support.same_content(config.results, finished[0].results, places)
    done = support.run_jobs(config)
    assert done.stages() == {"evaluate", "measure", "report"} and not done.places


def test_a_pack_that_fails_says_what(site: support.Site, tmp_path: Path, preloaded: None) -> None:
    next((site.train / "bee").iterdir()).write_bytes(b"no image")
    config = small(site, {"compare": ["random"]})
    (job,) = send(
        [PackWorker(resolved(config, tmp_path), ["ant", "bee"])], Request("x", 60), "debug", tmp_path / "logs"
    )
    with pytest.raises(StillhouseError, match="encode pack, sample random-pack: ended in an error"):
        wait([job], "debug")
    assert {place.split("/")[1] for place in support.stored(config.results)} == {"ant"}
    assert (config.results / Recipes(config).job("encode", "000").manifest).exists(), "ant alone is in shard 000"


def test_a_pack_that_gets_nowhere_gives_up(site: support.Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = PackWorker(resolved(small(site), tmp_path), ["ant"])
    monkeypatch.setattr(worker, "run", lambda command: 75)
    with pytest.raises(StillhouseError, match="nothing got done before the time limit"):
        worker()


def test_a_pack_is_started_again_as_it_was(tmp_path: Path) -> None:
    worker = PackWorker(tmp_path / "run.json", ["ant"])
    again = worker.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission) and again.function is worker


# ---------------------------------------------------------------- the profile and the console command


def test_the_shipped_profile_is_read() -> None:
    profile = Profile.read(support.ROOT / "slurm_profile")
    assert profile.resource("cluster", "slurm_partition") == "cpu"
    assert profile.resource("sample", "slurm_partition") == "gpu"
    assert profile.number("encode", "mem_mb", 0) == 32000
    assert profile.number("encode", "nothing", 7) == 7
    assert profile.threads("encode") > 1
    assert all(profile.number(stage, "seconds_per_item", 0) > 0 for stage in compact.STAGES)


def test_a_profile_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no config\.yaml in it"):
        Profile.read(tmp_path)
    (tmp_path / "config.yaml").write_text("set-resources: {encode: {mem_mb: 'lots'}}")
    with pytest.raises(ConfigError, match=r"encode.mem_mb: got 'lots'"):
        Profile.read(tmp_path).number("encode", "mem_mb", 1)


def test_submission_asks_and_refuses(plan_site, tmp_path: Path) -> None:
    site = plan_site()

    def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "workflow_scripts.cli", "submit", "--resolved", str(site.resolved())]
        environment = os.environ | {"PATH": str(tmp_path), "COLUMNS": "150"}
        options = {"cwd": support.ROOT, "env": environment, "stdin": subprocess.DEVNULL}
        return subprocess.run([*command, *arguments], **options, capture_output=True, text=True)

    asked = submit("--cluster", "local")
    assert asked.returncode == 1 and "jobs to run" in asked.stdout
    assert asked.stderr == "stillhouse: nobody is there to be asked: --yes submits without a question\n"
    nowhere = submit("--yes", "--compact")
    assert "go to 2 workers" in nowhere.stdout
    assert nowhere.stderr.startswith("stillhouse: there is no SLURM here (no sbatch)")
    (site.train / "ant").rename(site.train / "zebu")
    invalid = submit("--yes")
    assert invalid.returncode == 1 and "zebu" in invalid.stderr and "Submitted" not in invalid.stdout
