"""DDIM inversion of clean latents, and streaming moments of what it gives; noising, the control without a network."""

from __future__ import annotations

import torch

from workflow_scripts.config import Inversion
from workflow_scripts.diffusion.backbone import Denoiser
from workflow_scripts.diffusion.schedule import Grid


@torch.inference_mode()
def invert(
    denoiser: Denoiser,
    grid: Grid,
    latents: torch.Tensor,
    labels: torch.Tensor,
    until: int,
    settings: Inversion,
    *,
    cfg_scale: float,
    cfg_channels: int,
) -> torch.Tensor:
    """Run the DDIM map backwards from timestep 0 to grid step ``until`` (D3HR, section 4.1).

    Each step solves z_t = sqrt(abar_t) (z_s - sqrt(1-abar_s) eps) / sqrt(abar_s) + sqrt(1-abar_t) eps with eps taken at the
    known z_s; ``refinements`` re-evaluate eps at the z_t found, which converges to the exact inverse of the sampler.

    Args:
        latents: clean latents (n, c, h, w), float32, taken to be at the grid's first timestep.
        labels: (n,) int64.

    Returns:
        latents (n, c, h, w) at step ``until``.
    """
    z = latents
    for index in range(1, until + 1):
        abar_s, abar_t = float(grid.abar[index - 1]), float(grid.abar[index])
        source = z
        at = index if settings.evaluate_at == "next" else index - 1
        for refinement in range(settings.refinements + 1):
            timestep = int(grid.timesteps[at if refinement == 0 else index])
            eps, _ = denoiser.predict(z, timestep, labels, cfg_scale=cfg_scale, cfg_channels=cfg_channels)
            z = (abar_t / abar_s) ** 0.5 * (source - (1 - abar_s) ** 0.5 * eps) + (1 - abar_t) ** 0.5 * eps
    return z


def noised_moments(mean: torch.Tensor, variance: torch.Tensor, abar: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance of latents at signal power ``abar`` after forward noising, given those of the clean latents.

    It is what D3HR compares inversion with ("DDPM noising"), in closed form: x_t = sqrt(abar) x_0 + sqrt(1-abar) noise, DDPM
    eq. 4. One noised draw per image would add only its sampling error.
    """
    return abar**0.5 * mean, abar * variance + 1 - abar


class Moments:
    """Per-dimension mean and unbiased variance of a stream of batches, merged in float64 (Chan et al., 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: torch.Tensor | float = 0.0
        self._squares: torch.Tensor | float = 0.0

    def update(self, batch: torch.Tensor) -> None:
        """Add a batch (n, ...)."""
        n = len(batch)
        if n == 0:
            return
        batch = batch.double()
        mean = batch.mean(0)
        delta = mean - self._mean
        total = self.count + n
        self._squares = self._squares + (batch - mean).square().sum(0) + delta.square() * (self.count * n / total)
        self._mean = self._mean + delta * (n / total)
        self.count = total

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and variance in float64; the variance of a single sample is 0."""
        assert isinstance(self._mean, torch.Tensor) and isinstance(self._squares, torch.Tensor)
        return self._mean, self._squares / max(self.count - 1, 1)
