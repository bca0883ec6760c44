"""Differentiable Siamese augmentation (Zhao and Bilen, arXiv 2102.08259): one random operation per batch.

What is drawn is apart from what it is applied to, so that real and synthetic images can meet the very same operation.
Images are normalised, float (n, 3, H, W); what an operation moves in from outside is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
CROP, CUTOUT, SCALE, ROTATE = 0.125, 0.5, 1.2, 15.0


@dataclass(frozen=True)
class Augmentation:
    """An operation with its random numbers.

    Attributes:
        name: key of ``OPERATIONS``, or None for no operation.
        numbers: (rows, 3) uniform in [0, 1); one row is shared by all images, more are one per image.
    """

    name: str | None
    numbers: np.ndarray

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Augment images, keeping the graph."""
        if self.name is None:
            return images
        numbers = torch.from_numpy(self.numbers).to(images).expand(len(images), 3)
        return OPERATIONS[self.name](images, numbers)


def draw(generator: np.random.Generator, operations: Sequence[str], rows: int = 1) -> Augmentation:
    """Draw an operation and its parameters: one set for all images (matched), or ``rows`` sets, one per image."""
    place = int(generator.integers(max(len(operations), 1)))
    return Augmentation(operations[place] if operations else None, generator.random((rows, 3)))


def colour(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Shift brightness by up to 0.5, then scale saturation by 0 to 2, then contrast by 0.5 to 1.5."""
    brightness, saturation, contrast = (column.view(-1, 1, 1, 1) for column in u.unbind(1))
    x = x + (brightness - 0.5) * BRIGHTNESS
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * saturation * SATURATION
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + CONTRAST)


def crop(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Move the image by up to an eighth of its sides, in whole pixels."""
    height, width = x.shape[2:]
    reach = (round(height * CROP), round(width * CROP))
    top, left = ((u[:, axis] * (2 * reach[axis] + 1)).floor().long() for axis in (0, 1))
    padded = F.pad(x, (reach[1], reach[1], reach[0], reach[0]))
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = left[:, None] + torch.arange(width, device=x.device)
    batch = torch.arange(len(x), device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return padded[batch, channels, rows[:, None, :, None], columns[:, None, None, :]]


def cutout(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Blank a box of half the sides around a centre anywhere in the image."""
    keep = None
    for axis, side in enumerate(x.shape[2:]):
        size = round(side * CUTOUT)
        first = (u[:, axis] * (side + 1 - size % 2)).floor() - size // 2
        places = torch.arange(side, device=x.device)
        outside = (places < first[:, None]) | (places >= first[:, None] + size)
        keep = outside[:, None, :, None] if keep is None else keep | outside[:, None, None, :]
    assert keep is not None
    return x * keep


def flip(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Mirror with probability 1/2."""
    return torch.where((u[:, 0] < 0.5).view(-1, 1, 1, 1), x.flip(3), x)


def scale(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Zoom each side by 1/1.2 to 1.2."""
    factor = u[:, :2] * (SCALE - 1 / SCALE) + 1 / SCALE
    return _warp(x, torch.diag_embed(factor))


def rotate(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Turn by up to 15 degrees."""
    angle = (2 * u[:, 0] - 1) * ROTATE * math.pi / 180
    return _warp(x, torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2))


def _warp(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    theta = F.pad(matrices, (0, 1))
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "color": colour,
    "crop": crop,
    "cutout": cutout,
    "flip": flip,
    "scale": scale,
    "rotate": rotate,
}
