import base64
import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from workflow_scripts.evaluation.statistics import summarize
from workflow_scripts.report.data import LatentMap
from workflow_scripts.report.figures import (
    accuracy_figure,
    curves_figure,
    map_figure,
    marker_svg,
    method_styles,
    padded_limits,
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
    series = {"random": [(1, summarize([10.0])), (10, summarize([20.0, 22.0]))], "dit": [(10, summarize([30.0]))]}
    curves = {"dit": [((1, 5.0), (9, 20.0)), ((1, 6.0), (5, 10.0), (9, 22.0))]}
    cloud = np.random.default_rng(0).normal(size=(50, 2))
    latent_map = LatentMap("zero", cloud, {"k-means": cloud[:2], "dit": cloud[:2]}, {"dit": cloud[:3]}, (0.4, 0.2))
    drawn = [
        accuracy_figure(series, STYLES, (0.0, 40.0), "Top-1", "a"),
        curves_figure(curves, STYLES, (0.0, 40.0), "b"),
        map_figure(latent_map, STYLES, "c"),
        marker_svg(STYLES["dit"]),
    ]
    for svg in drawn:
        ElementTree.fromstring(svg)
        assert "xmlns" not in svg and "#010203" not in svg and "font-family" not in svg
    for svg in drawn[:3]:
        assert "currentColor" in svg
    assert STYLES["dit"].color in drawn[0] and STYLES["dit"].color in drawn[1]
    assert drawn[2].count('class="series-1"') == 2 and drawn[2].count('class="prototypes"') == 1
    assert drawn[0] == accuracy_figure(series, STYLES, (0.0, 40.0), "Top-1", "a")


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
