"""The loop against closed forms: for Gaussian data every step is affine, so that what comes out is known exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from analytic import Mixture, ddim_factor, dit_denoiser, exact_flow, gaussian, linear_schedule

from workflow_scripts.config import Sampler
from workflow_scripts.diffusion.noise import batch_noise, stream
from workflow_scripts.diffusion.sampler import Rows, Step, Term, sample
from workflow_scripts.diffusion.schedule import Grid, respace
from workflow_scripts.methods.mgd3 import ModeGuidance

SHAPE = (4, 1, 1)
MEAN = torch.tensor([1.5, -0.4, 0.0, 0.7], dtype=torch.float64).view(SHAPE)
UNGUIDED = {"cfg_scale": 1.0, "cfg_channels": 4}


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(
    model: Mixture,
    settings: Sampler,
    start: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    terms: Sequence[Term] = (),
    rows: Rows | None = None,
    start_step: int | None = None,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sample with float64 throughout; noise defaults to none at all."""
    grid = respace(model.abar, settings.steps, settings.spacing)
    if noise is None and settings.kind == "ddpm":
        noise = torch.zeros(len(start), settings.steps, *start.shape[1:], dtype=start.dtype)
    labels = torch.zeros(len(start), dtype=torch.int64) if labels is None else labels
    begin = settings.steps - 1 if start_step is None else start_step
    return sample(model, grid, settings, start, begin, labels, noise, terms, rows or {})


# ---------------------------------------------------------------- DDIM


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("start_step", [29, 11])
def test_ddim_is_its_closed_form(spacing: str, std: float, start_step: int) -> None:
    model, start = gaussian(MEAN, std), draws(3, *SHAPE)
    settings = Sampler(kind="ddim", spacing=spacing, steps=30, **UNGUIDED)
    grid = respace(model.abar, 30, spacing)
    final = run(model, settings, start, start_step=start_step)
    factor = ddim_factor(grid, std, start_step)
    expected = grid.abar[0] ** 0.5 * MEAN + factor * (start - grid.abar[start_step] ** 0.5 * MEAN)
    torch.testing.assert_close(final, expected, rtol=1e-10, atol=1e-10)
    assert model.calls == grid.timesteps[1 : start_step + 1].tolist()[::-1]


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_ddim_converges_to_the_probability_flow_at_first_order(std: float) -> None:
    abar = linear_schedule(10_000)
    model, start = gaussian(MEAN, std, abar=abar), draws(2, *SHAPE)
    expected = exact_flow(start, MEAN, std, abar[-1], abar[0])
    errors = []
    for steps in (25, 50, 100, 200, 400):
        final = run(model, Sampler(kind="ddim", steps=steps, **UNGUIDED), start)
        errors.append(float((final - expected).norm() / (expected - MEAN).norm()))
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    assert errors[-1] < 0.01
    np.testing.assert_allclose(ratios, 2, atol=0.05)


def test_ddim_of_a_mixture_reaches_its_modes() -> None:
    """Well-separated narrow modes: deterministic sampling ends near one of them, and both classes keep to their own."""
    classes = [torch.tensor([[2.0], [-2.0]]).view(2, 1, 1, 1).expand(2, 4, 1, 1), torch.full((1, 4, 1, 1), 8.0)]
    model = Mixture([means.double() for means in classes], 0.05)
    labels = torch.tensor([0] * 20 + [1] * 20)
    final = run(model, Sampler(kind="ddim", steps=100, **UNGUIDED), draws(40, *SHAPE), labels=labels)
    gap = (final[:20, None] - model.means[0]).flatten(2).norm(dim=2).min(1)
    assert float(gap.values.max()) < 0.4
    assert set(gap.indices.tolist()) == {0, 1}
    assert float((final[20:] - 8).abs().max()) < 0.3


# ---------------------------------------------------------------- DDPM


@dataclass
class Chain:
    """What the affine recursion gives: E[x], and the gains of the start and of each step's noise."""

    mean: float
    start: float
    noise: np.ndarray

    @property
    def variance(self) -> float:
        return self.start**2 + float((self.noise**2).sum())


def chain(
    grid: Grid, m: float, std: float, sigma: np.ndarray, prototype: float = 0.0, pull: np.ndarray | None = None
) -> Chain:
    """Propagate N(0, 1) at the last step through DDPM on exact data N(m, std^2), guided by ``pull`` (prototype - x0).

    E[x0 | x] = m + sqrt(a) std^2 / v (x - sqrt(a) m), so that every step is x -> gain x + shift + sigma n.
    """
    steps = len(grid.abar)
    pull = np.zeros(steps) if pull is None else pull
    mean, start, noise = 0.0, 1.0, np.zeros(steps)
    for i in range(steps - 1, -1, -1):
        a, below = grid.abar[i], grid.abar[i - 1] if i else 1.0
        beta = 1 - a / below
        slope = math.sqrt(a) * std**2 / (a * std**2 + 1 - a)
        of_x0 = beta * math.sqrt(below) / (1 - a) - sigma[i] * pull[i]
        of_x = (1 - below) * math.sqrt(1 - beta) / (1 - a)
        gain = of_x0 * slope + of_x
        mean = gain * mean + of_x0 * (1 - slope * math.sqrt(a)) * m + sigma[i] * pull[i] * prototype
        start, noise = gain * start, gain * noise
        noise[i] = sigma[i] if i else 0.0
    return Chain(mean, start, noise)


def probes(settings: Sampler) -> tuple[torch.Tensor, torch.Tensor]:
    """Row 0 sees nothing, row 1 a unit start, row 2 + i unit noise at step i: their outputs are the chain's gains."""
    rows = settings.steps + 2
    start = torch.zeros(rows, *SHAPE, dtype=torch.float64)
    noise = torch.zeros(rows, settings.steps, *SHAPE, dtype=torch.float64)
    start[1] = 1
    for i in range(settings.steps):
        noise[2 + i, i] = 1
    return start, noise


def assert_is_chain(final: torch.Tensor, expected: Chain, channel: int) -> None:
    out = final[:, channel, 0, 0].numpy()
    assert out[0] == pytest.approx(expected.mean, rel=1e-9, abs=1e-12)
    assert out[1] - out[0] == pytest.approx(expected.start, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(out[2:] - out[0], expected.noise, rtol=1e-9, atol=1e-12)


def sigmas(grid: Grid, share: float) -> np.ndarray:
    """Return the step's standard deviations: share 0 the posterior's, 1 sqrt(beta) (Improved DDPM, eq. 15)."""
    below = np.append(1, grid.abar[:-1])
    beta = 1 - grid.abar / below
    posterior = beta * (1 - below) / (1 - grid.abar)
    posterior[0] = posterior[1]
    return np.exp((share * np.log(beta) + (1 - share) * np.log(posterior)) / 2)


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_ddpm_of_fixed_variance_is_the_exact_chain(spacing: str, std: float) -> None:
    settings = Sampler(kind="ddpm", spacing=spacing, steps=25, variance="fixed", **UNGUIDED)
    model = gaussian(MEAN, std, raw=0.37)  # the variance channels must not matter
    grid = respace(model.abar, 25, spacing)
    start, noise = probes(settings)
    final = run(model, settings, start, noise=noise)
    for channel in range(4):
        assert_is_chain(final, chain(grid, float(MEAN[channel]), std, sigmas(grid, 0)), channel)
    assert model.calls == grid.timesteps.tolist()[::-1]


@pytest.mark.parametrize("raw", [-1.0, -0.5, 0.0, 1.0, 1.4])
def test_learned_variance_interpolates_logarithms(raw: float) -> None:
    settings = Sampler(kind="ddpm", steps=25, variance="learned", **UNGUIDED)
    model = gaussian(MEAN, 0.8, raw=raw)
    grid = respace(model.abar, 25, "linspace")
    start, noise = probes(settings)
    final = run(model, settings, start, noise=noise)
    assert_is_chain(final, chain(grid, float(MEAN[0]), 0.8, sigmas(grid, (raw + 1) / 2)), 0)


def test_learned_variance_of_a_network_without_it_is_fixed() -> None:
    start, noise = draws(2, *SHAPE), draws(2, 10, *SHAPE, seed=1)
    learned = run(gaussian(MEAN, 0.8), Sampler(steps=10, variance="learned", **UNGUIDED), start, noise=noise)
    fixed = run(gaussian(MEAN, 0.8), Sampler(steps=10, variance="fixed", **UNGUIDED), start, noise=noise)
    assert torch.equal(learned, fixed)


def gains(std: float, raw: float, steps: int) -> torch.Tensor:
    """Return the final value's gain of the start and of each noise, off the sampler itself."""
    settings = Sampler(steps=steps, **UNGUIDED)
    start, noise = probes(settings)
    final = run(gaussian(MEAN, std, raw=raw), settings, start, noise=noise)[:, 0, 0, 0]
    return final[1:] - final[0]


@pytest.mark.parametrize("steps", [5, 50])
def test_each_end_of_the_variance_is_exact_for_its_data(steps: int) -> None:
    """White data keep variance 1 with sqrt(beta); a single point is hit with the posterior's variance (DDPM, section 3.2).

    The last step adds no noise, which takes the beta of that step off the white variance.
    """
    beta = 1 - float(linear_schedule()[0])
    assert float(gains(1.0, 1.0, steps).square().sum()) == pytest.approx(1 - beta, rel=1e-9)
    assert float(gains(1e-9, -1.0, steps).abs().max()) < 1e-12
    assert float(gains(1.0, -1.0, steps).square().sum()) < 1 - beta
    start, noise = draws(3, *SHAPE), draws(3, steps, *SHAPE, seed=1)
    point = run(gaussian(MEAN, 1e-9, raw=-1.0), Sampler(steps=steps, **UNGUIDED), start, noise=noise)
    torch.testing.assert_close(point, MEAN.expand_as(point))


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_ddpm_variance_converges_to_the_datas(std: float) -> None:
    errors = [abs(chain_variance(std, steps) / std**2 - 1) for steps in (50, 100, 200, 400, 800)]
    assert all(finer < 0.65 * coarser for coarser, finer in itertools.pairwise(errors))
    assert errors[-1] < 0.05


def chain_variance(std: float, steps: int) -> float:
    grid = respace(linear_schedule(), steps, "linspace")
    return chain(grid, 0.0, std, sigmas(grid, 0)).variance


def test_ddpm_with_streams_has_the_chains_moments() -> None:
    """The closed form is what real draws have: mean and variance of 1500 images within four standard errors."""
    settings, n = Sampler(steps=12, variance="fixed", **UNGUIDED), 1500
    streams = [stream(0, "class", index, "noise") for index in range(n)]
    noise = batch_noise(streams, settings.steps, *SHAPE)
    start = batch_noise([stream(0, "class", index, "start") for index in range(n)], *SHAPE)
    model = gaussian(MEAN, 0.6)
    final = run(model, settings, start.double(), noise=noise.double()) - MEAN
    grid = respace(model.abar, settings.steps, "linspace")
    for channel in range(4):
        expected = chain(grid, float(MEAN[channel]), 0.6, sigmas(grid, 0))
        values = final[:, channel].flatten() + float(MEAN[channel]) - expected.mean
        assert float(values.mean()) == pytest.approx(0, abs=4 * math.sqrt(expected.variance / n))
        assert float(values.var()) == pytest.approx(expected.variance, rel=4 * math.sqrt(2 / n))


# ---------------------------------------------------------------- classifier-free guidance


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_guidance_between_equal_gaussians_shifts_the_mean(kind: str, channels: int, scale: float) -> None:
    """Class N(m, s^2) and null N(m0, s^2) guide to N(m0 + scale (m - m0), s^2), in the guided channels only."""
    null = torch.tensor([0.2, 0.3, -0.5, -0.6], dtype=torch.float64).view(SHAPE)
    shifted = null + scale * (MEAN - null)
    shifted[channels:] = MEAN[channels:]
    settings = Sampler(kind=kind, steps=20, cfg_scale=scale, cfg_channels=channels)
    start, noise = draws(3, *SHAPE), draws(3, 20, *SHAPE, seed=1)
    got = run(Mixture([MEAN[None]], 0.7, null=null[None]), settings, start, noise=noise)
    plain = Sampler(kind=kind, steps=20, **UNGUIDED)
    torch.testing.assert_close(got, run(gaussian(shifted, 0.7), plain, start, noise=noise), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- guidance terms


@dataclass
class Spy:
    """A term that writes down where it was called, and gives a constant."""

    stop: int
    value: float = 0.0
    steps: list[Step] = field(default_factory=list)

    def acts_at(self, index: int) -> bool:
        return index > self.stop

    def __call__(self, step: Step, rows: Rows) -> torch.Tensor:
        self.steps.append(step)
        return torch.full_like(step.x0, self.value)


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
@pytest.mark.parametrize("stop", [0, 25, 48, 49, 50])
def test_a_term_acts_once_per_step_above_its_stop(kind: str, stop: int) -> None:
    spy, other = Spy(stop), Spy(10)
    run(gaussian(MEAN, 1.0), Sampler(kind=kind, **UNGUIDED), draws(1, *SHAPE), terms=[spy, other])
    assert [step.index for step in spy.steps] == list(range(49, stop, -1))
    assert [step.index for step in other.steps] == list(range(49, 10, -1))


def test_published_window_is_24_steps() -> None:
    """i = 49..26 are guided, i = 25..0 are plain (ManifoldGD specification, 1.2)."""
    spy = Spy(ModeGuidance(0.1, 25).stop)
    run(gaussian(MEAN, 1.0), Sampler(**UNGUIDED), draws(1, *SHAPE), terms=[spy])
    assert len(spy.steps) == 24


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_a_term_sees_the_exact_prediction(kind: str) -> None:
    std, spy = 0.6, Spy(-1)
    settings = Sampler(kind=kind, steps=20, variance="learned", **UNGUIDED)
    model = gaussian(MEAN, std, raw=0.0)
    run(model, settings, draws(2, *SHAPE), terms=[spy], noise=draws(2, 20, *SHAPE, seed=1))
    grid = respace(model.abar, 20, "linspace")
    for step in spy.steps:
        a = grid.abar[step.index]
        x0 = MEAN + a**0.5 * std**2 / model.variance(a) * (step.x - a**0.5 * MEAN)
        sigma = math.sqrt(1 - a) if kind == "ddim" else sigmas(grid, 0.5)[step.index]
        torch.testing.assert_close(step.x0, x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(step.sigma, torch.full_like(x0, sigma), rtol=1e-9, atol=1e-9)
        assert step.abar == a
    assert len(spy.steps) == (19 if kind == "ddim" else 20)


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_terms_add_up(kind: str) -> None:
    start, settings = draws(2, *SHAPE), Sampler(kind=kind, steps=10, **UNGUIDED)
    two = run(gaussian(MEAN, 1.0), settings, start, terms=[Spy(3, 0.2), Spy(3, 0.5)])
    one = run(gaussian(MEAN, 1.0), settings, start, terms=[Spy(3, 0.7)])
    torch.testing.assert_close(two, one)
    assert not torch.allclose(one, run(gaussian(MEAN, 1.0), settings, start))


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_lambda_zero_is_plain_sampling_to_the_bit(kind: str) -> None:
    denoiser, count = dit_denoiser(), 3
    grid = respace(denoiser.abar, 10, "linspace")
    settings = Sampler(kind=kind, steps=10)
    start = batch_noise([stream(0, "a", index, "start") for index in range(count)], *denoiser.latent_shape)
    noise = batch_noise([stream(0, "a", index, "noise") for index in range(count)], 10, *denoiser.latent_shape)
    rows = {"prototype": torch.randn(start.shape, generator=torch.Generator().manual_seed(1))}
    labels = torch.arange(count)
    results = [
        sample(denoiser, grid, settings, start, 9, labels, noise, terms, rows)
        for terms in ([], [ModeGuidance(0.0, 2)], [ModeGuidance(0.1, 2)], [ModeGuidance(0.1, 9)])
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[3])  # the window never opens
    assert not torch.allclose(results[0], results[2])


@pytest.mark.parametrize("scale", [0.02, 0.1])
def test_ddim_guidance_is_algorithm_1(scale: float) -> None:
    """MGD3, algorithm 1, on a mixture: eps' = eps - sqrt(1 - abar) lambda (m - x0), then a DDIM step with eps'."""
    means = draws(5, *SHAPE, seed=3)
    model = Mixture([means[:3], means[3:]], 0.4)
    settings = Sampler(kind="ddim", steps=50, cfg_scale=4.0, cfg_channels=3)
    grid = respace(model.abar, 50, "linspace")
    labels = torch.tensor([0, 1, 0])
    mode = draws(3, *SHAPE, seed=4)
    x = start = draws(3, *SHAPE)
    for i in range(49, 0, -1):
        a, below = float(grid.abar[i]), float(grid.abar[i - 1])
        eps, _ = model.predict(x, int(grid.timesteps[i]), labels, cfg_scale=4.0, cfg_channels=3)
        if i > 25:
            x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
            eps = eps - math.sqrt(1 - a) * scale * (mode - x0)
        x = math.sqrt(below) * (x - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - below) * eps
    got = run(model, settings, start, terms=[ModeGuidance(scale, 25)], rows={"prototype": mode}, labels=labels)
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stop", [4, 10, 19])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_guided_ddpm_is_the_exact_chain(stop: int, share: float) -> None:
    scale, std, prototype = 0.1, 0.6, 2.5
    settings = Sampler(kind="ddpm", steps=20, variance="learned", **UNGUIDED)
    model = gaussian(MEAN, std, raw=2 * share - 1)
    grid = respace(model.abar, 20, "linspace")
    start, noise = probes(settings)
    rows = {"prototype": torch.full_like(start, prototype)}
    final = run(model, settings, start, noise=noise, terms=[ModeGuidance(scale, stop)], rows=rows)
    pull = np.where(np.arange(20) > stop, scale, 0.0)
    for channel in range(4):
        expected = chain(grid, float(MEAN[channel]), std, sigmas(grid, share), prototype, pull)
        assert_is_chain(final, expected, channel)
    plain = chain(grid, float(MEAN[0]), std, sigmas(grid, share))
    guided = chain(grid, float(MEAN[0]), std, sigmas(grid, share), prototype, pull)
    assert (abs(guided.mean - prototype) < abs(plain.mean - prototype)) == (stop < 19)
