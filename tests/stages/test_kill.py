"""``kill -9`` of a stage's program at any moment, then the same command again."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import support
from support import Programs, Site, checksums, leftovers, stored

from workflow_scripts.recipes import CLASS_STAGES, Recipes

# Long enough that a random moment is one of work: eight classes, small batches, more steps.
OVERRIDES: dict[str, Any] = {
    "compare": ["random", "mgd3", "d3hr"],
    "sampler.steps": 20,
    "methods.mgd3.guidance": [{"term": "mode", "scale": 0.1, "stop": 8}],
    "compute.sample_batch": 8,
    "compute.invert_batch": 4,
    "compute.encode_batch": 4,
}
JOBS = {"encode": "000", "cluster": "000", "invert": "000", "sample": "mgd3-000"}
BEFORE: dict[str, list[str]] = {"encode": [], "cluster": ["encode"], "invert": ["encode"], "sample": ["encode", "cluster"]}


def arguments(site: Site, resolved: Path, stage: str) -> list[Any]:
    manifest = site.results / Recipes(site.config(OVERRIDES)).job(stage, JOBS[stage]).manifest
    return ["--resolved", resolved, "--shard", JOBS[stage], "--manifest", manifest, "--log", site.results / "logs" / f"{stage}.log"]


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, wide_images: Path, tiny_backbone: Path, programs: Programs
) -> tuple[dict[str, dict[str, str]], dict[str, float]]:
    """The checksums of a store that no one disturbed, and the seconds that each stage took."""
    site = Site(wide_images / "train", wide_images / "test", tiny_backbone, tmp_path_factory.mktemp("undisturbed") / "results")
    resolved, seconds = site.resolved(OVERRIDES), {}
    for stage in JOBS:
        began = time.monotonic()
        assert programs.stage(stage, *arguments(site, resolved, stage)).wait().code == 0
        seconds[stage] = time.monotonic() - began
    return checksums(site.results), seconds


def prepare(site: Site, stage: str) -> None:
    support.run_jobs(site.config(OVERRIDES), BEFORE[stage])


def of_stage(found: dict[str, Any], *stages: str) -> dict[str, Any]:
    return {place: value for place, value in found.items() if place.split(".")[0] in stages}


@pytest.mark.parametrize("stage", JOBS)
def test_a_stage_killed_at_random_moments_ends_as_if_nothing_had_happened(
    stage: str, wide_site: Site, programs: Programs, undisturbed: tuple[dict[str, dict[str, str]], dict[str, float]]
) -> None:
    expected, seconds = undisturbed
    prepare(wide_site, stage)
    command = arguments(wide_site, wide_site.resolved(OVERRIDES), stage)
    seed = random.SystemRandom().randrange(10**6)
    moments = random.Random(seed)
    kills, landed, before = 0, 0, stored(wide_site.results)
    while kills < 12:
        started = programs.stage(stage, *command)
        # Some at any time, some in the middle of a commit.
        if kills % 2:
            time.sleep(moments.uniform(0, seconds[stage]))
        else:
            wanted = len(before) + moments.randrange(3)
            support.wait_until(
                lambda started=started, wanted=wanted: not started.process.is_alive()
                or (len(stored(wide_site.results)) >= wanted and bool(leftovers(wide_site.results / "store")))
            )
        ended = started.kill()
        kills += 1
        assert ended.code in (0, -signal.SIGKILL), f"seed {seed}: {ended.stderr}"
        after = stored(wide_site.results)
        assert after.items() >= before.items(), f"seed {seed}: a result was touched"
        assert set(after) <= set(expected), f"seed {seed}"
        assert checksums(wide_site.results).items() <= expected.items(), f"seed {seed}"
        landed += ended.code == -signal.SIGKILL
        before = after
        if ended.code == 0:
            break
    assert landed >= 2, f"seed {seed}: kills have to land for this test to mean anything"
    assert programs.stage(stage, *command).wait().code == 0, f"seed {seed}"
    assert stored(wide_site.results).items() >= before.items()
    made = of_stage(checksums(wide_site.results), stage)
    assert made == of_stage(expected, stage), f"seed {seed}"
    readable(wide_site, stage)
    assert not [path for path in leftovers(wide_site.results) if path in map(Path, stored(wide_site.results))]


def readable(site: Site, *stages: str) -> None:
    recipes = Recipes(site.config(OVERRIDES))
    for stage in stages:
        for result in recipes.stage_results(stage, JOBS[stage]):
            recipes.store.read(result)


@pytest.mark.parametrize("stage", JOBS)
def test_a_stage_killed_at_a_step_of_a_commit_loses_that_class_only(
    stage: str, wide_site: Site, programs: Programs, undisturbed: tuple[dict[str, dict[str, str]], dict[str, float]]
) -> None:
    prepare(wide_site, stage)
    command = arguments(wide_site, wide_site.resolved(OVERRIDES), stage)
    seed = random.SystemRandom().randrange(10**6)
    moments = random.Random(seed)
    total, rounds = len(of_stage(undisturbed[0], stage)), 0
    before = stored(wide_site.results)
    while rounds < 4:
        rounds += 1
        ended = programs.stage(stage, *command, die_at=moments.randrange(20, 90)).wait()
        assert ended.code in (0, -signal.SIGKILL), f"seed {seed}: {ended.stderr}"
        after = stored(wide_site.results)
        assert after.items() >= before.items(), f"seed {seed}"
        strays = {path.parent for path in (wide_site.results / "store").glob("*.zarr/*/.tmp-*")}
        assert len(list((wide_site.results / "store").glob("*.zarr/*/.tmp-*"))) <= rounds, f"seed {seed}: {strays}"
        before = after
        if ended.code == 0:
            break
    assert programs.stage(stage, *command).wait().code == 0
    assert stored(wide_site.results).items() >= before.items()
    assert len(of_stage(stored(wide_site.results), stage)) == total
    assert of_stage(checksums(wide_site.results), stage) == of_stage(undisturbed[0], stage), f"seed {seed}"


def test_two_programs_at_the_same_shard_do_no_harm(
    wide_site: Site, programs: Programs, undisturbed: tuple[dict[str, dict[str, str]], dict[str, float]]
) -> None:
    """A job that SLURM started twice."""
    prepare(wide_site, "sample")
    command = arguments(wide_site, wide_site.resolved(OVERRIDES), "sample")
    both = [programs.stage("sample", *command[:-2]) for _ in range(2)]
    assert [started.wait().code for started in both] == [0, 0]
    assert checksums(wide_site.results).items() <= undisturbed[0].items()
    assert of_stage(checksums(wide_site.results), "sample") == of_stage(undisturbed[0], "sample")
    assert not leftovers(wide_site.results)


def test_the_command_itself_can_be_killed_and_run_again(
    wide_site: Site, undisturbed: tuple[dict[str, dict[str, str]], dict[str, float]]
) -> None:
    """``python -m workflow_scripts.stages.sample``, without any help of the tests."""
    prepare(wide_site, "sample")
    command = [sys.executable, "-m", "workflow_scripts.stages.sample"]
    command += [str(argument) for argument in arguments(wide_site, wide_site.resolved(OVERRIDES), "sample")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    before = stored(wide_site.results)
    process = subprocess.Popen(command, cwd=support.ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    support.wait_until(lambda: process.poll() is not None or len(stored(wide_site.results)) >= len(before) + 5)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.communicate()[1]
    between = stored(wide_site.results)
    assert len(before) + 5 <= len(between) < len(before) + len(of_stage(undisturbed[0], "sample"))
    again = subprocess.run(command, cwd=support.ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert stored(wide_site.results).items() >= between.items()
    assert of_stage(checksums(wide_site.results), "sample") == of_stage(undisturbed[0], "sample")
    readable(wide_site, "sample")


def test_what_the_killed_left_behind_is_no_result(
    wide_site: Site, programs: Programs, undisturbed: tuple[dict[str, dict[str, str]], dict[str, float]]
) -> None:
    command = arguments(wide_site, wide_site.resolved(OVERRIDES), "encode")
    ended = programs.stage("encode", *command, die_at=30).wait()
    assert ended.code == -signal.SIGKILL
    assert leftovers(wide_site.results / "store"), "there is something to be mistaken"
    recipes = Recipes(wide_site.config(OVERRIDES))
    places = {result.place for job in recipes.jobs() if job.stage in CLASS_STAGES for result in recipes.stage_results(job.stage, job.shard)}
    assert set(stored(wide_site.results)) <= places
    missing = [result for result in recipes.stage_results("encode", "000") if not recipes.store.exists(result)]
    assert len(missing) == 8 - len(stored(wide_site.results)) > 0
