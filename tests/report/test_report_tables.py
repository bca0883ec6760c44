import csv
import dataclasses
import io
import re
from collections.abc import Callable
from statistics import fmean, stdev

import pytest

from workflow_scripts.report.data import MethodInfo, ReportData
from workflow_scripts.report.tables import (
    boards,
    csv_rows,
    latex,
    latex_escape,
    leaderboard,
    leaderboard_csv_rows,
    to_csv,
)


def with_scores(minimal: Callable[..., ReportData], values: dict[str, list[float]]) -> ReportData:
    """One IPC and architecture, and the given last-epoch accuracies per method, one seed each."""
    first = minimal().scores[0]
    scores = [
        dataclasses.replace(first, method=method, seed=seed, top1_last=value, set_digest=f"{method}{seed}")
        for method, accuracies in values.items()
        for seed, value in enumerate(accuracies)
    ]
    return minimal(methods=tuple(map(MethodInfo, values)), scores=tuple(scores))


def test_places_and_differences(minimal: Callable[..., ReportData]) -> None:
    data = with_scores(minimal, {"random": [10, 11, 12], "dit": [29, 31, 33], "mgd3": [32, 32.5, 33], "single": [31.9]})
    (board,) = boards(data)
    assert board.best("last") == "mgd3"
    assert board.close("last") == ["dit"]
    assert board.baselines == ("random", "dit")
    assert board.columns == ("convnet",)
    against_random = board.differences["mgd3", "random", "last"]
    assert against_random.points == pytest.approx(21.5) and against_random.clear
    against_dit = board.differences["mgd3", "dit", "last"]
    assert against_dit.points == pytest.approx(1.5) and not against_dit.clear
    assert not board.differences["single", "random", "last"].clear
    assert ("random", "random", "last") not in board.differences


def test_average_pairs_architectures_within_a_set(demo: ReportData) -> None:
    lost = next(s for s in demo.scores if s.method == "dit" and s.ipc == 10 and s.seed == 1)
    data = dataclasses.replace(demo, scores=tuple(s for s in demo.scores if s is not lost))
    row = next(r for r in leaderboard(data) if (r.method, r.ipc, r.architecture) == ("dit", 10, "average"))
    kept = [s for s in data.scores if s.method == "dit" and s.ipc == 10]
    expected = [fmean(s.top1_last for s in kept if s.seed == seed) for seed in (0, 2)]
    assert row.summaries["last"].n == 2
    assert row.sets == 2
    assert row.summaries["last"].mean == pytest.approx(fmean(expected))
    assert row.summaries["last"].std == pytest.approx(stdev(expected))


def test_csv(demo: ReportData, minimal: Callable[..., ReportData]) -> None:
    trainings = list(csv.DictReader(io.StringIO(to_csv(csv_rows(demo)))))
    assert len(trainings) == 84
    assert float(trainings[0]["top1_last"]) == demo.scores[0].top1_last
    assert "curve" not in trainings[0]
    cells = list(csv.DictReader(io.StringIO(to_csv(leaderboard_csv_rows(demo)))))
    assert len(cells) == 7 * 2 * 3 * 3
    assert all(float(c["ci95_low"]) <= float(c["mean"]) <= float(c["ci95_high"]) for c in cells)
    single = list(csv.DictReader(io.StringIO(to_csv(leaderboard_csv_rows(minimal())))))
    assert single[0]["std"] == single[0]["ci95_low"] == ""
    assert to_csv([]) == ""


def assert_structure(text: str) -> None:
    """What a LaTeX compiler would stumble over: unbalanced groups, bare specials, rows of the wrong width."""
    body = re.sub(r"(?<!\\)%.*", "", text)
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", body):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    assert len(re.findall(r"(?<!\\)\$", body)) % 2 == 0
    assert not re.search(r"(?<!\\)[_#^~]", body)
    begun, ended = re.findall(r"\\begin\{(\w+)\}", body), re.findall(r"\\end\{(\w+)\}", body)
    assert sorted(begun) == sorted(ended)
    for table in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", body, flags=re.DOTALL):
        columns = len(re.findall(r"\{tabular\}\{([lcr]+)\}", table)[0])
        for row in re.findall(r"^(.*?) \\\\$", table, flags=re.MULTILINE):
            cells = re.split(r"(?<!\\)&", row)
            spans = [int(found[1]) if (found := re.search(r"\\multicolumn\{(\d+)\}", cell)) else 1 for cell in cells]
            assert sum(spans) == columns


@pytest.mark.parametrize("metric", ["last", "best", "top5"])
def test_latex(demo: ReportData, metric: str) -> None:
    text = latex(demo, metric)
    assert_structure(text)
    assert text.count(r"\mathbf") == 6
    for row in leaderboard(demo):
        summary = row.summaries[metric]
        assert f"{summary.mean:.1f}" in text and rf"\pm {summary.std:.1f}$" in text


def test_latex_escapes(minimal: Callable[..., ReportData]) -> None:
    name = "50%_of {a} & b#1 ~ $x^2$ \\"
    data = dataclasses.replace(with_scores(minimal, {name: [1.0], "other": [2.0]}), title=name)
    assert_structure(latex(data))
    assert latex_escape(name) in latex(data)
    assert latex_escape("a_b%") == r"a\_b\%"
