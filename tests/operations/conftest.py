"""A run of D3HR on the shipped digits backbone whose class Gaussians are made up, so that sampling is all it takes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import torch

from workflow_scripts.config import RunConfig, load
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages import sample

CLASSES = ("7", "1", "4")
METHODS = ("d3hr", "d3hr-published")


def config(results: Path, **overrides: Any) -> RunConfig:
    """A run with its label order not sorted, and every image of a class, IPC and seed in a batch of its own."""
    settings: dict[str, Any] = {
        "dataset.classes": list(CLASSES),
        "compare": list(METHODS),
        "ipc": [1, 3],
        "seeds": [0, 1],
        "sampler.steps": 10,
        "methods.d3hr-published.start.candidates": 40,
        "evaluation.epochs": 1,
        "compute.device": "cpu",
        "compute.sample_batch": 1,
        "results": str(results),
        **overrides,
    }
    return load(support.ROOT / "config.yaml", "digits", [f"{key}={_yaml(value)}" for key, value in settings.items()])


def _yaml(value: Any) -> str:
    return str(value) if not isinstance(value, list) else f"[{', '.join(map(repr, value))}]"


def invert(recipes: Recipes) -> None:
    """Put a Gaussian for each class into the store."""
    shape = (4, 8, 8)
    for name in recipes.classes:
        for method in METHODS:
            random = np.random.default_rng(int(name))
            result = recipes.gaussian(name, method)
            assert result is not None
            arrays = {"mean": 0.3 * random.normal(size=shape), "variance": random.uniform(0.5, 1.5, shape)}
            recipes.store.commit(result, {key: array.astype(np.float32) for key, array in arrays.items()}, {})


@pytest.fixture(scope="session")
def sampled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of that run up to its samples. Copy it before you change it."""
    torch.set_num_threads(1)
    results = tmp_path_factory.mktemp("sampled") / "results"
    recipes = Recipes(config(results))
    invert(recipes)
    for method in METHODS:
        sample.work(recipes, f"{method}-000")
    return results


@pytest.fixture
def sampled(tmp_path: Path, sampled_once: Path) -> Callable[..., Recipes]:
    """A test's own copy of the run, with settings overridden."""

    def make(overrides: Mapping[str, Any] | None = None) -> Recipes:
        if not (tmp_path / "results").exists():
            shutil.copytree(sampled_once, tmp_path / "results")
        return Recipes(config(tmp_path / "results", **(overrides or {})))

    return make
