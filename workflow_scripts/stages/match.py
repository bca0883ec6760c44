"""Learn the synthetic images of a shard's classes by matching real images through the backbone (LD3M), for one IPC and seed.

All classes of a job go through the iterations together. By gradients or features, each is compared with its own real images
alone, under networks that depend on seed and iteration, so that its result does not depend on which others are there; by
trajectories, all classes of the run form one set. A killed job resumes at its last checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from workflow_scripts.config import DCObjective, DMObjective, MatchingMethod, MTTObjective
from workflow_scripts.diffusion.backbone import Autoencoder, Denoiser
from workflow_scripts.diffusion.noise import batch_noise, stream
from workflow_scripts.errors import DataError
from workflow_scripts.evaluation.augment import IMAGENET_MEAN
from workflow_scripts.evaluation.dsa import draw
from workflow_scripts.methods.ld3m import Synthesiser
from workflow_scripts.methods.matching import (
    LEGACY_MEAN,
    FlatNetwork,
    Match,
    batches,
    feature_distance,
    gradient_distance,
    normalised,
    student,
    tesla,
    to_pixels,
    unrolled,
)
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.inputs import real_images, scaled_latents
from workflow_scripts.stages.notice import NOTICE
from workflow_scripts.stages.worker import Computed, pick_device, progress, quiet_libraries, run_shard
from workflow_scripts.store.files import write_atomically
from workflow_scripts.store.results import Result

Compare = Callable[[int, torch.Tensor, float], Match]
"""From an iteration, images (n, 3, H, W) in [-1, 1] and the student's learning rate to what the objective says."""
CURVE_POINTS = 100
EXPERTS_IN_MEMORY = 64


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Learn one job's images."""
    quiet_libraries()
    device = pick_device(recipes.config.compute.device)

    def compute(missing: Iterator[Result]) -> Iterator[Computed]:
        return learn(recipes, shard, list(missing), device)

    return run_shard(recipes, "match", shard, compute, str(device), together=True)


@dataclass
class State:
    """Where the optimisation stands: what is learned, by name, with SGD's velocities, and the losses so far.

    Attributes:
        values: ``latents`` (n, c, h, w), ``embeddings`` (n, P, E) and ``rate`` (1,), the student's learning rate.
        curve: per class, or one for all, pairs of an iteration and the loss there.
    """

    values: dict[str, torch.Tensor]
    velocities: dict[str, torch.Tensor] = field(default_factory=dict)
    curves: list[list[tuple[int, float]]] = field(default_factory=list)
    iteration: int = 0

    def descend(self, name: str, gradient: torch.Tensor, rate: float, momentum: float) -> None:
        """Take one step of SGD with momentum."""
        before = self.velocities.get(name)
        self.velocities[name] = gradient if before is None else momentum * before + gradient
        self.values[name] = self.values[name] - rate * self.velocities[name]

    def note(self, losses: list[float]) -> None:
        """Remember the losses of this iteration."""
        self.curves = self.curves or [[] for _ in losses]
        for curve, loss in zip(self.curves, losses, strict=True):
            curve.append((self.iteration, loss))


def learn(recipes: Recipes, shard: str, missing: list[Result], device: torch.device) -> Iterator[Computed]:
    """Optimise the images of the missing results together, and yield each with everything that was learned."""
    config = recipes.config
    wanted, _ = recipes.match_set(shard)
    method = config.methods[wanted.method]
    assert isinstance(method, MatchingMethod)
    together = isinstance(method.objective, MTTObjective)
    results = recipes.stage_results("match", shard) if together else missing
    dtype = getattr(torch, config.compute.dtype)
    denoiser = Denoiser.load(recipes.backbone.path, device, dtype, side=recipes.backbone.latent_side)
    autoencoder = Autoencoder.load(recipes.backbone.autoencoder, device, dtype)
    synthesiser = Synthesiser(denoiser, autoencoder, method.chain, method.chunk, method.checkpointing)
    owners = [(result.class_name, index) for result in results for index in range(wanted.ipc)]
    noise = synthesiser.noise(owners, wanted.seed)
    file = recipes.checkpoint(shard)

    began = time.monotonic()
    state = resume(file, results, device) or start(recipes, method, denoiser, results)
    compare = comparison(recipes, wanted.method, results, device)
    before, took = time.monotonic(), 0.0
    for iteration in progress(
        range(state.iteration, method.iterations), method.iterations - state.iteration, f"match {shard}", "iteration"
    ):
        if method.chain.noise == "resample":
            noise = synthesiser.noise(owners, wanted.seed, iteration)
        step(state, synthesiser, method, noise, compare)
        took = max(took, time.monotonic() - before)
        stopping = NOTICE.due(took) and state.iteration < method.iterations
        if stopping or state.iteration % method.checkpoint_every == 0 or state.iteration == method.iterations:
            keep(file, state, results)
        if stopping:
            raise NOTICE.stopped(f"at iteration {state.iteration} of {method.iterations}")
        before = time.monotonic()
    seconds = (time.monotonic() - began) / len(missing)

    values, final = state.values, synthesiser.noise(owners, wanted.seed)
    for place, result in enumerate(results):
        rows = slice(place * wanted.ipc, (place + 1) * wanted.ipc)
        if result not in missing:
            continue
        chosen = [values["latents"][rows], values["embeddings"][rows], final[rows]]
        with torch.no_grad():
            parts = zip(*(tensor.split(method.chunk) for tensor in chosen), strict=True)
            latents = torch.cat([synthesiser.denoise(*part) for part in parts])
        if not torch.isfinite(latents).all():
            raise _diverged(wanted.method, result.class_name)
        images = np.concatenate([autoencoder.decode(part) for part in latents.split(config.compute.encode_batch)])
        learned = {"latents": latents, "learned_latents": chosen[0], "embeddings": chosen[1]}
        learned |= {"learning_rate": values["rate"]} if together else {}
        record = {
            "seconds": seconds,
            "noise_seed": wanted.seed,
            "iterations": state.iteration,
            "learning_rates": {key: getattr(method.objective, key) for key in ("lr_latents", "lr_embeddings")},
            "curve": state.curves[0 if together else place],
        }
        yield result, {"images": images} | {key: value.cpu().numpy() for key, value in learned.items()}, record
    file.unlink(missing_ok=True)


def start(recipes: Recipes, method: MatchingMethod, denoiser: Denoiser, results: list[Result]) -> State:
    """Return the start of an optimisation: latents of distinct real images (or noise), and copies of the class embedding."""
    latents = [torch.from_numpy(_initial_latents(recipes, method, denoiser, result)) for result in results]
    labels = [label for result in results for label in [result.recipe["label"]] * result.recipe["ipc"]]
    rate = method.objective.student_lr if isinstance(method.objective, MTTObjective) else 0.0
    embeddings = denoiser.embed(torch.tensor(labels, device=denoiser.device)).clone()
    values = {"latents": torch.cat(latents).to(denoiser.device), "embeddings": embeddings}
    return State(values | {"rate": torch.tensor([rate], dtype=torch.float64)})


def _initial_latents(recipes: Recipes, method: MatchingMethod, denoiser: Denoiser, result: Result) -> np.ndarray:
    name, ipc, seed = result.class_name, result.recipe["ipc"], result.recipe["seed"]
    if method.initial == "noise":
        streams = [stream(seed, name, index, "ld3m-initial") for index in range(ipc)]
        return batch_noise(streams, *denoiser.latent_shape).numpy()
    count = len(recipes.store.record(recipes.latents(name))["images"])  # without mirror images
    if count < ipc:
        raise DataError(f"class {name}: {count} readable images, fewer than IPC {ipc}. Add images, or lower ipc.")
    chosen = stream(seed, name, 0, "ld3m-initial").choice(count, ipc, replace=False)
    return scaled_latents(recipes, name)[chosen]


def step(state: State, synthesiser: Synthesiser, method: MatchingMethod, noise: torch.Tensor, compare: Compare) -> None:
    """Take one iteration: images, the objective's gradient for them, and from there that of what is learned."""
    objective, values = method.objective, state.values
    images, pull_back = synthesiser.trace(values["latents"], values["embeddings"], noise)
    match = compare(state.iteration, images, float(values["rate"]))
    if not np.isfinite(match.losses).all():
        raise _diverged("matching", f"iteration {state.iteration}")
    if state.iteration % max(1, method.iterations // CURVE_POINTS) == 0:
        state.note(match.losses)
    latents, embeddings = pull_back(match.gradient)
    state.descend("latents", latents, objective.lr_latents, method.momentum)
    state.descend("embeddings", embeddings, objective.lr_embeddings, method.momentum)
    if isinstance(objective, MTTObjective):
        slope = torch.tensor([match.rate_gradient], dtype=torch.float64)
        state.descend("rate", slope, objective.lr_student_lr, method.momentum)
    state.iteration += 1


def _diverged(name: str, where: str) -> DataError:
    return DataError(f"{name} diverged ({where}). Lower objective.lr_latents and objective.lr_embeddings.")


# ---------------------------------------------------------------- comparing


def comparison(recipes: Recipes, name: str, results: list[Result], device: torch.device) -> Compare:
    """Return a method's objective as a function of the images of these results."""
    method = recipes.config.methods[name]
    assert isinstance(method, MatchingMethod)
    mean = LEGACY_MEAN if method.legacy_colour else IMAGENET_MEAN
    if isinstance(method.objective, MTTObjective):
        return _trajectories(recipes, method.objective, recipes.experts(name), results, mean, device)
    return _class_by_class(recipes, method.objective, results, mean, device)


def _class_by_class(
    recipes: Recipes,
    objective: DCObjective | DMObjective,
    results: list[Result],
    mean: tuple[float, float, float],
    device: torch.device,
) -> Compare:
    resolution = recipes.config.dataset.resolution
    encoded = {
        result.class_name: recipes.store.record(recipes.latents(result.class_name))["images"] for result in results
    }
    real = [torch.from_numpy(real_images(recipes, name, keys)).to(device) for name, keys in encoded.items()]

    def compare(iteration: int, images: torch.Tensor, _: float) -> Match:
        seed, ipc = results[0].recipe["seed"], results[0].recipe["ipc"]
        _, classes = results[0].recipe.get("student_label", (0, 1))
        network = student(classes, resolution, objective.width, seed, iteration, device)
        losses, gradients = [], []
        for result, pixels, part in zip(results, real, images.split(ipc), strict=True):
            chance = stream(seed, result.class_name, iteration, "match")
            size = min(objective.batch_real, len(pixels))
            drawn = torch.from_numpy(chance.choice(len(pixels), size, replace=False)).to(device)
            augment = draw(chance, objective.dsa)
            reference = augment(normalised(to_pixels(pixels[drawn])))
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                synthetic = augment(normalised(leaf, mean))
                if isinstance(objective, DCObjective):
                    label = result.recipe["student_label"][0]
                    loss = gradient_distance(network, reference, synthetic, label)
                else:
                    loss = feature_distance(network, reference, synthetic)
            gradients.append(torch.autograd.grad(loss, leaf)[0])
            losses.append(loss.detach())
        return Match(torch.stack(losses).tolist(), torch.cat(gradients))

    return compare


def _trajectories(
    recipes: Recipes,
    objective: MTTObjective,
    experts: list[Result],
    results: list[Result],
    mean: tuple[float, float, float],
    device: torch.device,
) -> Compare:
    wanted = results[0].recipe
    seed, ipc, classes = wanted["seed"], wanted["ipc"], recipes.classes
    network = FlatNetwork(student(len(classes), recipes.config.dataset.resolution, objective.width, 0, 0, device))
    labels = torch.tensor([classes.index(r.class_name) for r in results for _ in range(ipc)], device=device)
    match = tesla if objective.gradient == "tesla" else unrolled

    @lru_cache(EXPERTS_IN_MEMORY)
    def trajectory(number: int) -> torch.Tensor:
        return torch.from_numpy(recipes.store.read(experts[number], "trajectory").arrays["trajectory"]).to(device)

    def compare(iteration: int, images: torch.Tensor, rate: float) -> Match:
        chance = stream(seed, "", iteration, "match")
        path, begin = trajectory(int(chance.integers(len(experts)))), int(chance.integers(objective.max_start))
        steps = objective.student_steps
        order = batches(len(images), objective.batch_synthetic, steps, chance)
        augment = [draw(chance, objective.dsa, len(rows)) for rows in order]
        rows = [torch.from_numpy(chosen).to(device) for chosen in order]

        def feed(number: int, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return augment[number](normalised(pixels[rows[number]], mean)), labels[rows[number]]

        found = match(network, path[begin], path[begin + objective.expert_epochs], images, feed, steps, rate)
        share = 0.5 if objective.halve_gradient else 1.0
        return Match(found.losses, share * found.gradient, found.rate_gradient)

    return compare


# ---------------------------------------------------------------- checkpoints


def keep(file: Path, state: State, results: list[Result]) -> None:
    """Replace the checkpoint: each result's rows under its digest, so that what is missing later can go on without the rest."""
    tensors: dict[str, torch.Tensor] = {}
    for kind, held in (("value", state.values), ("velocity", state.velocities)):
        for name, tensor in held.items():
            parts = [tensor] if name == "rate" else tensor.chunk(len(results))
            keys = ["all"] if name == "rate" else [result.digest for result in results]
            tensors |= {f"{key}.{kind}.{name}": part.cpu() for key, part in zip(keys, parts, strict=True)}
    single = len(state.curves) == 1
    curves = {r.digest: state.curves[0 if single else place] for place, r in enumerate(results)} if state.curves else {}
    metadata = {"iteration": str(state.iteration), "curves": json.dumps(curves), "shared": json.dumps(single)}
    write_atomically(file, save({key: value.contiguous() for key, value in tensors.items()}, metadata))


def resume(file: Path, results: list[Result], device: torch.device) -> State | None:
    """Read the state of these results from a checkpoint, if there is one that holds them all."""
    if not file.exists():
        return None
    try:
        opened = safe_open(file, "pt")
    except SafetensorError:
        return None
    with opened as held:
        metadata, keys = held.metadata(), set(held.keys())
        names = [result.digest for result in results]
        if not all(f"{name}.value.latents" in keys for name in names):
            return None
        state = State({}, iteration=int(metadata["iteration"]))
        for kind, into in (("value", state.values), ("velocity", state.velocities)):
            for name in ("latents", "embeddings"):
                parts = [held.get_tensor(f"{key}.{kind}.{name}") for key in names]
                into[name] = torch.cat(parts).to(device)
            if (key := f"all.{kind}.rate") in keys:
                into["rate"] = held.get_tensor(key)
        curves = json.loads(metadata["curves"])
        listed = [[(int(i), float(loss)) for i, loss in curves.get(name, [])] for name in names]
        state.curves = listed[:1] if json.loads(metadata["shared"]) else listed
    return state


if __name__ == "__main__":
    stage_main("match", __doc__, work, "METHOD-ipcK-seedS-NNN, for instance ld3m-dm-ipc10-seed0-000")
