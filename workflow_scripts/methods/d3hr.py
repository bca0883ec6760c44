"""D3HR (ICML 2025): a class is a Gaussian in the DDIM-inverted domain; draw the group that represents it best.

A group is n start latents z = mean + std * e; how well it represents the class is measured on the group's own mean,
standard deviation and skewness per dimension (section 4.3).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from workflow_scripts.config import GaussianStart
from workflow_scripts.diffusion.noise import normals


def draw_group(
    mean: torch.Tensor, variance: torch.Tensor, count: int, settings: GaussianStart, random: np.random.Generator
) -> torch.Tensor:
    """Draw ``count`` start latents of a class.

    ``random`` takes independent draws; ``best_of_m`` keeps the best of many such groups; ``moment_matched`` standardises one
    group per dimension, which makes its mean and spread losses exactly zero, the optimum that best_of_m searches for.
    A single image has no spread to match: all three then take one plain draw.

    Args:
        mean, variance: (c, h, w) of the inverted latents.
        random: the class's own stream.

    Returns:
        (count, c, h, w), float32.
    """
    std = variance.sqrt().flatten()
    if settings.construction == "best_of_m" and count > 1:
        noise = _best_noise(std.double(), count, settings, random)
    else:
        noise = normals(random, count, std.numel()).double()
        if settings.construction == "moment_matched" and count > 1:
            noise = (noise - noise.mean(0)) / noise.std(0)
    return (mean.flatten() + std * noise).view(count, *mean.shape).float()


def losses(noise: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Return how far groups are from the class Gaussian: mean, spread and skewness losses (eq. 9-11).

    Args:
        noise: standardised latents e of g groups (g, n, D), n >= 2.
        std: (D,) of the class.

    Returns:
        (g, 3): L2 norms over the D dimensions of the mean's and the standard deviation's error, and of the skewness.
    """
    centre = noise.mean(1, keepdim=True)
    centred = noise - centre
    spread = noise.std(1)
    skewness = centred.pow(3).mean(1) / centred.square().mean(1).clamp(min=1e-30).pow(1.5)
    weights = std.square().to(noise)
    mean_loss, spread_loss = (((error.square() @ weights).sqrt()) for error in (centre.squeeze(1), spread - 1))
    return torch.stack([mean_loss, spread_loss, skewness.norm(dim=1)], dim=1)


def _best_noise(std: torch.Tensor, count: int, settings: GaussianStart, random: np.random.Generator) -> torch.Tensor:
    """Return the noise (n, D) of the best of ``settings.candidates`` groups."""
    weights = torch.tensor(settings.weights, dtype=torch.float32)
    best, winner = torch.inf, torch.empty(0)
    for noise in _candidates(settings.candidates, count, std.numel(), random):
        scores = losses(noise, std) @ weights
        leader = int(scores.argmin())
        if float(scores[leader]) < best:
            best, winner = float(scores[leader]), noise[leader].clone()
    return winner.double()


def _candidates(total: int, count: int, dimensions: int, random: np.random.Generator) -> Iterator[torch.Tensor]:
    chunk = max(1, (1 << 24) // (count * dimensions))
    for start in range(0, total, chunk):
        yield normals(random, min(chunk, total - start), count, dimensions)
