"""Make the synthetic images of a shard's classes for one method, at every IPC and seed of the run.

Rows of a batch belong to whichever classes, IPCs and seeds come next; a class is committed when its last row is done. Where a
method makes the images of a class one after another, as many classes as a batch holds go in lockstep.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch

from workflow_scripts.config import Compute, CoresetMethod, DiffusionMethod
from workflow_scripts.diffusion.backbone import Autoencoder, Denoiser
from workflow_scripts.diffusion.checkpoint import Checkpoint
from workflow_scripts.diffusion.noise import batch_noise, stream
from workflow_scripts.diffusion.sampler import sample
from workflow_scripts.diffusion.schedule import Grid, respace
from workflow_scripts.errors import DataError
from workflow_scripts.methods.coresets import collage, select
from workflow_scripts.methods.manifoldgd import shared_latents
from workflow_scripts.methods.registry import (
    ClassInputs,
    find_candidate,
    is_greedy,
    is_joint,
    label_schedule_of,
    needs_latents,
    needs_pool,
    prepare_rows,
    start_step,
    terms_of,
)
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.inputs import real_images, scaled_latents
from workflow_scripts.stages.memory import Batch
from workflow_scripts.stages.worker import Computed, pick_device, quiet_libraries, run_shard
from workflow_scripts.store.results import Result

Rows = dict[str, torch.Tensor]
Prepare = Callable[[Result, Grid], Rows]
Owner = tuple[Result, int]


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Sample one method's shard."""
    config = recipes.config
    name = shard.rpartition("-")[0]
    method = config.methods[name]
    if isinstance(method, CoresetMethod):
        return run_shard(
            recipes, "sample", shard, lambda missing: (choose_real(recipes, method, result) for result in missing)
        )
    assert isinstance(method, DiffusionMethod)
    quiet_libraries()
    device = pick_device(config.compute.device)
    order = _ipc_of if is_greedy(method) else None
    return run_shard(recipes, "sample", shard, synthesise(recipes, name, device), str(device), order=order)


def choose_real(recipes: Recipes, method: CoresetMethod, result: Result) -> Computed:
    """Choose real images by their latents, and read them again from the source."""
    name = result.class_name
    keys = recipes.store.record(recipes.latents(name))["images"]
    latents = scaled_latents(recipes, name)[: len(keys)]  # without mirror images
    ipc, seed, count = result.recipe["ipc"], result.recipe["seed"], result.recipe["ipc"] * method.parts
    if len(keys) < count:
        raise DataError(
            f"class {name}: {len(keys)} readable images, fewer than the {count} that IPC {ipc} takes. Add images, or lower ipc."
        )
    chosen = select(method.select, latents, count, stream(seed, name, 0, "coreset"))
    arrays = {"images": real_images(recipes, name, [keys[index] for index in chosen]), "latents": latents[chosen]}
    if method.parts == 4:  # the latents of a collage stand for those that its encoding would have
        images = collage(arrays["images"].transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
        arrays = {"images": images.round().astype(np.uint8), "latents": collage(arrays["latents"])}
    return result, arrays, {"chosen": [keys[index] for index in chosen]}


def synthesise(recipes: Recipes, name: str, device: torch.device) -> Callable[[Iterator[Result]], Iterator[Computed]]:
    """Return a function that generates missing results from what the store has of their classes."""
    method = recipes.config.methods[name]
    assert isinstance(method, DiffusionMethod)

    def latents_of(class_name: str) -> torch.Tensor:
        return torch.from_numpy(scaled_latents(recipes, class_name)).to(device).flatten(1)

    return generate(
        recipes.backbone,
        method,
        lambda result, denoiser: class_inputs(recipes, name, result, denoiser),
        recipes.config.compute,
        device,
        latents_of if needs_pool(method) else None,
    )


def generate(
    backbone: Checkpoint,
    method: DiffusionMethod,
    inputs_of: Callable[[Result, Denoiser], ClassInputs],
    compute: Compute,
    device: torch.device,
    latents_of: Callable[[str], torch.Tensor] | None = None,
) -> Callable[[Iterable[Result]], Iterator[Computed]]:
    """Return a function that samples the rows of results, batch by batch, and yields each when its rows are complete.

    The networks are loaded at its first call and serve the later ones.

    Args:
        inputs_of: what the method needs to know of a result's class.
        latents_of: see :func:`sample_results`.
    """
    dtype = getattr(torch, compute.dtype)
    batch, decode_batch = Batch(compute.sample_batch), Batch(compute.encode_batch)
    fixed = device.type == "cuda" or compute.compile
    candidates: dict[str, int] = {}

    @cache
    def networks() -> tuple[Denoiser, Autoencoder]:
        return (
            Denoiser.load(backbone.path, device, dtype, side=backbone.latent_side, compiled=compute.compile),
            Autoencoder.load(backbone.autoencoder, device, dtype),
        )

    def prepare(result: Result, grid: Grid) -> Rows:
        inputs, ipc, seed = inputs_of(result, networks()[0]), result.recipe["ipc"], result.recipe["seed"]
        candidate = find_candidate(method, inputs, ipc, seed, device)
        if candidate is not None:
            candidates[result.digest] = candidate
        return prepare_rows(method, replace(inputs, candidate=candidate), grid, ipc, seed, device)

    def generated(results: Iterable[Result]) -> Iterator[Computed]:
        denoiser, autoencoder = networks()
        for result, latents in sample_results(
            denoiser, method, results, prepare, batch, fixed_shape=fixed, latents_of=latents_of
        ):
            if not torch.isfinite(latents).all():
                raise DataError(
                    f"class {result.class_name}: its latents are not finite. Lower the method's guidance scale or cfg_scale."
                )
            images = np.concatenate(list(decode_batch.over(latents, autoencoder.decode)))
            found = {"candidate": candidates[result.digest]} if result.digest in candidates else {}
            yield result, {"images": images, "latents": latents.cpu().numpy()}, found

    return generated


def class_inputs(recipes: Recipes, name: str, result: Result, denoiser: Denoiser) -> ClassInputs:
    """Read what a method needs to know of a class."""
    method = recipes.config.methods[name]
    assert isinstance(method, DiffusionMethod)
    clusterings = recipes.clusterings(result.class_name, name, result.recipe["ipc"])
    gaussian = recipes.gaussian(result.class_name, name)
    table = denoiser.label_table

    def arrays(of: Result | None) -> Mapping[str, np.ndarray] | None:
        return recipes.store.read(of).arrays if of else None

    return ClassInputs(
        result.class_name,
        denoiser.latent_shape,
        latents=scaled_latents(recipes, result.class_name) if needs_latents(method) else None,
        modes=arrays(clusterings.get("prototypes")),
        targets=arrays(clusterings.get("targets")),
        gaussian=arrays(gaussian),
        label=result.recipe["label"],
        others=[label for label in recipes.label_pool(name) if label != result.recipe["label"]],
        embedding_shape=None if table is None else (table.shape[1], table.shape[2]),
    )


def sample_results(
    denoiser: Denoiser,
    method: DiffusionMethod,
    results: Iterable[Result],
    prepare: Prepare,
    batch: Batch,
    *,
    fixed_shape: bool,
    latents_of: Callable[[str], torch.Tensor] | None = None,
) -> Iterator[tuple[Result, torch.Tensor]]:
    """Sample the rows of many results in batches that may span several of them.

    Args:
        results: taken as they are needed to fill the next batch.
        prepare: the per-row tensors of one result.
        batch: rows per batch; becomes smaller if memory runs out.
        fixed_shape: fill the last batch with repeated rows, so that compiled code and kernels stay the same.
        latents_of: the real latents (n, D) of a class, where guidance looks at them at each step: held once per batch.

    Yields:
        each result with its latents (ipc, c, h, w), in order.
    """
    grid = respace(denoiser.abar, method.sampler.steps, method.sampler.spacing)
    begin, terms = start_step(method, grid), terms_of(method)
    schedule = label_schedule_of(method, denoiser)

    def denoise(rows: Rows, owners: list[Owner]) -> torch.Tensor:
        """Sample one batch, filled up to the fixed shape where there is one."""
        count = len(owners)
        numbers = [positions.setdefault(result.digest, len(positions)) for result, _ in owners]
        rows = {**rows, "set": torch.tensor(numbers)}
        if fixed_shape and count < batch.size:
            filler = torch.arange(batch.size).clamp(max=count - 1)
            rows = {key: value[filler.to(value.device)] for key, value in rows.items()}
            rows["set"][count:] = -1
            owners = owners + [owners[-1]] * (batch.size - count)
        if latents_of is not None:
            rows |= shared_latents([result.class_name for result, _ in owners], latents_of)
        labels = torch.tensor([result.recipe["label"] for result, _ in owners], device=denoiser.device)
        noise = None
        if method.sampler.kind == "ddpm":
            streams = [stream(result.recipe["seed"], result.class_name, index, "noise") for result, index in owners]
            noise = batch_noise(streams, len(grid.timesteps), *denoiser.latent_shape).to(denoiser.device)
        return sample(denoiser, grid, method.sampler, rows["start"], begin, labels, noise, terms, rows, schedule)[
            :count
        ]

    def denoise_in_parts(rows: Rows, owners: list[Owner]) -> torch.Tensor:
        """Sample one batch, in halves if memory does not suffice for the whole; the rows of a joint set stay together."""
        cuts = [
            cut for cut in range(1, len(owners)) if not is_joint(method) or owners[cut][0] is not owners[cut - 1][0]
        ]
        if len(owners) <= batch.size or not cuts:
            try:
                return denoise(rows, owners)
            except torch.OutOfMemoryError:
                if not cuts:
                    raise
            batch.shrink(len(owners))
        cut = min(cuts, key=lambda cut: abs(2 * cut - len(owners)))
        halves = [{key: value[half] for key, value in rows.items()} for half in (slice(cut), slice(cut, None))]
        parts = zip(halves, (owners[:cut], owners[cut:]), strict=True)
        return torch.cat([denoise_in_parts(*part) for part in parts])

    positions: dict[str, int] = {}
    if is_greedy(method):
        yield from _in_lockstep(denoise_in_parts, results, lambda result: prepare(result, grid), batch)
        return
    begun: deque[Result] = deque()

    def rows_of(result: Result) -> Rows:
        begun.append(result)
        return prepare(result, grid)

    done: list[torch.Tensor] = []
    for rows, owners in _batches(results, rows_of, batch, whole=is_joint(method)):
        done.append(denoise_in_parts(rows, owners))
        while begun and sum(map(len, done)) >= begun[0].recipe["ipc"]:
            ready, current = torch.cat(done), begun.popleft()
            yield current, ready[: current.recipe["ipc"]]
            done = [ready[current.recipe["ipc"] :]]


def _in_lockstep(
    denoise: Callable[[Rows, list[Owner]], torch.Tensor],
    results: Iterable[Result],
    prepare: Callable[[Result], Rows],
    batch: Batch,
) -> Iterator[tuple[Result, torch.Tensor]]:
    """Make image after image of as many results of equal IPC at once as a batch holds; ``memory`` holds those made so far."""
    for ipc, equals in groupby(results, _ipc_of):
        while group := list(islice(equals, batch.size)):
            rows = [prepare(result) for result in group]
            finished = [row["start"].new_empty(0, row["start"][0].numel()) for row in rows]
            images: list[torch.Tensor] = []
            for index in range(ipc):
                now = _collate([{key: value[index : index + 1] for key, value in row.items()} for row in rows])
                now["memory"] = torch.stack(finished)
                images.append(denoise(now, [(result, index) for result in group]).clone())
                finished = [
                    torch.cat([past, new[None]]) for past, new in zip(finished, images[-1].flatten(1), strict=True)
                ]
            yield from zip(group, torch.stack(images, dim=1), strict=True)


def _batches(
    results: Iterable[Result], prepare: Callable[[Result], Rows], batch: Batch, *, whole: bool
) -> Iterator[tuple[Rows, list[Owner]]]:
    """Yield batches of rows, each with the result and index that every row belongs to.

    Args:
        whole: keep the rows of a result in one batch, which is larger than ``batch.size`` if a result is.
    """
    parts: list[Rows] = []
    owners: list[Owner] = []
    for result in results:
        index, ipc = 0, result.recipe["ipc"]
        if whole and owners and len(owners) + ipc > batch.size:
            yield _collate(parts), owners
            parts, owners = [], []
        rows = prepare(result)
        while index < ipc:
            take = ipc if whole else min(batch.size - len(owners), ipc - index)
            parts.append({key: value[index : index + take] for key, value in rows.items()})
            owners += [(result, i) for i in range(index, index + take)]
            index += take
            if len(owners) >= batch.size:
                yield _collate(parts), owners
                parts, owners = [], []
    if owners:
        yield _collate(parts), owners


def _ipc_of(result: Result) -> int:
    return int(result.recipe["ipc"])


def _collate(parts: list[Rows]) -> Rows:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


if __name__ == "__main__":
    stage_main("sample", __doc__, work, "METHOD-NNN, for instance mgd3-000")
