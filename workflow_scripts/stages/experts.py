"""Train experts on the real images and keep their trajectories, for methods that match trajectories (MTT).

An expert is a ConvNet in plain SGD. Only as many epochs are trained as are ever read: max_start - 1 + expert_epochs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from workflow_scripts.diffusion.noise import stream
from workflow_scripts.errors import DataError
from workflow_scripts.evaluation.dsa import draw
from workflow_scripts.methods.matching import FlatNetwork, flatten, normalised, student, to_pixels
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.inputs import training_images
from workflow_scripts.stages.worker import Computed, pick_device, run_shard
from workflow_scripts.store.results import Result


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Train one job's experts."""
    config = recipes.config
    device = pick_device(config.compute.device)

    @cache
    def real() -> tuple[torch.Tensor, torch.Tensor, int]:
        pixels, labels, skipped = training_images(recipes)
        return torch.from_numpy(pixels).to(device), torch.from_numpy(labels).to(device), len(skipped)

    def compute(missing: Iterator[Result]) -> Iterator[Computed]:
        images, classes, skipped = real()
        for result in missing:
            trajectory = train_expert(images, classes, len(recipes.classes), result.recipe)
            if not np.isfinite(trajectory).all():
                raise DataError(f"{result.class_name}: its training diverged. Lower objective.experts.learning_rate.")
            yield result, {"trajectory": trajectory}, {"skipped": skipped}

    return run_shard(recipes, "experts", shard, compute, str(device))


def train_expert(images: torch.Tensor, labels: torch.Tensor, classes: int, recipe: Mapping[str, Any]) -> np.ndarray:
    """Train one expert and return its parameters before the first and after each epoch (epochs + 1, P), float32.

    Args:
        images: uint8 (n, H, W, 3).
        labels: int64 (n,).
        recipe: of the result: number, width, epochs, learning_rate, batch_size and dsa.
    """
    network = student(classes, images.shape[1], recipe["width"], 0, recipe["number"], images.device, "expert")
    flat, vector = FlatNetwork(network), flatten(network)
    generator = stream(0, "", recipe["number"], "expert")
    trajectory = [vector.clone()]
    for _ in range(recipe["epochs"]):
        order = torch.from_numpy(generator.permutation(len(images))).to(images.device)
        for chosen in order.split(recipe["batch_size"]):
            augmented = draw(generator, recipe["dsa"], len(chosen))(normalised(to_pixels(images[chosen])))
            gradient = flat.gradient(vector.requires_grad_(), augmented, labels[chosen])
            vector = vector.detach() - recipe["learning_rate"] * gradient
        trajectory.append(vector.clone())
    return torch.stack(trajectory).cpu().numpy()


if __name__ == "__main__":
    stage_main("experts", __doc__, work, "METHOD-NNN, for instance ld3m-mtt-000")
