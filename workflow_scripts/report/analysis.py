"""What the report says in words: the summary, pairs that differ in one thing, published numbers beside ours."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workflow_scripts.report import published, tables
from workflow_scripts.report.data import ReportData
from workflow_scripts.report.published import Published


def join(words: Sequence[str], last: str = "and") -> str:
    """Words as a list in a sentence."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}" if words else ""


# ---------------------------------------------------------------- summary


def summary(data: ReportData, boards: Sequence[tables.Board], duration: str) -> list[str]:
    """Three sentences: who leads, which differences are more than chance, and at what cost and with how many copies.

    Args:
        duration: of all computing, for people.
    """
    leaders = [(board, leader) for board in boards if (leader := board.best("last")) is not None]
    if not leaders:
        return []
    several = len({board.protocol for board in boards}) > 1
    led = []
    for board, leader in leaders:
        cell = board.cells[leader, board.compared, "last"]
        interval = f" ({cell.interval[0]:.1f} to {cell.interval[1]:.1f})" if cell.interval else ""
        protocol = f" under {board.protocol}" if several else ""
        led.append(f"{cell.mean:.1f} %{interval} at IPC {board.ipc}{protocol} with {leader}")
    compared = leaders[0][0].compared
    count = len(leaders[0][0].averaged)
    nets = (
        f"averaged over {count} architectures" if compared == tables.AVERAGE else f"of {data.architectures[compared]}"
    )
    chance = 100 / max(len(data.dataset.classes), 1)
    sentences = [f"The best top-1 accuracy {nets} after the last epoch is {join(led)}, where chance is {chance:.1f} %."]
    sentences.append(_apart(*leaders[-1]))
    audited = [one for one in data.measured if one.method not in real_methods(data)]
    images, copies = (int(sum(one.audit.get(key) or 0 for one in audited)) for key in ("images", "copies"))
    found = ""
    if audited:
        share = "None" if not copies else f"{copies:,}".replace(",", "\u202f")
        verb = "is a copy" if copies in (0, 1) else "are copies"
        found = f"{share} of the {images:,} generated images {verb} of a training image, and all".replace(
            ",", "\u202f", 1
        )
    sentences.append(f"{found or 'All'} results together took {duration} of computing.")
    return sentences


def _apart(board: tables.Board, leader: str) -> str:
    ranking = board.rankings["last"]
    pairs = len(ranking.p_values)
    sets = [entry.levels.sets for entry in ranking.entries]
    if not pairs:
        return f"{leader} is the only method, so that there is nothing to compare it with."
    if max(sets) == 1:
        return "Every entry rests on one distilled set, so that no difference can be put down to the methods."
    apart = sum(ranking.distinguishable(*pair) for pair in ranking.p_values)
    close = board.close("last")
    low, high = min(sets), max(sets)
    drawn = f"{high} distilled sets" if low == high else f"{low} to {high} distilled sets"
    shown = close if len(close) <= 5 else [*close[:4], f"{len(close) - 4} more"]
    told = f"cannot be told apart from {join(shown)}" if close else "is distinguishable from every other method"
    chance = f"{apart} of {pairs} differences at IPC {board.ipc} are more than chance"
    return f"With {drawn} of each method, {chance}; {leader} {told}."


def real_methods(data: ReportData) -> set[str]:
    """The methods that choose real images, which are copies by construction."""
    return {method.name for method in data.methods if method.parameters.get("kind") == "coreset"}


# ---------------------------------------------------------------- ablations


@dataclass(frozen=True)
class Ablation:
    """Two methods that differ in one thing: what it is, and the first minus the second at each IPC of each protocol."""

    first: str
    second: str
    what: str
    differences: Mapping[tuple[str, int], tables.Difference]


def ablations(data: ReportData, boards: Sequence[tables.Board], metric: str = "last") -> list[Ablation]:
    """Find the pairs of methods that differ in one component, and their paired differences."""
    found = []
    for second, first in itertools.combinations(data.methods, 2):
        what = one_difference(first.parameters, second.parameters)
        if what is None:
            continue
        differences = {}
        for board in boards:
            scores = tables.collect(data, board.protocol, board.ipc, board.compared, metric)
            if first.name in scores and second.name in scores:
                comparison = tables.paired(scores[first.name], scores[second.name])
                if comparison is not None:
                    clear = (
                        comparison.interval is not None and not comparison.interval[0] <= 0 <= comparison.interval[1]
                    )
                    differences[board.protocol, board.ipc] = tables.Difference(comparison, comparison.difference, clear)
        if differences:
            found.append(Ablation(first.name, second.name, what, differences))
    return found


def one_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """Say in what the parameters of two methods differ, if it is one component; prototypes go with what uses them."""
    if first.get("kind") != second.get("kind") or first.get("kind") == "coreset":
        return None
    changed = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    if "prototypes" in changed and len(changed) > 1 and None in (first.get("prototypes"), second.get("prototypes")):
        changed.discard("prototypes")
    if len(changed) != 1:
        return None
    key = changed.pop()
    mine, theirs = first.get(key), second.get(key)
    if key == "guidance":
        return _guidance(list(mine or ()), list(theirs or ()))
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        return _settings(f"{key}.", mine, theirs)
    return f"{key} {mine} in place of {theirs}"


def _guidance(mine: list[Mapping[str, Any]], theirs: list[Mapping[str, Any]]) -> str | None:
    added = [term for term in mine if term not in theirs]
    removed = [term for term in theirs if term not in mine]
    if len(added) > 1 or len(removed) > 1:
        return None
    if not removed:
        return f"with {added[0]['term']}"
    if not added:
        return f"without {removed[0]['term']}"
    if added[0]["term"] != removed[0]["term"]:
        return f"{added[0]['term']} in place of {removed[0]['term']}"
    return _settings(f"{added[0]['term']}.", added[0], removed[0])


def _settings(prefix: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    if mine.get("kind") != theirs.get("kind"):
        return f"{prefix}kind {mine.get('kind')} in place of {theirs.get('kind')}"
    ours, others = dict(_leaves(mine)), dict(_leaves(theirs))
    changed = [key for key in ours.keys() | others.keys() if ours.get(key) != others.get(key)]
    told = [f"{prefix}{key} {ours.get(key)} in place of {others.get(key)}" for key in sorted(changed)]
    return "; ".join(told)


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------- published results


@dataclass(frozen=True)
class Beside:
    """A published number under the run's conditions, and ours of that method, if there is one, in points."""

    row: Published
    architecture: str
    ipc: int
    ours: tables.Cell | None

    @property
    def gap(self) -> float | None:
        """Ours minus the published."""
        return None if self.ours is None else self.ours.mean - self.row.value


@dataclass(frozen=True)
class Literature:
    """Published numbers that may stand beside ours, those of our methods that may not, and why there are none at all."""

    rows: list[Beside]
    others: list[tuple[Published, str]]
    reason: str


def literature(data: ReportData, boards: Sequence[tables.Board], rows: Sequence[Published] | None = None) -> Literature:
    """Set published numbers beside ours where data, protocol, architecture and IPC match; ours are of the best epoch then."""
    rows = published.load() if rows is None else rows
    subset = data.dataset.subset
    known = [row for row in rows if row.dataset == subset]
    if not known:
        named = f"{data.dataset.source} is no published data set" if subset is None else f"none are known on {subset}"
        return Literature([], [], f"There are no published numbers to compare with: {named}.")
    found: list[Beside] = []
    conditions = []
    for board in boards:
        changes = data.protocol_changes.get(board.protocol, ())
        preset = data.presets.get(board.protocol, board.protocol)
        preset = published.NAMES.get(preset, preset)
        protocol = f"{preset} with another {join(changes)}" if changes else preset
        for column in board.columns:
            if column != tables.AVERAGE:
                condition = (str(subset), protocol, data.architectures[column], board.ipc)
                conditions.append(condition)
                for row in published.matching(known, *condition, selection="best").rows:
                    found.append(Beside(row, condition[2], board.ipc, board.cells.get((row.method, column, "best"))))
    shown = {id(beside.row) for beside in found}
    names = {method.name for method in data.methods} | {"full"}
    others = []
    for row in known:
        if row.method in names and id(row) not in shown:
            reasons = [
                other.reason for c in conditions for other in published.matching([row], *c, selection="best").others
            ]
            if reasons:
                others.append((row, min(reasons, key=lambda reason: (reason.count(";"), len(reason)))))
    return Literature(found, others, "" if found else "No published number was measured under this run's conditions.")


# ---------------------------------------------------------------- classes


def mean_per_class(data: ReportData, ipc: int) -> dict[str, np.ndarray]:
    """Return each method's mean top-1 per class (classes,) at an IPC, over its trainings that recorded it."""
    found: dict[str, np.ndarray] = {}
    for method in (info.name for info in data.methods):
        rows = [s.per_class for s in data.scores if (s.method, s.ipc) == (method, ipc) and s.per_class]
        if rows:
            found[method] = np.mean(np.array(rows, dtype=float), axis=0)
    return found


def telling_classes(accuracies: Mapping[str, np.ndarray], most: int) -> tuple[list[int], bool]:
    """Choose at most ``most`` classes, the worst and the best on average, in that order; and say whether some are left out."""
    mean = np.mean(list(accuracies.values()), axis=0)
    if len(mean) <= most:
        return list(range(len(mean))), False
    order = np.argsort(mean, kind="stable").tolist()
    return [*order[: most // 2], *order[-(most - most // 2) :]], True


def common_confusions(counts: np.ndarray, most: int) -> list[tuple[int, int, int, float]]:
    """Return the most frequent mistakes: true class, taken for, how often, and percent of the true class's images."""
    mistakes = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    order = np.argsort(mistakes, axis=None, kind="stable")[::-1][:most]
    totals = counts.sum(1)
    return [
        (row, column, int(mistakes[row, column]), 100 * float(mistakes[row, column]) / max(int(totals[row]), 1))
        for row, column in (divmod(int(place), len(counts)) for place in order)
        if mistakes[row, column] > 0
    ]
