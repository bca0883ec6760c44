import csv
import dataclasses
import io
import re
from collections.abc import Callable
from statistics import fmean, stdev

import numpy as np
import pytest

from workflow_scripts.evaluation.statistics import bootstrap_interval
from workflow_scripts.report.data import MethodInfo, ReportData
from workflow_scripts.report.tables import (
    AVERAGE,
    Scores,
    boards,
    comparison_csv_rows,
    csv_rows,
    interval_of,
    latex,
    latex_escape,
    leaderboard_csv_rows,
    letters,
    markdown,
    to_csv,
    warnings,
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
    values = {"random": [10, 11, 12.1], "dit": [29, 31.2, 33], "mgd3": [32, 32.5, 33], "single": [31.9]}
    (board,) = boards(with_scores(minimal, values))
    assert board.best("last") == "mgd3"
    assert board.close("last") == ["dit", "single"], "one seed says nothing"
    assert board.cells["random", "convnet", "last"].rank == 3, "dit and mgd3 are better"
    assert (
        board.cells["mgd3", "convnet", "last"].letters == "a"
        and board.cells["random", "convnet", "last"].letters == "b"
    )
    assert board.baselines == ("random", "dit")
    assert board.columns == ("convnet",)
    against_random = board.differences["mgd3", "random", "last"]
    assert against_random.points == pytest.approx(32.5 - 33.1 / 3) and against_random.clear
    against_dit = board.differences["mgd3", "dit", "last"]
    assert against_dit.points == pytest.approx(32.5 - 93.2 / 3) and not against_dit.clear
    assert against_dit.comparison.interval[0] < against_dit.points < against_dit.comparison.interval[1]
    assert board.differences["dit", "random", "last"].points == pytest.approx(20.0333, abs=1e-3)
    assert not board.differences["single", "random", "last"].clear
    assert ("random", "random", "last") not in board.differences
    mirrored = board.against_best("dit", "last")
    assert mirrored.points == pytest.approx(against_dit.points)


def test_seeds_that_gave_one_set_are_one_set(minimal: Callable[..., ReportData]) -> None:
    data = with_scores(minimal, {"herding": [40.0, 42.0, 44.0], "random": [30.0, 33.0, 36.0]})
    same = {s.set_digest: "the images" for s in data.scores if s.method == "herding"}
    (board,) = boards(dataclasses.replace(data, contents=same))
    herding, random = (board.cells[method, "convnet", "last"] for method in ("herding", "random"))
    assert (herding.levels.sets, herding.levels.trainings, random.levels.sets) == (1, 3, 3)
    assert herding.levels.spread is None and herding.levels.std_within == pytest.approx(2)
    assert dict(warnings([board])).keys() == {herding.levels.warning, random.levels.warning}
    assert "one distilled set" in herding.levels.warning
    assert board.differences["herding", "random", "last"].comparison.seeds == 3, "pairs stay by seed"


def test_an_interval_ends_where_accuracies_do() -> None:
    near_the_end = {0: [97.0], 1: [98.5], 2: [99.9]}
    for scores in (near_the_end, {seed: [100 - score for score in group] for seed, group in near_the_end.items()}):
        low, high = interval_of(Scores(scores, {seed: seed for seed in scores})) or (None, None)
        plain = bootstrap_interval(scores, np.random.default_rng(0)) or (0, 0)
        assert plain[0] < 0 or plain[1] > 100, "stretched for three sets, it would go beyond"
        assert (low, high) == (max(plain[0], 0.0), min(plain[1], 100.0))


def test_average_pairs_architectures_within_a_set(demo: ReportData) -> None:
    lost = next(s for s in demo.scores if s.method == "dit" and s.ipc == 10 and s.seed == 1)
    data = dataclasses.replace(demo, scores=tuple(s for s in demo.scores if s is not lost))
    cell = next(b for b in boards(data) if b.ipc == 10).cells["dit", AVERAGE, "last"]
    kept = [s for s in data.scores if s.method == "dit" and s.ipc == 10]
    expected = [fmean(s.top1_last for s in kept if s.seed == seed) for seed in (0, 2)]
    assert (cell.levels.sets, cell.levels.trainings) == (2, 2)
    assert cell.mean == pytest.approx(fmean(expected))
    assert cell.levels.spread == pytest.approx(stdev(expected))
    assert cell.interval == bootstrap_interval(
        {s: [v] for s, v in zip((0, 2), expected, strict=True)}, np.random.default_rng(0)
    )


def test_means_over_others_have_a_column_and_are_not_averaged_again(demo: ReportData) -> None:
    extra = tuple(dataclasses.replace(s, architecture="unseen", top1_last=0.0) for s in demo.scores[:3])
    data = dataclasses.replace(
        demo,
        architectures={**demo.architectures, "unseen": "mean of 4 unseen"},
        scores=(*demo.scores, *extra),
        summarised=("unseen",),
    )
    board, plain = boards(data)[0], boards(demo)[0]
    assert board.columns == ("convnet", "resnet_ap10", "unseen", AVERAGE) and len(board.averaged) == 2
    for method in plain.methods:
        assert board.cells[method, AVERAGE, "last"] == plain.cells[method, AVERAGE, "last"]


def test_csv(demo: ReportData, minimal: Callable[..., ReportData]) -> None:
    trainings = list(csv.DictReader(io.StringIO(to_csv(csv_rows(demo)))))
    assert len(trainings) == 84
    assert float(trainings[0]["top1_last"]) == demo.scores[0].top1_last
    assert "curve" not in trainings[0]
    arranged = boards(demo)
    cells = list(csv.DictReader(io.StringIO(to_csv(leaderboard_csv_rows(demo, arranged)))))
    assert len(cells) == 7 * 2 * 3 * 3
    assert all(float(c["ci95_low"]) <= float(c["mean"]) <= float(c["ci95_high"]) for c in cells)
    pairs = list(csv.DictReader(io.StringIO(to_csv(comparison_csv_rows(demo, arranged)))))
    assert len(pairs) == 7 * 6 // 2 * 2 * 3
    assert all(float(p["ci95_low"]) < float(p["difference"]) < float(p["ci95_high"]) for p in pairs)
    single = list(csv.DictReader(io.StringIO(to_csv(leaderboard_csv_rows(minimal(), boards(minimal()))))))
    assert single[0]["sd_sets"] == single[0]["ci95_low"] == ""
    assert to_csv([]) == ""


def test_letters() -> None:
    assert letters((0, 2)) == "a c" and letters((25, 26, 27)) == "z aa ab"


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
def test_latex_and_markdown(demo: ReportData, metric: str) -> None:
    arranged = boards(demo)
    text, plain = latex(demo, arranged, metric), markdown(demo, arranged, metric)
    assert_structure(text)
    assert text.count(r"\mathbf") == 6 and plain.count("**") == 12
    rows = [line.split("|")[1:-1] for line in plain.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {7} and [row[0].strip() for row in rows[2:]] == [m.name for m in demo.methods]
    for board in arranged:
        for (_, _, of), cell in board.cells.items():
            if of == metric:
                assert f"{cell.mean:.1f} ± {cell.levels.spread:.1f}" in plain
                assert f"{cell.mean:.1f}" in text and rf"\pm {cell.levels.spread:.1f}$" in text


def test_latex_escapes(minimal: Callable[..., ReportData]) -> None:
    name = "50%_of {a} & b#1 ~ $x^2$ \\"
    data = dataclasses.replace(with_scores(minimal, {name: [1.0], "other": [2.0]}), title=name)
    assert_structure(latex(data, boards(data)))
    assert latex_escape(name) in latex(data, boards(data))
    assert latex_escape("a_b%") == r"a\_b\%"
    assert "50%\\_of {a} & b\\#1" in markdown(data, boards(data))
