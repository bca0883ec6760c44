"""The loop over a shard's class-level results: skip what exists, compute the rest, commit each as it is done."""

from __future__ import annotations

import logging
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from workflow_scripts.errors import ConfigError
from workflow_scripts.recipes import Recipes
from workflow_scripts.store.results import Result

if TYPE_CHECKING:
    import torch

Arrays = Mapping[str, np.ndarray]
Computed = tuple[Result, Arrays, Mapping[str, Any]]
USE_WEIGHTS = ("encode", "invert", "sample", "match")
PACKAGES = ("stillhouse", "torch", "diffusers", "numpy", "scikit-learn", "zarr")


def run_shard(
    recipes: Recipes, stage: str, shard: str, compute: Callable[[list[Result]], Iterable[Computed]], device: str = "cpu"
) -> dict[str, Any]:
    """Make a job's results exist.

    Args:
        compute: given the results that are missing, yields each with its arrays and extra facts for its record, in any order.

    Returns:
        the manifest's content: each class with the place of its result.
    """
    results = recipes.stage_results(stage, shard)
    missing = [result for result in results if not recipes.store.exists(result)]
    if missing:
        _compute(recipes, stage, shard, missing, compute, device)
    return {
        "results": [{"class": result.class_name, "place": result.place, "digest": result.digest} for result in results]
    }


def _compute(
    recipes: Recipes,
    stage: str,
    shard: str,
    missing: list[Result],
    compute: Callable[[list[Result]], Iterable[Computed]],
    device: str,
) -> None:
    info = environment(device)
    if stage in USE_WEIGHTS:
        info["licences"] = dict(recipes.backbone.licences)
        if note := recipes.backbone.licence_note():
            tqdm.write(note, file=sys.stderr)
    began = time.monotonic()
    for result, arrays, extra in progress(compute(missing), len(missing), f"{stage} {shard}"):
        now = time.monotonic()
        recipes.store.commit(result, arrays, {**info, **_identity(recipes, result), "seconds": now - began, **extra})
        began = now


def _identity(recipes: Recipes, result: Result) -> dict[str, Any]:
    """Return which class a result is of, and its label in the backbone; experts are of no class."""
    name = result.class_name
    return {"class": name, "label": recipes.backbone.label_of(name)} if name in recipes.classes else {}


def environment(device: str) -> dict[str, Any]:
    """Return what a record says of where it was computed."""
    return {"device": device, "host": platform.node(), "versions": {package: version(package) for package in PACKAGES}}


def pick_device(wanted: str) -> torch.device:
    """Turn the configured device into one that is there; ``auto`` prefers a GPU."""
    import torch  # here, because stages that only cluster or export start faster without it

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("compute.device: cuda, but this machine has no usable GPU. Set compute.device: auto or cpu.")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def progress(items: Iterable[Any], total: int, name: str, unit: str = "result") -> Iterator[Any]:
    """Show progress: a bar on a terminal, a line a minute in a log."""
    terminal = sys.stderr.isatty()
    yield from tqdm(
        items,
        total=total,
        desc=name,
        unit=unit,
        mininterval=0.2 if terminal else 60,
        maxinterval=60,
        ascii=not terminal,
    )


def quiet_libraries() -> None:
    """Keep the libraries' advice out of the logs."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
