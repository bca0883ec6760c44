"""A denoiser whose answers are known: noise prediction for mixtures of Gaussians, in closed form and in any precision.

At signal power a, a component N(m, s^2 I) has become N(sqrt(a) m, v I) with v = a s^2 + 1 - a, so that the score of a
mixture is the mean of (sqrt(a) m - x) / v over the components, weighted by their posterior, and eps = -sqrt(1 - a) score.
"""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from workflow_scripts.config import FitDiT
from workflow_scripts.diffusion.backbone import Denoiser, open_label_embeddings
from workflow_scripts.diffusion.fit import build_dit
from workflow_scripts.diffusion.schedule import Grid

CPU = torch.device("cpu")


@functools.cache
def linear_schedule(steps: int = 1000) -> np.ndarray:
    """Return abar of the linear 1e-4 to 2e-2 schedule, or of a finer one of nearly the same process."""
    scale = 1000 / steps
    return np.cumprod(1 - np.linspace(1e-4 * scale, 2e-2 * scale, steps))


class Mixture:
    """Stands in for Denoiser.

    Args:
        classes: component means (k, c, h, w) of each class; components of a class weigh the same, classes likewise.
        std: s, of every component.
        null: component means of the null label; default: all classes together.
        raw: constant variance channels, or None for a network without.
    """

    def __init__(
        self,
        classes: list[torch.Tensor],
        std: float,
        *,
        abar: np.ndarray | None = None,
        null: torch.Tensor | None = None,
        raw: float | None = None,
    ):
        everything = torch.cat(classes) if null is None else null
        shares = torch.cat([torch.full((len(means),), 1 / len(means)) for means in classes])
        self.means = [*classes, everything]
        self.weights = [torch.full((len(means),), 1 / len(means)).double() for means in classes]
        self.weights.append((shares if null is None else torch.ones(len(null))).double())
        self.std = std
        self.raw = raw
        self.abar = linear_schedule() if abar is None else abar
        self.null_label = len(classes)
        self.latent_shape = tuple(classes[0].shape[1:])
        self.device = CPU
        self.calls: list[int] = []

    def log_density(self, x: torch.Tensor, timestep: int, label: int) -> torch.Tensor:
        """Return log p_t(x | label) of (n, c, h, w), up to a constant."""
        return self._log_joint(x, timestep, label).logsumexp(1)

    def noise(self, x: torch.Tensor, timestep: int, label: int) -> torch.Tensor:
        """Return the exact eps (n, c, h, w) at a timestep."""
        abar = float(self.abar[timestep])
        share = self._log_joint(x, timestep, label).softmax(1).to(x)
        mean = (share @ self.means[label].to(x).flatten(1)).view_as(x)
        return (1 - abar) ** 0.5 * (x - abar**0.5 * mean) / self.variance(abar)

    def variance(self, abar: float) -> float:
        """Return v, a component's variance at a signal power."""
        return abar * self.std**2 + 1 - abar

    def predict(
        self,
        x: torch.Tensor,
        timestep: int,
        labels: torch.Tensor,
        *,
        cfg_scale: float,
        cfg_channels: int,
        null: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Answer as Denoiser.predict does, for labels."""
        assert null is None
        self.calls.append(timestep)
        eps = torch.empty_like(x)
        for label in labels.unique().tolist():
            eps[labels == label] = self.noise(x[labels == label], timestep, label)
        if cfg_scale != 1:
            null = self.noise(x, timestep, self.null_label)
            eps[:, :cfg_channels] = (null + cfg_scale * (eps - null))[:, :cfg_channels]
        return eps, None if self.raw is None else torch.full_like(x, self.raw)

    def _log_joint(self, x: torch.Tensor, timestep: int, label: int) -> torch.Tensor:
        abar = float(self.abar[timestep])
        means = abar**0.5 * self.means[label].to(x).flatten(1)
        squares = (x.flatten(1)[:, None] - means).square().sum(2)
        return self.weights[label].to(x).log() - squares / (2 * self.variance(abar))


class MixtureNetwork(nn.Module):
    """The same as a network, to be put under a real Denoiser; its variance channels hold the label."""

    def __init__(self, mixture: Mixture):
        super().__init__()
        self.mixture = mixture
        self.seen: list[tuple[int, list[int]]] = []
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        self.seen.append((int(timestep[0]), labels.tolist()))
        eps = torch.cat(
            [
                self.mixture.noise(row[None], int(time), int(label))
                for row, time, label in zip(x, timestep, labels, strict=True)
            ]
        )
        return SimpleNamespace(sample=torch.cat([eps, labels.view(-1, 1, 1, 1).expand_as(eps).to(eps)], dim=1))


def gaussian(mean: torch.Tensor, std: float, **options: object) -> Mixture:
    """Return the denoiser of the single Gaussian N(mean, std^2 I)."""
    return Mixture([mean[None]], std, **options)  # type: ignore[arg-type]


def exact_flow(z: torch.Tensor, mean: torch.Tensor, std: float, abar_from: float, abar_to: float) -> torch.Tensor:
    """Return the probability-flow map of N(mean, std^2 I) from one signal power to another."""
    ratio = (abar_to * std**2 + 1 - abar_to) / (abar_from * std**2 + 1 - abar_from)
    return abar_to**0.5 * mean + ratio**0.5 * (z - abar_from**0.5 * mean)


def ddim_factor(grid: Grid, std: float, top: int, bottom: int = 0) -> float:
    """Return what DDIM multiplies the deviation from sqrt(abar) m by, on its way from step ``top`` to ``bottom``.

    One step multiplies by (sqrt(a a') s^2 + sqrt((1 - a) (1 - a'))) / v.
    """
    upper, lower = grid.abar[bottom + 1 : top + 1], grid.abar[bottom:top]
    shared = np.sqrt(upper * lower) * std**2 + np.sqrt((1 - upper) * (1 - lower))
    return float(np.prod(shared / (upper * std**2 + 1 - upper)))


@functools.cache
def _random_dit(classes: int, side: int) -> nn.Module:
    model = build_dit(FitDiT(layers=2, heads=2, head_dim=16), (4, side, side), classes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Zero-initialised gates and output layers would make every prediction zero.
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def dit_denoiser(classes: int = 3, side: int = 8) -> Denoiser:
    """Return a Denoiser around a two-layer DiT with random weights, in which every row of a batch meets real kernels."""
    model = copy.deepcopy(_random_dit(classes, side))
    table = open_label_embeddings(model)
    return Denoiser(model, linear_schedule(), classes, (4, side, side), CPU, table)
