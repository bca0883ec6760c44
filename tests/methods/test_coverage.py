"""What guidance is for: on a class with known modes, every mode gets its image; unguided sampling misses some."""

from __future__ import annotations

import functools
from dataclasses import asdict

import numpy as np
import pytest
import torch
from analytic import CPU, Mixture

from workflow_scripts.config import DiffusionMethod
from workflow_scripts.diffusion.schedule import Grid
from workflow_scripts.methods.modes import Modes, Tree, grow_tree, kmeans
from workflow_scripts.methods.registry import ClassInputs, needs_pool, prepare_rows
from workflow_scripts.stages.memory import Batch
from workflow_scripts.stages.sample import sample_results
from workflow_scripts.store.results import Result

SHAPE, D = (4, 8, 8), 256
MODES, EACH, PLANE, STD = 10, 12, 8, 0.1
SEEDS = range(4)
RANDOM = np.random.default_rng(0)
BASIS = np.linalg.qr(RANDOM.normal(size=(D, PLANE)))[0].T
"""Modes and images lie on one plane, so that its tangents lead from mode to mode; in D dimensions latents are about 1."""
PLACES = 6 * RANDOM.normal(size=(MODES, PLANE))
CENTRES = torch.from_numpy(PLACES @ BASIS).view(MODES, *SHAPE)
IMAGES = (PLACES.repeat(EACH, 0) + 0.3 * RANDOM.normal(size=(MODES * EACH, PLANE))) @ BASIS
LATENTS = IMAGES.reshape(-1, *SHAPE).astype(np.float32)
SAMPLERS = {
    "ddpm": {"kind": "ddpm", "cfg_scale": 1.0},
    "ddim": {"kind": "ddim", "cfg_scale": 1.0},
}
KMEANS = {"kind": "kmeans"}
PULL = {"scale": 0.2, "stop": 25}
TANGENT = PULL | {"term": "tangent", "neighbours": EACH, "tangent_variance": 1.0}
GUIDED = {
    "mgd3": {"prototypes": KMEANS, "guidance": [PULL | {"term": "mode"}]},
    "manifoldgd": {"prototypes": KMEANS, "guidance": [TANGENT]},
    "manifoldgd-leaves": {"prototypes": {"kind": "leaves"}, "guidance": [TANGENT]},
    "manifoldgd-x0": {"prototypes": KMEANS, "guidance": [TANGENT | {"around": "x0"}]},
}
NOISY = {"prototypes": KMEANS, "guidance": [TANGENT | {"noisy": True}]}


@functools.cache
def prototypes(kind: str) -> Modes | Tree:
    return grow_tree(LATENTS, MODES, 10, 0) if kind == "leaves" else kmeans(LATENTS, MODES, 10, 0)[0]


def covered(options: dict[str, object]) -> list[int]:
    """Return how many modes the images of each seed lie at."""
    method = DiffusionMethod.model_validate({"kind": "diffusion"} | options)
    modes = asdict(prototypes(getattr(method.prototypes, "kind", "kmeans")))

    def prepare(result: Result, grid: Grid) -> dict[str, torch.Tensor]:
        inputs = ClassInputs("a", SHAPE, latents=LATENTS, modes=modes, label=0)
        return prepare_rows(method, inputs, grid, MODES, result.recipe["seed"], CPU)

    flat = torch.from_numpy(LATENTS).flatten(1)
    results = [Result("sample", "a", {"ipc": MODES, "seed": seed, "label": 0}) for seed in SEEDS]
    denoiser = Mixture([CENTRES], STD, raw=0.0)
    pool = (lambda name: flat) if needs_pool(method) else None
    found = []
    for _, latents in sample_results(denoiser, method, results, prepare, Batch(64), fixed_shape=False, latents_of=pool):
        distances = torch.cdist(latents.double().flatten(1), CENTRES.flatten(1))
        assert float(distances.min(1).values.max()) < STD * (D**0.5 + 8), "every image lies at some mode"
        found.append(len(set(distances.argmin(1).tolist())))
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_unguided_samples_miss_modes(sampler: str) -> None:
    """Ten draws of ten equal modes find 10 (1 - 0.9^10) = 6.5 of them on average."""
    found = covered({"sampler": SAMPLERS[sampler]})
    assert max(found) < MODES
    assert 5 < np.mean(found) < 8


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("method", GUIDED)
def test_guided_samples_cover_the_modes(method: str, sampler: str) -> None:
    found = covered(GUIDED[method] | {"sampler": SAMPLERS[sampler]})
    assert found == [MODES] * len(SEEDS)


def test_noise_in_the_patch_hides_the_manifold() -> None:
    """With noise as published the tangents are those of the noise, and hardly hold the way to a mode (specification, A6)."""
    found = covered(NOISY | {"sampler": SAMPLERS["ddpm"]})
    assert np.mean(found) < 8


def test_a_pull_of_no_strength_covers_no_more_than_none() -> None:
    """The margin above comes from the pull: without it the same code finds what unguided sampling finds."""
    none = {"prototypes": KMEANS, "guidance": [TANGENT | {"scale": 0.0}], "sampler": SAMPLERS["ddpm"]}
    assert covered(none) == covered({"sampler": SAMPLERS["ddpm"]})
