from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from analytic import CPU, linear_schedule

from workflow_scripts.config import DiffusionMethod, ModeTerm, Sampler
from workflow_scripts.diffusion.sampler import Step, sample
from workflow_scripts.diffusion.schedule import Grid, respace
from workflow_scripts.methods.mgd3 import ModeGuidance, injected_share

TABLE = {45: 12.4, 40: 7.9, 35: 4.2, 30: 2.3, 25: 1.37, 20: 0.86, 10: 0.32, 0: 0.01}
"""ManifoldGD's specification, 1.2: what lambda 0.1 leaves of the mode when guidance stops, of 50 steps."""

GRID = respace(linear_schedule(), 50, "linspace")


class Blank:
    """A denoiser that always expects the clean latent 0, so that nothing feeds back; it writes down what it is shown."""

    null_label, latent_shape, device, abar = 1, (1, 1, 1), CPU, linear_schedule()

    def __init__(self, raw: float):
        self.raw = raw
        self.shown: dict[int, float] = {}

    def predict(
        self,
        x: torch.Tensor,
        timestep: int,
        labels: torch.Tensor,
        *,
        cfg_scale: float,
        cfg_channels: int,
        null: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.shown[timestep] = float(x)
        return x / (1 - self.abar[timestep]) ** 0.5, torch.full_like(x, self.raw)


def carried(grid: Grid, scale: float, stop: int, raw: float) -> float:
    """Let the sampler itself pull to the mode 1 and return x / sqrt(abar) where guidance ended."""
    blank = Blank(raw)
    settings = Sampler(steps=len(grid.abar), variance="learned", cfg_scale=1.0)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    noise = torch.zeros(1, settings.steps, 1, 1, 1, dtype=torch.float64)
    rows = {"prototype": torch.ones_like(zero)}
    label = torch.zeros(1, dtype=torch.int64)
    sample(blank, grid, settings, zero, settings.steps - 1, label, noise, [ModeGuidance(scale, stop)], rows)
    return blank.shown[int(grid.timesteps[stop])] / math.sqrt(grid.abar[stop])


@pytest.mark.parametrize("steps", [20, 50, 250])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_injected_share_is_what_the_sampler_leaves(steps: int, fraction: float) -> None:
    grid = respace(linear_schedule(), steps, "linspace")
    stop = int(fraction * steps)
    assert injected_share(grid, 0.1, stop) == pytest.approx(carried(grid, 0.1, stop, raw=-1.0), rel=1e-9)


@pytest.mark.parametrize("stop", TABLE)
def test_specified_table_holds_for_sigma_of_beta(stop: int) -> None:
    """To every printed digit, with the upper end of the learned variance, sqrt(beta)."""
    digits = 2 if TABLE[stop] < 2 else 1
    assert round(carried(GRID, 0.1, stop, raw=1.0), digits) == TABLE[stop]


@pytest.mark.parametrize("stop", [45, 40, 35, 30, 25, 20, 10])
def test_injected_share_is_the_specified_table_within_rounding(stop: int) -> None:
    """It counts the posterior's sigma, the lower end: 0.85 instead of 0.86 at stop 20, 0.31 instead of 0.32 at 10."""
    assert injected_share(GRID, 0.1, stop) == pytest.approx(TABLE[stop], rel=0.03)


def test_injected_share_is_linear_in_lambda_and_nothing_without_guidance() -> None:
    assert injected_share(GRID, 0.4, 25) == pytest.approx(4 * injected_share(GRID, 0.1, 25))
    assert injected_share(GRID, 0.1, 49) == 0
    shares = [injected_share(GRID, 0.1, stop) for stop in range(50)]
    peak = int(np.argmax(shares))
    assert all(a < b for a, b in pairwise(shares[: peak + 1]))  # a later stop has decayed and been diluted


@pytest.mark.parametrize(
    ("i", "timestep", "abar", "sigma", "ddpm", "ddim"),
    [
        (49, 999, 0.00004, 0.574, 22.4, 15.7),
        (45, 917, 0.0002, 0.554, 10.7, 7.1),
        (40, 816, 0.0012, 0.538, 4.6, 2.9),
        (35, 714, 0.0056, 0.508, 2.25, 1.33),
        (30, 612, 0.022, 0.474, 1.22, 0.66),
        (26, 530, 0.057, 0.434, 0.81, 0.40),
        (20, 408, 0.181, 0.39, 0.44, 0.19),
        (10, 204, 0.646, 0.27, 0.14, 0.04),
    ],
)
def test_one_step_shifts_x0_by_the_specified_weight(
    i: int, timestep: int, abar: float, sigma: float, ddpm: float, ddim: float
) -> None:
    """w_t of table 1.2, measured on the sampler: by how much must x0 shift for the same step without guidance?

    Its sigma is the middle of the learned range.
    """

    def close(printed: float) -> object:
        text = f"{printed:.5f}".rstrip("0")
        return pytest.approx(printed, abs=0.5001 * 10.0 ** -len(text.split(".")[1]))

    assert GRID.timesteps[i] == timestep
    assert GRID.abar[i] == close(abar)
    middle = math.exp((GRID.posterior_log_variance[i] + math.log(GRID.betas[i])) / 4)
    assert middle == close(sigma)
    one = Grid(GRID.timesteps[i - 1 : i + 1], GRID.abar[i - 1 : i + 1])
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    rows, label = {"prototype": torch.ones_like(zero)}, torch.zeros(1, dtype=torch.int64)
    weights = []
    for kind, of_x0 in (
        ("ddpm", GRID.posterior_x0[i]),
        ("ddim", math.sqrt(GRID.abar[i - 1]) - math.sqrt((1 - GRID.abar[i - 1]) * GRID.abar[i] / (1 - GRID.abar[i]))),
    ):
        blank = Blank(raw=0.0)
        settings = Sampler(kind=kind, steps=2, cfg_scale=1.0)
        term = [ModeGuidance(0.1, 0)]
        final = sample(blank, one, settings, zero, 1, label, torch.zeros(1, 2, 1, 1, 1), term, rows)
        moved = blank.shown[int(one.timesteps[0])] if kind == "ddpm" else float(final)
        weights.append(moved / of_x0)
    assert weights == [close(ddpm), close(ddim)]


def test_the_pull_is_towards_each_rows_own_mode() -> None:
    x0 = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    prototype = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    step = Step(30, 0.5, x0 * 0, x0, torch.ones_like(x0))
    pull = ModeGuidance(0.1, 25)(step, {"prototype": prototype})
    torch.testing.assert_close(pull, 0.1 * (prototype - x0))


def test_the_published_configuration_is_the_default() -> None:
    term, settings = ModeTerm(term="mode"), Sampler()
    assert (term.scale, term.stop) == (0.1, 25)
    assert (settings.kind, settings.spacing, settings.steps, settings.variance) == ("ddpm", "linspace", 50, "learned")
    assert (settings.cfg_scale, settings.cfg_channels) == (4.0, 3)
    assert DiffusionMethod(kind="diffusion").guidance == ()
