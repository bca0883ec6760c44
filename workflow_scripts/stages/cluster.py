"""Cluster the latents of a shard's classes: the divisive tree that serves every IPC, and k-means for methods that use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from workflow_scripts.errors import DataError
from workflow_scripts.methods.modes import grow_tree, kmeans
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.inputs import scaled_latents
from workflow_scripts.stages.worker import Computed, run_shard
from workflow_scripts.store.results import Result


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Cluster one shard."""

    def compute(missing: Iterator[Result]) -> Iterator[Computed]:
        for result in missing:
            try:
                yield result, cluster_class(result.recipe, scaled_latents(recipes, result.class_name)), {}
            except ValueError as error:
                raise DataError(f"class {result.class_name}: {error}. Add distinct images, or lower ipc.") from error

    return run_shard(recipes, "cluster", shard, compute)


def cluster_class(recipe: Mapping[str, Any], latents: np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays of one class's clustering of (n, c, h, w) latents: those of a Tree, or of Modes."""
    if "tree" in recipe:
        tree = recipe["tree"]
        return asdict(grow_tree(latents, tree["max_leaves"], tree["split_restarts"], tree["seed"], tree["pool"]))
    settings = recipe["kmeans"]
    return asdict(kmeans(latents, recipe["k"], settings["restarts"], settings["seed"], settings["pool"])[0])


if __name__ == "__main__":
    stage_main("cluster", __doc__, work, "a shard number such as 000")
