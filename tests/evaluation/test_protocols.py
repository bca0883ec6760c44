import dataclasses
import json
import math
import subprocess
import sys
from typing import Any, get_args

import pytest

from workflow_scripts.config import ProtocolSettings
from workflow_scripts.evaluation.architectures import BUILDERS
from workflow_scripts.evaluation.protocols import (
    PROTOCOLS,
    RECIPE_FIELDS,
    STUDENTS,
    ArchitectureName,
    Case,
    Recipe,
    published_epochs,
)

BASIC: dict[str, Any] = {"architecture": "convnet", "resolution": 32, "classes": 10}


def values(protocol: str, architecture: str = "resnet18", ipc: int = 10, classes: int = 10) -> dict[str, Any]:
    return PROTOCOLS[protocol].at(Case(architecture, ipc, classes))


# ---------------------------------------------------------------- every protocol


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_says_everything_that_a_recipe_holds(name: str) -> None:
    own = {"architecture", "width", "classes", "seed"}
    assert set(PROTOCOLS[name].values) == {*RECIPE_FIELDS, "repeats"} - own
    assert set(PROTOCOLS[name].architectures) <= set(STUDENTS)
    for architecture in PROTOCOLS[name].architectures:
        given = values(name, architecture)
        del given["repeats"]
        Recipe(architecture=architecture, classes=10, **given)


def test_every_value_can_be_overridden() -> None:
    for protocol in PROTOCOLS.values():
        assert set(protocol.values) - {"target"} <= set(ProtocolSettings.model_fields)


def test_every_student_can_be_named_and_built() -> None:
    assert set(get_args(ArchitectureName)) == set(STUDENTS) == set(BUILDERS)


# ---------------------------------------------------------------- hard labels (protocols.md 2.1)


@pytest.mark.parametrize(
    ("ipc", "epochs", "epochs_of_100"),
    [
        (1, 3000, 2000),
        (2, 2000, 1300),
        (10, 2000, 1300),
        (11, 1500, 1000),
        (50, 1500, 1000),
        (51, 1000, 600),
        (200, 1000, 600),
        (201, 500, 300),
        (500, 500, 300),
        (501, 300, 200),
    ],
)
def test_hard_epochs(ipc: int, epochs: int, epochs_of_100: int) -> None:
    assert published_epochs(ipc, 10) == published_epochs(ipc, 1000) == epochs
    assert published_epochs(ipc, 100) == epochs_of_100
    assert values("hard-sgd", ipc=ipc)["epochs"] == values("hard-adamw", ipc=ipc)["epochs"] == epochs


def test_epochs_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        published_epochs(0, 10)


def test_hard_label_tables() -> None:
    sgd, adamw = values("hard-sgd"), values("hard-adamw")
    assert [sgd[key] for key in ("optimizer", "learning_rate", "momentum", "weight_decay")] == ["sgd", 0.01, 0.9, 5e-4]
    assert [adamw[key] for key in ("optimizer", "learning_rate", "weight_decay")] == ["adamw", 1e-3, 0.01]
    same = {key for key in sgd if sgd[key] == adamw[key]}
    assert set(sgd) - same == {"optimizer", "learning_rate", "weight_decay", "repeats"}
    assert {
        "resolution": 224,
        "batch_size": 64,
        "schedule": "step",
        "gamma": 0.2,
        "decay": "all",
        "crop_scale": (0.5, 1.0),
        "flip": True,
        "jitter": 0.4,
        "lighting": 0.1,
        "cutmix": 1.0,
        "mix_alpha": 1.0,
        "target": "hard",
        "train_size": "resolution",
        "test_resize": 1.0,
        "evaluations": 100,
    }.items() <= sgd.items()
    thousand = values("hard-sgd", classes=1000)
    assert (thousand["learning_rate"], thousand["weight_decay"], thousand["batch_size"]) == (0.1, 1e-4, 128)
    assert values("hard-sgd", classes=100)["learning_rate"] == 0.01
    assert PROTOCOLS["hard-sgd"].architectures == ("convnet", "resnet_ap10", "resnet18")


def test_the_default_recipe_is_the_hard_label_protocol() -> None:
    given = {key: value for key, value in values("hard-sgd").items() if key not in ("repeats", "resolution", "epochs")}
    assert Recipe(**BASIC, epochs=10) == Recipe(**BASIC, epochs=10, **given)


@pytest.mark.parametrize("epochs", [1, 7, 30, 300, 500, 1000, 1300, 1500, 2000, 3000])
def test_the_hard_rate_drops_after_two_thirds_and_five_sixths(epochs: int) -> None:
    recipe = Recipe(**BASIC, epochs=epochs)
    assert recipe.milestone_epochs() == (2 * epochs // 3, 5 * epochs // 6)
    factors = [recipe.rate_factor(epoch) for epoch in range(epochs)]
    expected = [0.2 ** ((epoch >= 2 * epochs // 3) + (epoch >= 5 * epochs // 6)) for epoch in range(epochs)]
    assert factors == pytest.approx(expected)


# ---------------------------------------------------------------- soft labels (protocols.md 2.2)


@pytest.mark.parametrize(
    ("ipc", "classes", "rded", "d3hr"),
    [
        (1, 10, 10, 10),
        (10, 10, 50, 50),
        (50, 10, 100, 100),
        (10, 100, 100, 50),
        (50, 1000, 200, 100),
        (1, 1000, 20, 10),
    ],
)
def test_online_batches(ipc: int, classes: int, rded: int, d3hr: int) -> None:
    assert values("soft-rded", ipc=ipc, classes=classes)["batch_size"] == rded
    assert values("soft-cao2", ipc=ipc, classes=classes)["batch_size"] == rded
    assert values("soft-d3hr", ipc=ipc, classes=classes)["batch_size"] == d3hr


def test_a_batch_is_no_larger_than_the_set() -> None:
    assert values("soft-rded", ipc=10, classes=3)["batch_size"] == 30
    assert values("soft-fkd", ipc=10, classes=10)["batch_size"] == 100
    assert values("soft-fkd", ipc=10, classes=1000)["batch_size"] == 1024


@pytest.mark.parametrize(
    ("student", "rate"),
    [
        ("resnet18_bn", 1e-3),
        ("resnet101", 1e-3),
        ("convnet_bn", 1e-3),
        ("efficientnet_b0", 2e-3),
        ("mobilenet_v2", 2.5e-3),
        ("vgg11", 5e-4),
        ("alexnet", 1e-4),
        ("deit_ti", 1e-4),
        ("swin_t", 1e-4),
    ],
)
def test_online_rates_by_student(student: str, rate: float) -> None:
    assert values("soft-rded", student)["learning_rate"] == rate
    assert values("soft-fkd", student)["learning_rate"] == 1e-3


def test_soft_label_tables() -> None:
    rded, d3hr, cao2, fkd = (values(f"soft-{name}", "resnet18_bn") for name in ("rded", "d3hr", "cao2", "fkd"))
    shared = {
        "epochs": 300,
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "decay": "matrices",
        "temperature": 20.0,
        "cutmix": 1.0,
        "mix_alpha": 1.0,
        "flip": True,
        "jitter": 0.0,
        "lighting": 0.0,
        "train_size": "native",
        "test_resize": 256 / 224,
        "published_quirks": (),
    }
    for protocol in (rded, d3hr, cao2, fkd):
        assert shared.items() <= protocol.items()
    assert (rded["patches"], rded["crop_scale"], rded["schedule"]) == (2, (0.5, 1.0), "half-cosine")
    assert (d3hr["patches"], d3hr["crop_scale"], d3hr["schedule"]) == (1, (0.08, 1.0), "half-cosine")
    assert (fkd["patches"], fkd["crop_scale"], fkd["schedule"]) == (1, (0.08, 1.0), "cosine")
    assert (rded["target"], d3hr["target"], fkd["target"]) == ("teacher", "teacher", "stored")
    assert (d3hr["repeats"], cao2["repeats"]) == (5, 3)
    assert {**cao2, "repeats": rded["repeats"]} == rded
    assert round(224 * rded["test_resize"]) == 256


def recipe(protocol: str, architecture: str = "resnet18_bn", **changes: Any) -> Recipe:
    given = {**values(protocol, architecture), **changes}
    del given["repeats"]
    return Recipe(architecture=architecture, classes=10, **given)


def test_when_soft_labels_are_tested() -> None:
    assert recipe("soft-rded").evaluation_epochs() == (250, 260, 270, 280, 290, 300)
    assert recipe("soft-d3hr").evaluation_epochs() == tuple(range(292, 301)), "291 to 299, counted from 0"
    assert recipe("soft-fkd").evaluation_epochs() == tuple(range(10, 301, 10))
    assert recipe("glad", "convnet").evaluation_epochs() == (1000,)


def test_cosines_end_at_one_half_and_at_nothing() -> None:
    half, whole = recipe("soft-rded"), recipe("soft-fkd")
    assert half.rate_factor(0) == whole.rate_factor(0) == 1
    assert half.rate_factor(150) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert whole.rate_factor(150) == pytest.approx(0.5)
    assert half.rate_factor(299) == pytest.approx(0.5, abs=0.01)
    assert whole.rate_factor(299) == pytest.approx(0, abs=1e-4)


# ---------------------------------------------------------------- GLaD (protocols.md 2.3)


def test_glad_table() -> None:
    glad = values("glad", "convnet")
    assert {
        "resolution": 128,
        "epochs": 1000,
        "batch_size": 256,
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "warmup-cosine",
        "ema": 0.995,
        "repeats": 5,
        "crop_scale": None,
        "cutmix": 0.0,
        "evaluations": 1,
        "dsa": ("color", "crop", "cutout", "flip", "scale", "rotate"),
    }.items() <= glad.items()
    rates = {name: values("glad", name)["learning_rate"] for name in PROTOCOLS["glad"].architectures}
    assert rates.pop("glad_vgg11") == 1e-4
    assert set(rates.values()) == {1e-3}
    assert set(PROTOCOLS["glad"].unseen) == set(PROTOCOLS["glad"].architectures) - {"convnet"}
    assert len(PROTOCOLS["glad"].unseen) == 4


def test_glad_warms_up_over_half_of_the_epochs() -> None:
    glad = recipe("glad", "convnet")
    assert glad.rate_factor(0) == pytest.approx(1 / 500)
    assert glad.rate_factor(249) == pytest.approx(0.5)
    assert glad.rate_factor(499) == glad.rate_factor(500) == 1
    assert glad.rate_factor(750) == pytest.approx(0.5)
    assert glad.rate_factor(999) == pytest.approx(0, abs=1e-4)
    assert dataclasses.replace(glad, epochs=1).rate_factor(0) == 1


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("epochs", "evaluations", "test_from", "points"),
    [
        (6, 3, 0.0, (2, 4, 6)),
        (7, 3, 0.0, (2, 4, 6, 7)),
        (3, 100, 0.0, (1, 2, 3)),
        (1, 1, 0.0, (1,)),
        (5, 1, 0.0, (5,)),
        (10, 10, 0.8, (9, 10)),
        (4, 30, 1.0, (4,)),
    ],
)
def test_evaluation_points_always_end_with_the_last_epoch(
    epochs: int, evaluations: int, test_from: float, points: object
) -> None:
    recipe = Recipe(**BASIC, epochs=epochs, evaluations=evaluations, test_from=test_from)
    assert recipe.evaluation_epochs() == points


def test_published_evaluation_points() -> None:
    points = Recipe(**BASIC, epochs=2000).evaluation_epochs()
    assert len(points) == 100 and points[:2] == (20, 40) and points[-1] == 2000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"optimizer": "lion"}, "sgd or adamw"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale"),
        ({"jitter": 1.5}, "jitter"),
        ({"cutmix": 0.7, "mixup": 0.7}, "add up to 1"),
        ({"milestones": (2 / 3, 1.5)}, "milestones"),
        ({"ema": 1.0}, "ema"),
        ({"patches": 0}, "patches"),
        ({"temperature": 0.0}, "temperature"),
        ({"train_size": "native", "crop_scale": None}, "native needs crop_scale"),
    ],
)
def test_recipe_names_what_is_out_of_range(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**{**BASIC, "epochs": 10, **change})


def test_a_recipe_can_be_digested() -> None:
    json.dumps(dataclasses.asdict(recipe("soft-rded")), allow_nan=False)


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; import workflow_scripts.evaluation.protocols, workflow_scripts.evaluation.statistics; "
        "sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
