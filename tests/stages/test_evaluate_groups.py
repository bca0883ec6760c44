"""Which trainings share their steps, and that it does not matter to what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import support
import torch

from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.evaluate import _groups
from workflow_scripts.team import Team

SEVERAL: dict[str, Any] = {
    "compare": ["random"],
    "ipc": [3],
    "evaluation.repeats": 2,
    "evaluation.architectures": [{"name": "convnet", "width": 4}, {"name": "convnet_bn", "width": 4}],
}


def sizes(site: support.Site, device: str, **changes: Any) -> list[int]:
    recipes = Recipes(site.config(SEVERAL | changes))
    return [len(group) for group in _groups(recipes, recipes.trainings("random", 3), Team(torch.device(device)))]


def test_small_students_without_batch_norm_share_steps_on_a_gpu(plan_site: Callable[..., support.Site]) -> None:
    site = plan_site()
    assert sizes(site, "cuda") == [4, 1, 1, 1, 1], "two seeds and two repeats; batch norm one by one"
    assert sizes(site, "cpu") == [1] * 8
    assert sizes(site, "cpu", **{"compute.students_at_once": 3}) == [3, 1, 1, 1, 1, 1]
    large = {"evaluation.resolution": 224, "evaluation.architectures": [{"name": "convnet"}]}
    assert sizes(site, "cuda", **large) == [1] * 4
    two = {"evaluation.protocols": ["hard-sgd", "hard-adamw"], "evaluation.architectures": [{"name": "convnet"}]}
    assert sizes(site, "cuda", **two) == [4, 4]


def test_trainings_at_once_are_written_as_those_one_by_one(site: support.Site) -> None:
    changes = SEVERAL | {"evaluation.architectures": [{"name": "convnet", "width": 4}]}
    support.run_jobs(site.config(changes))
    recipes = Recipes(site.config(changes))
    paths = [recipes.training_path(training) for training in recipes.trainings("random", 3)]
    alone = [json.loads(path.read_text()) for path in paths]
    for path in paths:
        path.unlink()
    (site.results / recipes.job("evaluate", "random-ipc3-000").manifest).unlink()
    again = support.run_jobs(site.config(changes | {"compute.students_at_once": 4}))
    assert again.jobs[0] == ("evaluate", "random-ipc3-000") and len(again.jobs) <= 2, (
        "it is in no digest but the report's"
    )
    for path, one in zip(paths, alone, strict=True):
        together = json.loads(path.read_text())
        assert together["students_at_once"] == 4 and one["students_at_once"] == 1
        assert together["top1_last"] == pytest.approx(one["top1_last"], abs=9), "an image of 12 by rounding"
        varying = {"created", "seconds", "students_at_once", "top1_best", "top1_last", "best_epoch", "curve"}
        same = set(one) - varying - {"confusion", "class_top1", "top5_last"}
        assert {key: together[key] for key in same} == {key: one[key] for key in same}
    assert not (site.results / "store" / "evaluate.checkpoints").exists()
