"""The report as one self-contained HTML page: no scripts, no fonts, no request to anywhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
from markupsafe import Markup

from workflow_scripts.report import figures, tables
from workflow_scripts.report.data import ContactSheet, LatentMap, ReportData, ScoreRow, SheetRow, StageTime

IMAGE_BUDGET = 12_000_000
"""Bytes of the page that images may take, about; sheets show fewer images until they fit."""

MAPS_PER_IPC = 12
SHEET_CLASSES = 24
SKIPPED_LISTED = 200
THUMBNAIL_SIDE = 96

_PAIRS_PER_SHEET = (100, 80, 60, 40, 30, 20, 12, 8, 4, 2, 1)
_PIXEL_ART_SIDE = 64  # images up to this side are shown as they are, every pixel a square
_TINY = 1e-3  # a latent distance below this is rounding: the nearest real image is the image itself

Item = TypeVar("Item")


@dataclass(frozen=True)
class FigureView:
    """A drawn figure, its caption, and the metric it belongs to (empty: all)."""

    caption: str
    svg: Markup
    metric: str = ""
    detail: str = ""


@dataclass(frozen=True)
class FigureGroup:
    """Figures under a common heading, and what their legend names."""

    title: str
    figures: list[FigureView]
    methods: list[str]
    prototypes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """A synthetic image beside its nearest real one, as data URIs."""

    synthetic: str
    real: str | None
    description: str


@dataclass(frozen=True)
class SheetRowView:
    """One class of a contact sheet."""

    class_name: str
    label: int
    pairs: list[Pair]
    median_distance: str


@dataclass(frozen=True)
class SheetView:
    """A contact sheet as it is drawn."""

    method: str
    rows: list[SheetRowView]
    shown: str
    own_neighbours: bool
    has_neighbours: bool
    pixelated: bool
    compact: bool


@dataclass(frozen=True)
class StageView:
    """A line of the time table; ``share`` is in percent of the longest stage."""

    stage: StageTime
    share: float


def render(data: ReportData) -> str:
    """Make the page of a run."""
    names = [method.name for method in data.methods]
    styles = figures.method_styles(names)
    trained = [score for score in data.scores if score.architecture not in data.summarised]
    compute_seconds = sum(stage.seconds for stage in data.stage_times)
    longest = max((stage.seconds for stage in data.stage_times), default=0.0) or 1.0
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        accuracy=format_accuracy, duration=format_duration, integer=format_integer, signed=format_difference
    )
    page = environment.get_template("page.html.j2").render(
        data=data,
        created=datetime.fromisoformat(data.created).strftime("%d %B %Y, %H:%M %Z").strip().lstrip("0"),
        ipcs=_ipcs(data.ipcs),
        metrics=tables.metrics(data),
        boards=tables.boards(data),
        column_title=lambda column: tables.column_title(data, column),
        markers={name: Markup(figures.marker_svg(style)) for name, style in styles.items()},
        methods={method.name: method for method in data.methods},
        parameters={method.name: flatten(method.parameters) for method in data.methods},
        protocols={name: flatten(settings) for name, settings in data.protocols.items()},
        score_protocols=list(dict.fromkeys(score.protocol for score in data.scores)),
        sets=len({score.set_digest for score in data.scores}),
        compute_seconds=compute_seconds,
        trained=trained,
        training_seconds=sum(score.seconds for score in trained),
        train_counts=_count_range(data.dataset.train_counts),
        test_counts=_count_range(data.dataset.test_counts),
        accuracy_groups=_accuracy_groups(data, styles),
        curve_groups=_curve_groups(data, styles),
        sheets=_sheet_views(data),
        map_groups=_map_groups(data, styles),
        stages=[StageView(stage, 100 * stage.seconds / longest) for stage in data.stage_times],
        skipped_limit=SKIPPED_LISTED,
        downloads=_downloads(data),
    )
    return page.strip() + "\n"


def format_accuracy(value: float) -> str:
    """An accuracy in percent with one decimal."""
    return f"{value:.1f}"


def format_difference(value: float) -> str:
    """A difference in points with its sign; a true minus."""
    return f"{value:+.1f}".replace("-", "−")


def format_integer(value: int) -> str:
    """An integer with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def format_duration(seconds: float) -> str:
    """A duration in its two largest units: 2 min 5 s, 3 h 12 min."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    units = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, whole = divmod(whole, size)
        units.append((count, name))
    first = next(place for place, (count, _) in enumerate(units) if count)
    return " ".join(f"{count} {name}" for count, name in units[first : first + 2] if count)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            pairs += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            pairs += flatten({str(place + 1): item for place, item in enumerate(value)}, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            pairs.append((f"{prefix}{key}", ", ".join(map(str, value)) or "none"))
        else:
            pairs.append((f"{prefix}{key}", "none" if value is None else str(value)))
    return pairs


def _spread(items: Sequence[Item], limit: int) -> list[Item]:
    """At most ``limit`` items, evenly spread, in order."""
    if len(items) <= limit:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, limit)]


def _count_range(counts: Sequence[int]) -> str:
    if not counts:
        return "none"
    low, high = format_integer(min(counts)), format_integer(max(counts))
    return low if low == high else f"{low} to {high}"


def _ipcs(ipcs: Sequence[int]) -> str:
    listed = " and ".join(filter(None, (", ".join(map(str, ipcs[:-1])), str(ipcs[-1])))) if ipcs else "no"
    return f"{listed} {'image' if tuple(ipcs) == (1,) else 'images'}"


def _downloads(data: ReportData) -> list[tuple[str, str, str]]:
    """(title, file name, data URI) of the tables that the page offers."""
    if not data.scores:
        return []
    texts = (
        ("Leaderboard (CSV)", "leaderboard.csv", "text/csv", tables.to_csv(tables.leaderboard_csv_rows(data))),
        ("Every training (CSV)", "scores.csv", "text/csv", tables.to_csv(tables.csv_rows(data))),
        ("Leaderboard (LaTeX)", "leaderboard.tex", "text/x-tex", tables.latex(data)),
    )
    return [(title, f"{data.run}-{name}", figures.data_uri(mime, text.encode())) for title, name, mime, text in texts]


def _with_protocol(data: ReportData, protocol: str, title: str) -> str:
    several = len({score.protocol for score in data.scores}) > 1
    return f"{title}, {protocol}" if several and title else protocol if several else title


def _accuracy_groups(data: ReportData, styles: Mapping[str, figures.MethodStyle]) -> list[FigureGroup]:
    """Accuracy against IPC for each protocol and architecture that has scores at more than one IPC."""
    rows = tables.leaderboard(data)
    groups: list[FigureGroup] = []
    for protocol in dict.fromkeys(row.protocol for row in rows):
        mine = [row for row in rows if row.protocol == protocol]
        columns = [
            column for column in (*data.architectures, tables.AVERAGE) if any(r.architecture == column for r in mine)
        ]
        drawn: list[FigureView] = []
        methods: set[str] = set()
        for metric, title in tables.METRICS.items():
            summaries = [row.summaries[metric] for row in mine if metric in row.summaries]
            if not summaries:
                continue
            limits = figures.padded_limits(
                [summary.mean + sign * (summary.ci95 or 0.0) for summary in summaries for sign in (-1, 1)]
            )
            for column in columns:
                series: dict[str, list[tuple[int, tables.Summary]]] = defaultdict(list)
                for row in mine:
                    if row.architecture == column and metric in row.summaries:
                        series[row.method].append((row.ipc, row.summaries[metric]))
                if len({ipc for points in series.values() for ipc, _ in points}) < 2:
                    continue
                name = f"accuracy-{len(groups)}-{metric}-{column}"
                svg = figures.accuracy_figure(series, styles, limits, title.split(",")[0], name)
                drawn.append(FigureView(tables.column_title(data, column), Markup(svg), metric))
                methods |= set(series)
        if drawn:
            shown = [name for name in styles if name in methods]
            groups.append(FigureGroup(_with_protocol(data, protocol, ""), drawn, shown))
    return groups


def _curve_groups(data: ReportData, styles: Mapping[str, figures.MethodStyle]) -> list[FigureGroup]:
    """Training curves for each protocol, IPC and architecture that has any."""
    grouped: dict[tuple[str, int], dict[str, list[ScoreRow]]] = defaultdict(lambda: defaultdict(list))
    for score in data.scores:
        if score.curve:
            grouped[score.protocol, score.ipc][score.architecture].append(score)
    groups: list[FigureGroup] = []
    for (protocol, ipc), by_architecture in sorted(grouped.items()):
        values = [value for scores in by_architecture.values() for score in scores for _, value in score.curve]
        limits = figures.padded_limits(values)
        drawn: list[FigureView] = []
        methods: set[str] = set()
        for architecture in (key for key in data.architectures if key in by_architecture):
            scores = by_architecture[architecture]
            curves = {name: [score.curve for score in scores if score.method == name] for name in styles}
            curves = {name: trainings for name, trainings in curves.items() if trainings}
            svg = figures.curves_figure(curves, styles, limits, f"curves-{len(groups)}-{architecture}")
            drawn.append(FigureView(data.architectures[architecture], Markup(svg)))
            methods |= set(curves)
        shown = [name for name in styles if name in methods]
        groups.append(FigureGroup(_with_protocol(data, protocol, f"IPC {ipc}"), drawn, shown))
    return groups


def _map_groups(data: ReportData, styles: Mapping[str, figures.MethodStyle]) -> list[FigureGroup]:
    """Latent maps for each IPC, a limited number of classes."""
    grouped: dict[int | None, list[LatentMap]] = defaultdict(list)
    for latent_map in data.maps:
        grouped[latent_map.ipc].append(latent_map)
    groups: list[FigureGroup] = []
    for ipc, maps in grouped.items():
        drawn = []
        for place, latent_map in enumerate(_spread(maps, MAPS_PER_IPC)):
            svg = figures.map_figure(latent_map, styles, f"map-{len(groups)}-{place}")
            first, second = latent_map.explained_variance
            detail = f"{100 * first:.0f} % + {100 * second:.0f} %"
            drawn.append(FigureView(latent_map.class_name, Markup(svg), detail=detail))
        methods = {name for latent_map in maps for name in (*latent_map.synthetic, *latent_map.prototypes)}
        shown = [name for name in styles if name in methods]
        prototypes = list(dict.fromkeys(name for latent_map in maps for name in latent_map.prototypes))
        groups.append(FigureGroup("" if ipc is None else f"IPC {ipc}", drawn, shown, prototypes))
    return groups


def _sheet_views(data: ReportData) -> dict[int, list[SheetView]]:
    """The contact sheets by IPC, with as many images as the page can carry."""
    sheets = [sheet for sheet in data.sheets if sheet.rows]
    pairs = _affordable_pairs(sheets)
    views: dict[int, list[SheetView]] = {}
    for ipc in data.ipcs:
        chosen = [_sheet_view(data, sheet, pairs) for sheet in sheets if sheet.ipc == ipc]
        if chosen:
            views[ipc] = chosen
    return views


def _affordable_pairs(sheets: Sequence[ContactSheet]) -> int:
    """How many image pairs each sheet may show within the page's budget, judged by a few images of each sheet."""
    weights = []
    for sheet in sheets:
        samples = [row.synthetic[0] for row in _spread(sheet.rows, 3) if len(row.synthetic)]
        size = np.mean([len(figures.thumbnail(image, THUMBNAIL_SIDE)) for image in samples]) if samples else 0.0
        weights.append(float(size))
    for pairs in _PAIRS_PER_SHEET:
        counts = [2 * sum(len(images) for _, images in _cut(sheet, pairs)) for sheet in sheets]
        if sum(weight * count for weight, count in zip(weights, counts, strict=True)) <= IMAGE_BUDGET:
            return pairs
    return _PAIRS_PER_SHEET[-1]


def _cut(sheet: ContactSheet, pairs: int) -> list[tuple[SheetRow, range]]:
    """The rows of a sheet to show, and which of their images: about square, so that both classes and images vary."""
    longest = max((len(row.synthetic) for row in sheet.rows), default=0)
    per_row = max(min(round(pairs**0.5), longest), 1)
    rows = _spread(sheet.rows, max(min(pairs // per_row, SHEET_CLASSES), 1))
    return [(row, range(min(per_row, len(row.synthetic)))) for row in rows]


def _sheet_view(data: ReportData, sheet: ContactSheet, pairs: int) -> SheetView:
    cut = _cut(sheet, pairs)
    own = _are_own_neighbours(row for row, _ in cut)
    rows = [
        SheetRowView(
            row.class_name,
            row.label,
            [_pair(row, place, show_real=not own) for place in images],
            "" if own or row.distances is None or not len(row.distances) else f"{np.median(row.distances):.3g}",
        )
        for row, images in cut
    ]
    most = max(len(row.pairs) for row in rows)
    classes = max(len(data.dataset.classes), len(sheet.rows))
    shown = f"{_of(len(rows), classes, 'class', 'classes')}, {_of(most, sheet.ipc, 'image', 'images')} each"
    largest = max((max(row.synthetic.shape[1:3]) for row, _ in cut), default=0)
    return SheetView(
        method=sheet.method,
        rows=rows,
        shown=shown,
        own_neighbours=own,
        has_neighbours=not own and any(pair.real for row in rows for pair in row.pairs),
        pixelated=largest <= _PIXEL_ART_SIDE,
        compact=most <= 3,
    )


def _of(shown: int, total: int, singular: str, plural: str) -> str:
    noun = singular if total == 1 else plural
    return f"{shown} of {format_integer(total)} {noun}" if shown < total else f"{format_integer(total)} {noun}"


def _are_own_neighbours(rows: Iterable[SheetRow]) -> bool:
    """Whether every image is its own nearest real image, as with methods that choose real images."""
    return all(
        row.nearest_real is not None
        and (
            np.array_equal(row.synthetic, row.nearest_real)
            or (row.distances is not None and np.all(row.distances < _TINY))
        )
        for row in rows
    )


def _pair(row: SheetRow, place: int, show_real: bool) -> Pair:
    description = f"{row.class_name}, image {place + 1}"
    if row.distances is not None and show_real:
        description += f"; nearest real image at latent distance {row.distances[place]:.3g}"
    real = None
    if show_real and row.nearest_real is not None:
        real = figures.thumbnail(row.nearest_real[place], THUMBNAIL_SIDE)
    return Pair(figures.thumbnail(row.synthetic[place], THUMBNAIL_SIDE), real, description)
