"""Controllers that are killed, doubled, submitted as jobs and preempted."""

import json
import subprocess

import pytest
from places import CLASSES, IN_HAND, ONCE, Place, begin, hurried, resumes


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


def named(place: Place, name: str, *states: str) -> list[str]:
    """The jobs of a name in the queue."""
    command = ["squeue", "--noheader", "--format=%i", f"--name={name}", f"--states={','.join(states)}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_a_controller_that_is_preempted_goes_on(place: Place) -> None:
    """Requeued by submitit, then preempted with its child by a higher partition: both go on, and nothing is computed twice."""
    place.hold("cat")
    options = ["--slurm-no-account", "--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "5"]
    said = place.stillhouse(
        "submit", "--configfile", "tiny.yaml", "--yes", "--partition", "cpu", "--", *options, "--until", "encode"
    )
    assert said.returncode == 0, said.stderr
    (number,) = named(place, "stillhouse-tiny", "PENDING", "RUNNING", "CONFIGURING")
    assert f"SLURM job {number}" in said.stdout
    log = place.results / "logs" / "submit" / "tiny" / number / f"{number}_0_log.out"

    again = place.stillhouse("submit", "--configfile", "tiny.yaml", "--yes")
    assert again.returncode == 1 and f"SLURM job {number}" in again.stderr

    def seen() -> str:
        return log.read_text() if log.exists() else ""

    place.lab.wait(lambda: bool(place.began("cat")), "a worker has begun", 240)
    status = json.loads(place.stillhouse("status", "--configfile", "tiny.yaml", "--json").stdout)
    (worker,) = status["workers"]
    assert worker["job"] and worker["in_hand"] == ["cat"]
    assert [job["number"] for job in status["jobs"]] == [number]

    subprocess.run(["scancel", "--signal=USR2", number], check=True)
    place.lab.wait(lambda: bool(named(place, "stillhouse-tiny", "PENDING")), f"it is requeued: {seen()}", 240)
    assert (place.folder / ".snakemake" / "locks").exists(), "killed, it left its lock behind"
    place.lab.wait(lambda: "its lock is removed" in seen(), "it has started again", 240)

    urgent = place.lab.sbatch("-p", "urgent", "-N2", "--exclusive", "-t", "60", wrap="sleep 600")
    place.lab.wait(lambda: urgent in [job["id"] for job in place.lab.jobs("RUNNING")], "the urgent job runs", 240)
    assert not named(place, "stillhouse-tiny", "RUNNING")
    subprocess.run(["scancel", urgent], check=True)

    place.lab.wait(
        lambda: hurried(place) or seen().count("its lock is removed") == 2, "it has started a third time", 240
    )
    place.release()
    place.lab.wait(lambda: not named(place, "stillhouse-tiny", "PENDING", "RUNNING"), "it ends", 300)
    assert "exited with an error" not in seen() and "Traceback" not in seen(), seen()
    place.expect_undisturbed("encode")
    assert place.computed() == ONCE
    assert not (place.folder / ".snakemake" / "locks").exists()
    assert not (place.results / "logs" / "submit" / "tiny" / "controller.json").exists()
