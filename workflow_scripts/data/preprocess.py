"""From a decoded image to a square of pixels, and from there to the [-1, 1] tensors that backbones take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from PIL import Image

from workflow_scripts.data.sources import BadImage, ImageEntry, Source

Crop = Literal["adm", "resize"]
Resample = Literal["bilinear", "bicubic", "lanczos", "box"]


def square(image: Image.Image, resolution: int, crop: Crop, resample: Resample = "bicubic") -> np.ndarray:
    """Scale the short side to ``resolution`` and cut out the centre.

    ``adm`` first halves with a box filter while the short side is at least twice the resolution, as ADM and DiT do.

    Returns:
        uint8 array (resolution, resolution, 3).
    """
    if crop == "adm":
        while min(image.size) >= 2 * resolution:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling[resample.upper()])
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def load_squares(
    source: Source,
    class_name: str,
    entries: Sequence[ImageEntry],
    *,
    resolution: int,
    crop: Crop,
    workers: int,
    batch: int,
    resample: Resample = "bicubic",
    on_bad: Callable[[BadImage], None] | None = None,
) -> Iterator[tuple[list[ImageEntry], np.ndarray]]:
    """Decode and crop images in threads, a batch at a time, in order.

    Args:
        on_bad: told of each image that cannot be decoded, which is then left out; without it such an image raises.

    Yields:
        the entries read, and their pixels as uint8 (n, resolution, resolution, 3), n <= batch.
    """

    def load(entry: ImageEntry) -> np.ndarray | BadImage:
        try:
            return square(source.load(entry, class_name), resolution, crop, resample)
        except BadImage as bad:
            return bad

    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(entries), batch):
            kept: list[ImageEntry] = []
            pixels: list[np.ndarray] = []
            chunk = entries[start : start + batch]
            for entry, loaded in zip(chunk, pool.map(load, chunk), strict=True):
                if not isinstance(loaded, BadImage):
                    kept.append(entry)
                    pixels.append(loaded)
                elif on_bad is None:
                    raise loaded
                else:
                    on_bad(loaded)
            if kept:
                yield kept, np.stack(pixels)


def load_labelled(
    source: Source,
    entries: Mapping[str, Sequence[ImageEntry]],
    *,
    resolution: int,
    crop: Crop,
    workers: int,
    resample: Resample = "bicubic",
    inner: int | None = None,
    channels_first: bool = False,
    on_bad: Callable[[BadImage], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Read all images of some classes into memory.

    Args:
        entries: the images of each class, in label order.
        inner: side of the centre that is kept of each square; default: all of it.
        channels_first: how pixels are laid out.
        on_bad: as for :func:`load_squares`.

    Returns:
        pixels uint8 (n, inner, inner, 3), or (n, 3, inner, inner) with channels first, and labels int64 (n,).
    """
    count, side = sum(map(len, entries.values())), resolution if inner is None else inner
    border = (resolution - side) // 2
    shape = (3, side, side) if channels_first else (side, side, 3)
    images = np.empty((count, *shape), np.uint8)  # filled in place: ImageNet's do not fit in memory twice
    labels = np.empty(count, np.int64)
    filled = 0
    for label, (name, listed) in enumerate(entries.items()):
        for _, pixels in load_squares(
            source,
            name,
            listed,
            resolution=resolution,
            crop=crop,
            resample=resample,
            workers=workers,
            batch=256,
            on_bad=on_bad,
        ):
            centre = pixels[:, border : border + side, border : border + side]
            images[filled : filled + len(pixels)] = centre.transpose(0, 3, 1, 2) if channels_first else centre
            labels[filled : filled + len(pixels)] = label
            filled += len(pixels)
    return images[:filled], labels[:filled]
