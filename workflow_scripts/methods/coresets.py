"""Coresets: real images of a class, chosen on their latents. They are the baselines that any synthesis must beat.

``crops`` concatenates instead of choosing well: each distilled image is a collage of four real ones at half their side, the
multi-formation of IDC (ICML 2022) without its learning, and RDED's layout without its teacher.
"""

from __future__ import annotations

import numpy as np
import torch

from workflow_scripts.methods.modes import kmeans


def select(rule: str, latents: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Choose ``count`` of (n, c, h, w) latents.

    ``random`` and ``crops`` draw without replacement; ``herding`` greedily keeps the mean of the chosen closest to the class
    mean (Welling, 2009; iCaRL, algorithm 4); ``kmeans`` takes the real latent nearest to each of ``count`` centroids;
    ``kcenter`` greedily keeps every latent close to one that is chosen (Sener & Savarese, 2018, algorithm 1).

    Returns:
        indices (count,), distinct.
    """
    if rule in ("random", "crops"):
        return random.choice(len(latents), count, replace=False)
    if rule == "kmeans":
        return kmeans(latents, count, restarts=10, seed=int(random.integers(2**31)))[1]
    greedy = {"herding": herding, "kcenter": kcenter}[rule]
    return greedy(latents.reshape(len(latents), -1).astype(np.float64), count)


def herding(points: np.ndarray, count: int) -> np.ndarray:
    """Choose ``count`` of (n, D) points whose running mean follows the mean of all."""
    target = points.mean(0)
    total = np.zeros_like(target)
    free = np.ones(len(points), dtype=bool)
    chosen = []
    for k in range(1, count + 1):
        gap = ((points + (total - k * target)) ** 2).sum(1)  # k^2 |mean with the candidate - target|^2
        chosen.append(int(np.where(free, gap, np.inf).argmin()))
        free[chosen[-1]] = False
        total += points[chosen[-1]]
    return np.array(chosen)


def kcenter(points: np.ndarray, count: int) -> np.ndarray:
    """Choose ``count`` of (n, D) points: the one nearest to the mean of all, then always the farthest from those chosen."""
    gap = ((points - points.mean(0)) ** 2).sum(1)
    chosen = [int(gap.argmin())]
    gap = np.full(len(points), np.inf)
    while len(chosen) < count:
        gap = np.minimum(gap, ((points - points[chosen[-1]]) ** 2).sum(1))
        gap[chosen[-1]] = -1  # below the 0 of its copies
        chosen.append(int(gap.argmax()))
    return np.array(chosen)


def collage(squares: np.ndarray) -> np.ndarray:
    """Lay out each four of (4n, c, h, w) images or latents in a 2 x 2 grid of the same size, averaged down to half their side.

    Returns:
        (n, c, h, w) float32, row by row.
    """
    count, channels, height, width = squares.shape
    parts = torch.from_numpy(squares).float().view(count // 4, 4, channels, height, width)

    def shrunk(row: int, column: int) -> torch.Tensor:
        size = ((height + row) // 2, (width + column) // 2)
        return torch.nn.functional.adaptive_avg_pool2d(parts[:, 2 * row + column], size)

    rows = [torch.cat([shrunk(row, 0), shrunk(row, 1)], dim=3) for row in (0, 1)]
    return torch.cat(rows, dim=2).numpy()
