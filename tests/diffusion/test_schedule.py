import math

import numpy as np
import pytest
from analytic import linear_schedule
from diffusers import DDIMScheduler

from workflow_scripts.diffusion.schedule import Grid, respace


def test_linspace_grid_is_dits() -> None:
    steps = respace(linear_schedule(), 50, "linspace").timesteps
    expected = [math.floor(i * 999 / 49 + 0.5) for i in range(50)]  # no i * 999 / 49 is a half
    assert steps.tolist() == expected
    assert steps[:4].tolist() == [0, 20, 41, 61]
    assert steps[-2:].tolist() == [979, 999]


def test_leading_grid_is_diffusers() -> None:
    steps = respace(linear_schedule(), 50, "leading").timesteps
    assert steps.tolist() == list(range(0, 1000, 20))
    scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="leading")
    scheduler.set_timesteps(50)
    assert steps[::-1].tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("steps", [2, 7, 50, 333, 1000])
def test_grids_increase_and_pick_abar(spacing: str, steps: int) -> None:
    abar = linear_schedule()
    grid = respace(abar, steps, spacing)
    assert len(grid.timesteps) == steps
    assert (np.diff(grid.timesteps) > 0).all()
    assert grid.timesteps[0] == 0
    np.testing.assert_array_equal(grid.abar, abar[grid.timesteps])


def test_all_steps_are_the_training_schedule() -> None:
    grid = respace(linear_schedule(), 1000, "linspace")
    np.testing.assert_array_equal(grid.timesteps, np.arange(1000))
    np.testing.assert_allclose(grid.betas, np.linspace(1e-4, 2e-2, 1000), rtol=1e-9)


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_posterior_is_bayes_rule(spacing: str, steps: int) -> None:
    """q(x_{i-1} | x_i, x_0) is the product of N(x_{i-1}; sqrt(a') x_0, 1 - a') and N(x_i; sqrt(1 - b) x_{i-1}, b)."""
    grid = respace(linear_schedule(), steps, spacing)
    x0, xi = 0.7, -1.9
    for i in range(1, steps):
        below, beta = grid.abar[i - 1], 1 - grid.abar[i] / grid.abar[i - 1]
        precision = 1 / (1 - below) + (1 - beta) / beta
        mean = (math.sqrt(below) * x0 / (1 - below) + math.sqrt(1 - beta) * xi / beta) / precision
        assert grid.posterior_x0[i] * x0 + grid.posterior_xt[i] * xi == pytest.approx(mean, rel=1e-9)
        assert grid.posterior_variance[i] == pytest.approx(1 / precision, rel=1e-9)
        assert grid.posterior_log_variance[i] == pytest.approx(-math.log(precision), abs=1e-9)
    assert (grid.posterior_x0[0], grid.posterior_xt[0], grid.posterior_variance[0]) == pytest.approx((1, 0, 0))
    assert grid.posterior_log_variance[0] == grid.posterior_log_variance[1]


def test_constants_of_the_published_schedule() -> None:
    """Values that D3HR's and ManifoldGD's specifications derive from the schedule."""
    abar = linear_schedule()
    assert abar[0] == pytest.approx(0.9999)
    for timestep, value in {600: 0.02557, 620: 0.01998, 400: 0.1936, 780: 0.00207, 980: 6e-5}.items():
        assert abar[timestep] == pytest.approx(value, rel=5e-3 if timestep < 900 else 0.05)


def test_step_of() -> None:
    grid = respace(linear_schedule(), 50, "leading")
    assert [grid.step_of(t) for t in (0, 600, 620, 980)] == [0, 30, 31, 49]
    with pytest.raises(ValueError, match="nearest is 600"):
        grid.step_of(605)


@pytest.mark.parametrize("steps", [0, 1, 1001])
def test_impossible_numbers_of_steps(steps: int) -> None:
    with pytest.raises(ValueError, match="choose 2 to 1000"):
        respace(linear_schedule(), steps, "linspace")


def test_two_steps_have_finite_constants() -> None:
    grid = Grid(np.array([0, 999]), linear_schedule()[[0, 999]])
    assert np.isfinite(grid.posterior_log_variance).all()
