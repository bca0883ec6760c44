"""A run that nothing disturbs, on two nodes with four GPUs."""

import json
import shutil
from typing import Any

import support
from lab import GPUS_PER_NODE, NODES
from places import CLASSES, ONCE, STAGES, Place


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
    place.expect_undisturbed(*STAGES)
    for stage in STAGES:
        assert place.computed(stage) == ONCE
    assert place.run("--config", "shards=4", "-n").said.count("Nothing to be done") == 1

    support.draw(1, 50).save(place.folder / "train" / "bee" / "new.png")
    shutil.rmtree(place.folder / ".snakemake")
    again = place.run("--config", "shards=4", "--until", "sample")
    assert again.process.returncode == 0, again.said
    assert len(again.submitted()) == len(STAGES), "one shard of each stage"
    for stage in STAGES:
        assert place.computed(stage) == ONCE | {"bee": 2}


def scores(place: Place) -> dict[str, dict[str, Any]]:
    """The records of all trainings."""
    return {path.name: json.loads(path.read_text()) for path in (place.results / "store" / "evaluate").glob("*.json")}


def test_a_training_whose_batches_two_nodes_share(place: Place) -> None:
    """The scores are those of one process."""
    shutil.copytree(place.undisturbed, place.results, symlinks=True)
    alone = scores(place)
    shutil.rmtree(place.results / "store" / "evaluate")
    shutil.rmtree(place.results / "manifests" / "evaluate")
    students = [{"name": "convnet", "width": 4, "gpus": len(NODES) * GPUS_PER_NODE, "nodes": len(NODES)}]
    place.write({"evaluation.architectures": students})
    controller = place.run(
        "--until", "evaluate", "--set-resources", "evaluate:slurm_partition=gpu", "evaluate:gpu_model=h100"
    )
    assert controller.process.returncode == 0, controller.said
    (number,) = controller.submitted()
    job = place.lab.scontrol("show", "job", number)
    assert "NodeList=wn[1-2]" in job and "TresPerNode=gres:gpu:h100:2" in job, job
    found = scores(place)
    assert found.keys() == alone.keys()
    for name, record in found.items():
        assert record["processes"] == 4
        for key in ("recipe", "curve", "top5_last", "confusion"):
            assert record[key] == alone[name][key]


def test_the_doctor_on_a_cluster_without_slurmdbd(place: Place) -> None:
    found = place.stillhouse("doctor", "--configfile", "tiny.yaml", "--json")
    lines = {line["check"]: line for line in json.loads(found.stdout)["checks"]}
    assert lines["slurm status command"]["status"] == "ok", "the profile has squeue, and that is what it takes here"
    assert "squeue" in lines["slurm status command"]["found"]
    assert "gpu" in lines["slurm partitions"]["found"]
    assert "h100" in lines["slurm gpus"]["found"]
