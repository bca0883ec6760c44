"""Workers and nodes that are killed, through ``slurm_profile`` on a real SLURM.

After each, the results equal those of a run on one machine that nothing disturbed.
"""

import json
import os
import signal

from lab import NODES
from places import IN_HAND, Place, begin, resumes


def worker_pid(place: Place, name: str = IN_HAND) -> int:
    """The process that has a class in hand."""
    (claim,) = (place.results / "store" / "claims" / "encode.zarr" / name).glob("*.json")
    return int(json.loads(claim.read_text())["pid"])


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
