import base64
import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from workflow_scripts.report.data import LatentMap
from workflow_scripts.report.figures import (
    Estimate,
    Gap,
    accuracy_figure,
    cost_figure,
    curves_figure,
    forest_figure,
    heat_figure,
    map_figure,
    marker_svg,
    method_styles,
    padded_limits,
    shrink,
    thumbnail,
)

STYLES = method_styles(["random", "dit"])


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_styles_are_fixed_by_order_and_distinct() -> None:
    names = [f"method {place}" for place in range(72)]
    styles = method_styles(names)
    assert len(set(styles.values())) == 72
    assert method_styles(names[:3]) == {name: styles[name] for name in names[:3]}


def test_figures_are_inline_svg_in_the_pages_ink() -> None:
    series = {"random": [(1, Estimate(10.0)), (10, Estimate(21.0, (8.0, 34.0)))], "dit": [(10, Estimate(30.0))]}
    curves = {"dit": [((1, 5.0), (9, 20.0)), ((1, 6.0), (5, 10.0), (9, 22.0))]}
    cloud = np.random.default_rng(0).normal(size=(50, 2))
    latent_map = LatentMap("zero", cloud, {"k-means": cloud[:2], "dit": cloud[:2]}, {"dit": cloud[:3]}, (0.4, 0.2))
    accuracy = accuracy_figure(series, STYLES, (0.0, 40.0), "Top-1")
    drawings = [
        accuracy,
        curves_figure(curves, STYLES, (0.0, 40.0)),
        map_figure(latent_map, STYLES, "zero"),
        heat_figure(np.array([[1.0, np.nan], [3.0, 4.0]]), ["random", "dit"], ["a", "b"], "A & B"),
        forest_figure([Gap("dit - random", 2.0, (-1.0, 5.0), False), Gap("one", -1.0, None, False)], "Differences"),
        cost_figure({"dit": (0.2, Estimate(30.0, (28.0, 31.0)))}, STYLES, (0.0, 40.0), "GPU-hours"),
    ]
    drawn = [drawing.inline(f"figure-{place}") for place, drawing in enumerate(drawings)]
    for svg in (*drawn, marker_svg(STYLES["dit"])):
        ElementTree.fromstring(svg)
        assert "xmlns" not in svg and "#010203" not in svg and "font-family" not in svg
    for svg in drawn:
        assert "currentColor" in svg and 'role="img" aria-label="' in svg
    assert STYLES["dit"].color in drawn[0] and STYLES["dit"].color in drawn[1]
    assert drawn[2].count('class="series-1"') == 2 and drawn[2].count('class="prototypes"') == 1
    assert ">4.0<" in drawn[3] and "nan" not in drawn[3]
    assert drawn[0] == accuracy.inline("figure-0")


def test_figures_as_files_have_a_legend_and_leave_the_inline_ones_alone() -> None:
    drawing = accuracy_figure(
        {m: [(1, Estimate(10.0)), (9, Estimate(20.0))] for m in STYLES}, STYLES, (0.0, 40.0), "Top-1"
    )
    before = drawing.inline("a")
    files = drawing.files()
    assert files["pdf"].startswith(b"%PDF-") and b"CreationDate" not in files["pdf"]
    ElementTree.fromstring(files["svg"].decode())
    assert b"random" in files["svg"] and b"#010203" not in files["svg"]
    assert "random" not in before and drawing.inline("a") == before
    assert drawing.files() == files


def test_small_images_are_kept_and_large_ones_scaled() -> None:
    small = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(decode(thumbnail(small, 112))), small)
    large = np.full((256, 192, 3), (200, 30, 30), np.uint8)
    picture = decode(thumbnail(large, 112))
    assert picture.size == (84, 112)
    assert np.abs(np.asarray(picture).astype(int) - (200, 30, 30)).max() < 8


def test_limits_leave_room_within_what_is_possible() -> None:
    assert padded_limits([50.0]) == (49.5, 50.5)
    assert padded_limits([-3.0, 105.0])[0] == 0.0
    assert padded_limits([20.0, 70.0]) == pytest.approx((17.0, 73.0))


def test_images_are_held_small() -> None:
    images = np.full((2, 256, 128, 3), 40, np.uint8)
    assert shrink(images, 64).shape == (2, 64, 32, 3)
    assert shrink(images, 256) is images
