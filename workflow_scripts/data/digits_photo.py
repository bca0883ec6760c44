"""Digits over photographs: a made-up benchmark that is hard enough to tell methods apart, and needs no download.

An image is a handwritten digit of scikit-learn's, turned, scaled and placed at random, blended in a random colour over a
random crop of one of the two photographs that ship with scikit-learn. Test images use the digits that :class:`Digits` holds
out. An image follows from (seed, split, class, index) alone, so there are as many as one asks for.
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np
from PIL import Image

from workflow_scripts.data.sources import Digits, ImageEntry, Split

SIDE = 32
DIGIT_SIDE = (26, 32)
TILT_DEGREES = 6.0
CROP_SIDE = (16, 64)
OPACITY = (0.75, 1.0)
CONTRAST = 150.0  # least distance, in 8-bit RGB, between the digit's colour and the mean of what it covers


class DigitsPhoto(Digits):
    """Coloured digits over photographs, 32x32 RGB, ``train`` and ``test`` images per class."""

    def __init__(self, train: int, test: int, seed: int):
        self._counts: dict[Split, int] = {"train": train, "test": test}
        self._seed = seed

    @cached_property
    def _photos(self) -> list[Image.Image]:
        folder = self._path.parent.parent / "images"
        return [Image.open(folder / name).convert("RGB") for name in ("china.jpg", "flower.jpg")]

    @cached_property
    def _strokes(self) -> dict[tuple[str, Split], list[Image.Image]]:
        """The 8x8 digits of each class and split, as opacities."""
        splits: tuple[Split, ...] = ("train", "test")
        return {
            (name, split): [
                Image.fromarray(self._images[int(e.key)]) for e in super(DigitsPhoto, self).entries(name, split)
            ]
            for name in self.classes()
            for split in splits
        }

    def entries(self, class_name: str, split: Split) -> list[ImageEntry]:
        """Return the images of a class; their keys are their places in the seed's sequence."""
        start = f"digits-photo/seed-{self._seed}/{split}"
        count = self._counts[split]
        return [
            ImageEntry(f"{start}/{index:06d}", SIDE * SIDE, 0, f"{start}/{class_name}/{index:06d}")
            for index in range(count)
        ]

    def load(self, entry: ImageEntry, class_name: str) -> Image.Image:
        """Paint one image."""
        random = np.random.Generator(
            np.random.Philox(key=int.from_bytes(hashlib.sha256(entry.path.encode()).digest()[:16]))
        )
        split: Split = "test" if entry.key.split("/")[2] == "test" else "train"
        strokes = self._strokes[class_name, split]
        mask = self._place(strokes[random.integers(len(strokes))], random)
        background = self._background(random)
        covered = (background * mask).sum((0, 1)) / mask.sum()
        colour = random.uniform(0, 255, 3)
        while np.linalg.norm(colour - covered) < CONTRAST:
            colour = random.uniform(0, 255, 3)
        mask = mask * random.uniform(*OPACITY)
        return Image.fromarray((background + mask * (colour - background)).round().astype(np.uint8))

    def _place(self, stroke: Image.Image, random: np.random.Generator) -> np.ndarray:
        """Return the digit as opacities (32, 32, 1) in [0, 1], turned, scaled and placed at random."""
        side = int(random.integers(DIGIT_SIDE[0], DIGIT_SIDE[1] + 1))
        digit = stroke.resize((side, side), Image.Resampling.BICUBIC)
        digit = digit.rotate(random.uniform(-TILT_DEGREES, TILT_DEGREES), Image.Resampling.BILINEAR)
        left, top = random.integers(0, SIDE - side + 1, 2).tolist()
        canvas = Image.new("L", (SIDE, SIDE))
        canvas.paste(digit, (left, top))
        return np.asarray(canvas, dtype=np.float64)[:, :, None] / 255

    def _background(self, random: np.random.Generator) -> np.ndarray:
        """Return a square crop of a photograph (32, 32, 3), mirrored half of the time."""
        photo = self._photos[random.integers(len(self._photos))]
        side = int(random.integers(CROP_SIDE[0], CROP_SIDE[1] + 1))
        left, top = (int(random.integers(0, length - side + 1)) for length in photo.size)
        crop = photo.resize((SIDE, SIDE), Image.Resampling.BOX, (left, top, left + side, top + side))
        pixels = np.asarray(crop, dtype=np.float64)
        return pixels[:, ::-1] if random.integers(2) else pixels
