"""The loop over a shard's results, and the programs around it."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
from support import Programs, Site

from workflow_scripts.errors import DataError, StillhouseError, StoreError
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import write_resolved
from workflow_scripts.stages.notice import NOTICE, UNFINISHED, Notice, Unfinished, parse_seconds
from workflow_scripts.stages.worker import Computed, run_shard
from workflow_scripts.store.attempts import Attempts, Failure
from workflow_scripts.store.claims import Claims, Left
from workflow_scripts.store.results import Result


def constant(result: Result) -> Computed:
    return result, {"mean": np.full(3, len(result.class_name), np.float16)}, {"note": result.class_name}


class Compute:
    """A stage's computation that keeps what it was handed, and fails at some classes."""

    def __init__(self, fail_at: Mapping[str, Exception] | None = None, at_once: int = 1):
        self.handed: list[list[str]] = []
        self.fail_at, self.at_once = dict(fail_at or {}), at_once

    def __call__(self, missing: Iterable[Result]) -> Iterator[Computed]:
        missing = iter(missing)
        while batch := list(islice(missing, self.at_once)):
            self.handed.append([result.class_name for result in batch])
            for result in batch:
                if result.class_name in self.fail_at:
                    raise self.fail_at[result.class_name]
            yield from map(constant, reversed(batch))

    @property
    def names(self) -> list[str]:
        return [name for batch in self.handed for name in batch]


@pytest.fixture(autouse=True)
def no_notice() -> Iterator[None]:
    yield
    NOTICE.told, NOTICE.deadline = False, None


@pytest.fixture
def recipes(wide_site: Site) -> Recipes:
    return Recipes(wide_site.config())


def existing(recipes: Recipes) -> list[str]:
    return [name for name in recipes.classes if recipes.store.exists(recipes.latents(name))]


def test_a_shard_computes_what_is_missing_only(recipes: Recipes) -> None:
    for name in ("bee", "gnu"):
        recipes.store.commit(*constant(recipes.latents(name)))
    compute = Compute()
    manifest = run_shard(recipes, "encode", "000", compute)
    assert compute.names == [name for name in support.WIDE if name not in ("bee", "gnu")]
    assert manifest == {
        "results": [
            {"class": name, "place": recipes.latents(name).place, "digest": recipes.latents(name).digest}
            for name in support.WIDE
        ]
    }
    again = Compute()
    assert run_shard(recipes, "encode", "000", again) == manifest
    assert not again.handed, "nothing is missing, so nothing is loaded"


def test_results_may_come_in_any_order(recipes: Recipes) -> None:
    backwards = run_shard(Recipes(recipes.config), "encode", "000", Compute(at_once=8))
    assert backwards == run_shard(recipes, "encode", "000", Compute())
    for name in support.WIDE:
        stored = recipes.store.read(recipes.latents(name))
        assert stored.arrays["mean"][0] == len(name)
        assert stored.record["note"] == name


# ---------------------------------------------------------------- failures


def failures(recipes: Recipes, name: str) -> list[Failure]:
    return Attempts(recipes.store.root / "attempts").failures(recipes.latents(name).place)


def told(recipes: Recipes, event: str) -> list[dict[str, Any]]:
    lines = [line for path in sorted((recipes.config.results / "events").rglob("*.jsonl")) for line in path.open()]
    return [found for found in map(json.loads, lines) if found["event"] == event]


def test_a_class_that_fails_is_set_aside_and_all_others_are_made(
    recipes: Recipes, capfd: pytest.CaptureFixture[str]
) -> None:
    compute = Compute({"dog": ArithmeticError("no dog")})
    with pytest.raises(
        StillhouseError, match="dog is set aside after 3 failed attempts: ArithmeticError: no dog"
    ) as error:
        run_shard(recipes, "encode", "000", compute)
    assert "stillhouse retry" in str(error.value)
    assert existing(recipes) == [name for name in support.WIDE if name != "dog"]
    assert compute.names == [*support.WIDE, "dog", "dog"], "the last two attempts come last"
    assert capfd.readouterr().err.count("Traceback") == 3
    assert [failure.counted for failure in failures(recipes, "dog")] == [True] * 3
    assert "raise self.fail_at[result.class_name]\nArithmeticError: no dog" in failures(recipes, "dog")[
        0
    ].traceback.replace("    ", "")
    assert [event["name"] for event in told(recipes, "failed")] == ["class dog"] * 3

    again = Compute()
    with pytest.raises(StillhouseError, match="dog is set aside"):
        run_shard(recipes, "encode", "000", again)
    assert not again.handed, "a class that is set aside costs nothing"

    Attempts(recipes.store.root / "attempts").clear(recipes.latents("dog").place)
    run_shard(recipes, "encode", "000", again)
    assert again.names == ["dog"]


def test_of_a_batch_that_fails_only_the_guilty_is_set_aside(recipes: Recipes) -> None:
    compute = Compute({"dog": ArithmeticError("no dog")}, at_once=4)
    with pytest.raises(StillhouseError, match="dog is set aside after 3 failed"):
        run_shard(recipes, "encode", "000", compute)
    assert existing(recipes) == [name for name in support.WIDE if name != "dog"]
    assert compute.handed == [
        ["ant", "bee", "cat", "dog"],
        ["elk", "fox", "gnu", "hen"],
        ["ant", "bee"],
        ["cat", "dog"],
        ["cat"],
        *[["dog"]] * 3,
    ], "suspects come last, and in halves"
    assert not failures(recipes, "ant"), "it succeeded in the end"


def test_a_failure_that_passes_leaves_no_trace(recipes: Recipes) -> None:
    seen: list[str] = []

    def flaky(missing: Iterable[Result]) -> Iterator[Computed]:
        for result in missing:
            seen.append(result.class_name)
            if seen.count("dog") == 1 and result.class_name == "dog":
                raise OSError("stale file handle")
            yield constant(result)

    run_shard(recipes, "encode", "000", flaky)
    assert seen == [*support.WIDE, "dog"]
    assert existing(recipes) == list(support.WIDE)
    assert not failures(recipes, "dog")


def test_errors_for_the_user_to_mend_are_told_together_and_not_held_against_a_class(recipes: Recipes) -> None:
    bad = {name: DataError(f"class {name}: bad image") for name in ("ant", "bee", "dog")}
    compute = Compute(bad)
    with pytest.raises(StillhouseError, match="class ant: bad image\nclass bee: bad image\nclass dog: bad image"):
        run_shard(recipes, "encode", "000", compute)
    assert compute.names == list(support.WIDE), "trying again would not mend an image"
    again = Compute()
    run_shard(recipes, "encode", "000", again)
    assert again.names == ["ant", "bee", "dog"]


def test_what_fails_for_every_class_is_no_class_s_fault(recipes: Recipes) -> None:
    broken = {name: RuntimeError("driver too old") for name in support.WIDE}
    compute = Compute(broken)
    with pytest.raises(RuntimeError, match="driver too old"):
        run_shard(recipes, "encode", "000", compute)
    assert compute.names == ["ant", "bee", "cat"]
    assert not list(recipes.store.root.rglob("attempts/**/*.json"))

    def unloadable(missing: Iterable[Result]) -> Iterator[Computed]:
        raise RuntimeError("no weights")
        yield

    with pytest.raises(RuntimeError, match="no weights"):
        run_shard(recipes, "encode", "000", unloadable)


def test_a_process_whose_gpu_is_lost_leaves_the_rest_to_a_new_one(recipes: Recipes) -> None:
    compute = Compute({"dog": RuntimeError("CUDA error: an illegal memory access was encountered")})
    with pytest.raises(Unfinished):
        run_shard(recipes, "encode", "000", compute)
    assert existing(recipes) == ["ant", "bee", "cat"]
    again = Compute()
    run_shard(recipes, "encode", "000", again)
    assert again.names == ["elk", "fox", "gnu", "hen", "dog"], "the suspect comes last"


def test_a_disk_that_is_full_ends_the_job_and_blames_no_class(
    recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr(recipes.store, "commit", full)
    compute = Compute()
    with pytest.raises(StoreError):
        run_shard(recipes, "encode", "000", compute)
    assert compute.names == ["ant"]
    assert not list(recipes.store.root.rglob("*.json")), "neither claims nor attempts are left"


# ---------------------------------------------------------------- stopping


def test_a_worker_stops_at_a_class_when_it_is_told_to(recipes: Recipes) -> None:
    def compute(missing: Iterable[Result]) -> Iterator[Computed]:
        for number, result in enumerate(missing):
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield constant(result)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Unfinished, match="told to by SIGTERM: 5 of 8 results are left"):
        run_shard(recipes, "encode", "000", compute)
    assert signal.getsignal(signal.SIGTERM) is before
    assert existing(recipes) == ["ant", "bee", "cat"]


def test_a_worker_stops_before_its_time_is_up(recipes: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def compute(missing: Iterable[Result]) -> Iterator[Computed]:
        for result in missing:
            now[0] += 100
            yield constant(result)

    NOTICE.give(minutes=10)
    with pytest.raises(Unfinished, match="time is nearly up: 3 of 8"):
        run_shard(recipes, "encode", "000", compute)
    assert now[0] == 1500, "100 s are left; the next class may take 125, and the end 30"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5:00", 300), ("1:02:03", 3723), ("2-00:00:01", 172801), ("1-12", 129600), ("0:45", 45), ("7", 420)],
)
def test_slurm_s_times(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["UNLIMITED", "INVALID", "NOT_SET", "", "Partition_Limit"])
def test_slurm_s_words_for_no_time(text: str) -> None:
    assert parse_seconds(text) is None


# ---------------------------------------------------------------- sharing with other workers


def test_two_workers_share_a_shard(recipes: Recipes) -> None:
    """The other worker has two classes in hand; it makes one, and dies with the other."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom workflow_scripts.store.claims import Claims\n"
        "with Claims(Path(sys.argv[1])) as claims:\n"
        "    assert claims.take(sys.argv[2]) is True and claims.take(sys.argv[3]) is True\n"
        "    print('ready', flush=True)\n    time.sleep(600)\n"
    )
    bee, dog = recipes.latents("bee"), recipes.latents("dog")
    command = [sys.executable, "-c", script, recipes.store.root / "claims", bee.place, dog.place]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=support.ROOT)
    assert other.stdout is not None
    assert other.stdout.readline() == b"ready\n"
    seen: list[str] = []

    def compute(missing: Iterable[Result]) -> Iterator[Computed]:
        for result in missing:
            seen.append(result.class_name)
            if result.class_name == "hen":  # the last of those that are free
                recipes.store.commit(*constant(bee))
                other.kill()
                other.wait()
            yield constant(result)

    run_shard(recipes, "encode", "000", compute)
    assert seen == ["ant", "cat", "elk", "fox", "gnu", "hen", "dog"]
    (died,) = told(recipes, "failed")
    assert (died["name"], died["counted"]) == ("class dog", False)
    assert "ended without a word" in died["error"]
    left = [path.parent.name for path in (recipes.store.root / "claims").rglob("*.json")]
    assert left == ["bee"], "no one asks for a claim to what exists"


def test_a_claim_ends_with_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "b.json"

    def leave(**changes: Any) -> None:
        path.parent.mkdir(exist_ok=True)
        owner = {
            "host": "elsewhere",
            "pid": 1,
            "job": "7",
            "started": 100.0,
            "token": "x",
            "told": False,
            "alone": True,
        }
        path.write_text(json.dumps(owner | changes))

    with Claims(tmp_path) as mine:
        leave()
        assert mine.take("a/b") is False, "fresh, and elsewhere"
        os.utime(path, (0, 0))
        taken = mine.take("a/b")
        assert isinstance(taken, Left)
        assert (taken.told, taken.alone) == (False, True)
        assert "elsewhere" in taken.owner
        mine.release("a/b")
        assert not path.exists()

        path.write_text("")
        assert mine.take("a/b") is False, "begun this moment"
        leave(host=platform.node(), pid=2**22 + 1)
        assert isinstance(mine.take("a/b"), Left), "its process is gone"
        mine.release("a/b")
        leave(host=platform.node(), pid=1)
        assert mine.take("a/b") is False, "its process lives"

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with Claims(tmp_path) as mine:
        leave(told=True)
        taken = mine.take("a/b")
        assert isinstance(taken, Left), "this job's earlier life, on a node that failed"
        assert taken.told
        leave(started=4e9)
        assert mine.take("a/b") is False, "this job's later life: this one is a ghost"
        leave(token="y", host=platform.node(), pid=os.getpid())
        mine.release("a/b")
        assert path.exists(), "taken over meanwhile, and left alone"


def test_a_worker_that_is_told_to_stop_says_so_in_its_claims(tmp_path: Path) -> None:
    notice = Notice()
    with Claims(tmp_path, told=lambda: notice.told) as mine:
        mine.take("a")
        notice.told = True
        support.wait_until(lambda: json.loads((tmp_path / "a.json").read_text())["told"] is True)


def test_a_place_that_takes_no_claims_stops_no_one(tmp_path: Path) -> None:
    (tmp_path / "claims").write_text("a file where a folder should be")
    with Claims(tmp_path / "claims") as mine:
        assert mine.take("encode.zarr/ant/1") is True
        mine.release("encode.zarr/ant/1")


# ---------------------------------------------------------------- records and events


def test_each_result_is_committed_before_the_next_is_computed(recipes: Recipes) -> None:
    seen = []

    def compute(missing: Iterable[Result]) -> Iterator[Computed]:
        for result in missing:
            seen.append(len(existing(recipes)))
            yield constant(result)

    run_shard(recipes, "encode", "000", compute)
    assert seen == list(range(8))


def test_the_record_says_what_computed_a_result_and_how_long_that_took(recipes: Recipes) -> None:
    run_shard(recipes, "encode", "000", Compute(), device="cuda")
    record = recipes.store.record(recipes.latents("fox"))
    assert record["device"] == "cuda"
    assert record["host"]
    assert 0 <= record["seconds"] < 60
    assert {"stillhouse", "torch", "zarr", "numpy"} <= record["versions"].keys()


def test_shards_share_the_classes_out(wide_site: Site) -> None:
    recipes = Recipes(wide_site.config({"shards": 3}))
    asked: list[str] = []
    for shard in recipes.shards:
        compute = Compute()
        run_shard(recipes, "encode", shard, compute)
        asked += compute.names
    assert sorted(asked) == sorted(support.WIDE)


# ---------------------------------------------------------------- programs


def manifest_of(site: Site, stage: str, shard: str) -> Path:
    return site.results / Recipes(site.config()).job(stage, shard).manifest


def test_a_program_makes_its_results_and_its_manifest(site: Site, programs: Programs) -> None:
    log = site.results / "logs" / "encode.log"
    arguments = [
        "--resolved",
        site.resolved(),
        "--shard",
        "000",
        "--log",
        log,
        "--manifest",
        manifest_of(site, "encode", "000"),
    ]
    ended = programs.stage("encode", *arguments).wait()
    assert (ended.code, ended.stdout, ended.stderr) == (0, "", "")
    assert support.tally(support.stored(site.results)) == {"encode": dict.fromkeys(support.CLASSES, 1)}
    manifest = json.loads(manifest_of(site, "encode", "000").read_text())
    assert (manifest["stage"], manifest["shard"]) == ("encode", "000")
    assert {result["place"] for result in manifest["results"]} == set(support.stored(site.results))
    assert "encode 000" in log.read_text(), "progress goes to the log"
    assert "accelerate" not in log.read_text(), "the libraries' advice does not"

    recipes = Recipes(site.config())
    (start,), (found,), (stop,) = (told(recipes, event) for event in ("start", "missing", "stop"))
    assert start["digest"] == recipes.job("encode", "000").digest
    assert (found["missing"], found["total"], stop["status"]) == (3, 3, 0)
    assert [event["name"] for event in told(recipes, "done")] == [f"class {name}" for name in support.CLASSES]

    before = support.stored(site.results)
    assert programs.stage("encode", *arguments).wait().code == 0
    assert support.stored(site.results) == before


def test_a_program_stops_before_so_many_minutes_and_goes_on_next_time(site: Site, programs: Programs) -> None:
    arguments = ["--resolved", site.resolved(), "--shard", "000"]
    ended = programs.stage("encode", *arguments, "--minutes", "0.4").wait()
    assert ended.code == UNFINISHED, ended.stderr
    assert "3 of 3 results are left" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert told(Recipes(site.config()), "stop")[0]["status"] == UNFINISHED
    assert programs.stage("encode", *arguments, "--minutes", "60").wait().code == 0


def test_a_program_refuses_a_plan_that_is_out_of_date(site: Site, programs: Programs) -> None:
    planned, resolved = manifest_of(site, "encode", "000"), site.resolved()
    support.draw(1, 50).save(site.train / "cat" / "new.png")
    ended = programs.stage("encode", "--resolved", resolved, "--shard", "000", "--manifest", planned).wait()
    assert ended.code == 1
    (message,) = ended.stderr.splitlines()
    assert message.startswith("encode 000: the images")
    assert "same snakemake command again" in message
    assert not support.stored(site.results)
    assert not planned.exists()


def test_images_that_change_meanwhile_are_noticed(site: Site, programs: Programs) -> None:
    """No manifest may say that a class is done if its images are others by now."""
    resolved = site.resolved()
    started = programs.start(encode_while_images_change, str(resolved), str(site.train / "cat" / "new.png"))
    ended = started.wait()
    assert ended.code == 1
    assert "changed since this job was planned" in ended.stderr
    assert not list((site.results / "manifests").rglob("*.json"))


def encode_while_images_change(resolved: str, added: str) -> None:
    from workflow_scripts.stages import common, encode

    def work(recipes: Recipes, shard: str) -> Mapping[str, object]:
        done = encode.work(recipes, shard)
        support.draw(1, 50).save(added)
        return done

    sys.argv = ["encode", "--resolved", resolved, "--shard", "000"]
    common.stage_main("encode", "", work, "")


def test_a_program_reads_the_configuration_like_every_other(site: Site, programs: Programs, tmp_path: Path) -> None:
    import yaml

    run = support.tiny_run(site.train, site.test, site.backbone)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(support.document(run, site.results)))
    arguments = [
        "--config",
        tmp_path / "mine.yaml",
        "--run",
        "tiny",
        "--set",
        "compute.encode_batch=3",
        "--shard",
        "000",
    ]
    ended = programs.stage("encode", *arguments).wait()
    assert ended.code == 0, ended.stderr
    assert manifest_of(site, "encode", "000").exists()

    ended = programs.stage("encode", *arguments, "--set", "compute.encode_batch=none").wait()
    assert ended.code == 1
    assert ended.stderr.count("\n") == 1
    assert "compute.encode_batch: got 'none'" in ended.stderr


@pytest.mark.parametrize(
    "stage",
    ["encode", "cluster", "invert", "features", "sample", "export", "evaluate", "measure", "report", "fit_backbone"],
)
def test_every_program_says_how_it_is_used(stage: str, programs: Programs) -> None:
    ended = programs.stage(stage, "--help").wait()
    assert ended.code == 0
    assert f"python -m workflow_scripts.stages.{stage}" in ended.stdout
    for option in ("--resolved", "--config", "--run", "--set", "--shard", "--manifest", "--log"):
        assert option in ended.stdout


@pytest.mark.parametrize(
    ("stage", "shard"),
    [
        ("encode", "first"),
        ("encode", "999"),
        ("encode", "-1"),
        ("sample", "000"),
        ("sample", "nomethod-000"),
        ("sample", "mgd3-x"),
        ("export", "nomethod"),
        ("evaluate", "mgd3"),
        ("evaluate", "mgd3-ipc99-000"),
        ("evaluate", "mgd3-ipc1-999"),
    ],
)
def test_a_shard_that_does_not_exist_is_refused(stage: str, shard: str, site: Site, programs: Programs) -> None:
    ended = programs.stage(stage, "--resolved", site.resolved(), f"--shard={shard}").wait()
    assert ended.code in (1, 2)
    assert "Traceback" not in ended.stderr, ended.stderr.splitlines()[-1]
    assert shard in ended.stderr
    assert not list(site.results.rglob("*.json")), "no manifest, no result"


def test_the_resolved_configuration_is_written_once(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "resolved.json"
    write_resolved(site.config(), path)
    os.utime(path, ns=(5, 5))
    inode = path.stat().st_ino
    write_resolved(site.config(), path)
    assert path.stat().st_ino == inode
    assert path.stat().st_mtime_ns > 5, "gc sees that it is used"
    path.write_text("damaged")
    write_resolved(site.config(), path)
    assert path.read_text() == site.config().canonical()


def test_records_have_the_licences_of_the_weights(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    own = shutil.copytree(site.backbone / "vae", site.results.parent / "vae")
    (own / "README.md").write_text("---\nlicense: mit\n---\n")
    config = site.config({"backbone.vae": str(own)})
    support.run_jobs(config, ("encode",))
    recipes = Recipes(config)
    record = recipes.store.record(recipes.latents("ant"))
    assert record["licences"] == {"denoiser": "unknown", "vae": "MIT"}
    assert capfd.readouterr().err.count("Licence of the backbone's weights: denoiser unknown, vae MIT.") == 1
    assert recipes.latents("ant") == Recipes(site.config()).latents("ant"), "the same bytes are the same autoencoder"
