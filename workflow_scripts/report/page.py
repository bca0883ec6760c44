"""The report as one self-contained HTML page, which asks nothing of anybody: no fonts, no request, one small script.

Without the script the page shows everything; it adds sorting and filters.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
from markupsafe import Markup

from workflow_scripts.evaluation.measures import Metric
from workflow_scripts.evaluation.measures import metrics as set_metrics
from workflow_scripts.report import analysis, figures, tables
from workflow_scripts.report.data import (
    ClosePair,
    ContactSheet,
    Cost,
    LatentMap,
    Measured,
    ReportData,
    ScoreRow,
    SheetRow,
    StageTime,
)
from workflow_scripts.report.published import TRUST

IMAGE_BUDGET = 12_000_000
"""Bytes of the page that images may take, about; sheets show fewer images until they fit."""

CLASSES_TOLD_APART = 20
CONFUSION_SIDE = 24
CONFUSIONS_LISTED = 24
CLASSES_LISTED = 200
MAPS_PER_IPC = 12
SHEET_CLASSES = 24
SKIPPED_LISTED = 200
THUMBNAIL_SIDE = 96
PAIR_SIDE = 128

_PAIRS_PER_SHEET = (100, 80, 60, 40, 30, 20, 12, 8, 4, 2, 1)
_PIXEL_ART_SIDE = 64  # images up to this side are shown as they are, every pixel a square
_TINY = 1e-3  # a latent distance below this is rounding: the nearest real image is the image itself

Item = TypeVar("Item")


@dataclass(frozen=True)
class FigureView:
    """A drawn figure, its caption, what it belongs to (empty: all), and the name of its files (empty: none)."""

    caption: str
    svg: Markup
    metric: str = ""
    detail: str = ""
    protocol: str = ""
    ipc: int | None = None
    architecture: str = ""


@dataclass(frozen=True)
class FigureGroup:
    """Figures under a common heading, and what their legend names."""

    title: str
    figures: list[FigureView]
    methods: list[str]
    prototypes: list[str] = field(default_factory=list)
    protocol: str = ""
    ipc: int | None = None


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
    name: str
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


@dataclass(frozen=True)
class MeasureBoard:
    """The set metrics of one IPC: ``cells`` by (method, metric) hold the mean over sets and its spread, if there is one."""

    ipc: int
    space: str
    dimensions: int
    metrics: Mapping[str, Metric]
    methods: list[str]
    cells: Mapping[tuple[str, str], tuple[float, float | None]]
    sets: Mapping[str, int]
    best: Mapping[str, set[str]]
    decimals: Mapping[str, int]
    warnings: list[tuple[str, str]]
    biased: Mapping[str, str]
    audits: Mapping[str, Mapping[str, float | None]]
    scores: Mapping[str, tables.Cell]


@dataclass(frozen=True)
class PairView:
    """A synthetic image and the nearest real one, as data URIs, and what is to say of them."""

    synthetic: str
    real: str
    caption: str
    description: str


@dataclass(frozen=True)
class Page:
    """The finished page, and the figures on it by name."""

    html: str
    drawings: Mapping[str, figures.Drawing]


def render(data: ReportData) -> Page:
    """Make the page of a run."""
    pad = _Pad()
    names = [method.name for method in data.methods]
    styles = figures.method_styles(names)
    boards = tables.boards(data)
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
        accuracy=format_accuracy,
        duration=format_duration,
        integer=format_integer,
        signed=format_difference,
        significant=format_significant,
        fixed=format_fixed,
    )
    page = environment.get_template("page.html.j2").render(
        data=data,
        created=datetime.fromisoformat(data.created).strftime("%d %B %Y, %H:%M %Z").strip().lstrip("0"),
        ipcs=_ipcs(data.ipcs),
        metrics=tables.metrics(data),
        boards=boards,
        warnings=tables.warnings(boards),
        summary=analysis.summary(data, boards, format_duration(compute_seconds)),
        column_title=lambda column: tables.column_title(data, column),
        markers={name: Markup(figures.marker_svg(style)) for name, style in styles.items()},
        methods={method.name: method for method in data.methods},
        parameters={method.name: flatten(method.parameters) for method in data.methods},
        protocols={name: flatten(settings) for name, settings in data.protocols.items()},
        score_protocols=list(dict.fromkeys(score.protocol for score in data.scores)),
        score_architectures=tables.architectures_of(data),
        set_count=len({data.content(score.set_digest) for score in data.scores}),
        compute_seconds=compute_seconds,
        trained=trained,
        training_seconds=sum(score.seconds for score in trained),
        train_counts=_count_range(data.dataset.train_counts),
        test_counts=_count_range(data.dataset.test_counts),
        accuracy_groups=_accuracy_groups(data, boards, styles, pad),
        heat_maps=_heat_maps(data, boards, pad),
        ablations=analysis.ablations(data, boards),
        ablation_figures=_ablation_figures(data, boards, pad),
        literature=analysis.literature(data, boards),
        trust=TRUST,
        curve_groups=_curve_groups(data, styles, pad),
        sheets=_sheet_views(data),
        map_groups=_map_groups(data, styles, pad),
        class_figures=_class_figures(data, pad),
        confusion_figures=_confusion_figures(data, pad),
        confusion_lists=_confusion_lists(data),
        measure_boards=_measure_boards(data, boards),
        real_methods=analysis.real_methods(data),
        pairs=_pair_views(data),
        stages=[StageView(stage, 100 * stage.seconds / longest) for stage in data.stage_times],
        cost_boards=_cost_boards(data),
        cost_stages=[one.stage for one in data.stage_times if any(one.stage in cost.stages for cost in data.costs)],
        cost_figures=_cost_figures(data, boards, styles, pad),
        device_hours=_hours(data),
        skipped_limit=SKIPPED_LISTED,
        classes_limit=CLASSES_LISTED,
        downloads=_downloads(data, boards),
    )
    return Page(page.strip() + "\n", pad.drawings)


class _Pad:
    """Draws figures for the page and keeps them."""

    def __init__(self) -> None:
        self.drawings: dict[str, figures.Drawing] = {}

    def draw(self, drawing: figures.Drawing, name: str) -> Markup:
        """Return the inline figure."""
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
        self.drawings[stem] = drawing
        return Markup(drawing.inline(stem))


def downloads(data: ReportData) -> dict[str, str]:
    """The tables that lie beside the page, by file name."""
    boards = tables.boards(data)
    return {
        "leaderboard.csv": tables.to_csv(tables.leaderboard_csv_rows(data, boards)),
        "comparisons.csv": tables.to_csv(tables.comparison_csv_rows(data, boards)),
        "scores.csv": tables.to_csv(tables.csv_rows(data)),
        "leaderboard.tex": tables.latex(data, boards),
        "leaderboard.md": tables.markdown(data, boards),
    }


def format_accuracy(value: float) -> str:
    """An accuracy in percent with one decimal."""
    return f"{value:.1f}"


def format_difference(value: float) -> str:
    """A difference in points with its sign; a true minus."""
    return f"{value:+.1f}".replace("-", "−")


def format_integer(value: int) -> str:
    """An integer with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def format_significant(value: float) -> str:
    """A number with three significant digits and a true minus."""
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return text.replace("-", "−")


def format_fixed(value: float, decimals: int) -> str:
    """A number with so many decimals, and a true minus."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")


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


def _downloads(data: ReportData, boards: Sequence[tables.Board]) -> list[tuple[str, str, str]]:
    """(title, file name, data URI) of the tables that the page offers."""
    if not data.scores:
        return []
    texts = (
        ("Leaderboard (CSV)", "leaderboard.csv", "text/csv", tables.leaderboard_csv_rows(data, boards)),
        ("Comparisons (CSV)", "comparisons.csv", "text/csv", tables.comparison_csv_rows(data, boards)),
        ("Every training (CSV)", "scores.csv", "text/csv", tables.csv_rows(data)),
        ("Leaderboard (LaTeX)", "leaderboard.tex", "text/x-tex", tables.latex(data, boards)),
        ("Leaderboard (Markdown)", "leaderboard.md", "text/markdown", tables.markdown(data, boards)),
    )
    return [
        (title, f"{data.run}-{name}", figures.data_uri(mime, (t if isinstance(t, str) else tables.to_csv(t)).encode()))
        for title, name, mime, t in texts
    ]


def _with_protocol(data: ReportData, protocol: str, title: str) -> str:
    several = len({score.protocol for score in data.scores}) > 1
    return f"{title}, {protocol}" if several and title else protocol if several else title


def _estimate(cell: tables.Cell) -> figures.Estimate:
    return figures.Estimate(cell.mean, cell.interval)


def _accuracy_groups(
    data: ReportData, boards: Sequence[tables.Board], styles: Mapping[str, figures.MethodStyle], pad: _Pad
) -> list[FigureGroup]:
    """Accuracy against IPC for each protocol and architecture that has scores at more than one IPC."""
    groups: list[FigureGroup] = []
    for protocol in dict.fromkeys(board.protocol for board in boards):
        mine = [board for board in boards if board.protocol == protocol]
        drawn: list[FigureView] = []
        methods: set[str] = set()
        for metric, title in tables.METRICS.items():
            cells = [cell for board in mine for (_, _, of), cell in board.cells.items() if of == metric]
            if not cells:
                continue
            limits = figures.padded_limits([value for cell in cells for value in (cell.interval or (cell.mean,))])
            for column in mine[0].columns:
                series: dict[str, list[tuple[int, figures.Estimate]]] = defaultdict(list)
                for board in mine:
                    for method in board.methods:
                        if (cell := board.cells.get((method, column, metric))) is not None:
                            series[method].append((board.ipc, _estimate(cell)))
                if len({ipc for points in series.values() for ipc, _ in points}) < 2:
                    continue
                drawing = figures.accuracy_figure(series, styles, limits, title.split(",")[0])
                svg = pad.draw(drawing, f"accuracy-{protocol}-{metric}-{column}")
                drawn.append(FigureView(tables.column_title(data, column), svg, metric, architecture=column))
                methods |= set(series)
        if drawn:
            shown = [name for name in styles if name in methods]
            groups.append(FigureGroup(_with_protocol(data, protocol, ""), drawn, shown, protocol=protocol))
    return groups


def _heat_maps(data: ReportData, boards: Sequence[tables.Board], pad: _Pad) -> list[FigureView]:
    """Methods by architectures, one map for each board, if there are several architectures."""
    drawn = []
    for board in boards if len(tables.architectures_of(data)) > 1 else ():
        columns = board.columns
        cells = [[board.cells.get((method, column, "last")) for column in columns] for method in board.methods]
        values = np.array([[np.nan if cell is None else cell.mean for cell in row] for row in cells])
        titles = [tables.column_title(data, column) for column in columns]
        label = f"Top-1 of each method with each architecture at IPC {board.ipc}"
        drawing = figures.heat_figure(values, board.methods, titles, label)
        svg = pad.draw(drawing, f"architectures-{board.protocol}-ipc{board.ipc}")
        caption = _with_protocol(data, board.protocol, f"IPC {board.ipc}")
        drawn.append(FigureView(caption, svg, protocol=board.protocol, ipc=board.ipc))
    return drawn


def _ablation_figures(data: ReportData, boards: Sequence[tables.Board], pad: _Pad) -> list[FigureView]:
    found = analysis.ablations(data, boards)
    drawn = []
    for board in boards:
        gaps = [
            figures.Gap(
                f"{pair.first} − {pair.second}",
                difference.points,
                difference.comparison.interval if difference.comparison else None,
                difference.clear,
            )
            for pair in found
            if (difference := pair.differences.get((board.protocol, board.ipc))) is not None
        ]
        if gaps:
            label = f"Differences between methods that differ in one thing, at IPC {board.ipc}"
            svg = pad.draw(figures.forest_figure(gaps, label), f"ablations-{board.protocol}-ipc{board.ipc}")
            caption = _with_protocol(data, board.protocol, f"IPC {board.ipc}")
            drawn.append(FigureView(caption, svg, protocol=board.protocol, ipc=board.ipc))
    return drawn


def _class_figures(data: ReportData, pad: _Pad) -> list[FigureView]:
    """Top-1 per class and method at each IPC: all classes, or the worst and the best ones."""
    drawn = []
    for ipc in data.ipcs:
        accuracies = analysis.mean_per_class(data, ipc)
        if accuracies:
            chosen, cut = analysis.telling_classes(accuracies, CLASSES_TOLD_APART)
            values = np.stack([row[chosen] for row in accuracies.values()])
            titles = [data.dataset.title(data.dataset.classes[label]) for label in chosen]
            drawing = figures.heat_figure(values, list(accuracies), titles, f"Top-1 of each class at IPC {ipc}")
            detail = (
                f"the {len(chosen) // 2} worst and the {len(chosen) - len(chosen) // 2} best classes" if cut else ""
            )
            drawn.append(FigureView(f"IPC {ipc}", pad.draw(drawing, f"classes-ipc{ipc}"), detail=detail, ipc=ipc))
    return drawn


def _confusion_figures(data: ReportData, pad: _Pad) -> list[FigureView]:
    """Confusion matrices with percent of each class's images, where the classes are few."""
    drawn = []
    for confusion in data.confusions:
        if len(confusion.counts) <= CONFUSION_SIDE:
            shares = 100 * confusion.counts / np.maximum(confusion.counts.sum(1, keepdims=True), 1)
            titles = [data.dataset.title(name) for name in data.dataset.classes]
            label = f"Confusion of classes with {confusion.method} at IPC {confusion.ipc}: true class by row"
            drawing = figures.heat_figure(shares, titles, titles, label)
            svg = pad.draw(drawing, f"confusion-{confusion.method}-ipc{confusion.ipc}")
            drawn.append(FigureView(f"{confusion.method}, IPC {confusion.ipc}", svg, ipc=confusion.ipc))
    return drawn


def _confusion_lists(data: ReportData) -> list[tuple[str, list[tuple[str, str, int, float]]]]:
    """The most frequent mistakes, where the classes are too many for a matrix."""
    titles = [data.dataset.title(name) for name in data.dataset.classes]
    found = []
    for confusion in data.confusions:
        if len(confusion.counts) > CONFUSION_SIDE:
            mistakes = [
                (titles[true], titles[taken], times, percent)
                for true, taken, times, percent in analysis.common_confusions(confusion.counts, CONFUSIONS_LISTED)
            ]
            found.append((f"{confusion.method}, IPC {confusion.ipc}", mistakes))
    return found


def _measure_boards(data: ReportData, boards: Sequence[tables.Board]) -> list[MeasureBoard]:
    """The set metrics of each IPC; seeds that gave the same set count once."""
    found = []
    for ipc in data.ipcs:
        by_method: dict[str, dict[str, Measured]] = defaultdict(dict)
        for one in data.measured:
            if one.ipc == ipc:
                by_method[one.method][data.content(one.set_digest)] = one
        if not by_method:
            continue
        methods = [info.name for info in data.methods if info.name in by_method]
        example = next(iter(by_method[methods[0]].values()))
        described = set_metrics(example.space)
        cells: dict[tuple[str, str], tuple[float, float | None]] = {}
        best: dict[str, set[str]] = {}
        decimals: dict[str, int] = {}
        for key, metric in described.items():
            for method in methods:
                values = [one.values[key] for one in by_method[method].values() if key in one.values]
                if values:
                    cells[method, key] = (float(np.mean(values)), float(np.std(values, ddof=1)) if values[1:] else None)
            mine = {method: cells[method, key][0] for method in methods if (method, key) in cells}
            decimals[key] = 3 - min(sum(max(map(abs, mine.values()), default=0) >= 10**power for power in range(3)), 3)
            shown_values = {method: format_fixed(value, decimals[key]) for method, value in mine.items()}
            if len(set(shown_values.values())) > 1:
                leader = (min if metric.better == "lower" else max)(mine, key=lambda method: mine[method])
                best[key] = {method for method, text in shown_values.items() if text == shown_values[leader]}
        shown = {key: metric for key, metric in described.items() if any((m, key) in cells for m in methods)}
        board = next((board for board in boards if board.ipc == ipc), None)
        audits = {method: _mean_audit([one.audit for one in by_method[method].values()]) for method in methods}
        found.append(
            MeasureBoard(
                ipc,
                example.space,
                example.dimensions,
                shown,
                methods,
                cells,
                {method: len(by_method[method]) for method in methods},
                best,
                decimals,
                [(described[key].title, text) for key, text in example.warnings.items() if key in described],
                {key: text for key, text in example.warnings.items() if text.startswith("biased") and key in shown},
                audits,
                {
                    m: board.cells[m, board.compared, "last"]
                    for m in methods
                    if (m, board.compared, "last") in board.cells
                }
                if board
                else {},
            )
        )
    return found


def _mean_audit(audits: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Sum what is counted, and average the rest."""
    found: dict[str, float | None] = {}
    for key in audits[0]:
        values = [value for audit in audits if (value := audit.get(key)) is not None]
        counted = key in ("images", "copies")
        found[key] = sum(values) if counted else sum(values) / len(values) if values else None
    return found


def _pair_views(data: ReportData) -> dict[tuple[str, int], list[PairView]]:
    """The closest pairs by method and IPC, as pictures."""
    views: dict[tuple[str, int], list[PairView]] = defaultdict(list)
    for pair in data.pairs:
        own, real = (data.dataset.title(name) for name in (pair.class_name, pair.real_class))
        share = "" if pair.ratio is None else f"{pair.ratio:.2f} of the usual distance"
        views[pair.method, pair.ipc].append(
            PairView(
                figures.thumbnail(pair.synthetic, PAIR_SIDE),
                figures.thumbnail(pair.real, PAIR_SIDE),
                f"{own}{'' if own == real else f' / {real}'}: {share or format_significant(pair.distance)}",
                _pair_text(pair, own, real),
            )
        )
    return views


def _pair_text(pair: ClosePair, own: str, real: str) -> str:
    return (
        f"Synthetic image of {own} by {pair.method} at IPC {pair.ipc}, and the nearest real image, {pair.real_path} "
        f"of {real}, at distance {pair.distance:.3g}"
    )


def _cost_boards(data: ReportData) -> dict[int, list[Cost]]:
    return {ipc: mine for ipc in data.ipcs if (mine := [cost for cost in data.costs if cost.ipc == ipc])}


def _hours(data: ReportData) -> str:
    """What an hour of the run's device is called."""
    return "GPU-hours" if any("cuda" in cost.device.lower() for cost in data.costs) else "CPU-hours"


def _cost_figures(
    data: ReportData, boards: Sequence[tables.Board], styles: Mapping[str, figures.MethodStyle], pad: _Pad
) -> list[FigureView]:
    """Accuracy against the hours of making a set, one panel for each board."""
    drawn = []
    for board in boards:
        cells = {
            cost.method: (sum(cost.stages.values()) / 3600 / cost.sets, board.cells[key])
            for cost in data.costs
            if cost.ipc == board.ipc and (key := (cost.method, board.compared, "last")) in board.cells
        }
        points = {method: (hours, _estimate(cell)) for method, (hours, cell) in cells.items() if hours > 0}
        if points:
            limits = figures.padded_limits([v for _, e in points.values() for v in (e.interval or (e.mean,))])
            drawing = figures.cost_figure(points, styles, limits, _hours(data))
            svg = pad.draw(drawing, f"cost-{board.protocol}-ipc{board.ipc}")
            caption = _with_protocol(data, board.protocol, f"IPC {board.ipc}")
            drawn.append(FigureView(caption, svg, protocol=board.protocol, ipc=board.ipc))
    return drawn


def _curve_groups(data: ReportData, styles: Mapping[str, figures.MethodStyle], pad: _Pad) -> list[FigureGroup]:
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
            drawing = figures.curves_figure(curves, styles, limits)
            svg = pad.draw(drawing, f"curves-{protocol}-ipc{ipc}-{architecture}")
            drawn.append(FigureView(data.architectures[architecture], svg, architecture=architecture))
            methods |= set(curves)
        shown = [name for name in styles if name in methods]
        title = _with_protocol(data, protocol, f"IPC {ipc}")
        groups.append(FigureGroup(title, drawn, shown, protocol=protocol, ipc=ipc))
    return groups


def _map_groups(data: ReportData, styles: Mapping[str, figures.MethodStyle], pad: _Pad) -> list[FigureGroup]:
    """Latent maps for each IPC, a limited number of classes."""
    grouped: dict[int | None, list[LatentMap]] = defaultdict(list)
    for latent_map in data.maps:
        grouped[latent_map.ipc].append(latent_map)
    groups: list[FigureGroup] = []
    for ipc, maps in grouped.items():
        drawn = []
        for place, latent_map in enumerate(_spread(maps, MAPS_PER_IPC)):
            title = data.dataset.title(latent_map.class_name)
            svg = pad.draw(figures.map_figure(latent_map, styles, title), f"map-{len(groups)}-{place}")
            first, second = latent_map.explained_variance
            detail = f"{100 * first:.0f} % + {100 * second:.0f} %"
            drawn.append(FigureView(title, svg, detail=detail))
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
            data.dataset.title(row.class_name),
            row.class_name,
            row.label,
            [_pair(row, data.dataset.title(row.class_name), place, show_real=not own) for place in images],
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


def _pair(row: SheetRow, title: str, place: int, show_real: bool) -> Pair:
    description = f"{title}, image {place + 1}"
    if row.distances is not None and show_real:
        description += f"; nearest real image at latent distance {row.distances[place]:.3g}"
    real = None
    if show_real and row.nearest_real is not None:
        real = figures.thumbnail(row.nearest_real[place], THUMBNAIL_SIDE)
    return Pair(figures.thumbnail(row.synthetic[place], THUMBNAIL_SIDE), real, description)
