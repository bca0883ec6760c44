"""Make the synthetic images of a shard's classes for one method, at every IPC and seed of the run.

Rows of a batch belong to whichever classes, IPCs and seeds come next; a class is committed when its last row is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from workflow_scripts.config import CoresetMethod, DiffusionMethod
from workflow_scripts.data.preprocess import load_squares
from workflow_scripts.diffusion.backbone import Autoencoder, Denoiser
from workflow_scripts.diffusion.noise import batch_noise, stream
from workflow_scripts.diffusion.sampler import sample
from workflow_scripts.diffusion.schedule import respace
from workflow_scripts.errors import DataError
from workflow_scripts.methods.coresets import select
from workflow_scripts.methods.registry import ClassInputs, needs_latents, prepare_rows, start_step, terms_of
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.inputs import scaled_latents
from workflow_scripts.stages.worker import Computed, pick_device, quiet_libraries, run_shard
from workflow_scripts.store.results import Result

Prepare = Callable[[Result], dict[str, torch.Tensor]]


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Sample one method's shard."""
    config = recipes.config
    name = shard.rpartition("-")[0]
    method = config.methods[name]
    if isinstance(method, CoresetMethod):
        return run_shard(
            recipes, "sample", shard, lambda missing: (choose_real(recipes, method, result) for result in missing)
        )
    quiet_libraries()
    device = pick_device(config.compute.device)
    return run_shard(recipes, "sample", shard, lambda missing: synthesise(recipes, name, missing, device), str(device))


def choose_real(recipes: Recipes, method: CoresetMethod, result: Result) -> Computed:
    """Choose real images by their latents, and read them again from the source."""
    config, name = recipes.config, result.class_name
    keys = recipes.store.record(recipes.latents(name))["images"]
    latents = scaled_latents(recipes, name)[: len(keys)]  # without mirror images
    ipc, seed = result.recipe["ipc"], result.recipe["seed"]
    if len(keys) < ipc:
        raise DataError(f"class {name}: {len(keys)} readable images, fewer than IPC {ipc}. Add images, or lower ipc.")
    chosen = select(method.select, latents, ipc, stream(seed, name, 0, "coreset"))
    by_key = {entry.key: entry for entry in recipes.catalog.entries(name, "train")}
    batches = load_squares(
        recipes.catalog.source,
        name,
        [by_key[keys[index]] for index in chosen],
        resolution=config.dataset.resolution,
        crop=config.dataset.crop,
        workers=config.compute.workers,
        batch=config.compute.encode_batch,
    )
    images = np.concatenate([pixels for _, pixels in batches])
    return result, {"images": images, "latents": latents[chosen]}, {"chosen": [keys[index] for index in chosen]}


def synthesise(recipes: Recipes, name: str, missing: list[Result], device: torch.device) -> Iterator[Computed]:
    """Sample the rows of all missing results, batch by batch, and yield each result when its rows are complete."""
    config = recipes.config
    method = config.methods[name]
    assert isinstance(method, DiffusionMethod)
    dtype = getattr(torch, config.compute.dtype)
    denoiser = Denoiser.load(recipes.backbone.path, device, dtype, compiled=config.compute.compile)
    autoencoder = Autoencoder.load(recipes.backbone.path, device, dtype)

    def prepare(result: Result) -> dict[str, torch.Tensor]:
        inputs = class_inputs(recipes, name, result, denoiser.latent_shape)
        return prepare_rows(method, inputs, result.recipe["ipc"], result.recipe["seed"], device)

    fixed = device.type == "cuda" or config.compute.compile
    for result, latents in sample_results(
        denoiser, method, missing, prepare, config.compute.sample_batch, fixed_shape=fixed
    ):
        if not torch.isfinite(latents).all():
            raise DataError(
                f"class {result.class_name}: {name} diverged to non-finite latents. Lower its guidance scale or cfg_scale."
            )
        images = np.concatenate([autoencoder.decode(part) for part in latents.split(config.compute.encode_batch)])
        yield result, {"images": images, "latents": latents.cpu().numpy()}, {}


def class_inputs(recipes: Recipes, name: str, result: Result, shape: tuple[int, int, int]) -> ClassInputs:
    """Read what a method needs to know of a class."""
    method = recipes.config.methods[name]
    assert isinstance(method, DiffusionMethod)
    modes = recipes.modes(result.class_name, name, result.recipe["ipc"])
    gaussian = recipes.gaussian(result.class_name, name)
    return ClassInputs(
        result.class_name,
        shape,
        scaled_latents(recipes, result.class_name) if needs_latents(method) else None,
        recipes.store.read(modes).arrays if modes else None,
        recipes.store.read(gaussian).arrays if gaussian else None,
    )


def sample_results(
    denoiser: Denoiser,
    method: DiffusionMethod,
    results: list[Result],
    prepare: Prepare,
    batch: int,
    *,
    fixed_shape: bool,
) -> Iterator[tuple[Result, torch.Tensor]]:
    """Sample the rows of many results in batches that may span several of them.

    Args:
        prepare: the per-row tensors of one result.
        fixed_shape: fill the last batch with repeated rows, so that compiled code and kernels stay the same.

    Yields:
        each result with its latents (ipc, c, h, w), in order.
    """
    grid = respace(denoiser.abar, method.sampler.steps, method.sampler.spacing)
    begin, terms = start_step(method, grid), terms_of(method)
    done: list[torch.Tensor] = []
    waiting = iter(results)
    current = next(waiting, None)
    for rows, owners in _batches(results, prepare, batch):
        count = len(owners)
        if fixed_shape and count < batch:
            filler = torch.arange(batch).clamp(max=count - 1)
            rows = {key: value[filler.to(value.device)] for key, value in rows.items()}
            owners = owners + [owners[-1]] * (batch - count)
        labels = torch.tensor([result.recipe["label"] for result, _ in owners], device=denoiser.device)
        noise = None
        if method.sampler.kind == "ddpm":
            streams = [stream(result.recipe["seed"], result.class_name, index, "noise") for result, index in owners]
            noise = batch_noise(streams, len(grid.timesteps), *denoiser.latent_shape).to(denoiser.device)
        latents = sample(denoiser, grid, method.sampler, rows["start"], begin, labels, noise, terms, rows)
        done.append(latents[:count])
        while current is not None and sum(map(len, done)) >= current.recipe["ipc"]:
            ready = torch.cat(done)
            yield current, ready[: current.recipe["ipc"]]
            done = [ready[current.recipe["ipc"] :]]
            current = next(waiting, None)


def _batches(
    results: Iterable[Result], prepare: Prepare, batch: int
) -> Iterator[tuple[dict[str, torch.Tensor], list[tuple[Result, int]]]]:
    """Yield batches of rows, each with the result and index that every row belongs to."""
    parts: list[dict[str, torch.Tensor]] = []
    owners: list[tuple[Result, int]] = []
    for result in results:
        rows = prepare(result)
        index, ipc = 0, result.recipe["ipc"]
        while index < ipc:
            take = min(batch - len(owners), ipc - index)
            parts.append({key: value[index : index + take] for key, value in rows.items()})
            owners += [(result, i) for i in range(index, index + take)]
            index += take
            if len(owners) == batch:
                yield _collate(parts), owners
                parts, owners = [], []
    if owners:
        yield _collate(parts), owners


def _collate(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


if __name__ == "__main__":
    stage_main("sample", __doc__, work, "METHOD-NNN, for instance mgd3-000")
