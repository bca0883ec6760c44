"""``kill -9`` of a stage's program at any moment, then the same command again."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import support
from support import Programs, Site, leftovers, same_content, stored

from workflow_scripts.recipes import Recipes

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
BEFORE: dict[str, list[str]] = {
    "encode": [],
    "cluster": ["encode"],
    "invert": ["encode"],
    "sample": ["encode", "cluster"],
}


def arguments(site: Site, resolved: Path, stage: str) -> list[Any]:
    manifest = site.results / Recipes(site.config(OVERRIDES)).job(stage, JOBS[stage]).manifest
    return [
        "--resolved",
        resolved,
        "--shard",
        JOBS[stage],
        "--manifest",
        manifest,
        "--log",
        site.results / "logs" / f"{stage}.log",
    ]


@dataclass(frozen=True)
class Undisturbed:
    """A store that no one disturbed, its places by stage, and the seconds that each stage took."""

    results: Path
    places: dict[str, set[str]]
    seconds: dict[str, float]

    def compare(self, site: Site, stage: str) -> None:
        """Expect that a stage of a disturbed store ended the same."""
        made = {place for place in stored(site.results) if place.startswith(f"{stage}.zarr/")}
        assert made == self.places[stage]
        same_content(site.results, self.results, made)
        recipes = Recipes(site.config(OVERRIDES))
        for result in recipes.stage_results(stage, JOBS[stage]):
            recipes.store.read(result)


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, wide_images: Path, tiny_backbone: Path, programs: Programs
) -> Undisturbed:
    results = tmp_path_factory.mktemp("undisturbed") / "results"
    site = Site(wide_images / "train", wide_images / "test", tiny_backbone, results)
    resolved, seconds = site.resolved(OVERRIDES), {}
    for stage in JOBS:
        began = time.monotonic()
        assert programs.stage(stage, *arguments(site, resolved, stage)).wait().code == 0
        seconds[stage] = time.monotonic() - began
    return Undisturbed(results, {s: {p for p in stored(results) if p.startswith(f"{s}.zarr/")} for s in JOBS}, seconds)


def prepare(site: Site, stage: str) -> None:
    support.run_jobs(site.config(OVERRIDES), BEFORE[stage])


@pytest.mark.parametrize("stage", JOBS)
def test_a_stage_killed_at_random_moments_ends_as_if_nothing_had_happened(
    stage: str, wide_site: Site, programs: Programs, undisturbed: Undisturbed
) -> None:
    prepare(wide_site, stage)
    command = arguments(wide_site, wide_site.resolved(OVERRIDES), stage)
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # shown if the test fails
    moments = random.Random(seed)
    landed = 0
    for attempt in range(6):
        before = stored(wide_site.results)
        started = programs.stage(stage, *command)
        if attempt % 2:  # at any time
            time.sleep(moments.uniform(0, 0.5 * undisturbed.seconds[stage]))
        else:  # in the middle of a commit, if it can be caught
            count = len(before) + moments.randrange(3)
            wait_for_commit(started, wide_site.results, count)
        ended = started.kill()
        assert ended.code in (0, -signal.SIGKILL), ended.stderr
        landed += ended.code == -signal.SIGKILL
        after = stored(wide_site.results)
        assert after.items() >= before.items(), "a result was touched"
        same_content(wide_site.results, undisturbed.results, set(after) - set(before))
        if ended.code == 0:
            break
    assert landed >= 1, "kills have to land for this test to mean anything"
    assert programs.stage(stage, *command).wait().code == 0
    assert stored(wide_site.results).items() >= after.items()
    undisturbed.compare(wide_site, stage)


def wait_for_commit(started: support.Started, results: Path, count: int) -> None:
    """Wait until there are so many results and a further one is being written, or the program has ended."""
    support.wait_until(
        lambda: not started.process.is_alive() or bool(len(stored(results)) >= count and leftovers(results / "store"))
    )


@pytest.mark.parametrize("stage", JOBS)
def test_a_stage_killed_at_a_step_of_a_commit_loses_that_class_only(
    stage: str, wide_site: Site, programs: Programs, undisturbed: Undisturbed
) -> None:
    prepare(wide_site, stage)
    command = arguments(wide_site, wide_site.resolved(OVERRIDES), stage)
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # shown if the test fails
    moments = random.Random(seed)
    for rounds in range(1, 4):
        before = stored(wide_site.results)
        ended = programs.stage(stage, *command, die_at=moments.randrange(6, 30)).wait()
        assert ended.code == -signal.SIGKILL, ended.stderr
        assert stored(wide_site.results).items() > before.items() or len(stored(wide_site.results)) == len(before)
        assert len(list((wide_site.results / "store").glob("*.zarr/*/.tmp-*"))) <= rounds, "more than the class in hand"
    before = stored(wide_site.results)
    assert programs.stage(stage, *command).wait().code == 0
    assert stored(wide_site.results).items() >= before.items()
    undisturbed.compare(wide_site, stage)


def test_two_programs_at_the_same_shard_do_no_harm(
    wide_site: Site, programs: Programs, undisturbed: Undisturbed
) -> None:
    """A job that SLURM started twice."""
    prepare(wide_site, "sample")
    command = arguments(wide_site, wide_site.resolved(OVERRIDES), "sample")
    both = [programs.stage("sample", *command[:-2]) for _ in range(2)]
    assert [started.wait().code for started in both] == [0, 0]
    undisturbed.compare(wide_site, "sample")
    assert not leftovers(wide_site.results)


def test_the_command_itself_can_be_killed_and_run_again(
    wide_site: Site, programs: Programs, undisturbed: Undisturbed
) -> None:
    """``python -m workflow_scripts.stages.sample``, without any help of the tests."""
    prepare(wide_site, "sample")
    options = arguments(wide_site, wide_site.resolved(OVERRIDES), "sample")
    command = [sys.executable, "-m", "workflow_scripts.stages.sample", *map(str, options)]
    before = stored(wide_site.results)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=support.ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    support.wait_until(lambda: process.poll() is not None or len(stored(wide_site.results)) >= len(before) + 5, 120)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.communicate()[1]
    between = stored(wide_site.results)
    assert len(before) + 5 <= len(between) < len(before) + len(undisturbed.places["sample"])
    assert programs.stage("sample", *options).wait().code == 0
    assert stored(wide_site.results).items() >= between.items()
    undisturbed.compare(wide_site, "sample")


def test_what_the_killed_left_behind_is_no_result(wide_site: Site, programs: Programs) -> None:
    command = arguments(wide_site, wide_site.resolved(OVERRIDES), "encode")
    ended = programs.stage("encode", *command, die_at=40).wait()
    assert ended.code == -signal.SIGKILL
    assert leftovers(wide_site.results / "store"), "there is something to be mistaken"
    recipes = Recipes(wide_site.config(OVERRIDES))
    results = recipes.stage_results("encode", "000")
    assert set(stored(wide_site.results)) <= {result.place for result in results}
    missing = [result for result in results if not recipes.store.exists(result)]
    assert len(missing) == 8 - len(stored(wide_site.results)) > 0
