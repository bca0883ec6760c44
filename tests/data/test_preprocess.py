"""From decoded images to squares, in order and in batches."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import support
from PIL import Image

from workflow_scripts.data.preprocess import load_labelled, load_squares, square
from workflow_scripts.data.sources import BadImage, ImageFolder

SIZES = [
    (40, 40),
    (41, 40),
    (40, 61),
    (33, 200),
    (16, 16),
    (7, 9),
    (9, 7),
    (64, 64),
    (63, 127),
    (300, 17),
    (129, 128),
    (1, 50),
]


def adm_reference(image: Image.Image, side: int) -> np.ndarray:
    """``center_crop_arr`` of ADM and DiT, written out."""
    while min(*image.size) >= 2 * side:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = side / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    return array[top : top + side, left : left + side]


def picture(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [16, 31])
def test_adm_crop_is_that_of_the_published_code(size: tuple[int, int], side: int) -> None:
    result = square(picture(size), side, "adm")
    assert (result.shape, result.dtype) == ((side, side, 3), np.uint8)
    np.testing.assert_array_equal(result, adm_reference(picture(size), side))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_resize_scales_the_short_side_at_once(size: tuple[int, int], resample: str) -> None:
    image, side = picture(size), 16
    scale = side / min(size)
    scaled = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling[resample.upper()])
    left, top = (scaled.width - side) // 2, (scaled.height - side) // 2
    expected = np.asarray(scaled)[top : top + side, left : left + side]
    np.testing.assert_array_equal(square(image, side, "resize", resample), expected)


def test_the_centre_is_kept() -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    assert square(Image.fromarray(pixels), 20, "adm").min() == 255


# ---------------------------------------------------------------- batches


@pytest.fixture
def source(tmp_path: Path) -> ImageFolder:
    support.make_folder(tmp_path / "train", ("ant", "bee"), 10)
    return ImageFolder(tmp_path / "train", tmp_path / "train")


def load(
    source: ImageFolder, *, batch: int, workers: int = 2, on_bad: Callable[[BadImage], None] | None = None
) -> list:
    entries = source.entries("ant", "train")
    return list(
        load_squares(source, "ant", entries, resolution=16, crop="adm", workers=workers, batch=batch, on_bad=on_bad)
    )


@pytest.mark.parametrize("batch", [1, 3, 10, 64])
@pytest.mark.parametrize("workers", [1, 4])
def test_images_come_in_order_whatever_the_batch(batch: int, workers: int, source: ImageFolder) -> None:
    batches = load(source, batch=batch, workers=workers)
    entries = source.entries("ant", "train")
    assert [entry for kept, _ in batches for entry in kept] == entries
    assert all(len(kept) == len(pixels) <= batch for kept, pixels in batches)
    expected = np.stack([square(source.load(entry, "ant"), 16, "adm") for entry in entries])
    np.testing.assert_array_equal(np.concatenate([pixels for _, pixels in batches]), expected)


def spoil(source: ImageFolder, *places: int) -> list[str]:
    entries = source.entries("ant", "train")
    for place in places:
        Path(entries[place].path).write_bytes(b"no image")
    return [entries[place].path for place in places]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_bad_images_are_left_out_and_told(batch: int, source: ImageFolder) -> None:
    before = [entry.key for entry in source.entries("ant", "train")]
    spoilt = spoil(source, 2, 3, 9)
    told: list[BadImage] = []
    batches = load(source, batch=batch, on_bad=told.append)
    assert [bad.path for bad in told] == spoilt
    kept = [entry.key for entries, _ in batches for entry in entries]
    assert kept == [key for place, key in enumerate(before) if place not in (2, 3, 9)]
    assert sum(len(pixels) for _, pixels in batches) == 7


def test_a_bad_image_raises_unless_someone_wants_to_know(source: ImageFolder) -> None:
    (spoilt,) = spoil(source, 4)
    with pytest.raises(BadImage, match=r"class ant") as caught:
        load(source, batch=3)
    assert caught.value.path == spoilt


def test_nothing_but_bad_images_yields_nothing(source: ImageFolder) -> None:
    spoil(source, *range(10))
    told: list[BadImage] = []
    assert load(source, batch=4, on_bad=told.append) == []
    assert len(told) == 10


def test_all_classes_are_read_with_their_labels(source: ImageFolder) -> None:
    (spoilt,) = spoil(source, 0)
    told: list[BadImage] = []
    entries = {name: source.entries(name, "train") for name in ("bee", "ant")}
    pixels, labels = load_labelled(source, entries, resolution=16, crop="resize", workers=2, on_bad=told.append)
    assert (pixels.shape, pixels.dtype, labels.dtype) == ((19, 16, 16, 3), np.uint8, np.int64)
    assert [bad.path for bad in told] == [spoilt]
    assert labels.tolist() == [0] * 10 + [1] * 9
    whole = square(source.load(entries["bee"][3], "bee"), 16, "resize")
    np.testing.assert_array_equal(pixels[3], whole)
    inner = {"inner": 11, "channels_first": True, "on_bad": told.append}
    centres, _ = load_labelled(source, entries, resolution=16, crop="resize", workers=2, **inner)
    np.testing.assert_array_equal(centres[3], whole.transpose(2, 0, 1)[:, 2:13, 2:13])
    assert pixels.flags.c_contiguous and centres.flags.c_contiguous
    with pytest.raises(BadImage, match="class ant"):
        load_labelled(source, entries, resolution=16, crop="resize", workers=2)
