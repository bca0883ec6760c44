from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from analytic import Mixture, ddim_factor, dit_denoiser, exact_flow, gaussian, linear_schedule

from workflow_scripts.config import Inversion, Sampler
from workflow_scripts.diffusion.inversion import Moments, invert, noised_moments
from workflow_scripts.diffusion.sampler import sample
from workflow_scripts.diffusion.schedule import Grid, respace
from workflow_scripts.stages.invert import class_gaussian
from workflow_scripts.stages.memory import Batch

SHAPE = (4, 1, 1)
MEAN = torch.tensor([1.5, -0.4, 0.0, 0.7], dtype=torch.float64).view(SHAPE)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inverted(
    model: Mixture, grid: Grid, latents: torch.Tensor, until: int, cfg_scale: float = 1.0, **settings: object
) -> torch.Tensor:
    labels = torch.zeros(len(latents), dtype=torch.int64)
    return invert(model, grid, latents, labels, until, Inversion(**settings), cfg_scale=cfg_scale, cfg_channels=4)


def sampled(
    model: Mixture, grid: Grid, spacing: str, z: torch.Tensor, start: int, cfg_scale: float = 1.0
) -> torch.Tensor:
    settings = Sampler(kind="ddim", spacing=spacing, steps=len(grid.abar), cfg_scale=cfg_scale, cfg_channels=4)
    return sample(model, grid, settings, z, start, torch.zeros(len(z), dtype=torch.int64), None, [], {})


def mixture(std: float = 0.6) -> Mixture:
    return Mixture([draws(3, *SHAPE, seed=5), draws(2, *SHAPE, seed=6)], std)


# ---------------------------------------------------------------- one step, many steps


@pytest.mark.parametrize(("evaluate_at", "timestep"), [("next", 20), ("current", 0)])
def test_first_step_is_the_published_formula(evaluate_at: str, timestep: int) -> None:
    """z_t = sqrt(a_t / a_s) z_s + sqrt(a_t) (sqrt(1 / a_t - 1) - sqrt(1 / a_s - 1)) eps (D3HR 1.4, the paper's form)."""
    model = mixture()
    grid, z = respace(model.abar, 50, "leading"), draws(3, *SHAPE)
    eps = model.noise(z, timestep, 0)
    s, t = grid.abar[0], grid.abar[1]
    expected = (t / s) ** 0.5 * z + t**0.5 * ((1 / t - 1) ** 0.5 - (1 / s - 1) ** 0.5) * eps
    torch.testing.assert_close(inverted(model, grid, z, 1, evaluate_at=evaluate_at), expected, rtol=1e-10, atol=1e-10)
    assert model.calls == [timestep]


@pytest.mark.parametrize("evaluate_at", ["next", "current"])
@pytest.mark.parametrize("refinements", [0, 2])
def test_calls_are_those_of_the_steps(evaluate_at: str, refinements: int) -> None:
    model = mixture()
    grid = respace(model.abar, 50, "leading")
    inverted(model, grid, draws(1, *SHAPE), 30, evaluate_at=evaluate_at, refinements=refinements)
    first = range(20, 601, 20) if evaluate_at == "next" else range(0, 600, 20)
    expected = [t for a, b in zip(first, range(20, 601, 20), strict=True) for t in [a] + [b] * refinements]
    assert model.calls == expected


def test_until_zero_is_the_latent() -> None:
    model, z = mixture(), draws(2, *SHAPE)
    assert torch.equal(inverted(model, respace(model.abar, 50, "leading"), z, 0), z)


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_refined_inversion_divides_by_ddims_factor(std: float) -> None:
    model, z = gaussian(MEAN, std), draws(3, *SHAPE)
    grid = respace(model.abar, 50, "leading")
    until = grid.step_of(600)
    expected = grid.abar[until] ** 0.5 * MEAN + (z - grid.abar[0] ** 0.5 * MEAN) / ddim_factor(grid, std, until)
    got = inverted(model, grid, z, until, refinements=30)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("evaluate_at", ["next", "current"])
@pytest.mark.parametrize("std", [0.5, 2.0])
def test_inversion_converges_to_the_probability_flow_at_first_order(evaluate_at: str, std: float) -> None:
    abar = linear_schedule(10_000)
    model, z = gaussian(MEAN, std, abar=abar), draws(2, *SHAPE)
    errors = []
    for steps in (100, 200, 400):
        grid = respace(abar, steps, "leading")
        until = grid.step_of(6000)
        expected = exact_flow(z, MEAN, std, grid.abar[0], grid.abar[until])
        errors.append(float((inverted(model, grid, z, until, evaluate_at=evaluate_at) - expected).norm()))
    np.testing.assert_allclose(np.array(errors[:-1]) / np.array(errors[1:]), 2, atol=0.25)
    assert errors[-1] < 0.06


@pytest.mark.parametrize("direction", ["inversion", "sampling"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_guided_maps_converge_to_the_guided_flow_at_first_order(direction: str, scale: float) -> None:
    """Between Gaussians of equal spread guidance is exact: the flow is that of the mean n + w (m - n)."""
    std, abar, null = 0.7, linear_schedule(10_000), -0.5 * MEAN
    model, z = Mixture([MEAN[None]], std, abar=abar, null=null[None]), draws(2, *SHAPE)
    mean = null + scale * (MEAN - null)
    errors = []
    for steps in (100, 200, 400):
        grid = respace(abar, steps, "leading")
        top = grid.step_of(6000)
        if direction == "inversion":
            got, ends = inverted(model, grid, z, top, scale), (0, top)
        else:
            got, ends = sampled(model, grid, "leading", z, top, scale), (top, 0)
        expected = exact_flow(z, mean, std, *(float(grid.abar[end]) for end in ends))
        errors.append(float((got - expected).norm() / expected.norm()))
    np.testing.assert_allclose(np.array(errors[:-1]) / np.array(errors[1:]), 2, atol=0.25)
    assert errors[-1] < 0.01


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("refinements", [1, 3])
def test_round_trip_is_below_a_thousandth(spacing: str, refinements: int) -> None:
    model = mixture(1.0)
    grid = respace(model.abar, 200, spacing)
    z = draws(8, *SHAPE)
    back = sampled(model, grid, spacing, inverted(model, grid, z, 120, refinements=refinements), 120)
    assert float((back - z).norm() / z.norm()) < 1e-3


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_refinements_converge_to_the_samplers_inverse(std: float) -> None:
    model = mixture(std)
    grid, z = respace(model.abar, 50, "leading"), draws(8, *SHAPE)
    errors = []
    for refinements in (0, 1, 2, 4, 8):
        back = sampled(model, grid, "leading", inverted(model, grid, z, 30, refinements=refinements), 30)
        errors.append(float((back - z).norm() / z.norm()))
    assert all(finer < 0.7 * coarser for coarser, finer in itertools.pairwise(errors)), errors
    assert errors[-1] < 1e-4


def test_round_trip_without_refinements_gains_with_steps() -> None:
    model, z = mixture(1.0), draws(8, *SHAPE)
    errors = []
    for steps in (25, 50, 100, 200):
        grid = respace(model.abar, steps, "leading")
        until = grid.step_of(600)
        back = sampled(model, grid, "leading", inverted(model, grid, z, until), until)
        errors.append(float((back - z).norm() / z.norm()))
    assert all(finer < 0.7 * coarser for coarser, finer in itertools.pairwise(errors)), errors


def test_guided_round_trip_needs_the_same_guidance() -> None:
    model = mixture(1.0)
    grid, z = respace(model.abar, 200, "leading"), draws(8, *SHAPE)
    there = inverted(model, grid, z, 120, cfg_scale=1.5, refinements=6)
    back = sampled(model, grid, "leading", there, 120, cfg_scale=1.5)
    assert float((back - z).norm() / z.norm()) < 1e-3
    other = sampled(model, grid, "leading", there, 120, cfg_scale=1.0)
    assert float((other - z).norm() / z.norm()) > 0.05


def test_a_network_is_inverted_too() -> None:
    """In float32, through Denoiser and a DiT with random weights."""
    denoiser = dit_denoiser()
    grid = respace(denoiser.abar, 50, "leading")
    z = draws(3, *denoiser.latent_shape).float()
    labels = torch.arange(3)
    settings = Sampler(kind="ddim", spacing="leading", cfg_scale=1.5, cfg_channels=4)
    there = invert(denoiser, grid, z, labels, 30, Inversion(refinements=4), cfg_scale=1.5, cfg_channels=4)
    back = sample(denoiser, grid, settings, there, 30, labels, None, [], {})
    assert there.dtype == torch.float32
    assert float((there - z).norm() / z.norm()) > 0.5
    assert float((back - z).norm() / z.norm()) < 1e-3


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_inverted_class_has_the_known_moments(std: float) -> None:
    """Latents N(m, s^2) become N(sqrt(a) m, a s^2 + 1 - a): what D3HR fits, within the error of the sample and of Euler."""
    n, abar = 2000, linear_schedule()
    model = gaussian(MEAN, std)
    grid = respace(abar, 200, "leading")
    until = grid.step_of(600)
    moments = Moments()
    for part in (MEAN + std * draws(n, *SHAPE)).split(300):
        moments.update(inverted(model, grid, part, until, refinements=3))
    mean, variance = moments.result()
    v = model.variance(abar[600])
    assert float((mean - abar[600] ** 0.5 * MEAN).abs().max()) < 4 * (v / n) ** 0.5
    np.testing.assert_allclose(variance / v, 1, atol=4 * (2 / n) ** 0.5 + 0.02)


# ---------------------------------------------------------------- noising, the control


class Silent:
    """A denoiser that must not be asked."""

    abar, device = linear_schedule(), torch.device("cpu")


def recipe(**settings: object) -> dict[str, object]:
    inversion = Inversion(**settings).model_dump(mode="json", exclude={"cfg_scale"})
    common = {"steps": 50, "spacing": "leading", "timestep": 600, "label": 0, "cfg_scale": 1.0, "cfg_channels": 4}
    return common | {"inversion": inversion}


def test_noising_has_the_moments_of_noised_latents() -> None:
    n, abar = 20_000, 0.3
    latents = MEAN + draws(50, *SHAPE) * torch.linspace(0.2, 2, 4).view(SHAPE)
    mean, variance = noised_moments(latents.mean(0), latents.var(0, correction=0), abar)
    rows = latents[torch.arange(n) % 50]
    noised = abar**0.5 * rows + (1 - abar) ** 0.5 * draws(n, *SHAPE, seed=9)
    assert (abs(noised.mean(0) - mean) < 4.5 * (variance / n) ** 0.5).all()
    np.testing.assert_allclose(noised.var(0) / variance, 1, atol=4.5 * (2 / n) ** 0.5)


@pytest.mark.parametrize("batch", [7, 100])
def test_noising_asks_no_network_and_keeps_the_start_timestep(batch: int) -> None:
    latents = (MEAN + 0.4 * draws(40, *SHAPE)).float()
    arrays, facts = class_gaussian(Silent(), latents, recipe(map="noise"), Batch(batch))
    abar = linear_schedule()[600]
    expected_mean, expected_variance = abar**0.5 * latents.mean(0), abar * latents.var(0) + 1 - abar
    np.testing.assert_allclose(arrays["mean"], expected_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(arrays["variance"], expected_variance, rtol=1e-5)
    assert facts == {"count": 40}
    assert {value.dtype for value in arrays.values()} == {np.dtype("float32")}


def test_noising_a_single_image_leaves_the_noises_variance() -> None:
    arrays, _ = class_gaussian(Silent(), MEAN[None].float(), recipe(map="noise"), Batch(8))
    np.testing.assert_allclose(arrays["variance"], 1 - linear_schedule()[600], rtol=1e-6)


@pytest.mark.parametrize("batch", [7, 100])
def test_class_statistics_are_those_of_its_inverted_latents(batch: int) -> None:
    model, latents = mixture(), draws(20, *SHAPE)
    arrays, _ = class_gaussian(model, latents, recipe(refinements=1), Batch(batch))
    there = inverted(mixture(), respace(model.abar, 50, "leading"), latents, 30, refinements=1)
    np.testing.assert_allclose(arrays["mean"], there.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(arrays["variance"], there.var(0), rtol=1e-5)


# ---------------------------------------------------------------- moments


@pytest.mark.parametrize("splits", [[1, 2, 40, 7, 50], [100], [1] * 100, [99, 1], [50, 50]])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streaming_moments_are_numpys(splits: list[int], offset: float) -> None:
    values = np.random.default_rng(0).normal(offset, [[0.5], [3.0]], size=(100, 2, 3))
    moments = Moments()
    for part in torch.from_numpy(values).split(splits):
        moments.update(part)
    mean, variance = moments.result()
    assert moments.count == 100
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(variance, values.var(0, ddof=1), rtol=1e-10)


def test_moments_of_float32_are_kept_in_float64() -> None:
    values = (1000 + np.random.default_rng(0).normal(size=(5000, 3))).astype(np.float32)
    moments = Moments()
    for part in torch.from_numpy(values).split(64):
        moments.update(part)
    mean, variance = moments.result()
    assert mean.dtype == variance.dtype == torch.float64
    np.testing.assert_allclose(mean, values.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, values.astype(np.float64).var(0, ddof=1), rtol=1e-10)


def test_a_single_sample_has_no_variance() -> None:
    moments = Moments()
    moments.update(torch.tensor([[1.5, -2.0]]))
    mean, variance = moments.result()
    assert mean.tolist() == [1.5, -2.0]
    assert variance.tolist() == [0.0, 0.0]
