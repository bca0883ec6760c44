"""Scores as tables: the leaderboard for the page, and its CSV, LaTeX and Markdown forms."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workflow_scripts.evaluation.statistics import (
    Comparison,
    Levels,
    Ranking,
    bootstrap_interval,
    compare,
    merge_equal_sets,
    rank,
)
from workflow_scripts.report.data import ReportData, ScoreRow

AVERAGE = "average"
"""The column that averages over architectures."""

METRICS: dict[str, str] = {
    "last": "Top-1, last epoch",
    "best": "Top-1, best epoch",
    "top5": "Top-5, last epoch",
}
"""What can be read from a training, in the order in which it is offered."""

_READ: dict[str, Callable[[ScoreRow], float | None]] = {
    "last": lambda score: score.top1_last,
    "best": lambda score: score.top1_best,
    "top5": lambda score: score.top5_last,
}
_FIELDS = (
    "run", "method", "ipc", "seed", "protocol", "architecture", "repeat", "top1_best", "top1_last", "top5_last", "epochs",
    "images_seen", "seconds", "set_digest",
)  # fmt: skip

Interval = tuple[float, float]


@dataclass(frozen=True)
class Scores:
    """One metric of one method in one column: the scores of each seed, and what names each seed's distilled set."""

    by_seed: Mapping[Hashable, Sequence[float]]
    sets: Mapping[Hashable, Hashable]


@dataclass(frozen=True)
class Cell:
    """An entry of the leaderboard.

    Attributes:
        levels: mean, and spread between distilled sets and between trainings.
        interval: 95 % interval of the mean by the hierarchical bootstrap; None for a single training.
        rank: one plus the number of methods of the column that are distinguishably better.
        letters: methods that share one cannot be told apart.
        place: ``best`` for the highest mean of the column, ``close`` where that cannot be told apart from it, or empty.
    """

    levels: Levels
    interval: Interval | None
    rank: int
    letters: str
    place: str

    @property
    def mean(self) -> float:
        """Mean over the sets, in percent."""
        return self.levels.mean


@dataclass(frozen=True)
class Difference:
    """A method minus another, paired by seed, in points; ``clear`` where the ranking tells them apart."""

    comparison: Comparison | None
    points: float
    clear: bool


@dataclass(frozen=True)
class Board:
    """The leaderboard of one protocol and IPC.

    ``cells`` is keyed by (method, column, metric), ``differences`` by (method, baseline, metric); what was not trained
    is missing. ``rankings``, by metric, and differences are those of ``compared``, the average column or the only
    architecture.
    """

    protocol: str
    ipc: int
    methods: tuple[str, ...]
    columns: tuple[str, ...]
    averaged: tuple[str, ...]
    baselines: tuple[str, ...]
    compared: str
    cells: Mapping[tuple[str, str, str], Cell]
    differences: Mapping[tuple[str, str, str], Difference]
    rankings: Mapping[str, Ranking]

    def best(self, metric: str) -> str | None:
        """The method that leads the compared column."""
        return next((m for m in self.methods if self.place(m, metric) == "best"), None)

    def close(self, metric: str) -> list[str]:
        """The methods that the compared column cannot tell from the leader."""
        return [m for m in self.methods if self.place(m, metric) == "close"]

    def place(self, method: str, metric: str) -> str:
        """A method's place in the compared column."""
        cell = self.cells.get((method, self.compared, metric))
        return cell.place if cell else ""

    def against_best(self, method: str, metric: str) -> Difference | None:
        """The leader of the compared column minus a method."""
        leader = self.best(metric)
        if leader is None or leader == method or (method, self.compared, metric) not in self.cells:
            return None
        return _difference(self.rankings[metric], leader, method)


def metrics(data: ReportData) -> dict[str, str]:
    """The metrics that the run's scores have, with their titles."""
    return {key: title for key, title in METRICS.items() if any(_READ[key](score) is not None for score in data.scores)}


def collect(data: ReportData, protocol: str, ipc: int, column: str, metric: str) -> dict[str, Scores]:
    """Gather the scores of each method in one column of one board.

    In the average column each seed and repeat contributes its mean over the architectures, provided that all of them were
    trained, so that the level of sets stays one of sets.
    """
    counted = averaged(data, protocol) if column == AVERAGE else [column]
    grouped: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    sets: dict[str, dict[Hashable, Hashable]] = defaultdict(dict)
    for score in data.scores:
        value = _READ[metric](score)
        if (score.protocol, score.ipc) == (protocol, ipc) and score.architecture in counted and value is not None:
            grouped[score.method][score.seed, score.repeat].append(value)
            sets[score.method][score.seed] = data.content(score.set_digest)
    found: dict[str, Scores] = {}
    for method in (info.name for info in data.methods):
        by_seed: dict[Hashable, list[float]] = defaultdict(list)
        for (seed, _), values in grouped.get(method, {}).items():
            if len(values) == len(counted):
                by_seed[seed].append(sum(values) / len(counted))
        if by_seed:
            found[method] = Scores(by_seed, sets[method])
    return found


def boards(data: ReportData) -> list[Board]:
    """Arrange the leaderboard in one table per protocol and IPC, and compare within each column."""
    trained = {(score.protocol, score.ipc) for score in data.scores}
    protocols = dict.fromkeys(score.protocol for score in data.scores)
    return [_board(data, protocol, ipc) for protocol in protocols for ipc in data.ipcs if (protocol, ipc) in trained]


def warnings(arranged: Iterable[Board]) -> list[tuple[str, str]]:
    """What entries of the compared columns cannot tell, each with the methods concerned."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    every = set()
    for board in arranged:
        for method in board.methods:
            cell = board.cells.get((method, board.compared, "last"))
            every.add(method)
            if cell and cell.levels.warning:
                found[cell.levels.warning][method] = None
    return [(text, ", ".join(names) if set(names) < every else "All entries") for text, names in found.items()]


def csv_rows(data: ReportData) -> list[dict[str, Any]]:
    """One row per training."""
    return [{name: getattr(score, name) for name in _FIELDS} for score in data.scores]


def leaderboard_csv_rows(data: ReportData, arranged: Iterable[Board]) -> list[dict[str, Any]]:
    """One row per entry of the leaderboard and metric, with n and standard deviation at both levels."""
    return [
        {
            "run": data.run,
            "protocol": board.protocol,
            "ipc": board.ipc,
            "method": method,
            "architecture": column,
            "metric": metric,
            "mean": cell.mean,
            "ci95_low": cell.interval[0] if cell.interval else None,
            "ci95_high": cell.interval[1] if cell.interval else None,
            "sets": cell.levels.sets,
            "trainings": cell.levels.trainings,
            "sd_sets": cell.levels.spread,
            "sd_trainings": cell.levels.std_within,
            "rank": cell.rank,
            "groups": cell.letters,
            "warning": cell.levels.warning,
        }
        for board in arranged
        for (method, column, metric), cell in board.cells.items()
    ]


def comparison_csv_rows(data: ReportData, arranged: Iterable[Board]) -> list[dict[str, Any]]:
    """One row per pair of methods in the compared column of each board, and metric."""
    rows = []
    for board in arranged:
        for metric, ranking in board.rankings.items():
            for (first, second), found in ranking.comparisons.items():
                rows.append(
                    {
                        "run": data.run,
                        "protocol": board.protocol,
                        "ipc": board.ipc,
                        "architecture": board.compared,
                        "metric": metric,
                        "first": first,
                        "second": second,
                        "seeds": found.seeds if found else 0,
                        "difference": found.difference if found else None,
                        "ci95_low": found.interval[0] if found and found.interval else None,
                        "ci95_high": found.interval[1] if found and found.interval else None,
                        "effect": found.effect if found else None,
                        "effect_low": found.effect_interval[0] if found and found.effect_interval else None,
                        "effect_high": found.effect_interval[1] if found and found.effect_interval else None,
                        "p_holm": ranking.p_values[first, second],
                        "distinguishable": ranking.distinguishable(first, second),
                    }
                )
    return rows


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as CSV with a header; None becomes an empty field."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def latex(data: ReportData, arranged: Iterable[Board], metric: str = "last") -> str:
    """The leaderboard as one booktabs table per protocol: mean ± standard deviation over sets, the best mean in bold."""
    tables = [_latex_table(data, protocol, group, metric) for protocol, group in _by_protocol(arranged).items()]
    return "% Needs \\usepackage{booktabs}\n" + "\n".join(tables)


def markdown(data: ReportData, arranged: Iterable[Board], metric: str = "last") -> str:
    """The same as Markdown."""
    parts = []
    for protocol, group in _by_protocol(arranged).items():
        columns = group[0].columns
        heads = [
            f"IPC {board.ipc}" if len(columns) == 1 else f"IPC {board.ipc}, {column_title(data, column)}"
            for board in group
            for column in columns
        ]
        lines = [
            f"{METRICS[metric]} (%), protocol {protocol}. {_SPREAD}",
            "",
            "| " + " | ".join(["Method", *map(_markdown_escape, heads)]) + " |",
            "| " + " | ".join(["---", *["---:"] * len(heads)]) + " |",
        ]
        for method in _shown(data, group):
            cells = [board.cells.get((method, column, metric)) for board in group for column in columns]
            lines.append("| " + " | ".join([_markdown_escape(method), *map(_markdown_cell, cells)]) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


_SPREAD = (
    "Mean ± standard deviation over distilled sets (over trainings where there is one set); the best mean in bold."
)


def latex_escape(text: str) -> str:
    """Escape what LaTeX would read as markup."""
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{character: "\\" + character for character in "&%$#_{}"},
    }
    return "".join(special.get(character, character) for character in text)


def column_title(data: ReportData, column: str) -> str:
    """The heading of a leaderboard column."""
    return "Average" if column == AVERAGE else data.architectures[column]


def architectures_of(data: ReportData, protocol: str | None = None) -> tuple[str, ...]:
    """The architectures that were trained, by a protocol or any, in the report's order."""
    used = {score.architecture for score in data.scores if protocol in (None, score.protocol)}
    return tuple(key for key in data.architectures if key in used)


def averaged(data: ReportData, protocol: str) -> list[str]:
    """The architectures over which a protocol's average is taken: all that are no means themselves."""
    return [key for key in architectures_of(data, protocol) if key not in data.summarised]


def letters(groups: Sequence[int]) -> str:
    """Groups of a ranking as letters: a, b, ... z, aa, ..."""
    return " ".join(chr(97 + group) if group < 26 else chr(96 + group // 26) + chr(97 + group % 26) for group in groups)


def _board(data: ReportData, protocol: str, ipc: int) -> Board:
    columns = architectures_of(data, protocol)
    columns = (*columns, AVERAGE) if len(columns) > 1 else columns
    compared = columns[-1]
    cells: dict[tuple[str, str, str], Cell] = {}
    rankings: dict[str, Ranking] = {}
    for metric in METRICS:
        for column in columns:
            scores = collect(data, protocol, ipc, column, metric)
            if not scores:
                continue
            ranking = rank({m: s.by_seed for m, s in scores.items()}, sets={m: s.sets for m, s in scores.items()})
            leader = ranking.entries[0].method
            for entry in ranking.entries:
                close = entry.method != leader and not ranking.distinguishable(leader, entry.method)
                cells[entry.method, column, metric] = Cell(
                    entry.levels,
                    interval_of(scores[entry.method]),
                    entry.place,
                    letters(entry.groups),
                    "best" if entry.method == leader else "close" if close else "",
                )
            if column == compared:
                rankings[metric] = ranking
    methods = tuple(info.name for info in data.methods if any(method == info.name for method, _, _ in cells))
    baselines = tuple(name for name in data.baselines if name in methods and len(methods) > 1)
    differences = {
        (method, baseline, metric): _difference(ranking, method, baseline)
        for metric, ranking in rankings.items()
        for method in methods
        for baseline in baselines
        if method != baseline and {(method, compared, metric), (baseline, compared, metric)} <= cells.keys()
    }
    nets = tuple(averaged(data, protocol))
    return Board(protocol, ipc, methods, columns, nets, baselines, compared, cells, differences, rankings)


def interval_of(scores: Scores) -> Interval | None:
    """The 95 % interval of a method's mean by the hierarchical bootstrap; seeds of one set are one set.

    Its stretch for few sets may take an end beyond what an accuracy can be, where it is cut off.
    """
    found = bootstrap_interval(merge_equal_sets(scores.by_seed, scores.sets), np.random.default_rng(0))
    return None if found is None else (max(found[0], 0.0), min(found[1], 100.0))


def paired(first: Scores, second: Scores) -> Comparison | None:
    """The first minus the second on the seeds that they share, if any."""
    shared = set(first.by_seed) & set(second.by_seed)
    return compare(first.by_seed, second.by_seed) if shared else None


def _difference(ranking: Ranking, first: str, second: str) -> Difference:
    means = {entry.method: entry.levels.mean for entry in ranking.entries}
    found, sign = ranking.comparisons.get((first, second)), 1
    if (first, second) not in ranking.comparisons:
        found, sign = ranking.comparisons[second, first], -1
    if found is not None and sign < 0:
        found = _reversed(found)
    points = means[first] - means[second] if found is None else found.difference
    return Difference(found, points, ranking.distinguishable(first, second))


def _reversed(found: Comparison) -> Comparison:
    def flip(interval: Interval | None) -> Interval | None:
        return None if interval is None else (-interval[1], -interval[0])

    return Comparison(
        found.seeds,
        found.unpaired,
        -found.difference,
        flip(found.interval),
        found.p_value,
        None if found.effect is None else -found.effect,
        flip(found.effect_interval),
        found.warning,
    )


def _by_protocol(arranged: Iterable[Board]) -> dict[str, list[Board]]:
    by_protocol: dict[str, list[Board]] = defaultdict(list)
    for board in arranged:
        by_protocol[board.protocol].append(board)
    return by_protocol


def _shown(data: ReportData, group: Sequence[Board]) -> list[str]:
    shown = {method for board in group for method in board.methods}
    return [info.name for info in data.methods if info.name in shown]


def _latex_table(data: ReportData, protocol: str, group: Sequence[Board], metric: str) -> str:
    columns = group[0].columns
    names = [latex_escape(column_title(data, column)) for column in columns]
    spans, rules = [], []
    for place, board in enumerate(group):
        first = 2 + place * len(columns)
        spans.append(rf"\multicolumn{{{len(columns)}}}{{c}}{{IPC {board.ipc}}}")
        rules.append(rf"\cmidrule(lr){{{first}-{first + len(columns) - 1}}}")
    caption = latex_escape(f"{data.title}: {METRICS[metric]} (%), protocol {protocol}. {_SPREAD}").replace(
        "±", r"$\pm$"
    )
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{l{'r' * len(columns) * len(group)}}}",
        r"\toprule",
        " & ".join(["", *spans]) + r" \\",
        " ".join(rules),
        " & ".join(["Method", *(names * len(group))]) + r" \\",
        r"\midrule",
    ]
    for method in _shown(data, group):
        cells = [_latex_cell(board.cells.get((method, column, metric))) for board in group for column in columns]
        lines.append(" & ".join([latex_escape(method), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _spread(cell: Cell) -> float | None:
    return cell.levels.std_within if cell.levels.spread is None else cell.levels.spread


def _latex_cell(cell: Cell | None) -> str:
    if cell is None:
        return "--"
    mean = f"{cell.mean:.1f}"
    if cell.place == "best":
        mean = rf"\mathbf{{{mean}}}"
    spread = _spread(cell)
    return f"${mean}$" if spread is None else rf"${mean} \pm {spread:.1f}$"


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    spread = _spread(cell)
    text = f"{cell.mean:.1f}{'' if spread is None else f' ± {spread:.1f}'}"
    return f"**{text}**" if cell.place == "best" else text


def _markdown_escape(text: str) -> str:
    return "".join("\\" + character if character in r"\|*_`[]<>#" else character for character in text)
