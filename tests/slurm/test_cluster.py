"""Runs through ``slurm_profile`` on a real SLURM that is disturbed in every way we could think of.

After each, the results equal those of a run on one machine that nothing disturbed.
"""

import json
import os
import shutil
import signal
import subprocess

import pytest
import support
from lab import GPUS_PER_NODE, NODES
from places import CLASSES, Place

ONCE = dict.fromkeys(CLASSES, 1)
IN_HAND = "cat"  # third of six


def worker_pid(place: Place, name: str = IN_HAND) -> int:
    """The process that has a class in hand."""
    (claim,) = (place.results / "store" / "claims" / "encode.zarr" / name).glob("*.json")
    return int(json.loads(claim.read_text())["pid"])


def begin(place: Place, *arguments: str) -> None:
    """Start a run of ``encode`` and wait until a worker has its third class in hand."""
    place.hold(IN_HAND)
    place.start("--until", "encode", *arguments)
    place.wait_for(lambda: bool(place.began(IN_HAND)), f"{IN_HAND} is in hand")


def test_a_run_over_two_nodes_and_four_gpus(place: Place) -> None:
    """The whole pipeline; then one class changes, and that alone is computed again, without what Snakemake remembers."""
    place.shards = 4
    firsts = CLASSES[:4]
    place.hold(*firsts)
    controller = place.start("--config", "shards=4")
    place.wait_for(lambda: all(place.began(name) for name in firsts), "four jobs run at once")
    where = {place.began(name)[0].read_text() for name in firsts}
    assert {text.split()[0] for text in where} == set(NODES), "both nodes work"
    assert len(where) == len(NODES) * GPUS_PER_NODE == 4, "each job has a GPU of its own"
    running = place.lab.jobs("RUNNING")
    assert {(job["partition"], job["limit"]) for job in running} == {("gpu", "17:00"), ("gpu", "16:00")}, (
        "2 or 1 classes"
    )
    assert all("TresPerJob=gres:gpu:1" in place.lab.scontrol("show", "job", job["id"]) for job in running)
    place.release()
    assert controller.wait(900) == 0, controller.said
    assert (place.results / "tiny" / "report" / "index.html").is_file()
    stages = ("encode", "cluster", "invert", "sample")
    place.expect_undisturbed(*stages)
    for stage in stages:
        assert place.computed(stage) == ONCE
    assert place.run("--config", "shards=4", "-n").said.count("Nothing to be done") == 1

    support.draw(1, 50).save(place.folder / "train" / "bee" / "new.png")
    shutil.rmtree(place.folder / ".snakemake")
    again = place.run("--config", "shards=4", "--until", "sample")
    assert again.process.returncode == 0, again.said
    assert len(again.submitted()) == len(stages), "one shard of each stage"
    for stage in stages:
        assert place.computed(stage) == ONCE | {"bee": 2}


def test_preemption(place: Place) -> None:
    begin(place)
    urgent = place.lab.sbatch("-p", "urgent", "-N2", f"--gres=gpu:{GPUS_PER_NODE}", "-t", "60", wrap="sleep 600")
    place.wait_for(lambda: any(job["id"] == urgent for job in place.lab.jobs("RUNNING")), "the urgent job runs")
    place.release()
    subprocess.run(["scancel", urgent], check=True)
    place.wait_for(lambda: not any(job["id"] == urgent for job in place.lab.jobs()), "the urgent job is gone")
    resumes(place)
    (controller,) = place.controllers
    assert len(controller.submitted()) == 1, "SLURM started the same job again"
    assert not place.events("failed"), "a preemption is held against no class"


def resumes(place: Place) -> None:
    """Expect that a disturbed run of ``encode`` ends as if nothing had been."""
    controller = place.controllers[-1]
    place.wait_for(lambda: hurried(place) or controller.process.poll() is not None, "the controller ends", 900)
    assert controller.wait() == 0, controller.said
    place.expect_undisturbed("encode")
    assert place.computed() == ONCE


def hurried(place: Place) -> bool:
    """Let requeued jobs start at once."""
    place.lab.hurry()
    return False


def test_a_time_limit(place: Place) -> None:
    """A minute is not enough for six classes of six seconds: the worker stops before, and its next attempt has two."""
    place.seconds(6)
    # An option on the command line replaces all that the profile says of it.
    place.start("--until", "encode", "--set-resources", "encode:runtime=attempt", "encode:slurm_partition=gpu")
    resumes(place)
    stops = place.events("stop")
    assert stops[-1]["status"] == 0
    assert any(stop["status"] == 75 and "time is nearly up" in stop["reason"] for stop in stops[:-1]), stops
    starts = place.events("start")
    assert all(start["deadline"] is not None for start in starts)
    assert len({start["job"] for start in starts}) == len(place.controllers[0].submitted())


def test_kill_9_of_a_worker(place: Place) -> None:
    begin(place)
    os.kill(worker_pid(place), signal.SIGKILL)
    place.release()
    resumes(place)
    assert len(place.controllers[0].submitted()) == 2
    (failed,) = place.events("failed")
    assert failed["name"] == f"class {IN_HAND}"
    assert "ended without a word" in failed["error"]
    assert not failed["counted"], "a worker may end for any reason"


def test_a_node_that_fails(place: Place) -> None:
    begin(place)
    node = place.began(IN_HAND)[0].read_text().split()[0]
    place.lab.kill_node(node)
    place.lab.scontrol("update", f"nodename={node}", "state=down", "reason=lab")
    try:
        place.release()
        resumes(place)
        assert len({event["job"] for event in place.events("start")}) == 1, "SLURM moved the job to the other node"
        assert {path.read_text().split()[0] for path in place.began("fox")} == set(NODES) - {node}
    finally:
        place.lab.start_node(node)
        place.lab.scontrol("update", f"nodename={node}", "state=resume")
        place.lab.wait(lambda: place.lab.states()[node] == "idle", f"{node} is back")


def test_a_controller_that_is_killed_and_started_again(place: Place) -> None:
    begin(place)
    first = place.controllers[0]
    first.process.kill()
    first.process.wait()
    assert len(place.lab.jobs("RUNNING")) == 1, "the job goes on"
    assert place.run("--unlock").process.returncode == 0
    place.start("--until", "encode")
    place.wait_for(lambda: len(place.events("missing")) == 2, "a second worker has begun with the same shard")
    place.wait_for(lambda: len(place.computed()) == len(CLASSES) - 1, "it makes all but what the first has in hand")
    assert len(place.began(IN_HAND)) == 1
    place.release()
    resumes(place)


def test_two_controllers_at_once(place: Place, tmp_path_factory: pytest.TempPathFactory) -> None:
    """From two working copies, because Snakemake locks the one that it is started in."""
    other = tmp_path_factory.mktemp("other")
    for path in place.folder.iterdir():
        if path.name not in ("lab", ".snakemake"):
            (other / path.name).symlink_to(path)
    (place.folder / "results").mkdir()
    (other / "results").unlink(missing_ok=True)
    (other / "results").symlink_to(place.folder / "results")
    place.seconds(1)
    both = [place.start("--until", "encode"), place.start("--until", "encode", folder=other)]
    assert [controller.wait() for controller in both] == [0, 0], both[1].said
    place.expect_undisturbed("encode")
    assert place.computed() == ONCE
    assert len(place.events("start")) == 2


def test_a_poisoned_class(place: Place) -> None:
    poison = place.folder / "lab" / "poison" / IN_HAND
    poison.touch()
    controller = place.run("--until", "encode", "--retries", "1")
    assert controller.process.returncode == 1
    assert "class cat is set aside after 3 failed attempts: ArithmeticError: cat is poisoned" in controller.said
    assert "stillhouse retry" in controller.said
    assert place.computed() == {name: 1 for name in CLASSES if name != IN_HAND}
    assert len(place.began(IN_HAND)) == 1, "one process made all three attempts; the next job only says so"
    assert len(controller.submitted()) == 2

    status = json.loads(place.stillhouse("status", "--configfile", "tiny.yaml", "--json").stdout)
    (aside,) = status["set_aside"]
    assert (aside["stage"], aside["of"], aside["failures"]) == ("encode", "cat", 3)
    assert "ArithmeticError: cat is poisoned" in aside["error"]

    poison.unlink()
    cleared = place.stillhouse("retry", "--configfile", "tiny.yaml")
    assert cleared.returncode == 0, cleared.stderr
    assert "cat failed 3 times" in cleared.stdout
    place.start("--until", "encode")
    resumes(place)


def test_a_full_disk(place: Place) -> None:
    store = place.results / "store"
    store.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(store)], capture_output=True).returncode:
        if os.environ.get("STILLHOUSE_SLURM") == "required":
            pytest.fail("a small disk cannot be mounted here")
        pytest.skip("a small disk cannot be mounted here")
    try:
        controller = place.run("--until", "encode", "--retries", "0")
        assert controller.process.returncode == 1
        assert "Nothing already stored is harmed: free some space" in controller.said
        assert not place.events("failed"), "a full disk is no class's fault"
        assert len(place.computed()) < len(CLASSES)
        subprocess.run(["mount", "-o", "remount,size=50m", str(store)], check=True)
        place.start("--until", "encode")
        resumes(place)
    finally:
        subprocess.run(["umount", "--lazy", str(store)], check=True)


def test_the_doctor_on_a_cluster_without_slurmdbd(place: Place) -> None:
    found = place.stillhouse("doctor", "--configfile", "tiny.yaml", "--json")
    lines = {line["check"]: line for line in json.loads(found.stdout)["checks"]}
    assert lines["slurm status command"]["status"] == "ok", "the profile has squeue, and that is what it takes here"
    assert "squeue" in lines["slurm status command"]["found"]
    assert "gpu" in lines["slurm partitions"]["found"]
    assert "h100" in lines["slurm gpus"]["found"]
