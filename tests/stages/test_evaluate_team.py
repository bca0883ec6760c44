"""Evaluate jobs of several processes: what they write, and how they end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
import torch

from workflow_scripts.config import load_resolved
from workflow_scripts.errors import ConfigError
from workflow_scripts.evaluation.training import Students
from workflow_scripts.recipes import Recipes, Training
from workflow_scripts.stages import evaluate
from workflow_scripts.stages.common import launcher
from workflow_scripts.stages.notice import NOTICE, Unfinished
from workflow_scripts.store.attempts import Attempts

ONE: dict[str, Any] = {
    "compare": ["random"],
    "ipc": [3],
    "seeds": [0],
    "evaluation.architectures": [{"name": "convnet_bn", "width": 4}],
    "evaluation.repeats": 2,
    "evaluation.epochs": 4,
    "evaluation.batch_size": 4,  # 9 images: batches of 4, 4 and 1
    "evaluation.learning_rate": 0.01,
    "evaluation.set_metrics": False,
}
TWO = ONE | {"evaluation.architectures": [{"name": "convnet_bn", "width": 4, "gpus": 2}]}
SHARD = "random-ipc3-000"


def scores(recipes: Recipes, trainings: list[Training] | None = None) -> list[dict[str, Any]]:
    return [json.loads(recipes.training_path(one).read_text()) for one in trainings or recipes.trainings("random", 3)]


def forget(recipes: Recipes) -> list[dict[str, Any]]:
    """Remove the scores of the job, and return them."""
    found = scores(recipes)
    for training in recipes.trainings("random", 3):
        recipes.training_path(training).unlink()
    (recipes.config.results / recipes.job("evaluate", SHARD).manifest).unlink()
    return found


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    varying = {"created", "seconds", "processes"}
    return {key: one[key] for key in one.keys() - varying} == {key: two[key] for key in two.keys() - varying}


# ---------------------------------------------------------------- jobs


def test_jobs_are_of_students_that_ask_for_as_many_gpus(plan_site: Callable[..., support.Site]) -> None:
    site = plan_site()

    def jobs(*gpus: int, **changes: Any) -> dict[str, tuple[int, list[str]]]:
        names = ("convnet", "resnet18_bn", "resnet50")
        students = [{"name": name, "gpus": count} for name, count in zip(names, gpus, strict=True)]
        recipes = Recipes(site.config(ONE | {"evaluation.architectures": students} | changes))
        return {
            job.manifest: (job.gpus, [training.architecture.name for training in recipes.trainings_of(job.shard)])
            for job in support.jobs_of(recipes, "evaluate")
        }

    plain = jobs(1, 1, 1)
    assert list(plain.values()) == [(1, ["convnet"] * 2 + ["resnet18_bn"] * 2 + ["resnet50"] * 2)]
    assert list(jobs(4, 1, 8).values()) == [(1, ["resnet18_bn"] * 2), (4, ["convnet"] * 2), (8, ["resnet50"] * 2)]
    assert [value[0] for value in jobs(4, 1, 1, **{"evaluation.trainings_per_job": 1}).values()] == [1, 1, 1, 1, 4, 4]
    without = {"evaluation.architectures": [{"name": name} for name in ("convnet", "resnet18_bn", "resnet50")]}
    recipes = [
        Recipes(site.config(ONE | own)) for own in (without, {"evaluation.architectures": [{"name": "convnet"}]})
    ]
    assert plain.keys() == {job.manifest for job in support.jobs_of(recipes[0], "evaluate")}


def test_jobs_are_of_students_that_ask_for_as_many_nodes(plan_site: Callable[..., support.Site]) -> None:
    students = [{"name": "convnet", "gpus": 4}, {"name": "resnet50", "gpus": 4, "nodes": 2}]
    recipes = Recipes(plan_site().config(ONE | {"evaluation.architectures": students}))
    jobs = [(job.gpus, job.nodes, job.items) for job in support.jobs_of(recipes, "evaluate")]
    assert jobs == [(4, 1, 2), (4, 2, 2)]


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 2), (2, 2), (5, 2), (4, 3)])
def test_gpus_that_cannot_be_spread(plan_site: Callable[..., support.Site], gpus: int, nodes: int) -> None:
    with pytest.raises(ConfigError, match=f"gpus: {gpus} cannot be spread over {nodes} nodes"):
        plan_site().config(ONE | {"evaluation.architectures": [{"name": "convnet", "gpus": gpus, "nodes": nodes}]})


def test_gpus_are_in_no_digest(plan_site: Callable[..., support.Site]) -> None:
    site = plan_site()
    one, two = Recipes(site.config(ONE)), Recipes(site.config(TWO))
    assert [job.manifest for job in one.jobs()] == [job.manifest for job in two.jobs()], "the report's neither"
    assert {job.gpus for job in two.jobs() if job.stage == "evaluate"} == {2}
    own = {"evaluation.architectures": None, "evaluation.protocols": ["mine"]}
    settings = {"preset": "hard-sgd", "architectures": [{"name": "convnet"}]}
    shared = {**settings, "architectures": [{"name": "convnet", "gpus": 4, "nodes": 2}]}
    reports = [Recipes(site.config(ONE | own | {"evaluation.settings": {"mine": s}})) for s in (settings, shared)]
    assert len({recipes.job("report", "report").digest for recipes in reports}) == 1


def test_a_teacher_is_trained_on_one_gpu(plan_site: Callable[..., support.Site]) -> None:
    teacher = {"architecture": {"name": "convnet_bn", "gpus": 2}, "fit": {}}
    with pytest.raises(ConfigError, match="gpus"):
        plan_site().config(ONE | {"evaluation.teacher": teacher})


# ---------------------------------------------------------------- processes


def test_torchrun_writes_the_scores_of_one_process(site: support.Site) -> None:
    support.run_jobs(site.config(ONE))
    recipes = Recipes(site.config(TWO))
    alone = forget(recipes)
    job = recipes.job("evaluate", SHARD)
    command = [*launcher(2).replace("python", sys.executable, 1).split(), "workflow_scripts.stages.evaluate"]
    command += ["--resolved", str(site.resolved(TWO)), "--shard", SHARD, "--log", str(site.results / "a.log")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=support.ROOT)
    assert ended.returncode == 0, ended.stderr
    found = scores(recipes)
    assert [record["processes"] for record in found] == [2, 2] and [record["processes"] for record in alone] == [1, 1]
    assert all(map(same, found, alone))
    assert (site.results / job.manifest).exists()
    assert (site.results / "a.log").exists() and (site.results / "a.rank1.log").exists()
    told = [path.read_text() for path in (site.results / "events" / "evaluate").glob("*.jsonl")]
    (own,) = [text for text in told if '"start"' in text]  # one process speaks for both
    lines = [json.loads(line) for line in own.splitlines()]
    assert lines[0]["processes"] == 2 and [line["event"] for line in lines].count("done") == 2
    assert lines[-1] == lines[-1] | {"event": "stop", "status": 0}


def be_one_of_two(rank: int, port: int, resolved: str, fault: str) -> None:
    """Be a process that torchrun started, with something that happens to it in its third step, or second epoch."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    steps, step = 0, Students.step

    def faulty(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5 and fault == f"rank {rank} fails":
            raise RuntimeError("out of luck")
        if steps == 5 and fault == "rank 1 is told":
            NOTICE.told = rank == 1
        return step(*arguments)

    Students.step = faulty  # type: ignore[method-assign]
    try:
        evaluate.work(Recipes(load_resolved(Path(resolved))), SHARD)
    except Unfinished as error:
        print(error, file=sys.stderr)
        sys.exit(75)


def together(programs: support.Programs, resolved: Path, fault: str) -> list[support.Ended]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [programs.start(be_one_of_two, rank, port, str(resolved), fault) for rank in (0, 1)]
    return [process.wait(120) for process in started]


def test_whoever_fails_takes_the_others_down(site: support.Site, programs: support.Programs) -> None:
    support.run_jobs(site.config(ONE))
    recipes = Recipes(site.config(TWO))
    alone = forget(recipes)
    resolved = site.resolved(TWO)
    for fault in ("rank 0 fails", "rank 1 fails"):
        leader, follower = together(programs, resolved, fault)
        assert leader.code == 75 and follower.code not in (0, None), (leader.stderr, follower.stderr)
        assert "the others need it" in leader.stderr
    attempts = Attempts(site.results / "store" / "attempts")
    failures = [attempts.failures(recipes.training_place(training)) for training in recipes.trainings_of(SHARD)]
    assert [[failure.counted for failure in one] for one in failures] == [[True], [True]], "each once, alone"
    assert not list((site.results / "store" / "claims").rglob("*.json"))

    leader, follower = together(programs, resolved, "rank 1 is told")
    assert leader.code == follower.code == 75
    assert "stopped in good order after 2 of 4 epochs of random" in leader.stderr
    assert len(list((site.results / "store" / "evaluate.checkpoints").iterdir())) == 1

    support.run_jobs(site.config(ONE))  # one process goes on where two stopped
    assert all(map(same, scores(recipes), alone))


# ---------------------------------------------------------------- time


def test_a_training_ends_in_good_order_and_goes_on(site: support.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    config = site.config(ONE)
    support.run_jobs(config)
    recipes = Recipes(config)
    whole = forget(recipes)
    rates: list[float] = []
    set_rate = Students.set_rate

    def counted(students: Students, rate: float) -> None:
        rates.append(rate)
        monkeypatch.setattr(NOTICE, "told", len(rates) == 2)
        set_rate(students, rate)

    monkeypatch.setattr(Students, "set_rate", counted)
    with pytest.raises(Unfinished, match=r"after 2 of 4 epochs of random .* repeat 0, because it was told to"):
        evaluate.work(recipes, SHARD)
    assert not any(recipes.training_path(training).exists() for training in recipes.trainings_of(SHARD))
    monkeypatch.setattr(NOTICE, "told", False)
    evaluate.work(recipes, SHARD)
    assert len(rates) == 2 * 4, "no epoch twice"
    assert all(map(same, scores(recipes), whole))
    assert not list((site.results / "store" / "evaluate.checkpoints").iterdir())
