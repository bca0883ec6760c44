"""Figures, inline for the page and as files for papers, and images as data URIs.

On the page figures take their ink from it: axes and text are drawn in ``currentColor`` and set in the page's own typeface, so
they follow its light and dark colour schemes. Files are black on nothing, with a legend.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

from workflow_scripts.report.data import Images, LatentMap, Points

# Okabe and Ito's colours without black and yellow, which vanish on a dark or a light page, and two that fit them.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a6fd1", "#8c6d31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<")

_INK = "#010203"  # stands for currentColor until the SVG is written
_REAL = "#8d9196"
_STYLE = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "svg.fonttype": "none",
    "text.color": _INK,
    "xtick.color": _INK,
    "xtick.labelsize": 8.5,
    "xtick.major.width": 0.6,
    "ytick.color": _INK,
    "ytick.labelsize": 8.5,
    "ytick.major.width": 0.6,
}


@dataclass(frozen=True)
class MethodStyle:
    """How a method is drawn wherever it appears."""

    color: str
    marker: str


def method_styles(names: Sequence[str]) -> dict[str, MethodStyle]:
    """Give each method a colour and a marker, in order of appearance. 72 methods pass before a pair comes again."""
    return {
        name: MethodStyle(COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)])
        for place, name in enumerate(names)
    }


def marker_svg(style: MethodStyle) -> str:
    """A method's marker as a small inline SVG, for legends."""
    marker = MarkerStyle(style.marker)
    path = marker.get_path().transformed(marker.get_transform())
    letters = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
    outline = ""
    for points, code in path.iter_segments(simplify=False):
        corners = "" if code == Path.CLOSEPOLY else " ".join(f"{value:.3g}" for value in points)
        outline += letters[code] + corners
    return (
        f'<svg class="marker" viewBox="-0.65 -0.65 1.3 1.3" aria-hidden="true">'
        f'<path d="{outline}" transform="scale(1 -1)" fill="{style.color}"/></svg>'
    )


@dataclass(frozen=True)
class Estimate:
    """A mean in percent and its 95 % interval, if there is one."""

    mean: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Drawing:
    """A figure, and what it shows in words; ``keys`` are the styles of its legend."""

    figure: Figure
    label: str
    keys: Mapping[str, MethodStyle]

    def inline(self, name: str) -> str:
        """The figure as an SVG element; ``name`` must be unique on the page, as identifiers inside are derived from it."""
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
            return _svg(self.figure, self.label)

    def files(self) -> dict[str, bytes]:
        """The figure with a legend, as files by suffix: ``svg`` and ``pdf``."""
        marks = [
            Line2D([], [], color=style.color, marker=style.marker, markersize=5, linewidth=1.2, label=name)
            for name, style in self.keys.items()
        ]
        legend = self.figure.legend(
            handles=marks, loc="outside lower center", ncols=min(4, len(marks)), frameon=False, fontsize=8
        ) if len(marks) > 1 else None  # fmt: skip
        written = {}
        for suffix in ("svg", "pdf"):
            buffer = io.BytesIO()
            with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "file", "pdf.fonttype": 42}):
                nothing: dict[str, None] = {"CreationDate": None} if suffix == "pdf" else {"Date": None}
                self.figure.savefig(buffer, format=suffix, bbox_inches="tight", metadata=nothing)
            written[suffix] = buffer.getvalue()
        if legend is not None:
            legend.remove()
        return {"svg": written["svg"].replace(_INK.encode(), b"#000000"), "pdf": written["pdf"]}


def accuracy_figure(
    series: Mapping[str, Sequence[tuple[int, Estimate]]],
    styles: Mapping[str, MethodStyle],
    limits: tuple[float, float],
    metric: str,
) -> Drawing:
    """Accuracy against IPC on a logarithmic axis, with 95 % intervals; one architecture, one line per method."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panel()
        ipcs = sorted({ipc for points in series.values() for ipc, _ in points})
        step = (max(ipcs) / min(ipcs)) ** (0.012 if len(ipcs) > 1 else 0)
        for place, (method, points) in enumerate(series.items()):
            shift = step ** (place - (len(series) - 1) / 2)  # neighbouring error bars stay apart
            ends = [estimate.interval or (estimate.mean, estimate.mean) for _, estimate in points]
            axes.errorbar(
                [ipc * shift for ipc, _ in points],
                [estimate.mean for _, estimate in points],
                yerr=[
                    [max(e.mean - low, 0) for (_, e), (low, _) in zip(points, ends, strict=True)],
                    [max(high - e.mean, 0) for (_, e), (_, high) in zip(points, ends, strict=True)],
                ],
                color=styles[method].color,
                marker=styles[method].marker,
                markersize=5,
                linewidth=1.2,
                elinewidth=0.9,
                capsize=0,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(ipcs))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ipcs, [str(ipc) for ipc in ipcs])
        axes.set_xlabel("Images per class")
        _accuracy_axis(axes, limits, metric)
    label = f"{metric} accuracy against images per class, one line per method"
    return Drawing(figure, label, {name: styles[name] for name in series})


def curves_figure(
    curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]],
    styles: Mapping[str, MethodStyle],
    limits: tuple[float, float],
) -> Drawing:
    """Test accuracy during training: the mean over each method's trainings, and the range between them."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panel()
        for place, (method, trainings) in enumerate(curves.items()):
            epochs = np.array(sorted({epoch for training in trainings for epoch, _ in training}), dtype=float)
            values = np.stack([np.interp(epochs, *np.array(training, dtype=float).T) for training in trainings])
            every = max(len(epochs) // 5, 1)
            style = styles[method]
            axes.fill_between(epochs, values.min(0), values.max(0), color=style.color, alpha=0.14, linewidth=0)
            axes.plot(
                epochs,
                values.mean(0),
                color=style.color,
                marker=style.marker,
                markersize=4,
                linewidth=1.1,
                markevery=(every * place // max(len(curves), 1), every),
            )
        axes.set_xlabel("Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _accuracy_axis(axes, limits, "Top-1")
    label = "Test accuracy against training epoch, one line per method"
    return Drawing(figure, label, {name: styles[name] for name in curves})


def heat_figure(
    values: NDArray[np.floating], rows: Sequence[str], columns: Sequence[str], label: str, *, unit: str = "%"
) -> Drawing:
    """A table (rows, columns) of percentages as colours, with the numbers in it where they fit; nan stays empty."""
    wide = len(columns) <= 24
    with matplotlib.rc_context(_STYLE):
        size = (
            1.3 + 0.095 * max(map(len, rows), default=0) + (0.42 if wide else 0.2) * len(columns),
            0.9 + 0.27 * len(rows),
        )
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        shown = np.ma.masked_invalid(values)
        low, high = (float(shown.min()), float(shown.max())) if shown.count() else (0.0, 1.0)
        mesh = axes.pcolormesh(shown, cmap="cividis", vmin=low, vmax=high if high > low else low + 1, edgecolors="none")
        for (row, column), value in np.ndenumerate(values):
            if wide and np.isfinite(value):
                light = (value - low) / ((high - low) or 1) > 0.55
                text = f"{value:.0f}" if len(columns) > 8 else f"{value:.1f}"
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color="#000000" if light else "#ffffff",
                          fontsize=8)  # fmt: skip
        tilt = 40 if max(map(len, columns), default=0) > 4 else 0
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=tilt, ha="left" if tilt else "center",
                        rotation_mode="anchor")  # fmt: skip
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(mesh, ax=axes, fraction=0.03, pad=0.02, aspect=28)
        bar.ax.tick_params(length=2, labelsize=7.5)
        bar.outline.set_visible(False)
        bar.ax.set_title(unit, fontsize=8)
    return Drawing(figure, label, {})


@dataclass(frozen=True)
class Gap:
    """A difference in points, its 95 % interval if there is one, and whether it is distinguishable from none."""

    name: str
    points: float
    interval: tuple[float, float] | None
    clear: bool


def forest_figure(gaps: Sequence[Gap], label: str) -> Drawing:
    """Differences in points with their intervals, one line each; filled where they are distinguishable from none."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 0.75 + 0.27 * len(gaps)), layout="constrained")
        axes = figure.add_subplot()
        reach = max([abs(gap.points) for gap in gaps] or [1.0])
        limit = 3 * reach + 1  # an interval of two seeds is wider than any page
        for place, gap in enumerate(gaps):
            color = COLORS[5] if gap.points < 0 else COLORS[0]
            if gap.interval is not None:
                axes.plot(np.clip(gap.interval, -limit, limit), [place, place], color=color, linewidth=1.3)
            axes.plot(
                [gap.points], [place], "o", color=color, markersize=5.5, fillstyle="full" if gap.clear else "none"
            )
        axes.axvline(0, color=_INK, alpha=0.5, linewidth=0.7)
        axes.set_yticks(range(len(gaps)), [gap.name for gap in gaps])
        axes.set_ylim(len(gaps) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("Difference in points")
        axes.grid(axis="x", color=_INK, alpha=0.13, linewidth=0.6)
        axes.set_axisbelow(True)
    return Drawing(figure, label, {})


def cost_figure(
    points: Mapping[str, tuple[float, Estimate]],
    styles: Mapping[str, MethodStyle],
    limits: tuple[float, float],
    unit: str,
) -> Drawing:
    """Accuracy against the hours that a method's sets cost, on a logarithmic axis."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panel()
        for method, (hours, estimate) in points.items():
            low, high = estimate.interval or (estimate.mean, estimate.mean)
            axes.errorbar(
                [hours],
                [estimate.mean],
                yerr=[[max(estimate.mean - low, 0)], [max(high - estimate.mean, 0)]],
                color=styles[method].color,
                marker=styles[method].marker,
                markersize=6.5,
                elinewidth=0.9,
            )
        axes.set_xscale("log")
        axes.set_xlabel(f"{unit} for one distilled set, shared encoding left out")
        _accuracy_axis(axes, limits, "Top-1")
    return Drawing(figure, f"Top-1 accuracy against {unit} per distilled set", {name: styles[name] for name in points})


def map_figure(latent_map: LatentMap, styles: Mapping[str, MethodStyle], title: str) -> Drawing:
    """One class's latent space: real latents grey, prototypes crosses, synthetic latents in their method's colour.

    The marks of each method lie in a group of class ``series-<place>``, with the method's place in ``styles``.
    """
    places = {method: place for place, method in enumerate(styles)}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2.8, 2.8), dpi=200)
        axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
        real = np.asarray(latent_map.real).reshape(-1, 2)
        alpha = 0.55 * min(1.0, 200 / max(len(real), 1)) ** 0.5  # a crowd must not hide what lies in it
        axes.plot(*real.T, "o", color=_REAL, alpha=alpha, markersize=3, markeredgewidth=0, rasterized=True)
        for method, points in latent_map.synthetic.items():
            style = styles[method]
            marks = dict(marker=style.marker, color=style.color, markersize=5, markeredgecolor="white")
            _marks(axes, points, f"series-{places[method]}", markeredgewidth=0.5, **marks)
        for prototype, points in latent_map.prototypes.items():
            known = prototype in styles
            color = styles[prototype].color if known else _INK
            series = f"series-{places[prototype]}" if known else "prototypes"
            _marks(axes, points, series, marker="x", color=color, markersize=5.5, markeredgewidth=1.3)
        axes.set(xticks=[], yticks=[])
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.06)
        for side in ("top", "right"):
            axes.spines[side].set_visible(True)
        axes.spines[:].set_alpha(0.35)
    return Drawing(figure, f"Latent space of class {title}", {m: styles[m] for m in latent_map.synthetic})


def padded_limits(values: Sequence[float]) -> tuple[float, float]:
    """Axis limits for accuracies in percent: the values' range and some room, within 0 to 100."""
    low, high = min(values), max(values)
    room = max(0.06 * (high - low), 0.5)
    return max(low - room, 0.0), min(high + room, 101.0)


def thumbnail(image: Images, side: int) -> str:
    """An image as a data URI: PNG as it is when it fits into ``side`` pixels, else a JPEG scaled down to it."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    buffer = io.BytesIO()
    if max(picture.size) <= side:
        kind = "png"
        picture.save(buffer, "PNG", optimize=True)
    else:
        kind = "jpeg"
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=82, optimize=True)
    return data_uri(f"image/{kind}", buffer.getvalue())


def data_uri(mime: str, content: bytes) -> str:
    """Content as a base64 data URI."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def shrink(images: Images, side: int) -> Images:
    """Scale images (n, H, W, 3) down to ``side`` pixels, if they are larger, so that many can be held."""
    if max(images.shape[1:3]) <= side:
        return images
    pictures = [Image.fromarray(image) for image in images]
    for picture in pictures:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.stack([np.asarray(picture) for picture in pictures])


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 3.3), layout="constrained")
    return figure, figure.add_subplot()


def _marks(axes: Axes, points: Points, series: str, **style: Any) -> None:
    (line,) = axes.plot(*np.asarray(points).reshape(-1, 2).T, linestyle="none", **style)
    line.set_gid(series)


def _accuracy_axis(axes: Axes, limits: tuple[float, float], metric: str) -> None:
    axes.set_ylim(*limits)
    axes.set_ylabel(f"{metric} accuracy (%)")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color=_INK, alpha=0.13, linewidth=0.6)
    axes.set_axisbelow(True)


def _svg(figure: Figure, label: str) -> str:
    """Write a figure as an SVG element for HTML: without prolog, namespaces, fixed size, and ids that may clash."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="(series-\d+|prototypes)">', r'<g class="\1">', text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<!--.*?-->\s*|<style.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"font: (\S+px) '[^;\"]*|font-family: '[^;\"]*;?", _font_size, text)
    text = text.replace("xlink:href", "href").replace(_INK, "currentColor")
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None, "matplotlib writes a viewBox"
    root = f'<svg viewBox="{box[1]}" role="img" aria-label="{html.escape(label)}">'
    return re.sub(r"<svg[^>]*>", lambda _: root, text, count=1)


def _font_size(declaration: re.Match[str]) -> str:
    return f"font-size: {declaration[1]}" if declaration[1] else ""
