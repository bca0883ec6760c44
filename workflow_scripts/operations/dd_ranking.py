"""``stillhouse dd-ranking``: DD-Ranking's scores from a run's trainings, against random real sets under the same protocols."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table

from workflow_scripts.errors import ConfigError, DataError
from workflow_scripts.evaluation.dd_ranking import augmentation_robust_score, label_robust_score
from workflow_scripts.recipes import Recipes


@dataclass(frozen=True)
class Ranked:
    """One method's scores at one IPC with one student, in [0, 1]; 0.2689 is neither gain nor loss.

    Attributes:
        lrs: Label-robust score.
        ars: Augmentation-robust score, if the run has a protocol without augmentation.
    """

    method: str
    ipc: int
    architecture: str
    lrs: float
    ars: float | None


def dd_ranking(recipes: Recipes, *, last: bool, as_json: bool) -> None:
    """Print the scores, best methods first within each IPC and student."""
    rows = ranked(recipes, last=last)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("IPC", "student", "method", "LRS", "ARS"):
        table.add_column(heading, justify="right" if heading in ("IPC", "LRS", "ARS") else "left")
    for row in rows:
        ars = "-" if row.ars is None else f"{100 * row.ars:.1f}"
        table.add_row(str(row.ipc), row.architecture, row.method, f"{100 * row.lrs:.1f}", ars)
    Console().print(table)


def ranked(recipes: Recipes, *, last: bool = False) -> list[Ranked]:
    """Return the scores of every method but the random sets.

    Accuracies are means over seeds and repeats, as fractions.

    Args:
        last: take the last epoch in place of the best.

    Raises:
        ConfigError: evaluation.dd_ranking is not set.
        DataError: a training has no score yet.
    """
    ranking = recipes.config.evaluation.dd_ranking
    if ranking is None:
        raise ConfigError(
            "evaluation.dd_ranking: not set. Name the protocols: {hard: hard-sgd, own: soft-rded, real: {resnet18_bn: 69.8}}"
        )
    means = _means(recipes, "top1_last" if last else "top1_best")
    rows = []
    for method, ipc, student, protocol in means:
        if protocol != ranking.own or method == ranking.baseline or student not in ranking.real:
            continue

        def top1(name: str, protocol: str, ipc: int = ipc, student: str = student) -> float:
            if (name, ipc, student, protocol) not in means:
                raise ConfigError(f"evaluation.dd_ranking: {student} is not a student of {protocol}")
            return means[name, ipc, student, protocol]

        lrs = label_robust_score(
            real_hard=ranking.real[student] / 100,
            synthetic_hard=top1(method, ranking.hard),
            synthetic=top1(method, ranking.own),
            random=top1(ranking.baseline, ranking.own),
        )
        ars = None
        if ranking.plain is not None:
            ars = augmentation_robust_score(
                synthetic_augmented=top1(method, ranking.own),
                random_augmented=top1(ranking.baseline, ranking.own),
                synthetic_plain=top1(method, ranking.plain),
                random_plain=top1(ranking.baseline, ranking.plain),
            )
        rows.append(Ranked(method, ipc, student, lrs, ars))
    return sorted(rows, key=lambda row: (row.ipc, row.architecture, -row.lrs))


def _means(recipes: Recipes, key: str) -> dict[tuple[str, int, str, str], float]:
    """Return the mean top-1, as a fraction, by method, IPC, student and protocol."""
    found = defaultdict(list)
    for method in recipes.config.compare:
        for ipc in recipes.config.ipc:
            for training in recipes.trainings(method, ipc):
                path = recipes.training_path(training)
                if not path.exists():
                    raise DataError(f"{method} IPC {ipc}, {training.protocol}: not evaluated yet. Run snakemake first.")
                top1 = json.loads(path.read_text())[key] / 100
                found[method, ipc, training.architecture.name, training.protocol].append(top1)
    return {cell: fmean(values) for cell, values in found.items()}
