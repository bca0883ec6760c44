"""Digits over photographs: made from a seed, alike everywhere, with held-out digits in the test split."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from workflow_scripts.config import Dataset, Generate
from workflow_scripts.data.catalog import Catalog, open_source
from workflow_scripts.data.digits_photo import DigitsPhoto
from workflow_scripts.data.notes import Notes
from workflow_scripts.data.sources import Digits, Split

# SHA-256 of the first images of each class and split at seed 0. It must never change: scores would no longer compare.
PIXELS = "d3c04264127f28c0b2d69d965084bf0b97027b3b70ac7c23e4a7ab565b891029"


def pictures(source: DigitsPhoto, split: Split, count: int) -> np.ndarray:
    return np.stack(
        [
            np.asarray(source.load(entry, name))
            for name in source.classes()
            for entry in source.entries(name, split)[:count]
        ]
    )


def test_the_pixels_are_the_same_for_ever() -> None:
    source = DigitsPhoto(train=3, test=2, seed=0)
    made = np.concatenate([pictures(source, "train", 3), pictures(source, "test", 2)])
    assert made.shape == (50, 32, 32, 3)
    assert hashlib.sha256(made.tobytes()).hexdigest() == PIXELS


def test_an_image_depends_on_its_place_in_the_sequence_alone() -> None:
    few, many = DigitsPhoto(train=2, test=1, seed=4), DigitsPhoto(train=50, test=20, seed=4)
    np.testing.assert_array_equal(pictures(few, "train", 2), pictures(many, "train", 2))
    assert [entry.key for entry in few.entries("3", "train")] == [e.key for e in many.entries("3", "train")[:2]]
    assert len(many.entries("3", "train")) == 50
    assert len(many.entries("3", "test")) == 20
    other = DigitsPhoto(train=2, test=1, seed=5)
    assert not np.array_equal(pictures(few, "train", 2), pictures(other, "train", 2))
    assert set(few.entries("3", "train")).isdisjoint(other.entries("3", "train"))


def test_images_of_a_class_differ() -> None:
    made = pictures(DigitsPhoto(train=20, test=1, seed=0), "train", 20)
    assert len({image.tobytes() for image in made}) == 200


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_split_is_drawn_from_its_own_digits(split: Split) -> None:
    source = DigitsPhoto(train=3, test=3, seed=0)
    own = {int(entry.key) for entry in Digits().entries("7", split)}
    strokes = {image.tobytes() for image in source._strokes["7", split]}
    assert strokes == {Digits()._images[index].tobytes() for index in own}


def test_the_configured_source_reaches_the_catalog(tmp_path: Path) -> None:
    dataset = Dataset(source="digits-photo", resolution=32, generate=Generate(train=4, test=2, seed=1))
    assert isinstance(open_source(dataset, Notes(tmp_path)), DigitsPhoto)
    catalog = Catalog(dataset, tmp_path)
    assert len(catalog.entries("0", "train")) == 4
    other = dataset.model_copy(update={"generate": Generate(train=4, test=2, seed=2)})
    assert Catalog(other, tmp_path).fingerprint("0", "train") != catalog.fingerprint("0", "train")
