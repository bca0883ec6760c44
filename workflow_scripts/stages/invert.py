"""Invert the latents of a shard's classes by DDIM and keep each class's mean and variance at the start timestep (D3HR)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from workflow_scripts.config import Inversion
from workflow_scripts.diffusion.backbone import Denoiser
from workflow_scripts.diffusion.inversion import Moments, invert, noised_moments
from workflow_scripts.diffusion.schedule import respace
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.inputs import scaled_latents
from workflow_scripts.stages.memory import Batch
from workflow_scripts.stages.worker import Computed, pick_device, quiet_libraries, run_shard
from workflow_scripts.store.results import Result


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Invert one shard."""
    config = recipes.config
    quiet_libraries()
    device = pick_device(config.compute.device)

    batch = Batch(config.compute.invert_batch)

    @cache
    def denoiser() -> Denoiser:
        dtype = getattr(torch, config.compute.dtype)
        return Denoiser.load(
            recipes.backbone.path, device, dtype, side=recipes.backbone.latent_side, compiled=config.compute.compile
        )

    def compute(missing: Iterator[Result]) -> Iterator[Computed]:
        denoiser()
        for result in missing:
            latents = torch.from_numpy(scaled_latents(recipes, result.class_name))
            yield result, *class_gaussian(denoiser(), latents, result.recipe, batch)

    return run_shard(recipes, "invert", shard, compute, str(device))


def class_gaussian(
    denoiser: Denoiser, latents: torch.Tensor, recipe: Mapping[str, Any], batch: Batch
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Stream a class's latents (n, c, h, w) through the map; return mean and variance (c, h, w) fp32, and the count."""
    grid = respace(denoiser.abar, recipe["steps"], recipe["spacing"])
    settings, until = Inversion(**recipe["inversion"]), grid.step_of(recipe["timestep"])

    def mapped(part: torch.Tensor) -> torch.Tensor:
        part = part.to(denoiser.device)
        if settings.map != "ddim":
            return part
        labels = torch.full((len(part),), recipe["label"], device=denoiser.device)
        guidance = {"cfg_scale": recipe["cfg_scale"], "cfg_channels": recipe["cfg_channels"]}
        return invert(denoiser, grid, part, labels, until, settings, **guidance)

    moments = Moments()
    for part in batch.over(latents, mapped):
        moments.update(part)
    fitted = moments.result()
    if settings.map == "noise":
        fitted = noised_moments(*fitted, float(grid.abar[until]))
    mean, variance = (moment.float().cpu().numpy() for moment in fitted)
    return {"mean": mean, "variance": variance}, {"count": moments.count}


if __name__ == "__main__":
    stage_main("invert", __doc__, work, "a shard number such as 000")
