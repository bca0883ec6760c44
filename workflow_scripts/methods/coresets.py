"""Coresets: real images of a class, chosen on their latents. They are the baselines that any synthesis must beat."""

from __future__ import annotations

import numpy as np

from workflow_scripts.methods.modes import kmeans


def select(rule: str, latents: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Choose ``count`` of (n, c, h, w) latents.

    ``random`` draws without replacement; ``herding`` greedily keeps the mean of the chosen closest to the class mean
    (Welling, 2009; iCaRL, algorithm 4); ``kmeans`` takes the real latent nearest to each of ``count`` centroids.

    Returns:
        indices (count,), distinct.
    """
    if rule == "random":
        return random.choice(len(latents), count, replace=False)
    if rule == "herding":
        return herding(latents.reshape(len(latents), -1).astype(np.float64), count)
    return kmeans(latents, count, restarts=10, seed=int(random.integers(2**31)))[1]


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
