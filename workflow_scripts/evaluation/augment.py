"""Augmentation of whole batches on their device, as in the Minimax/IDC hard-label protocol.

Every function draws from an explicit generator, on the device of the images, and never waits for the device.
Each image gets its own crop, flip, jitter and lighting; CutMix draws one box per batch.

Images are float (N, 3, H, W) in [0, 1] before normalisation, unless stated otherwise. Nothing is clipped in between.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in luma (ITU-R BT.601)."""

LIGHTING_EIGENVALUES = (0.2175, 0.0188, 0.0045)
"""Eigenvalues of the RGB covariance over ImageNet (Krizhevsky et al. 2012, as in common use)."""

LIGHTING_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
"""Eigenvectors of the RGB covariance over ImageNet: one per column, rows are red, green, blue."""

CROP_TRIES = 10


@cache
def _constant(values: tuple, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a cached inference tensor would fail in a later backward pass
        return torch.tensor(values, dtype=torch.float32, device=device)


def _uniform(
    low: float, high: float, size: tuple[int, ...], generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    return torch.rand(size, generator=generator, device=device).mul_(high - low).add_(low)


def crop_boxes(
    count: int,
    height: int,
    width: int,
    generator: torch.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> torch.Tensor:
    """Draw the boxes of RandomResizedCrop, with torchvision's semantics, on the generator's device.

    Area is uniform in ``scale`` (fractions of the image), width over height log-uniform in ``ratio``; sizes are rounded
    to whole pixels. Of ten tries the first that fits counts; if none does, the box is the largest centred one with a
    ratio in range.

    Returns:
        (count, 4) int64: top, left, height, width in pixels.
    """
    device = generator.device
    area = _uniform(*scale, (count, CROP_TRIES), generator, device) * (height * width)
    aspect = _uniform(math.log(ratio[0]), math.log(ratio[1]), (count, CROP_TRIES), generator, device).exp_()
    widths, heights = (area * aspect).sqrt_().round_(), (area / aspect).sqrt_().round_()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    found = fits.gather(1, first)

    fallback_width = min(width, round(height * ratio[1]))
    fallback_height = min(height, round(width / ratio[0]))
    box_width = torch.where(found, widths.gather(1, first), fallback_width)
    box_height = torch.where(found, heights.gather(1, first), fallback_height)
    size = torch.cat([box_height, box_width], dim=1)
    room = _constant((height, width), device) - size
    anywhere = (torch.rand((count, 2), generator=generator, device=device) * (room + 1)).floor_().minimum(room)
    corner = torch.where(found, anywhere, (room / 2).floor_())
    return torch.cat([corner, size], dim=1).to(torch.int64)


def _source_positions(start: torch.Tensor, length: torch.Tensor, steps: int) -> torch.Tensor:
    """Where ``steps`` output pixels per box lie on the input, (N, steps) in pixels, held inside their box."""
    centres = torch.arange(steps, device=start.device, dtype=torch.float32).add_(0.5).div_(steps)
    positions = start[:, None] + length[:, None] * centres - 0.5
    return positions.maximum(start[:, None]).minimum((start + length - 1)[:, None])


def resized_crop(
    images: torch.Tensor, boxes: torch.Tensor, size: int, mirrored: torch.Tensor | None = None
) -> torch.Tensor:
    """Cut one box per image and resize it bilinearly, without antialiasing and without looking outside the box.

    Args:
        images: (N, C, H, W) float.
        boxes: (N, 4) top, left, height, width in pixels, inside the images.
        size: Side of the square result in pixels.
        mirrored: (N,) bool, which crops to mirror left to right; none if omitted.

    Returns:
        (N, C, size, size) float.
    """
    count, _, height, width = images.shape
    top, left, box_height, box_width = boxes.to(torch.float32).unbind(1)
    y = _source_positions(top, box_height, size) * (2 / max(height - 1, 1)) - 1
    x = _source_positions(left, box_width, size) * (2 / max(width - 1, 1)) - 1
    if mirrored is not None:
        x = torch.where(mirrored[:, None], x.flip(1), x)
    shape = (count, size, size)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)


def random_resized_crop(
    images: torch.Tensor,
    generator: torch.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = False,
) -> torch.Tensor:
    """Crop each image at random, see ``crop_boxes``, and resize it to a square of its old height.

    ``flip`` mirrors each with probability 1/2, in the same resampling.
    """
    count, _, height, width = images.shape
    boxes = crop_boxes(count, height, width, generator, scale=scale, ratio=ratio)
    mirrored = torch.rand(count, generator=generator, device=images.device) < 0.5 if flip else None
    return resized_crop(images, boxes, height, mirrored)


def jitter_matrices(
    images: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return colour jitter as one affine map of RGB per image.

    The three operators, with factor f, are IDC's: f x + (1 - f) g, where g is black for brightness, the image's mean
    grey for contrast and the pixel's own grey for saturation. Without clipping they commute, since saturation keeps
    every pixel's grey and brightness scales the mean grey too. So the published random order needs no drawing.

    Args:
        images: (N, 3, H, W) the images that will be jittered, whose mean grey is needed.
        brightness: (N,) factors, 1 for no change; so also ``contrast`` and ``saturation``.

    Returns:
        Matrices (N, 3, 3) and offsets (N, 3).
    """
    weights = _constant(GREY, images.device)
    identity = torch.eye(3, device=images.device)
    to_grey = weights.expand(3, 3)
    saturate = saturation[:, None, None] * identity + (1 - saturation)[:, None, None] * to_grey
    mean_grey = images.mean(dim=(2, 3)) @ weights
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


@dataclass(frozen=True)
class TrainAugmentation:
    """The published train transform: crop, flip, colour jitter, PCA lighting, normalisation, in this order.

    Attributes:
        crop_scale: Range of the crop's area, as fractions of the image.
        crop_ratio: Range of the crop's width over its height.
        flip: Mirror every image with probability 1/2; off where left and right matter, as in digits.
        jitter: Strengths s of brightness, contrast and saturation, factors uniform in [1 - s, 1 + s].
        lighting: Standard deviation of the PCA lighting's coefficients.
    """

    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    jitter: tuple[float, float, float] = (0.4, 0.4, 0.4)
    lighting: float = 0.1

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Augment uint8 images (N, 3, H, H) to normalised float32 ones of the same shape."""
        count, device = len(images), images.device
        crops = random_resized_crop(
            to_float(images), generator, scale=self.crop_scale, ratio=self.crop_ratio, flip=self.flip
        )
        factors = [_uniform(1 - strength, 1 + strength, (count,), generator, device) for strength in self.jitter]
        alphas = torch.randn((count, 3), generator=generator, device=device).mul_(self.lighting)
        matrices, offsets = jitter_matrices(crops, *factors)
        offsets = offsets + lighting_offsets(alphas)
        mean, std = _constant(IMAGENET_MEAN, device), _constant(IMAGENET_STD, device)
        return recolour(crops, matrices / std[:, None], (offsets - mean) / std)


def cutmix(
    images: torch.Tensor, generator: torch.Generator, *, beta: float = 1.0, probability: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Paste one box, the same for the whole batch, from a random partner into each image (Yun et al. 2019).

    The box has the image's proportions and an area of 1 - lambda, lambda ~ Beta(``beta``, ``beta``), around a uniform
    centre, cut at the border. With probability 1 - ``probability`` it is empty.

    Returns:
        The mixed images (N, C, H, W), the partners (N,) int64, and the share of an image's own pixels, a scalar tensor:
        the weight of its own label, the partner's label having the rest.
    """
    count, _, height, width = images.shape
    device = images.device
    partners = torch.randperm(count, generator=generator, device=device)
    # The only public way to draw a Beta takes the global generator; a ratio of two Gamma draws is the same.
    gammas = torch._standard_gamma(torch.full((2,), beta, device=device), generator=generator)
    draws = torch.rand(3, generator=generator, device=device)
    sides = _constant((height, width), device)
    side_share = (1 - gammas[0] / gammas.sum()).sqrt() * (draws[2] < probability)
    half = (sides * side_share).floor().div(2).floor()
    centre = (draws[:2] * sides).floor()
    low, high = (centre - half).clamp(min=0), (centre + half).minimum(sides)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    inside_rows = (rows >= low[0]) & (rows < high[0])
    inside_columns = (columns >= low[1]) & (columns < high[1])
    mixed = torch.where(inside_rows[:, None] & inside_columns, images[partners], images)
    own_share = 1 - (high - low).prod() / (height * width)
    return mixed, partners, own_share
