"""Noise schedules, and the coarser grid of timesteps on which one samples.

Notation follows DDPM: ``abar`` is the cumulative product of 1 - beta; timesteps are those of the training schedule
(0 to T-1), steps are places in the respaced grid, counted from 0 (nearly clean) to S-1 (noise).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Spacing = Literal["linspace", "leading"]


@dataclass(frozen=True)
class Grid:
    """A respaced diffusion process (Improved DDPM, section 4), in float64.

    Attributes:
        timesteps: (S,) increasing timesteps of the training schedule.
        abar: (S,) cumulative signal power at each of them.
        betas: (S,) noise variances of the respaced chain.
    """

    timesteps: np.ndarray
    abar: np.ndarray

    @property
    def betas(self) -> np.ndarray:
        """Return 1 - abar_i / abar_{i-1}."""
        return 1 - self.abar / self.abar_previous

    @property
    def abar_previous(self) -> np.ndarray:
        """Return abar of the step below, 1 below the first."""
        return np.append(1.0, self.abar[:-1])

    @property
    def posterior_variance(self) -> np.ndarray:
        """Return the variance of q(x_{i-1} | x_i, x_0), DDPM eq. 7."""
        return self.betas * (1 - self.abar_previous) / (1 - self.abar)

    @property
    def posterior_log_variance(self) -> np.ndarray:
        """Return its logarithm, where the first step, whose variance is 0, takes the second's."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1:2] if len(variance) > 1 else self.betas[:1], variance[1:]))

    @property
    def posterior_x0(self) -> np.ndarray:
        """Return the coefficient of x_0 in the posterior mean, DDPM eq. 7."""
        return self.betas * np.sqrt(self.abar_previous) / (1 - self.abar)

    @property
    def posterior_xt(self) -> np.ndarray:
        """Return the coefficient of x_i in the posterior mean, DDPM eq. 7."""
        return (1 - self.abar_previous) * np.sqrt(1 - self.betas) / (1 - self.abar)

    def step_of(self, timestep: int) -> int:
        """Return the step at a timestep.

        Raises:
            ValueError: if the grid has no such timestep; it names the nearest.
        """
        step = int(np.argmin(np.abs(self.timesteps - timestep)))
        if self.timesteps[step] != timestep:
            raise ValueError(f"timestep {timestep} is not on the sampling grid; the nearest is {self.timesteps[step]}")
        return step


def spaced_timesteps(total: int, steps: int, spacing: Spacing) -> np.ndarray:
    """Choose ``steps`` of ``total`` training timesteps.

    ``linspace`` is DiT's own respacing (0, 20, 41, ..., 979, 999 for 50 of 1000); ``leading`` is the default of
    diffusers' DDIM (0, 20, ..., 980).

    Raises:
        ValueError: if there are not so many.
    """
    if not 1 < steps <= total:
        raise ValueError(f"{steps} sampling steps: choose 2 to {total}")
    if spacing == "linspace":
        return np.round(np.linspace(0, total - 1, steps)).astype(int)
    return np.arange(steps) * (total // steps)


def offset_timesteps(total: int, steps: int) -> np.ndarray:
    """Choose 1, 1 + k, 1 + 2k, ... with k = total // steps: latent diffusion's DDIM grid, of exactly ``steps`` entries.

    Raises:
        ValueError: if they do not fit.
    """
    if not 2 <= steps <= total // 2:
        raise ValueError(f"{steps} sampling steps: choose 2 to {total // 2}")
    return 1 + np.arange(steps) * (total // steps)


def respace(abar: np.ndarray, steps: int, spacing: Spacing) -> Grid:
    """Return the process on ``steps`` of the training timesteps, whose cumulative signal power is ``abar`` (T,)."""
    timesteps = spaced_timesteps(len(abar), steps, spacing)
    return Grid(timesteps, np.asarray(abar, dtype=np.float64)[timesteps])
