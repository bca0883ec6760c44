"""D3HR (ICML 2025): a class is a Gaussian in the DDIM-inverted domain; draw the group that represents it best.

A group is n start latents z = mean + std * e; how well it represents the class is measured on the group's own mean,
standard deviation and skewness per dimension (section 4.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from workflow_scripts.config import GaussianStart
from workflow_scripts.diffusion.noise import normals

BLOCK = 1 << 20
"""Numbers per image in a block of candidates: a few arrays of this size are all that the search holds, whatever m and n."""


def draw_group(
    mean: torch.Tensor,
    variance: torch.Tensor,
    count: int,
    settings: GaussianStart,
    random: np.random.Generator,
    device: torch.device | None = None,
    candidate: int | None = None,
) -> torch.Tensor:
    """Draw ``count`` start latents of a class.

    ``random`` takes independent draws; ``best_of_m`` keeps the best of many such groups; ``moment_matched`` standardises one
    group per dimension, which makes its mean and spread losses exactly zero, the optimum that best_of_m searches for.
    A single image has no spread to match: all three then take one plain draw.

    Args:
        mean, variance: (c, h, w) of the inverted latents.
        random: the class's own stream, on the CPU: the plain draw is the same everywhere.
        device: where best_of_m draws its candidates and scores them (default: the CPU). torch's streams differ between the
            CPU and CUDA, and between models of GPU, so that best_of_m depends on the recipe alone on one kind of device.
        candidate: what :func:`best_candidate` found, to draw that group without the search.

    Returns:
        (count, c, h, w), float32, on the CPU.
    """
    std = variance.sqrt().flatten()
    if settings.construction == "best_of_m" and count > 1:
        device, seed = device or torch.device("cpu"), int(random.integers(2**32))
        if candidate is None:
            candidate = _search(std, count, settings, seed, device)
        groups = block_size(std.numel())
        block, place = divmod(candidate, groups)
        images = candidates(seed, block, groups, count, std.numel(), device)
        noise = torch.stack([image[place] for image in images]).cpu().double()
    else:
        noise = normals(random, count, std.numel()).double()
        if settings.construction == "moment_matched" and count > 1:
            noise = (noise - noise.mean(0)) / noise.std(0)
    return (mean.flatten() + std * noise).view(count, *mean.shape).float()


def best_candidate(
    variance: torch.Tensor, count: int, settings: GaussianStart, random: np.random.Generator, device: torch.device
) -> int:
    """Return the number of the group that best_of_m takes of a class; the arguments are those of :func:`draw_group`."""
    return _search(variance.sqrt().flatten(), count, settings, int(random.integers(2**32)), device)


def losses(images: Iterable[torch.Tensor], std: torch.Tensor) -> torch.Tensor:
    """Return how far groups are from the class Gaussian: mean, spread and skewness losses (eq. 9-11).

    One pass sums the first three powers of each image's distance d to the group's first image: they give the central
    moments, and a shift within the data keeps what is subtracted small. With standardised noise, the mean and spread losses
    of all groups are products of a matrix (g, D) with the class's variance, and skewness does not depend on the class.

    Args:
        images: for each of the n >= 2 places of a group, the standardised latent e of g groups (g, D).
        std: (D,) of the class.

    Returns:
        (g, 3): L2 norms over the D dimensions of the mean's and the standard deviation's error, and of the skewness.
    """
    rest = iter(images)
    first = next(rest)
    one, two, three, distance, square = (torch.zeros_like(first) for _ in range(5))
    n = 1
    for image in rest:
        torch.sub(image, first, out=distance)
        torch.mul(distance, distance, out=square)
        one += distance
        two += square
        three.addcmul_(square, distance)
        n += 1
    shift = one / n
    variance = (two / n - shift.square()).clamp(min=0)
    third = three / n - 3 * shift * (two / n) + 2 * shift.pow(3)
    # Of n numbers the skewness is at most this; where all n are nearly equal, rounding would let it grow beyond.
    most = (n - 2) / (n - 1) ** 0.5
    skewness = (third / variance.clamp(min=1e-30).pow(1.5)).clamp(-most, most)
    weights = std.square().to(first)
    errors = (first + shift, (variance * (n / (n - 1))).sqrt() - 1)
    return torch.stack([*((error.square() @ weights).sqrt() for error in errors), skewness.norm(dim=1)], dim=1)


def candidates(
    seed: int, block: int, groups: int, count: int, dimensions: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Draw one block of groups from a generator of its own: ``count`` times (groups, dimensions), place by place.

    Args:
        seed: of the class, below 2^32; blocks use it and its successors, within the 32 bits that torch keeps on the CPU.
    """
    generator = torch.Generator(device).manual_seed((seed + block) % 2**32)
    for _ in range(count):
        yield torch.randn(groups, dimensions, generator=generator, device=device)


def block_size(dimensions: int) -> int:
    """Return how many groups a block holds. It is part of what best_of_m means: another size would draw other candidates."""
    return max(1, BLOCK // dimensions)


def _search(std: torch.Tensor, count: int, settings: GaussianStart, seed: int, device: torch.device) -> int:
    """Return the best of ``settings.candidates`` groups; the first of equals wins."""
    dimensions = std.numel()
    groups = block_size(dimensions)
    weights = torch.tensor(settings.weights, device=device)
    std = std.float().to(device)
    best = torch.full((), torch.inf, device=device)
    winner = torch.zeros((), dtype=torch.int64, device=device)  # on the device, so that nothing waits for it
    for block in range(-(-settings.candidates // groups)):
        scores = losses(candidates(seed, block, groups, count, dimensions, device), std) @ weights
        low, place = scores[: settings.candidates - block * groups].min(0)
        winner = torch.where(low < best, block * groups + place, winner)
        best = torch.minimum(low, best)
    return int(winner)
