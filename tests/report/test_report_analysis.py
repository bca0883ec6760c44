import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from workflow_scripts.report.analysis import (
    ablations,
    common_confusions,
    literature,
    mean_per_class,
    one_difference,
    summary,
    telling_classes,
)
from workflow_scripts.report.data import DatasetSummary, MethodInfo, ReportData
from workflow_scripts.report.published import Published
from workflow_scripts.report.tables import boards

MODE = {"term": "mode", "scale": 0.1}
TANGENT = {"term": "tangent", "scale": 0.1, "kappa": 0.0}
TRANSPORT = {"term": "transport", "scale": 0.5, "sweeps": 5}


def diffusion(**changes: object) -> dict:
    plain = {
        "kind": "diffusion",
        "start": {"kind": "noise"},
        "prototypes": None,
        "guidance": [],
        "sampler": {"steps": 50},
    }
    return plain | changes


KMEANS = {"kind": "kmeans"}


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        (diffusion(guidance=[MODE], prototypes=KMEANS), diffusion(), "with mode"),
        (diffusion(), diffusion(guidance=[TRANSPORT]), "without transport"),
        (diffusion(guidance=[TANGENT], prototypes=KMEANS), diffusion(guidance=[MODE], prototypes=KMEANS),
         "tangent in place of mode"),
        (diffusion(guidance=[TANGENT | {"kappa": 0.25}]), diffusion(guidance=[TANGENT]), "tangent.kappa 0.25 in place of 0.0"),
        (diffusion(guidance=[MODE, TRANSPORT]), diffusion(guidance=[MODE]), "with transport"),
        (diffusion(sampler={"steps": 25, "kind": "ddim"}), diffusion(sampler={"steps": 50, "kind": "ddim"}),
         "sampler.steps 25 in place of 50"),
        (diffusion(start={"kind": "gaussian", "t": 600}), diffusion(), "start.kind gaussian in place of noise"),
        (diffusion(prototypes={"kind": "leaves"}, guidance=[MODE]), diffusion(prototypes=KMEANS, guidance=[MODE]),
         "prototypes.kind leaves in place of kmeans"),
        (diffusion(prototypes={"kind": "leaves"}, guidance=[TANGENT]), diffusion(prototypes=KMEANS, guidance=[MODE]), None),
        (diffusion(guidance=[TANGENT, TRANSPORT]), diffusion(), None),
        (diffusion(guidance=[MODE], sampler={"steps": 25}), diffusion(), None),
        (diffusion(), diffusion(), None),
        ({"kind": "coreset", "select": "random"}, {"kind": "coreset", "select": "kmeans"}, None),
        ({"kind": "coreset", "select": "random"}, diffusion(), None),
    ],
)  # fmt: skip
def test_pairs_that_differ_in_one_thing(first: dict, second: dict, what: str | None) -> None:
    assert one_difference(first, second) == what


def test_ablations_are_paired_by_seed(minimal: Callable[..., ReportData]) -> None:
    first = minimal().scores[0]
    values = {"dit": [50.0, 60.0, 70.0], "mgd3": [52.0, 61.0, 73.0]}
    scores = tuple(
        dataclasses.replace(first, method=method, seed=seed, top1_last=value, set_digest=f"{method}{seed}")
        for method, row in values.items()
        for seed, value in enumerate(row)
    )
    methods = (
        MethodInfo("dit", "", diffusion()),
        MethodInfo("mgd3", "", diffusion(guidance=[MODE], prototypes=KMEANS)),
    )
    data = minimal(methods=methods, scores=scores)
    (pair,) = ablations(data, boards(data))
    assert (pair.first, pair.second, pair.what) == ("mgd3", "dit", "with mode")
    difference = pair.differences["hard-sgd", 1]
    assert difference.points == pytest.approx(2.0) and difference.comparison.seeds == 3
    assert not difference.clear, "t = 2 / (1 / sqrt 3) = 3.46 is less than 4.30"


# ---------------------------------------------------------------- published numbers


def published(**changes: object) -> Published:
    plain = {
        "method": "mgd3", "dataset": "imagewoof", "ipc": 1, "architecture": "ResNet-18", "protocol": "hard-sgd",
        "selection": "best", "value": 38.5, "spread": 2.5, "source": "a table", "trust": "primary",
    }  # fmt: skip
    return Published(**(plain | changes))  # type: ignore[arg-type]


def woof(minimal: Callable[..., ReportData], **changes: object) -> ReportData:
    row = dataclasses.replace(
        minimal().scores[0], method="mgd3", architecture="resnet18", top1_best=40.0, top1_last=39.0
    )
    content = {
        "dataset": DatasetSummary("imagefolder", ("a", "b"), (1, 1), (1, 1), subset="imagewoof"),
        "methods": (MethodInfo("mgd3"),),
        "architectures": {"resnet18": "ResNet-18"},
        "scores": (row,),
    }
    return minimal(**(content | changes))


def test_published_numbers_stand_beside_ours_only_under_the_same_conditions(minimal: Callable[..., ReportData]) -> None:
    rows = [
        published(),
        published(method="dit", value=30.0),
        published(method="full", ipc=None, value=89.3, spread=None),
        published(ipc=10),
        published(protocol="hard-adamw", architecture="ConvNet-6"),
        published(method="minimax", protocol="hard-adamw"),
        published(dataset="imagenette"),
    ]
    data = woof(minimal)
    found = literature(data, boards(data), rows)
    assert [(beside.row.method, beside.gap) for beside in found.rows] == [("mgd3", 1.5), ("dit", None), ("full", None)]
    assert [(row.ipc, reason) for row, reason in found.others] == [
        (10, "IPC 10, not 1"),
        (1, "protocol hard-adamw, not hard-sgd; architecture ConvNet-6, not ResNet-18"),
    ], "of our methods, on our data"
    assert found.reason == ""


def test_a_changed_protocol_matches_nothing_and_says_why(minimal: Callable[..., ReportData]) -> None:
    data = woof(minimal, protocol_changes={"hard-sgd": ("epochs", "flip")})
    found = literature(data, boards(data), [published()])
    assert not found.rows and "No published number" in found.reason
    assert found.others[0][1] == "protocol hard-sgd, not hard-sgd with another epochs and flip"


def test_a_variant_of_a_published_protocol_goes_by_its_name_in_print(minimal: Callable[..., ReportData]) -> None:
    row = dataclasses.replace(woof(minimal).scores[0], protocol="mine")
    data = woof(minimal, scores=(row,), presets={"mine": "soft-d3hr"})
    found = literature(data, boards(data), [published(protocol="soft-online"), published()])
    assert [beside.row.protocol for beside in found.rows] == ["soft-online"]


def test_data_that_nobody_published_on(minimal: Callable[..., ReportData]) -> None:
    assert "digits is no published data set" in literature(minimal(), boards(minimal())).reason
    data = woof(minimal)
    assert "none are known on imagewoof" in literature(data, boards(data), [published(dataset="imagenette")]).reason


# ---------------------------------------------------------------- sentences and classes


def test_a_summary_of_one_training_claims_nothing(minimal: Callable[..., ReportData]) -> None:
    sentences = summary(minimal(), boards(minimal()), "5 s")
    assert len(sentences) == 3
    assert (
        "nothing to compare it with" in sentences[1] and sentences[2] == "All results together took 5 s of computing."
    )
    two = tuple(dataclasses.replace(minimal().scores[0], method=m, set_digest=m) for m in ("random", "dit"))
    data = minimal(methods=(MethodInfo("random"), MethodInfo("dit")), scores=two)
    assert "no difference can be put down to the methods" in summary(data, boards(data), "5 s")[1]
    assert summary(minimal(scores=()), [], "0 s") == []


def test_classes_worth_telling(minimal: Callable[..., ReportData]) -> None:
    scores = tuple(
        dataclasses.replace(minimal().scores[0], seed=seed, per_class=tuple(range(seed, 100 + seed))) for seed in (0, 2)
    )
    accuracies = mean_per_class(minimal(scores=scores), 1)
    np.testing.assert_allclose(accuracies["random"], np.arange(100) + 1)
    assert telling_classes(accuracies, 4) == ([0, 1, 98, 99], True)
    assert telling_classes(accuracies, 100) == (list(range(100)), False)
    assert mean_per_class(minimal(), 1) == {}


def test_common_confusions() -> None:
    counts = np.array([[5, 3, 2], [0, 10, 0], [1, 4, 5]])
    assert common_confusions(counts, 3) == [(2, 1, 4, 40.0), (0, 1, 3, 30.0), (0, 2, 2, 20.0)]
    assert len(common_confusions(counts, 99)) == 4
