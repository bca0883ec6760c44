"""Image sources: which images there are, and that every file becomes RGB or a named complaint."""

import hashlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import support
from PIL import Image
from sklearn.datasets import load_digits

from workflow_scripts.config import Dataset
from workflow_scripts.data.catalog import open_source
from workflow_scripts.data.notes import Notes
from workflow_scripts.data.sources import BadImage, Digits, ImageEntry, ImageFolder
from workflow_scripts.errors import DataError

# SHA-256 of the sorted keys of the test split, all classes. It must never change: scores would no longer compare.
TEST_SPLIT = "1cf12eedf4ffc0094a9c4f264367267296afb1e564439c04c72a831bc8bb6548"


# ---------------------------------------------------------------- digits


def test_digits_are_those_of_scikit_learn() -> None:
    source, bundled = Digits(), load_digits()
    assert source.classes() == [str(digit) for digit in range(10)]
    seen = []
    for name in source.classes():
        for entry in source.entries(name, "train") + source.entries(name, "test"):
            index = int(entry.key)
            seen.append(index)
            assert bundled.target[index] == int(name)
            image = source.load(entry, name)
            assert (image.mode, image.size) == ("RGB", (8, 8))
            expected = np.minimum(bundled.images[index] * 16, 255).astype(np.uint8)
            np.testing.assert_array_equal(np.asarray(image), np.repeat(expected[..., None], 3, axis=2))
    assert sorted(seen) == list(range(1797)), "every image once, in one split"


def test_digits_are_split_70_to_30_within_each_class_and_for_ever() -> None:
    source = Digits()
    keys = []
    for name in source.classes():
        train, test = ([entry.key for entry in source.entries(name, split)] for split in ("train", "test"))
        assert not set(train) & set(test)
        assert train == sorted(train) and test == sorted(test)
        assert len(test) == round(0.3 * (len(train) + len(test)))
        keys += test
    assert len(keys) == 539
    assert hashlib.sha256(" ".join(sorted(keys)).encode()).hexdigest() == TEST_SPLIT


def test_digits_are_listed_alike_every_time() -> None:
    assert Digits().entries("3", "train") == Digits().entries("3", "train")
    assert open_source(Dataset(source="digits", resolution=32), Notes(Path())).entries("3", "test") == Digits().entries(
        "3", "test"
    )


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    (tmp_path / "train" / "ant").mkdir(parents=True)
    (tmp_path / "test" / "ant").mkdir(parents=True)
    return ImageFolder(tmp_path / "train", tmp_path / "test")


def put(folder: ImageFolder, name: str, content: bytes) -> ImageEntry:
    """Put a file into the class ``ant`` and return its entry."""
    (folder._roots["train"] / "ant" / name).write_bytes(content)
    return next(entry for entry in folder.entries("ant", "train") if entry.key == name)


def test_a_folder_lists_images_of_any_case_in_order(folder: ImageFolder) -> None:
    root = folder._roots["train"]
    names = ["b.JPG", "a.jpeg", "c.Png", "d.WEBP", "e.PNG", "10.jpg", "9.jpg", "A.JpEg"]
    for name in [*names, "notes.txt", "f.gif", "g.png.bak", "png", "Thumbs.db"]:
        (root / "ant" / name).write_bytes(b"x" * len(name))
    (root / "ant" / "folder.png").mkdir()
    entries = folder.entries("ant", "train")
    assert [entry.key for entry in entries] == sorted(names)
    for entry in entries:
        stat = Path(entry.path).stat()
        assert (entry.size, entry.mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def test_classes_are_the_folders_in_order(tmp_path: Path) -> None:
    for name in ("bee", "ant", "Zebra", "two words", ".cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "cat").symlink_to(tmp_path / "ant")
    (tmp_path / "readme.txt").write_text("no class")
    assert ImageFolder(tmp_path, tmp_path).classes() == ["Zebra", "ant", "bee", "cat", "two words"]


def test_train_and_test_are_read_from_their_own_folders(tiny_images: Path) -> None:
    source = ImageFolder(tiny_images / "train", tiny_images / "test")
    assert len(source.entries("bee", "train")) == support.COUNT
    test = source.entries("bee", "test")
    assert len(test) == 4
    assert all(Path(entry.path).parent == tiny_images / "test" / "bee" for entry in test)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.root: .*nowhere is not a folder\. Give the folder that holds"):
        ImageFolder(tmp_path / "nowhere", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"dataset\.test_root: .*file is not a folder"):
        ImageFolder(tmp_path, tmp_path / "file")
    with pytest.raises(DataError, match="holds no class folders"):
        ImageFolder(tmp_path, tmp_path).classes()
    (tmp_path / "ant").mkdir()
    with pytest.raises(DataError, match=r"class bee: .*bee cannot be listed \(No such file or directory\)"):
        ImageFolder(tmp_path, tmp_path).entries("bee", "test")


# ---------------------------------------------------------------- every kind of image becomes RGB

PICTURE = support.draw(1, 1, 24).convert("RGB")
GREY = PICTURE.convert("L")


def close(left: Image.Image, right: Image.Image, tolerance: float) -> None:
    assert left.size == right.size
    difference = np.abs(np.asarray(left, np.float64) - np.asarray(right.convert("RGB"), np.float64)).mean()
    assert difference <= tolerance


def sixteen_bit() -> Image.Image:
    return Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)


KINDS: dict[str, tuple[str, bytes, Image.Image, float]] = {
    "png": ("x.png", support.encoded(PICTURE, "PNG"), PICTURE, 0),
    "jpeg": ("x.jpg", support.encoded(PICTURE, "JPEG", quality=100), PICTURE, 8),
    "progressive jpeg": ("x.jpg", support.encoded(PICTURE, "JPEG", quality=100, progressive=True), PICTURE, 8),
    "lossless webp": ("x.webp", support.encoded(PICTURE, "WEBP", lossless=True), PICTURE, 0),
    "grey png": ("x.png", support.encoded(GREY, "PNG"), GREY, 0),
    "grey jpeg": ("x.jpeg", support.encoded(GREY, "JPEG", quality=100), GREY, 2),
    "black and white png": ("x.png", support.encoded(GREY.convert("1"), "PNG"), GREY.convert("1"), 0),
    "palette png": ("x.png", support.encoded(PICTURE.quantize(64), "PNG"), PICTURE.quantize(64), 0),
    "palette with transparency": (
        "x.png",
        support.encoded(PICTURE.quantize(64), "PNG", transparency=255),
        PICTURE.quantize(64),
        0,
    ),
    "16 bit grey png": ("x.png", support.encoded(sixteen_bit(), "PNG"), GREY, 1),
    "cmyk jpeg": ("x.jpg", support.encoded(PICTURE.convert("CMYK"), "JPEG", quality=100), PICTURE, 8),
    "opaque alpha png": ("x.png", support.encoded(PICTURE.convert("RGBA"), "PNG"), PICTURE, 0),
    "opaque alpha webp": ("x.webp", support.encoded(PICTURE.convert("RGBA"), "WEBP", lossless=True), PICTURE, 0),
    "grey with alpha": ("x.png", support.encoded(GREY.convert("LA"), "PNG"), GREY, 0),
    "interlaced name, other format": ("x.png", support.encoded(PICTURE, "JPEG", quality=100), PICTURE, 8),
    "one pixel": ("x.png", support.encoded(PICTURE.crop((0, 0, 1, 1)), "PNG"), PICTURE.crop((0, 0, 1, 1)), 0),
}


@pytest.mark.parametrize(("name", "content", "expected", "tolerance"), KINDS.values(), ids=KINDS)
def test_every_kind_of_image_becomes_rgb(
    name: str, content: bytes, expected: Image.Image, tolerance: float, folder: ImageFolder
) -> None:
    image = folder.load(put(folder, name, content), "ant")
    assert image.mode == "RGB"
    close(image, expected, tolerance)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_images_are_turned_upright(format: str, orientation: int, folder: ImageFolder) -> None:
    upright = PICTURE.resize((24, 16))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[format]
    image = folder.load(
        put(folder, f"x.{format.lower()}", support.encoded(stored, format, exif=exif, **options)), "ant"
    )
    close(image, upright, 3)


# ---------------------------------------------------------------- everything else is a named complaint


def chunked(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


PNG, JPEG, WEBP = (support.encoded(PICTURE, format) for format in ("PNG", "JPEG", "WEBP"))
BAD: dict[str, tuple[str, bytes, str]] = {
    "zero bytes": ("x.png", b"", "zero bytes"),
    "text": ("x.jpg", b"<html>404 not found</html>", "cannot be decoded"),
    "one byte": ("x.png", b"\x89", "cannot be decoded"),
    "png signature alone": ("x.png", PNG[:8], "cannot be decoded"),
    "half a png": ("x.png", chunked(PNG, 0.5), "cannot be decoded"),
    "half a jpeg": ("x.jpg", chunked(JPEG, 0.5), "cannot be decoded"),
    "most of a jpeg": ("x.jpg", chunked(JPEG, 0.9), "cannot be decoded"),
    "half a webp": ("x.webp", chunked(WEBP, 0.5), "cannot be decoded"),
    "zeros after the head of a png": ("x.png", PNG[:40] + bytes(500), "cannot be decoded"),
    "zeros": ("x.jpg", bytes(5000), "cannot be decoded"),
    "a png too large to be true": (
        "x.png",
        support.encoded(Image.new("1", (20_000, 20_000)), "PNG"),
        "cannot be decoded",
    ),
}


@pytest.mark.parametrize(("name", "content", "reason"), BAD.values(), ids=BAD)
def test_a_bad_image_is_named_with_its_class_and_the_remedy(
    name: str, content: bytes, reason: str, folder: ImageFolder
) -> None:
    entry = put(folder, name, content)
    with pytest.raises(BadImage) as caught:
        folder.load(entry, "ant")
    message = str(caught.value)
    for part in (entry.path, "class ant", reason, "dataset.on_bad_image: skip"):
        assert part in message
    assert (caught.value.path, "\n" in message) == (entry.path, False)
    assert caught.value.reason in message


def test_a_file_that_vanished_is_named(folder: ImageFolder) -> None:
    entry = put(folder, "x.png", PNG)
    Path(entry.path).unlink()
    with pytest.raises(BadImage, match=r"x\.png"):
        folder.load(entry, "ant")


def spoilers() -> dict[str, Callable[[np.random.Generator, bytes], bytes]]:
    def flip(random: np.random.Generator, content: bytes) -> bytes:
        spoilt = bytearray(content)
        for at in random.integers(len(content), size=4):
            spoilt[at] ^= 1 << int(random.integers(8))
        return bytes(spoilt)

    def cut(random: np.random.Generator, content: bytes) -> bytes:
        return content[: int(random.integers(1, len(content)))]

    def blank(random: np.random.Generator, content: bytes) -> bytes:
        start = int(random.integers(len(content)))
        length = int(random.integers(1, 200))
        return content[:start] + bytes(min(length, len(content) - start)) + content[start + length :]

    return {"flip": flip, "cut": cut, "blank": blank}


def oriented(format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    return support.encoded(PICTURE, format, exif=exif)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("spoil", spoilers().values(), ids=spoilers())
def test_spoilt_bytes_give_an_image_or_a_bad_image_and_nothing_else(
    spoil: Callable[[np.random.Generator, bytes], bytes], format: str, folder: ImageFolder
) -> None:
    random = np.random.default_rng(0)
    content = oriented(format)
    path = folder._roots["train"] / "ant" / f"x.{format.lower()}"
    bad, unexplained = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for attempt in range(150):
            path.write_bytes(spoil(random, content))
            try:
                image = folder.load(folder.entries("ant", "train")[0], "ant")
                assert image.mode == "RGB"
            except BadImage:
                bad += 1
            except Exception as error:
                unexplained.append(f"{attempt}: {error!r}")
    assert not unexplained, "\n".join(unexplained[:10])
    assert bad > 0


@pytest.mark.parametrize("tag", [0x0100, 0x0102, 0x0103, 0x0106])
def test_metadata_that_cameras_get_wrong_does_not_crash(tag: int, folder: ImageFolder) -> None:
    """An otherwise good photograph says its width (or another number) in words; only the orientation matters."""
    content = bytearray(oriented("JPEG"))
    header = content.index(b"MM\0*")
    assert content[header + 10 : header + 14] == b"\x01\x0e\x00\x02", "the description, a text"
    content[header + 10 : header + 12] = tag.to_bytes(2, "big")
    image = folder.load(put(folder, "x.jpg", bytes(content)), "ant")
    assert image.size == PICTURE.size[::-1]


def test_an_image_is_complete_or_bad(folder: ImageFolder) -> None:
    """A download that broke off must not become an image with a grey half."""
    for format in ("PNG", "JPEG", "WEBP"):
        content = support.encoded(PICTURE.resize((200, 200)), format)
        for share in (0.1, 0.3, 0.6, 0.9):
            with pytest.raises(BadImage):
                folder.load(put(folder, f"x.{format.lower()}", chunked(content, share)), "ant")
        assert folder.load(put(folder, f"x.{format.lower()}", content), "ant").size == (200, 200)
        assert Image.open(io.BytesIO(content)).size == (200, 200)
