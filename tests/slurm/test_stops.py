"""Workers that SLURM stops: for a job that is more urgent, or because their time is up.

After each, the results equal those of a run on one machine that nothing disturbed.
"""

import subprocess

from lab import GPUS_PER_NODE
from places import Place, begin, resumes


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
