"""The denoising loop that every training-free method shares.

Rows of a batch may belong to different classes. Guidance is a sum of terms; a term returns a vector g in the space of
clean latents, which the DDPM step adds to the posterior mean in units of its standard deviation, and the DDIM step
subtracts from epsilon in units of sqrt(1 - abar) (MGD3: released code, and Algorithm 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from workflow_scripts.config import Sampler
from workflow_scripts.diffusion.backbone import Denoiser
from workflow_scripts.diffusion.schedule import Grid

Rows = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """Where the loop stands.

    Attributes:
        index: step of the grid, S-1 at the start down to 0.
        abar: cumulative signal power at this step.
        x: current latents (n, c, h, w).
        x0: the guided prediction of the clean latents (n, c, h, w).
        sigma: standard deviation of the reverse step (n, c, h, w), or sqrt(1 - abar) for DDIM.
    """

    index: int
    abar: float
    x: torch.Tensor
    x0: torch.Tensor
    sigma: torch.Tensor


class Term(Protocol):
    """A guidance term."""

    def acts_at(self, index: int) -> bool:
        """Say whether the term acts at a step index."""

    def __call__(self, step: Step, rows: Rows) -> torch.Tensor:
        """Return g (n, c, h, w) for the rows of a batch, given what was prepared for each of them."""


class LabelSchedule(Protocol):
    """Conditions that change while sampling goes on."""

    def __call__(self, index: int, timestep: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the embeddings (n, P, E) of the class and the null rows at a step, or None for the plain labels."""


@torch.inference_mode()
def sample(
    denoiser: Denoiser,
    grid: Grid,
    settings: Sampler,
    start: torch.Tensor,
    start_step: int,
    labels: torch.Tensor,
    noise: torch.Tensor | None,
    terms: Sequence[Term],
    rows: Rows,
    schedule: LabelSchedule | None = None,
) -> torch.Tensor:
    """Denoise a batch from ``start_step`` to clean latents.

    DDPM takes ``start_step + 1`` network calls, the last one without noise. DDIM (eta 0) ends at the grid's first timestep, 0,
    whose latents count as clean: it is the exact inverse of :func:`workflow_scripts.diffusion.inversion.invert`.

    Args:
        start: latents at ``start_step`` (n, c, h, w), float32.
        labels: (n,) int64.
        noise: DDPM's noise (n, start_step + 1, c, h, w); entry i is used at step i. None for DDIM.
        rows: tensors that the terms and the schedule read, with n rows each but for those that the rows share.
        schedule: what the network is told in place of the labels.

    Returns:
        clean latents (n, c, h, w), float32.
    """
    x = start
    for index in range(start_step, 0 if settings.kind == "ddim" else -1, -1):
        timestep = int(grid.timesteps[index])
        condition = None if schedule is None else schedule(index, timestep, rows)
        told, null = (labels, None) if condition is None else condition
        eps, raw = denoiser.predict(
            x, timestep, told, cfg_scale=settings.cfg_scale, cfg_channels=settings.cfg_channels, null=null
        )
        abar, abar_next = float(grid.abar[index]), float(grid.abar_previous[index])
        x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
        sigma = _sigma(grid, index, raw, settings, x0)
        active = [term for term in terms if term.acts_at(index)]
        force = (
            sum((term(Step(index, abar, x, x0, sigma), rows) for term in active), torch.zeros(())) if active else None
        )
        if settings.kind == "ddpm":
            x = float(grid.posterior_x0[index]) * x0 + float(grid.posterior_xt[index]) * x
            if force is not None:
                x = x + sigma * force
            if index > 0:
                assert noise is not None
                x = x + sigma * noise[:, index]
        else:
            if force is not None:
                eps = eps - sigma * force
                x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
            x = abar_next**0.5 * x0 + (1 - abar_next) ** 0.5 * eps
    return x


def _sigma(grid: Grid, index: int, raw: torch.Tensor | None, settings: Sampler, x0: torch.Tensor) -> torch.Tensor:
    if settings.kind == "ddim":
        return torch.full_like(x0, float(1 - grid.abar[index]) ** 0.5)
    shortest = float(grid.posterior_log_variance[index])
    if settings.variance == "fixed" or raw is None:
        return torch.full_like(x0, shortest / 2).exp()
    longest = float(torch.tensor(grid.betas[index]).log())
    share = (raw + 1) / 2  # Improved DDPM, eq. 15
    return torch.exp((share * longest + (1 - share) * shortest) / 2)
