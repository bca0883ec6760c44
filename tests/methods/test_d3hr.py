from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from analytic import CPU, gaussian, linear_schedule
from scipy.stats import skew

from workflow_scripts.config import DiffusionMethod, GaussianStart, Inversion, Sampler
from workflow_scripts.diffusion.inversion import Moments, invert
from workflow_scripts.diffusion.noise import normals, stream
from workflow_scripts.diffusion.sampler import sample
from workflow_scripts.diffusion.schedule import respace
from workflow_scripts.methods import d3hr
from workflow_scripts.methods.d3hr import block_size, candidates, draw_group, losses
from workflow_scripts.methods.registry import start_step

SHAPE = (4, 3, 3)
D = 36
RANDOM = np.random.default_rng(0)
MEAN = torch.from_numpy(RANDOM.normal(size=SHAPE))
VARIANCE = torch.from_numpy(RANDOM.uniform(0.2, 3.0, SHAPE))


def start(construction: str, **options: object) -> GaussianStart:
    return GaussianStart(kind="gaussian", construction=construction, **options)


def group(construction: str, count: int, *, seed: int = 0, **options: object) -> torch.Tensor:
    return draw_group(MEAN, VARIANCE, count, start(construction, **options), stream(seed, "class", 0, "group"))


def losses_of(z: np.ndarray) -> list[float]:
    """Return D3HR's three losses of one group (n, D) by their definition (eq. 9-11), with scipy's skewness."""
    mean, std = MEAN.numpy().ravel(), VARIANCE.numpy().ravel() ** 0.5
    return [
        float(np.linalg.norm(z.mean(0) - mean)),
        float(np.linalg.norm(z.std(0, ddof=1) - std)),
        float(np.linalg.norm(skew(z, axis=0))),
    ]


def flat(z: torch.Tensor) -> np.ndarray:
    return z.double().flatten(1).numpy()


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("n", [2, 3, 10, 50])
def test_losses_are_their_definition(n: int) -> None:
    noise = torch.from_numpy(np.random.default_rng(1).gumbel(size=(6, n, D)))
    std = VARIANCE.sqrt().flatten()
    z = (MEAN.flatten() + std * noise).numpy()
    expected = [losses_of(one) for one in z]
    np.testing.assert_allclose(losses(noise.unbind(1), std), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(losses(noise.float().unbind(1), std), expected, rtol=1e-4, atol=1e-4)


def test_skewness_is_per_dimension() -> None:
    """Across the set, not across the features as in the released code (specification, P3)."""
    noise = torch.zeros(1, 5, D, dtype=torch.float64)
    noise[0, :, 0] = torch.tensor([0.0, 0, 0, 0, 5])
    noise[0, :, 1] = torch.tensor([-1.0, 1, -2, 2, 0])
    noise[0, :, 2:] = torch.tensor([1.0, -1, 0.5, -0.5, 0])[:, None]
    assert float(losses(noise.unbind(1), torch.ones(D))[0, 2]) == pytest.approx(skew([0, 0, 0, 0, 5]), rel=1e-12)


def test_skewness_of_nearly_equal_numbers_is_not_rounding() -> None:
    """One pass in float32 over images that differ in the fourth digit, as pairs and triples often do in some dimension."""
    for n in (2, 3, 4):
        noise = 1.7 + 1e-4 * torch.from_numpy(np.random.default_rng(n).normal(size=(50, n, D))).float()
        expected = np.linalg.norm(skew(noise.double().numpy(), axis=1), axis=1)
        np.testing.assert_allclose(losses(noise.unbind(1), torch.ones(D))[:, 2], expected, rtol=1e-3, atol=1e-3)
    alike = torch.full((1, 5, D), 0.3)
    assert float(losses(alike.unbind(1), torch.ones(D))[0, 2]) == 0


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize("construction", ["random", "best_of_m", "moment_matched"])
def test_groups_are_reproducible_and_their_stream_matters(construction: str) -> None:
    a, b, c = (group(construction, 5, seed=seed, candidates=20) for seed in (0, 0, 1))
    assert (a.shape, a.dtype) == ((5, *SHAPE), torch.float32)
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)


def test_random_groups_have_the_classes_moments() -> None:
    n = 20_000
    z = flat(group("random", n))
    mean, variance = MEAN.numpy().ravel(), VARIANCE.numpy().ravel()
    np.testing.assert_array_less(np.abs(z.mean(0) - mean), 4.5 * np.sqrt(variance / n))
    np.testing.assert_allclose(z.var(0) / variance, 1, atol=4.5 * np.sqrt(2 / n))
    correlation = np.corrcoef(z.T)[~np.eye(D, dtype=bool)]
    assert np.abs(correlation).max() < 4.5 / np.sqrt(n)


@pytest.mark.parametrize("count", [2, 3, 10, 100])
def test_moment_matched_groups_lose_nothing_in_mean_and_spread(count: int) -> None:
    mean, spread, skewness = losses_of(flat(group("moment_matched", count)))
    assert mean < 1e-5
    assert spread < 1e-5
    random_mean, random_spread, _ = losses_of(flat(group("random", count)))
    assert min(random_mean, random_spread) > 0.1
    assert np.isfinite(skewness)


def test_moment_matching_moves_the_same_draw() -> None:
    """Per dimension it is an increasing affine map of the plain draw from the same stream."""
    plain, matched = flat(group("random", 10)), flat(group("moment_matched", 10))
    for dimension in range(D):
        slope, intercept = np.polyfit(plain[:, dimension], matched[:, dimension], 1)
        assert slope > 0
        np.testing.assert_allclose(matched[:, dimension], slope * plain[:, dimension] + intercept, atol=1e-5)


def drawn(m: int, count: int, seed: int = 0) -> np.ndarray:
    """Return the noise (m, count, D) of all candidates of a class."""
    base, groups = int(stream(seed, "class", 0, "group").integers(2**32)), block_size(D)
    blocks = [torch.stack([*candidates(base, b, groups, count, D, CPU)], dim=1) for b in range(-(-m // groups))]
    return torch.cat(blocks)[:m].double().numpy()


@pytest.mark.parametrize("weights", [(1.0, 1.0, 0.5), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("count", [3, 10])
@pytest.mark.parametrize("groups", [7, 64, 1000])
def test_best_of_m_is_the_least_of_its_candidates(
    weights: tuple[float, float, float], count: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they fill blocks, leave the last one unfinished or do not fill the first."""
    monkeypatch.setattr(d3hr, "BLOCK", groups * D)
    m = 200
    assert block_size(D) == groups
    z = MEAN.numpy().ravel() + VARIANCE.numpy().ravel() ** 0.5 * drawn(m, count)
    scores = np.array([losses_of(one) for one in z]) @ weights
    first, second = np.sort(scores)[:2]
    assert second - first > 1e-4, "the winner must not hang on rounding"
    best = flat(group("best_of_m", count, candidates=m, weights=weights))
    np.testing.assert_allclose(best, z[scores.argmin()], rtol=1e-5, atol=1e-5)


def test_candidates_are_white_and_differ_between_blocks_and_classes() -> None:
    noise = drawn(20_000, 3)
    assert np.abs(noise.mean(0)).max() < 4.5 / np.sqrt(20_000)
    np.testing.assert_allclose(noise.var(0), 1, atol=4.5 * np.sqrt(2 / 20_000))
    one, two = (next(candidates(5, block, 10, 1, D, CPU)) for block in (0, 1))
    assert not torch.equal(one, two)
    assert not np.array_equal(drawn(10, 3), drawn(10, 3, seed=1))
    last = next(candidates(2**32 - 1, 1, 10, 1, D, CPU))  # seeds go round
    assert torch.equal(last, next(candidates(0, 0, 10, 1, D, CPU)))


def test_candidates_do_not_depend_on_how_many_there_are() -> None:
    """The winner of many is the winner of few, or one of those that came later."""
    m = block_size(D)
    few, many = (group("best_of_m", 3, candidates=count) for count in (m + 5, 3 * m))
    z = MEAN.numpy().ravel() + VARIANCE.numpy().ravel() ** 0.5 * drawn(m + 5, 3)
    is_few = [np.abs(flat(few) - one).max() < 1e-4 for one in z]
    assert sum(is_few) == 1
    better = [np.dot(losses_of(flat(chosen)), (1, 1, 0.5)) for chosen in (few, many)]
    assert better[1] <= better[0] + 1e-5


def test_more_candidates_never_lose() -> None:
    scores = [np.dot(losses_of(flat(group("best_of_m", 5, candidates=m))), (1, 1, 0.5)) for m in (1, 10, 100, 1000)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(scores))
    assert scores[-1] < scores[0]


@pytest.mark.parametrize("construction", ["random", "best_of_m", "moment_matched"])
def test_a_single_image_is_a_plain_draw(construction: str) -> None:
    z = flat(group(construction, 1, candidates=10))[0]
    noise = normals(stream(0, "class", 0, "group"), 1, D).double().numpy()[0]
    np.testing.assert_allclose(z, MEAN.numpy().ravel() + VARIANCE.numpy().ravel() ** 0.5 * noise, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("construction", ["random", "best_of_m", "moment_matched"])
def test_a_class_without_spread_gives_its_mean(construction: str) -> None:
    """As a class of one image has: variance 0."""
    z = draw_group(MEAN, VARIANCE * 0, 3, start(construction, candidates=5), stream(0, "a", 0, "group"))
    torch.testing.assert_close(z, MEAN.float().expand(3, *SHAPE))


# ---------------------------------------------------------------- the whole method, on data whose Gaussian is known


def test_statistics_and_sampler_meet_at_the_same_timestep() -> None:
    grid = respace(linear_schedule(), 50, "leading")
    sampler = Sampler(kind="ddim", spacing="leading")
    fair = DiffusionMethod(kind="diffusion", start=start("random"), sampler=sampler)
    legacy = DiffusionMethod(kind="diffusion", start=start("random", legacy_offset=True), sampler=sampler)
    plain = DiffusionMethod(kind="diffusion", sampler=sampler)
    assert grid.timesteps[start_step(fair, grid)] == 600
    assert grid.timesteps[start_step(legacy, grid)] == 620  # the released off-by-one (specification, P1)
    assert start_step(plain, grid) == 49


@pytest.mark.parametrize("std", [0.5, 1.5])
def test_groups_become_latents_of_the_class(std: float) -> None:
    """Invert latents N(m, s^2), fit, draw a matched group and sample: its mean and spread are the class's again.

    DDIM is affine here, so that a matched group stays matched: only the fit's own sampling error is left.
    """
    mean = MEAN / 2
    model = gaussian(mean, std)
    grid = respace(model.abar, 200, "leading")
    method = DiffusionMethod(
        kind="diffusion", start=start("moment_matched"), sampler=Sampler(kind="ddim", spacing="leading", steps=200)
    )
    begin = start_step(method, grid)
    latents = mean + std * torch.randn(400, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.zeros(400, dtype=torch.int64)
    moments = Moments()
    inverted = invert(model, grid, latents, labels, begin, Inversion(refinements=4), cfg_scale=1.0, cfg_channels=4)
    moments.update(inverted)
    z_mean, z_variance = moments.result()
    v = model.variance(grid.abar[begin])
    assert float((z_mean - grid.abar[begin] ** 0.5 * mean).abs().max()) < 4.5 * (v / 400) ** 0.5
    np.testing.assert_allclose(z_variance / v, 1, atol=4.5 * (2 / 400) ** 0.5 + 0.02)

    assert isinstance(method.start, GaussianStart)
    z = draw_group(z_mean, z_variance, 10, method.start, stream(0, "a", 0, "group")).double()
    settings = Sampler(kind="ddim", spacing="leading", steps=200, cfg_scale=1.0, cfg_channels=4)
    final = sample(model, grid, settings, z, begin, labels[:10], None, [], {})
    torch.testing.assert_close(final.mean(0), latents.mean(0), rtol=0, atol=1e-3)
    torch.testing.assert_close(final.std(0), latents.std(0), rtol=2e-3, atol=0)
