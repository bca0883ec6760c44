"""What is made for an image depends on its seed, class and index alone: not on the batch, the order or the padding.

Rows run through a two-layer DiT with random weights, so that a row which leaked into another, or took another's label or
noise, would show.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from analytic import CPU, dit_denoiser

from workflow_scripts.config import DiffusionMethod, Inversion
from workflow_scripts.diffusion.backbone import Denoiser
from workflow_scripts.diffusion.inversion import Moments, invert
from workflow_scripts.diffusion.noise import batch_noise, stream
from workflow_scripts.diffusion.sampler import sample
from workflow_scripts.diffusion.schedule import Grid, respace
from workflow_scripts.methods.modes import grow_tree, kmeans
from workflow_scripts.methods.registry import ClassInputs, is_greedy, needs_pool, prepare_rows, terms_of
from workflow_scripts.stages.memory import Batch
from workflow_scripts.stages.sample import sample_results
from workflow_scripts.store.results import Result

SHAPE = (4, 8, 8)
CLASSES = ("ant", "bee", "cat")
DDPM = {"steps": 10, "cfg_scale": 2.0}
DDIM = {"kind": "ddim", "spacing": "leading", "steps": 10, "cfg_scale": 2.0, "cfg_channels": 4}
MODE = {"term": "mode", "stop": 4}
TRANSPORT = {"term": "transport", "window": [2, 8], "targets": 5, "scale": 5.0}
METHODS = {
    "plain": {"sampler": DDPM},
    "mgd3": {"sampler": DDPM, "prototypes": {"kind": "kmeans"}, "guidance": [MODE]},
    "mgd3-ddim": {"sampler": DDIM, "prototypes": {"kind": "kmeans"}, "guidance": [MODE]},
    "manifoldgd": {
        "sampler": DDPM,
        "prototypes": {"kind": "multiscale", "start_depth": 1},
        "guidance": [{"term": "tangent", "stop": 4, "neighbours": 16, "kappa": 0.25, "normal_pull": 0.1}],
    },
    "manifoldgd-x0": {
        "sampler": DDPM,
        "prototypes": {"kind": "multiscale", "start_depth": 1},
        "guidance": [{"term": "tangent", "stop": 4, "neighbours": 8, "around": "x0", "normal_pull": 0.1}],
    },
    "manifoldgd-x0-noisy": {
        "sampler": DDPM,
        "prototypes": {"kind": "leaves"},
        "guidance": [
            {"term": "tangent", "stop": 4, "neighbours": 64, "around": "x0", "noisy": True, "normal_pull": 0.1}
        ],
    },
    "manifoldgd-noisy": {
        "sampler": DDPM,
        "prototypes": {"kind": "leaves"},
        "guidance": [{"term": "tangent", "stop": 4, "neighbours": 64, "noisy": True, "normal_pull": 0.1}],
    },
    "manifoldgd-released": {
        "sampler": DDPM,
        "prototypes": {"kind": "leaves"},
        "guidance": [MODE, {"term": "released_manifold", "stop": 4, "cloud": 40, "scale": 1.0}],
    },
    "d3hr": {"sampler": DDIM, "start": {"kind": "gaussian"}},
    "d3hr-search": {
        "sampler": DDIM,
        "start": {"kind": "gaussian", "construction": "best_of_m", "candidates": 20, "legacy_offset": True},
    },
    "d4m": {"sampler": DDIM, "prototypes": {"kind": "kmeans"}, "start": {"kind": "prototype", "timestep": 700}},
    "soft": {"sampler": DDPM, "labels": {"kind": "soft", "noise": 0.5, "other": 0.5}},
    "dmgd": {"sampler": DDPM, "labels": {"kind": "soft"}, "guidance": [TRANSPORT]},
    "dmgd-joint": {"sampler": DDPM, "guidance": [TRANSPORT | {"matching": "synchronous"}]},
    "dmgd-norm": {
        "sampler": DDPM,
        "prototypes": {"kind": "kmeans"},
        "guidance": [TRANSPORT | {"scale": 0.1, "unit_gradient": True, "log_domain": True, "sweeps": 30}, MODE],
    },
}


class Network(torch.nn.Module):
    """The exact noise of white data, sqrt(1 - abar) x, plus a DiT's answer: latents keep a sane size."""

    def __init__(self, dit: torch.nn.Module, abar: np.ndarray):
        super().__init__()
        self.dit = dit
        self.register_buffer("sigma", torch.from_numpy(np.sqrt(1 - abar)).float())

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        eps, raw = self.dit(x, timestep, labels).sample.chunk(2, dim=1)
        eps = self.sigma[timestep].view(-1, 1, 1, 1) * (x + 0.3 * eps)
        return SimpleNamespace(sample=torch.cat([eps, raw.tanh()], dim=1))


@functools.cache
def denoiser() -> Denoiser:
    plain = dit_denoiser(len(CLASSES), SHAPE[1])
    plain.model = Network(plain.model, plain.abar)
    return plain


@functools.cache
def real(name: str) -> np.ndarray:
    return stream(0, name, 0, "real").normal(CLASSES.index(name) - 1, 1, (24 + len(name), *SHAPE)).astype(np.float32)


def flat_latents(name: str) -> torch.Tensor:
    return torch.from_numpy(real(name)).flatten(1)


@functools.cache
def gaussian(name: str) -> dict[str, np.ndarray]:
    grid, latents = respace(denoiser().abar, 10, "leading"), torch.from_numpy(real(name))
    labels = torch.full((len(latents),), CLASSES.index(name))
    moments = Moments()
    until = grid.step_of(600)
    moments.update(invert(denoiser(), grid, latents, labels, until, Inversion(), cfg_scale=1.0, cfg_channels=4))
    mean, variance = (moment.float().numpy() for moment in moments.result())
    return {"mean": mean, "variance": variance}


def inputs(method: DiffusionMethod, name: str, ipc: int) -> ClassInputs:
    kind = getattr(method.prototypes, "kind", None)
    modes = None
    if kind is not None:
        clusters = kmeans(real(name), ipc, 1, 0)[0] if kind == "kmeans" else grow_tree(real(name), 12, 1, 0)
        modes = asdict(clusters)
    transported = any(term.term == "transport" for term in method.guidance)
    table = denoiser().label_table
    assert table is not None
    return ClassInputs(
        name,
        SHAPE,
        latents=real(name),
        modes=modes,
        targets=asdict(kmeans(real(name), 5, 1, 0)[0]) if transported else None,
        gaussian=gaussian(name) if method.start.kind == "gaussian" else None,
        label=CLASSES.index(name),
        others=[label for label in range(len(CLASSES)) if label != CLASSES.index(name)],
        embedding_shape=(table.shape[1], table.shape[2]),
    )


def method_of(name: str) -> DiffusionMethod:
    return DiffusionMethod.model_validate({"kind": "diffusion"} | METHODS[name])


def result(name: str, ipc: int, seed: int = 0) -> Result:
    return Result("sample", name, {"ipc": ipc, "seed": seed, "label": CLASSES.index(name)})


RESULTS = [
    result("ant", 1),
    result("bee", 4),
    result("ant", 4),
    result("cat", 3),
    result("ant", 4, seed=1),
    result("cat", 1),
]


def make(
    method: str | DiffusionMethod,
    results: Sequence[Result],
    batch: int,
    *,
    fixed_shape: bool = False,
    model: Denoiser | None = None,
) -> dict[str, torch.Tensor]:
    chosen = method_of(method) if isinstance(method, str) else method

    pool = flat_latents if needs_pool(chosen) else None
    options: dict[str, Any] = {"fixed_shape": fixed_shape, "latents_of": pool}
    wanted = sorted(results, key=lambda one: one.recipe["ipc"]) if is_greedy(chosen) else list(results)
    made = list(sample_results(model or denoiser(), chosen, wanted, preparer(chosen), Batch(batch), **options))
    assert [one for one, _ in made] == wanted, "results come in the order asked for"
    return {one.digest: latents for one, latents in made}


def preparer(method: DiffusionMethod) -> Callable[[Result, Grid], dict[str, torch.Tensor]]:
    def prepare(wanted: Result, grid: Grid) -> dict[str, torch.Tensor]:
        ipc = wanted.recipe["ipc"]
        return prepare_rows(method, inputs(method, wanted.class_name, ipc), grid, ipc, wanted.recipe["seed"], CPU)

    return prepare


@functools.cache
def reference(method: str) -> dict[str, torch.Tensor]:
    """Return each result sampled on its own, in a batch of just its size."""
    return {one.digest: make(method, [one], one.recipe["ipc"])[one.digest] for one in RESULTS}


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for key, latents in theirs.items():
        assert latents.dtype == torch.float32
        torch.testing.assert_close(mine[key], latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_latents_do_not_depend_on_batch_order_or_padding(method: str, batch: int) -> None:
    for fixed_shape in (False, True):
        assert_same(make(method, RESULTS, batch, fixed_shape=fixed_shape), reference(method))
    if batch == 7:
        assert_same(make(method, RESULTS[::-1], batch), reference(method))
        shuffled = [RESULTS[index] for index in (3, 0, 5, 2, 4, 1)]
        assert_same(make(method, shuffled, batch, fixed_shape=True), reference(method))


@pytest.mark.parametrize("method", METHODS)
def test_images_differ_and_are_finite(method: str) -> None:
    """Else the test above would pass on a sampler that ignores what it is given."""
    latents = torch.cat(list(reference(method).values()))
    assert torch.isfinite(latents).all()
    assert 0.1 < float(latents.std()) < 10
    if method.startswith(("plain", "d3hr", "d4m")):
        return
    guided, plain = reference(method), reference("plain" if method != "mgd3-ddim" else "d3hr")
    for key, value in guided.items():
        assert float((value - plain[key]).abs().max()) > 2e-3


@pytest.mark.parametrize("method", METHODS)
def test_no_two_images_are_alike(method: str) -> None:
    latents = torch.cat([reference(method)[one.digest] for one in (RESULTS[1], RESULTS[2], RESULTS[3], RESULTS[4])])
    distances = torch.cdist(latents.flatten(1), latents.flatten(1)) + 1e9 * torch.eye(len(latents))
    assert float(distances.min()) > 0.5


@pytest.mark.parametrize("options", [DDPM, DDIM])
def test_the_image_of_ipc_1_is_the_first_of_ipc_10(options: dict[str, object]) -> None:
    method = DiffusionMethod.model_validate({"kind": "diffusion", "sampler": options})
    one, ten = result("bee", 1), result("bee", 10)
    made = make(method, [ten, one], 4)
    torch.testing.assert_close(made[one.digest][0], made[ten.digest][0], rtol=1e-5, atol=1e-5)
    assert made[ten.digest].shape == (10, *SHAPE)


def test_a_result_is_the_sampler_on_its_own_streams() -> None:
    """The engine adds nothing: row i of a class is ``sample`` with that image's start, noise, label and prototype."""
    method, wanted = method_of("mgd3"), RESULTS[4]
    grid = respace(denoiser().abar, 10, "linspace")
    rows = prepare_rows(method, inputs(method, "ant", 4), grid, 4, 1, CPU)
    for index in range(4):
        own = {key: value[index : index + 1] for key, value in rows.items()}
        noise = batch_noise([stream(1, "ant", index, "noise")], 10, *SHAPE)
        label = torch.tensor([CLASSES.index("ant")])
        alone = sample(denoiser(), grid, method.sampler, own["start"], 9, label, noise, terms_of(method), own)
        torch.testing.assert_close(reference("mgd3")[wanted.digest][index], alone[0], rtol=1e-5, atol=1e-5)


def test_lambda_zero_is_plain_sampling() -> None:
    nothing = DiffusionMethod.model_validate(
        {"kind": "diffusion"} | METHODS["mgd3"] | {"guidance": [{"term": "mode", "scale": 0.0, "stop": 4}]}
    )
    mine, plain = make(nothing, RESULTS, 7), make("plain", RESULTS, 7)
    assert all(torch.equal(mine[key], plain[key]) for key in plain)


def test_full_tangent_is_mode_guidance_to_the_bit() -> None:
    """kappa 1 is MGD3, whatever the neighbourhood (specification 9, item 3)."""
    tangent = {"term": "tangent", "stop": 4, "kappa": 1.0, "neighbours": 16}
    whole = DiffusionMethod.model_validate({"kind": "diffusion"} | METHODS["mgd3"] | {"guidance": [tangent]})
    mine, mgd3 = make(whole, RESULTS, 7), make("mgd3", RESULTS, 7)
    assert all(torch.equal(mine[key], mgd3[key]) for key in mgd3)


class Counting(torch.nn.Module):
    """Passes calls on and writes down their batch sizes."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> object:
        self.sizes.append(len(x))
        return self.model(x, *rest)


@pytest.mark.parametrize(("fixed_shape", "sizes"), [(True, {14}), (False, {14, 6})])
def test_batches_are_full_and_the_last_is_padded(fixed_shape: bool, sizes: set[int]) -> None:
    """17 rows in batches of 7 are two full batches and one of 3; guidance doubles them, and each takes 10 steps."""
    method, whole = method_of("plain"), denoiser()
    counting = Counting(whole.model)
    counted = Denoiser(counting, whole.abar, whole.null_label, SHAPE, CPU)
    list(
        sample_results(
            counted,
            method,
            RESULTS,
            preparer(method),
            Batch(7),
            fixed_shape=fixed_shape,
        )
    )
    assert set(counting.sizes) == sizes
    assert len(counting.sizes) == 3 * 10


class Small(Counting):
    """A network for which the GPU's memory suffices up to some number of rows."""

    limit = 6

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> object:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x, *rest)


@pytest.mark.parametrize("fixed_shape", [True, False])
def test_batches_become_smaller_when_memory_runs_out(fixed_shape: bool, capsys: pytest.CaptureFixture[str]) -> None:
    whole = denoiser()
    small = Small(whole.model)
    model = Denoiser(small, whole.abar, whole.null_label, SHAPE, CPU)
    found, usual = make("plain", RESULTS, 12, fixed_shape=fixed_shape, model=model), make("plain", RESULTS, 12)
    for key, latents in usual.items():
        torch.testing.assert_close(found[key], latents)
    assert set(small.sizes) <= ({6} if fixed_shape else {2, 4, 6}), "guidance doubles rows: three fit"
    assert capsys.readouterr().err.count("Out of GPU memory") == 2, "12 rows, 6 rows, and then 3 for good"


def test_the_rows_of_a_joint_set_stay_together_when_memory_runs_out() -> None:
    whole, method = denoiser(), method_of("dmgd-joint")
    small = Small(whole.model)
    small.limit = 2 * max(one.recipe["ipc"] for one in RESULTS)
    model = Denoiser(small, whole.abar, whole.null_label, SHAPE, CPU)
    found, usual = make(method, RESULTS, 20, model=model), make(method, RESULTS, 20)
    for key, latents in usual.items():
        torch.testing.assert_close(found[key], latents)

    small.limit -= 1
    with pytest.raises(torch.OutOfMemoryError):
        make(method, RESULTS, 20, model=model)


def test_results_are_yielded_as_soon_as_their_rows_are_done() -> None:
    """A killed job then loses only the class in hand: what is complete must not wait for later classes to be prepared."""
    method, prepared = method_of("plain"), []

    def prepare(one: Result, grid: Grid) -> dict[str, torch.Tensor]:
        prepared.append(one)
        return preparer(method)(one, grid)

    generator = sample_results(denoiser(), method, RESULTS, prepare, Batch(3), fixed_shape=False)
    first, _ = next(generator)
    assert first is RESULTS[0]
    assert len(prepared) == 2  # ant's one row and two of bee's filled the batch of three
    second, latents = next(generator)
    assert second is RESULTS[1]
    assert len(latents) == 4
    assert len(prepared) == 3


def test_nothing_to_do() -> None:
    assert list(sample_results(denoiser(), method_of("plain"), [], lambda *_: {}, Batch(4), fixed_shape=True)) == []
