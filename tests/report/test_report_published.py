import re
from collections import defaultdict
from pathlib import Path

import pytest

from workflow_scripts.data.imagenet import subset_names
from workflow_scripts.report.published import FILE, PROTOCOLS, TRUST, Published, load, matching

ROWS = load()
OTHER_DATASETS = {"cifar10", "cifar100"}


def value(method: str, dataset: str, ipc: int | None, architecture: str, protocol: str, trust: str) -> float:
    found = [
        row.value
        for row in ROWS
        if (row.method, row.dataset, row.ipc, row.architecture, row.protocol, row.trust)
        == (method, dataset, ipc, architecture, protocol, trust)
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("row", "top1"),
    [
        (("dmgd", "imagewoof", 10, "ResNetAP-10", "hard-adamw", "primary"), 40.8),
        (("dmgd", "imagenette", 50, "ResNetAP-10", "hard-adamw", "primary"), 80.6),
        (("mgd3", "imagenette", 10, "ResNetAP-10", "hard-sgd", "primary"), 66.4),
        (("mgd3", "imagewoof", 100, "ResNet-18", "hard-sgd", "primary"), 68.8),
        (("mgd3", "imagenet1k", 50, "ResNet-101", "soft-online", "primary"), 67.7),
        (("minimax", "imagewoof", 10, "ResNetAP-10", "hard-sgd", "quoted"), 39.2),
        (("random", "imagenet100", 20, "ConvNet-6", "hard-sgd", "quoted"), 24.8),
        (("manifoldgd", "imagenette", 50, "ResNetAP-10", "hard-sgd", "secondary"), 78.4),
        (("manifoldgd", "imagenet1k", 1, "ConvNet-6", "hard-sgd", "secondary"), 3.1),
        (("d3hr", "imagenet1k", 10, "ResNet-18", "soft-online", "secondary"), 44.3),
        (("d3hr", "imagenet1k", 100, "ResNet-101", "soft-online", "secondary"), 68.1),
        (("sre2l", "imagenet1k", 50, "ResNet-18", "soft-stored", "quoted"), 46.8),
        (("rded", "imagenet1k", 50, "ResNet-18", "soft-online", "secondary"), 56.5),
        (("ld3m-dm", "imagenet-a", 10, "mean of 4 unseen", "glad-128", "primary"), 57.0),
        (("full", "imagewoof", None, "ResNet-18", "hard-sgd", "quoted"), 89.3),
    ],
)
def test_known_numbers(row: tuple[str, str, int | None, str, str, str], top1: float) -> None:
    assert value(*row) == top1


def test_values_are_plausible() -> None:
    assert len(ROWS) > 700
    for row in ROWS:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.method), row
        assert 1 < row.value < 95, row
        assert row.spread is None or row.spread < 9, row
        assert row.ipc in (None, 1, 10, 20, 50, 70, 100), row
        assert row.dataset in {*subset_names(), *OTHER_DATASETS}, row
        assert row.selection == "best", row


def test_no_number_is_there_twice() -> None:
    by_condition = defaultdict(list)
    for row in ROWS:
        by_condition[row.method, row.dataset, row.ipc, row.architecture, row.protocol, row.selection].append(row)
    for rows in by_condition.values():
        assert len({row.source for row in rows}) == len(rows), rows
        assert len([row for row in rows if row.trust in ("primary", "secondary", "quoted")]) <= 1, rows


def test_no_distilled_set_beats_the_full_data() -> None:
    full = {(row.dataset, row.architecture, row.protocol): row.value for row in ROWS if row.ipc is None}
    for row in ROWS:
        assert row.value <= full.get((row.dataset, row.architecture, row.protocol), 100), row


def test_more_images_are_better_in_one_source() -> None:
    curves = defaultdict(list)
    for row in ROWS:
        if row.ipc is not None:
            curves[row.method, row.dataset, row.architecture, row.protocol, row.source].append((row.ipc, row.value))
    falling = [
        key[:3] for key, points in curves.items() if sorted(points) != sorted(points, key=lambda point: point[1])
    ]
    assert falling == [("dm", "imagewoof", "ResNet-18")]  # as its tables print it


def test_every_grade_and_protocol_is_used_and_rows_are_sorted() -> None:
    assert {row.trust for row in ROWS} == set(TRUST)
    assert {row.protocol for row in ROWS} == set(PROTOCOLS)
    places = [(row.dataset, row.protocol, row.ipc or 10**9, row.architecture, row.method, row.source) for row in ROWS]
    assert places == sorted(places)


def test_matching_rows_are_those_of_the_conditions() -> None:
    found = matching(ROWS, "imagewoof", "hard-sgd", "ResNetAP-10", 10)
    assert {"random", "dit", "minimax", "mgd3", "manifoldgd", "tgdd", "full"} <= {row.method for row in found.rows}
    assert {row.ipc for row in found.rows} == {10, None}
    assert {row.protocol for row in found.rows} == {"hard-sgd"}
    assert "dmgd" not in {row.method for row in found.rows}
    assert len(found.rows) + len(found.others) == len(ROWS)


def row(**changes: object) -> Published:
    plain = {
        "method": "mgd3",
        "dataset": "imagewoof",
        "ipc": 10,
        "architecture": "ResNet-18",
        "protocol": "hard-sgd",
        "selection": "best",
        "value": 38.5,
        "spread": 2.5,
        "source": "a table",
        "trust": "primary",
    }
    return Published(**(plain | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset": "imagenette"}, "data set imagenette, not imagewoof"),
        ({"protocol": "hard-adamw"}, "protocol hard-adamw, not hard-sgd"),
        ({"architecture": "ConvNet-6"}, "architecture ConvNet-6, not ResNet-18"),
        ({"ipc": 50}, "IPC 50, not 10"),
        ({"selection": "last"}, "epoch last, not best"),
        ({"trust": "unverified"}, "unverified: from memory or an uncertain transcription: not to be quoted"),
        ({"ipc": 50, "protocol": "own"}, "protocol own, not hard-sgd; IPC 50, not 10"),
    ],
)
def test_a_row_that_does_not_match_says_why(changes: dict[str, object], reason: str) -> None:
    found = matching([row(**changes), row()], "imagewoof", "hard-sgd", "ResNet-18", 10, selection="best")
    assert found.rows == (row(),)
    assert [(other.row, other.reason) for other in found.others] == [(row(**changes), reason)]


def test_own_and_unstated_protocols_match_nothing() -> None:
    for protocol in ("own", "soft-unstated"):
        found = matching([row(protocol=protocol)], "imagewoof", protocol, "ResNet-18", 10)
        assert not found.rows
        assert "need not be that of another paper" in found.others[0].reason


def test_either_epoch_matches_unless_one_is_asked_for() -> None:
    rows = [row(), row(selection="last")]
    assert len(matching(rows, "imagewoof", "hard-sgd", "ResNet-18", 10).rows) == 2
    assert len(matching(rows, "imagewoof", "hard-sgd", "ResNet-18", 10, trust=("secondary",)).rows) == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("10,ResNet-18", "ten,ResNet-18", "line 2: invalid literal"),
        ("10,ResNet-18", ",ResNet-18", "line 2: ipc is ''"),
        ("hard-sgd", "hard", "line 2: protocol is 'hard', which is none of"),
        ("38.5", "385", "line 2: value 385 or spread 2.5 is not a percentage"),
        ("38.5", "nan", "is not a percentage"),
        ("primary", "sure", "line 2: trust is 'sure'"),
        ("a table", "", "line 2: source is ''"),
        (",primary", "", "not one value per column"),
        ("primary", "primary,more", "not one value per column"),
        ("method,", "name,", "the columns must be"),
    ],
)
def test_a_broken_row_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    header = FILE.read_text().splitlines()[0]
    text = f"{header}\nmgd3,imagewoof,10,ResNet-18,hard-sgd,best,38.5,2.5,a table,primary\n"
    path = tmp_path / "rows.csv"
    path.write_text(text)
    assert load(path) == (row(),)
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=re.escape(message)):
        load(path)
