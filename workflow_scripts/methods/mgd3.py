"""MGD3: mode-guided diffusion (ICML 2025). Each image is pulled to one k-means mode of its class's latents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from workflow_scripts.diffusion.sampler import Rows, Step
from workflow_scripts.diffusion.schedule import Grid


@dataclass(frozen=True)
class ModeGuidance:
    """g = lambda (m - x0), guided while the step index is above ``stop`` (sections 3.2 and 3.3)."""

    scale: float
    stop: int

    def acts_at(self, index: int) -> bool:
        """Act while the step index is above ``stop``."""
        return index > self.stop

    def __call__(self, step: Step, rows: Rows) -> torch.Tensor:
        """Return the pull of each row's x0 to its prototype."""
        return self.scale * (rows["prototype"] - step.x0)


def injected_share(grid: Grid, scale: float, stop: int) -> float:
    """Return how much of the mode the guided DDPM steps leave in x, relative to its signal level sqrt(abar) when they end.

    About 1 is right: below, the mode is hinted at; far above, its content is overdriven. The published lambda 0.1 with
    stop 25 of 50 steps gives 1.37. It counts what the steps add, without the feedback through x0, for the posterior
    variance; use it to carry lambda over to another number of steps.
    """
    share = 0.0
    for index in range(len(grid.abar) - 1, stop, -1):
        share = grid.posterior_xt[index] * share + scale * np.exp(grid.posterior_log_variance[index] / 2)
    return float(share / np.sqrt(grid.abar[stop]))
