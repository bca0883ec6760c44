"""Scores as tables: the leaderboard for the page, and its CSV and LaTeX forms."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workflow_scripts.evaluation.statistics import Summary, summarize
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


@dataclass(frozen=True)
class LeaderboardRow:
    """What one method reaches at one IPC with one architecture, or on average over all of them.

    ``summaries`` holds one summary per metric; ``sets`` counts the different distilled sets behind it.
    """

    protocol: str
    ipc: int
    method: str
    architecture: str
    summaries: Mapping[str, Summary]
    sets: int


@dataclass(frozen=True)
class Standing:
    """A summary and its place in its column: ``best``, ``close`` (its interval overlaps the best one's) or neither."""

    summary: Summary
    place: str


@dataclass(frozen=True)
class Difference:
    """A method's mean minus a baseline's, in points; ``clear`` when their intervals do not overlap."""

    points: float
    clear: bool


@dataclass(frozen=True)
class Board:
    """The leaderboard of one protocol and IPC.

    ``cells`` is keyed by (method, column, metric), ``differences`` by (method, baseline, metric); what was not trained
    is missing. Differences are those of ``compared``, the average column or the only architecture.
    """

    protocol: str
    ipc: int
    methods: tuple[str, ...]
    columns: tuple[str, ...]
    baselines: tuple[str, ...]
    compared: str
    cells: Mapping[tuple[str, str, str], Standing]
    differences: Mapping[tuple[str, str, str], Difference]
    rows: Mapping[tuple[str, str], LeaderboardRow]

    def best(self, metric: str) -> str | None:
        """The method that leads the compared column."""
        return next((m for m in self.methods if self.place(m, metric) == "best"), None)

    def close(self, metric: str) -> list[str]:
        """The methods whose interval overlaps the leader's in the compared column."""
        return [m for m in self.methods if self.place(m, metric) == "close"]

    def place(self, method: str, metric: str) -> str:
        """A method's place in the compared column."""
        cell = self.cells.get((method, self.compared, metric))
        return cell.place if cell else ""


def metrics(data: ReportData) -> dict[str, str]:
    """The metrics that the run's scores have, with their titles."""
    return {key: title for key, title in METRICS.items() if any(_READ[key](score) is not None for score in data.scores)}


def leaderboard(data: ReportData) -> list[LeaderboardRow]:
    """Aggregate the scores over seeds and repeats.

    With more than one architecture, every method gets a further row under ``AVERAGE``: each seed and repeat contributes
    its mean over the architectures, provided that all of them were trained, so that the interval is one over sets.
    """
    grouped: dict[tuple[str, int, str], list[ScoreRow]] = defaultdict(list)
    for score in data.scores:
        grouped[score.protocol, score.ipc, score.method].append(score)
    protocols = dict.fromkeys(score.protocol for score in data.scores)
    rows = []
    for protocol in protocols:
        architectures = _architectures(data, protocol)
        averaged = [key for key in architectures if key not in data.summarised]
        for ipc in data.ipcs:
            for method in (info.name for info in data.methods):
                scores = grouped.get((protocol, ipc, method), [])
                for architecture in architectures:
                    chosen = [score for score in scores if score.architecture == architecture]
                    if chosen:
                        rows.append(_row(protocol, ipc, method, architecture, [[score] for score in chosen]))
                if len(averaged) > 1:
                    nets: dict[tuple[int, int], list[ScoreRow]] = defaultdict(list)
                    for score in scores:
                        if score.architecture in averaged:
                            nets[score.seed, score.repeat].append(score)
                    complete = [group for group in nets.values() if len(group) == len(averaged)]
                    if complete:
                        rows.append(_row(protocol, ipc, method, AVERAGE, complete))
    return rows


def boards(data: ReportData) -> list[Board]:
    """Arrange the leaderboard in one table per protocol and IPC, and compare within each column."""
    by_board: dict[tuple[str, int], list[LeaderboardRow]] = defaultdict(list)
    for row in leaderboard(data):
        by_board[row.protocol, row.ipc].append(row)
    columns = {protocol: _architectures(data, protocol) for protocol, _ in by_board}
    columns = {name: (*keys, AVERAGE) if len(keys) > 1 else keys for name, keys in columns.items()}
    return [_board(data, protocol, ipc, columns[protocol], rows) for (protocol, ipc), rows in by_board.items()]


def csv_rows(data: ReportData) -> list[dict[str, Any]]:
    """One row per training: the fields of ``ScoreRow`` without the curve."""
    fields = [field.name for field in dataclasses.fields(ScoreRow) if field.name != "curve"]
    return [{name: getattr(score, name) for name in fields} for score in data.scores]


def leaderboard_csv_rows(data: ReportData) -> list[dict[str, Any]]:
    """One row per entry of the leaderboard and metric: n, mean, standard deviation and 95 % interval."""
    return [
        {
            "run": data.run,
            "protocol": row.protocol,
            "ipc": row.ipc,
            "method": row.method,
            "architecture": row.architecture,
            "metric": metric,
            "n": summary.n,
            "sets": row.sets,
            "mean": summary.mean,
            "std": summary.std,
            "ci95_low": summary.interval[0] if summary.interval else None,
            "ci95_high": summary.interval[1] if summary.interval else None,
        }
        for row in leaderboard(data)
        for metric, summary in row.summaries.items()
    ]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as CSV with a header; None becomes an empty field."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def latex(data: ReportData, metric: str = "last") -> str:
    """The leaderboard as one booktabs table per protocol: mean ± standard deviation, the best mean in bold."""
    by_protocol: dict[str, list[Board]] = defaultdict(list)
    for board in boards(data):
        by_protocol[board.protocol].append(board)
    tables = [_latex_table(data, protocol, group, metric) for protocol, group in by_protocol.items()]
    return "% Needs \\usepackage{booktabs}\n" + "\n".join(tables)


def latex_escape(text: str) -> str:
    """Escape what LaTeX would read as markup."""
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{character: "\\" + character for character in "&%$#_{}"},
    }
    return "".join(special.get(character, character) for character in text)


def _architectures(data: ReportData, protocol: str) -> tuple[str, ...]:
    used = {score.architecture for score in data.scores if score.protocol == protocol}
    return tuple(key for key in data.architectures if key in used)


def _row(
    protocol: str, ipc: int, method: str, architecture: str, trainings: Sequence[Sequence[ScoreRow]]
) -> LeaderboardRow:
    summaries = {}
    for metric, read in _READ.items():
        groups = [[value for score in group if (value := read(score)) is not None] for group in trainings]
        if all(len(values) == len(group) for values, group in zip(groups, trainings, strict=True)):
            summaries[metric] = summarize([sum(values) / len(values) for values in groups])
    sets = {score.set_digest for group in trainings for score in group}
    return LeaderboardRow(protocol, ipc, method, architecture, summaries, len(sets))


def _overlap(first: Summary, second: Summary) -> bool:
    """Whether two 95 % intervals overlap; a single training has none, so nothing can be said."""
    if first.interval is None or second.interval is None:
        return False
    return first.interval[0] <= second.interval[1] and second.interval[0] <= first.interval[1]


def _board(
    data: ReportData, protocol: str, ipc: int, columns: tuple[str, ...], rows: Iterable[LeaderboardRow]
) -> Board:
    found = {(row.method, row.architecture): row for row in rows}
    methods = tuple(info.name for info in data.methods if any(method == info.name for method, _ in found))
    cells, differences = {}, {}
    baselines = tuple(name for name in data.baselines if name in methods and len(methods) > 1)
    for metric in METRICS:
        for column in columns:
            summaries = {
                method: found[method, column].summaries[metric]
                for method in methods
                if (method, column) in found and metric in found[method, column].summaries
            }
            if not summaries:
                continue
            leader = max(summaries, key=lambda method: summaries[method].mean)
            for method, summary in summaries.items():
                close = _overlap(summary, summaries[leader])
                place = "best" if method == leader else "close" if close else ""
                cells[method, column, metric] = Standing(summary, place)
            if column != columns[-1]:
                continue
            for baseline in (name for name in baselines if name in summaries):
                for method, summary in summaries.items():
                    if method == baseline:
                        continue
                    reference = summaries[baseline]
                    clear = summary.interval is not None and reference.interval is not None
                    differences[method, baseline, metric] = Difference(
                        summary.mean - reference.mean, clear and not _overlap(summary, reference)
                    )
    return Board(protocol, ipc, methods, columns, baselines, columns[-1], cells, differences, found)


def _latex_table(data: ReportData, protocol: str, group: Sequence[Board], metric: str) -> str:
    columns = group[0].columns
    names = [latex_escape(column_title(data, column)) for column in columns]
    spans, rules = [], []
    for place, board in enumerate(group):
        first = 2 + place * len(columns)
        spans.append(rf"\multicolumn{{{len(columns)}}}{{c}}{{IPC {board.ipc}}}")
        rules.append(rf"\cmidrule(lr){{{first}-{first + len(columns) - 1}}}")
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_escape(data.title)}: {METRICS[metric]} (\%), protocol {latex_escape(protocol)}. "
        r"Mean $\pm$ standard deviation over trainings; the best mean in bold.}",
        rf"\begin{{tabular}}{{l{'r' * len(columns) * len(group)}}}",
        r"\toprule",
        " & ".join(["", *spans]) + r" \\",
        " ".join(rules),
        " & ".join(["Method", *(names * len(group))]) + r" \\",
        r"\midrule",
    ]
    shown = {method for board in group for method in board.methods}
    for method in (info.name for info in data.methods if info.name in shown):
        cells = [_latex_cell(board.cells.get((method, column, metric))) for board in group for column in columns]
        lines.append(" & ".join([latex_escape(method), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _latex_cell(cell: Standing | None) -> str:
    if cell is None:
        return "--"
    mean = f"{cell.summary.mean:.1f}"
    if cell.place == "best":
        mean = rf"\mathbf{{{mean}}}"
    spread = "" if cell.summary.std is None else rf" \pm {cell.summary.std:.1f}"
    return f"${mean}{spread}$"


def column_title(data: ReportData, column: str) -> str:
    """The heading of a leaderboard column."""
    return "Average" if column == AVERAGE else data.architectures[column]
