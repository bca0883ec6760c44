"""Augmentation of whole batches on their device, in two parts: what is drawn, and what is done with it.

``draw_epoch`` draws everything that is random in an epoch, on the CPU and from an explicit generator, so that it is the
same on every device and can be stored and replayed. The rest are pure functions of images and draws that never wait for the
device. Each image gets its own crop, flip, jitter and lighting; CutMix and MixUp draw once per batch.

Images are float (N, 3, H, W) in [0, 1] before normalisation, unless stated otherwise. Nothing is clipped in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import numpy as np
import torch

from workflow_scripts.evaluation.dsa import OPERATIONS
from workflow_scripts.evaluation.protocols import Recipe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in luma (ITU-R BT.601)."""

LIGHTING_EIGENVALUES = (0.2175, 0.0188, 0.0045)
"""Eigenvalues of the RGB covariance over ImageNet (Krizhevsky et al. 2012, as in common use)."""

LIGHTING_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
"""Eigenvectors of the RGB covariance over ImageNet: one per column, rows are red, green, blue."""

CROP_TRIES = 10
CROP_RATIO = (3 / 4, 4 / 3)
"""Range of a crop's width over its height, torchvision's default and every protocol's."""

Draws = Mapping[str, torch.Tensor]
"""What is random in an epoch of N images in M batches, by name; only what the recipe needs.

- ``order`` (N,) int64: the image at each position
- ``boxes`` (N, 4) int64: top, left, height, width of its crop in pixels
- ``mirrored`` (N,) bool
- ``tiles`` (N, patches^2) int64: which tile comes to each place
- ``factors`` (N, 3) float32: of brightness, contrast and saturation
- ``alphas`` (N, 3) float32: coefficients of PCA lighting
- ``operations`` (M,) int64: which of the recipe's DSA operations, with ``numbers`` (N, 3) in [0, 1)
- ``partners`` (N,) int64: the position that it is mixed with, in the same batch
- ``mix_boxes`` (M, 4) int64: top, left, bottom, right of what CutMix pastes
- ``mix_weights`` (M,) float32: weight of its own pixels outside that box: 1 but for MixUp
"""


# ---------------------------------------------------------------- draws


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the generator of an epoch's draws, so that a training can be taken up at any epoch."""
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def draw_epoch(recipe: Recipe, count: int, side: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Draw everything that is random in an epoch.

    Args:
        recipe: The training.
        count: Training images.
        side: Side of the training images in pixels.
        generator: Of the CPU.
    """
    draws = {"order": torch.randperm(count, generator=generator)}
    if recipe.patches > 1:
        draws["tiles"] = torch.rand((count, recipe.patches**2), generator=generator).argsort(dim=1)
    if recipe.crop_scale is not None:
        draws["boxes"] = crop_boxes(count, side, side, generator, scale=recipe.crop_scale)
    if recipe.flip:
        draws["mirrored"] = torch.rand(count, generator=generator) < 0.5
    if recipe.jitter:
        draws["factors"] = _uniform(1 - recipe.jitter, 1 + recipe.jitter, (count, 3), generator)
    if recipe.lighting:
        draws["alphas"] = torch.randn((count, 3), generator=generator) * recipe.lighting
    batches = -(-count // recipe.batch_size)
    if recipe.dsa:
        draws["operations"] = torch.randint(len(recipe.dsa), (batches,), generator=generator)
        draws["numbers"] = torch.rand((count, 3), generator=generator)
    if recipe.cutmix or recipe.mixup:
        batch_of = torch.arange(count) // recipe.batch_size
        # Sorting by batch and then by chance is one permutation within each batch.
        draws["partners"] = (batch_of + torch.rand(count, generator=generator, dtype=torch.float64)).argsort()
        draws["mix_boxes"], draws["mix_weights"] = _mixes(recipe, batches, generator)
    return draws


def _uniform(low: float, high: float, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(size, generator=generator).mul_(high - low).add_(low)


def crop_boxes(
    count: int,
    height: int,
    width: int,
    generator: torch.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = CROP_RATIO,
) -> torch.Tensor:
    """Draw the boxes of RandomResizedCrop, with torchvision's semantics.

    Area is uniform in ``scale`` (fractions of the image), width over height log-uniform in ``ratio``; sizes are rounded
    to whole pixels. Of ten tries the first that fits counts; if none does, the box is the largest centred one with a
    ratio in range.

    Returns:
        (count, 4) int64: top, left, height, width in pixels.
    """
    area = _uniform(*scale, (count, CROP_TRIES), generator) * (height * width)
    aspect = _uniform(math.log(ratio[0]), math.log(ratio[1]), (count, CROP_TRIES), generator).exp_()
    widths, heights = (area * aspect).sqrt_().round_(), (area / aspect).sqrt_().round_()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    found = fits.gather(1, first)

    fallback_width = min(width, round(height * ratio[1]))
    fallback_height = min(height, round(width / ratio[0]))
    box_width = torch.where(found, widths.gather(1, first), fallback_width)
    box_height = torch.where(found, heights.gather(1, first), fallback_height)
    size = torch.cat([box_height, box_width], dim=1)
    room = torch.tensor([height, width]) - size
    anywhere = (torch.rand((count, 2), generator=generator) * (room + 1)).floor_().minimum(room)
    corner = torch.where(found, anywhere, (room / 2).floor_())
    return torch.cat([corner, size], dim=1).to(torch.int64)


def _mixes(recipe: Recipe, batches: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a box and a weight per batch (Yun et al. 2019; Zhang et al. 2018).

    CutMix's box has the image's proportions and an area of 1 - lambda, lambda ~ Beta(alpha, alpha), around a uniform centre,
    cut at the border.
    """
    # The only public way to draw a Beta takes the global generator; a ratio of two Gamma draws is the same.
    gammas = torch._standard_gamma(torch.full((batches, 2), recipe.mix_alpha), generator=generator)
    share = gammas[:, 0] / gammas.sum(1)
    chance, *centre = torch.rand((3, batches), generator=generator)
    cut = chance < recipe.cutmix
    blend = ~cut & (chance < recipe.cutmix + recipe.mixup)
    side = recipe.resolution
    half = ((1 - share).sqrt() * cut * side).floor().div(2).floor()
    middle = (torch.stack(centre) * side).floor()
    low, high = (middle - half).clamp(min=0), (middle + half).clamp(max=side)
    return torch.cat([low, high]).T.to(torch.int64), torch.where(blend, share, 1.0)


def own_shares(draws: Draws, side: int) -> torch.Tensor:
    """Return the weight of an image's own label in each batch (M,): its partner's label has the rest."""
    top, left, bottom, right = draws["mix_boxes"].unbind(1)
    return draws["mix_weights"] * (1 - (bottom - top) * (right - left) / side**2)


# ---------------------------------------------------------------- what is done with them


def augment(images: torch.Tensor, draws: Draws, recipe: Recipe) -> torch.Tensor:
    """Turn uint8 images (n, 3, S, S) into normalised float32 (n, 3, R, R), by draws of as many rows, but for mixing and DSA."""
    x = to_float(images)
    if "tiles" in draws:
        x = shuffle_tiles(x, draws["tiles"], recipe.patches)
    mirrored = draws.get("mirrored")
    if "boxes" in draws:
        x = resized_crop(x, draws["boxes"], recipe.resolution, mirrored)
    elif mirrored is not None:
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    if "factors" not in draws and "alphas" not in draws:
        return normalise(x)
    mean, std = _constant(IMAGENET_MEAN, x.device), _constant(IMAGENET_STD, x.device)
    if "factors" in draws:
        matrices, offsets = jitter_matrices(x, *draws["factors"].unbind(1))
    else:
        matrices, offsets = torch.eye(3, device=x.device), torch.zeros(3, device=x.device)
    if "alphas" in draws:
        offsets = offsets + lighting_offsets(draws["alphas"])
    return recolour(x, matrices / std[:, None], (offsets - mean) / std)


def siamese(batch: torch.Tensor, operation: str, numbers: torch.Tensor) -> torch.Tensor:
    """Apply one operation of DSA to a batch of normalised images, with numbers (n, 3) of each image's own."""
    return OPERATIONS[operation](batch, numbers)


def blend(images: torch.Tensor, others: torch.Tensor, boxes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Blend each image with another, and paste the other's pixels in a box.

    Args:
        images: (n, C, H, W) float.
        others: (n, C, H, W) float.
        boxes: (n, 4) top, left, bottom, right.
        weights: (n,) of the image's own pixels outside the box.
    """
    height, width = images.shape[2:]
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    top, left, bottom, right = (side[:, None] for side in boxes.unbind(1))
    inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    own = torch.where(inside, 0.0, weights[:, None, None, None])
    return torch.lerp(others, images, own)


def shuffle_tiles(images: torch.Tensor, tiles: torch.Tensor, factor: int) -> torch.Tensor:
    """Cut each image into ``factor`` x ``factor`` tiles and put tile ``tiles[n, k]`` at place k, counted in rows (RDED).

    Raises:
        ValueError: ``factor`` does not divide the images' sides.
    """
    count, channels, height, width = images.shape
    if height % factor or width % factor:
        raise ValueError(f"images of {height} x {width} px cannot be cut into {factor} x {factor} equal tiles")
    grid = images.view(count, channels, factor, height // factor, factor, width // factor)
    rows = torch.arange(count, device=images.device)[:, None]
    shuffled = grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[rows, tiles].unflatten(1, (factor, factor))
    return shuffled.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def resized_crop(
    images: torch.Tensor, boxes: torch.Tensor, size: int, mirrored: torch.Tensor | None = None
) -> torch.Tensor:
    """Cut one box per image and resize it bilinearly, with antialiasing and without looking outside the box.

    Both axes are linear maps of the image, so that a batch of different crops is two batched matrix products.

    Args:
        images: (N, C, H, W) float.
        boxes: (N, 4) top, left, height, width in pixels, inside the images.
        size: Side of the square result in pixels.
        mirrored: (N,) bool, which crops to mirror left to right; none if omitted.

    Returns:
        (N, C, size, size) float.
    """
    top, left, height, width = boxes.to(torch.float32).unbind(1)
    vertical = _resampling(top, height, images.shape[2], size)
    horizontal = _resampling(left, width, images.shape[3], size)
    if mirrored is not None:
        horizontal = torch.where(mirrored[:, None, None], horizontal.flip(1), horizontal)
    return vertical[:, None] @ images @ horizontal.mT[:, None]


def _resampling(start: torch.Tensor, length: torch.Tensor, side: int, steps: int) -> torch.Tensor:
    """Return the weights (N, steps, side) of input pixels in output pixels: triangles, at least a pixel wide on each side."""
    scale = (length / steps)[:, None, None]
    pixels = torch.arange(side, device=start.device) + 0.5
    centres = start[:, None, None] + (torch.arange(steps, device=start.device) + 0.5)[:, None] * scale
    first, last = start[:, None, None], (start + length)[:, None, None]
    inside = (pixels > first) & (pixels < last)
    weights = (1 - (pixels - centres).abs() / scale.clamp(min=1)).clamp(min=0) * inside
    return weights / weights.sum(2, keepdim=True)


def jitter_matrices(
    images: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return colour jitter as one affine map of RGB per image.

    The three operators, with factor f, are IDC's: f x + (1 - f) g, where g is black for brightness, the image's mean
    grey for contrast and the pixel's own grey for saturation. Without clipping they commute, since saturation keeps
    every pixel's grey and brightness scales the mean grey too. So the published random order needs no drawing.

    Args:
        images: (N, 3, H, W) float.
        brightness: (N,) factors; 1 changes nothing.
        contrast: (N,) factors.
        saturation: (N,) factors.

    Returns:
        Matrices (N, 3, 3) and offsets (N, 3) for ``recolour``.
    """
    weights = _constant(GREY, images.device)
    mean_grey = images.mean(dim=(2, 3)) @ weights
    identity = torch.eye(3, device=images.device)
    factor = saturation[:, None, None]
    saturate = factor * identity + (1 - factor) * weights
    offsets = brightness * (1 - contrast) * mean_grey
    return (brightness * contrast)[:, None, None] * saturate, offsets[:, None].expand(-1, 3)


def lighting_offsets(alphas: torch.Tensor) -> torch.Tensor:
    """Return the RGB offsets (N, 3) of PCA lighting for coefficients ``alphas`` (N, 3) of the principal components."""
    values = _constant(LIGHTING_EIGENVALUES, alphas.device)
    vectors = _constant(LIGHTING_EIGENVECTORS, alphas.device)
    return (alphas * values) @ vectors.T


def recolour(images: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Apply an affine map of RGB to each image: ``matrices`` (N, 3, 3) or (3, 3), ``offsets`` (N, 3) or (3,)."""
    count = len(images)
    flat = torch.baddbmm(
        offsets.expand(count, 3)[:, :, None], matrices.expand(count, 3, 3), images.flatten(start_dim=2)
    )
    return flat.view_as(images)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 images into float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Normalise float images in [0, 1] by ImageNet's mean and standard deviation."""
    mean, std = _constant(IMAGENET_MEAN, images.device), _constant(IMAGENET_STD, images.device)
    return (images - mean[:, None, None]).div_(std[:, None, None])


@cache
def _constant(values: tuple, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a cached inference tensor would fail in a later backward pass
        return torch.tensor(values, dtype=torch.float32, device=device)
