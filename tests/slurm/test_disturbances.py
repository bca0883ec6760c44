"""Workers and nodes that are stopped or fail, through ``slurm_profile`` on a real SLURM.

After each, the results equal those of a run on one machine that nothing disturbed.
"""

import json
import os
import signal
import subprocess

from lab import GPUS_PER_NODE, NODES
from places import IN_HAND, Place, begin, resumes


def worker_pid(place: Place, name: str = IN_HAND) -> int:
    """The process that has a class in hand."""
    (claim,) = (place.results / "store" / "claims" / "encode.zarr" / name).glob("*.json")
    return int(json.loads(claim.read_text())["pid"])


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


def test_a_time_limit(place: Place) -> None:
    """Two minutes, half of one kept in reserve, are not enough for six classes of 13 seconds; the next attempt has three."""
    place.seconds(13)
    # An option on the command line replaces all that the profile says of it.
    place.start("--until", "encode", "--set-resources", "encode:runtime=attempt + 1", "encode:slurm_partition=gpu")
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
        if (
            "NODE_FAIL" not in place.controllers[0].said
        ):  # else Snakemake saw it before SLURM moved the job, and sent another
            assert len({event["job"] for event in place.events("start")}) == 1, "SLURM moved the job to the other node"
        assert {path.read_text().split()[0] for path in place.began("fox")} == set(NODES) - {node}
    finally:
        place.lab.start_node(node)
        place.lab.scontrol("update", f"nodename={node}", "state=resume")
        place.lab.wait(lambda: place.lab.states()[node] == "idle", f"{node} is back")
