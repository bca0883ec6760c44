import subprocess
import sys

import pytest

from workflow_scripts.evaluation.protocols import Recipe, hard_label_settings, published_epochs

BASIC = {"architecture": "convnet", "resolution": 32, "classes": 10}


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
def test_published_epochs(ipc: int, epochs: int, epochs_of_100: int) -> None:
    assert published_epochs(ipc, 10) == published_epochs(ipc, 1000) == epochs
    assert published_epochs(ipc, 100) == epochs_of_100


def test_published_epochs_rejects_nothing() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        published_epochs(0, 10)


def test_sgd_is_the_default_and_changes_for_1000_classes() -> None:
    assert Recipe(**BASIC, epochs=10, **hard_label_settings("sgd", 10)) == Recipe(**BASIC, epochs=10)
    thousand = hard_label_settings("sgd", 1000)
    assert (thousand["learning_rate"], thousand["weight_decay"], thousand["batch_size"]) == (0.1, 1e-4, 128)
    assert hard_label_settings("sgd", 100)["learning_rate"] == 0.01


def test_adamw_variant() -> None:
    assert hard_label_settings("adamw", 10) == {
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "batch_size": 64,
    }
    assert hard_label_settings("adamw", 1000)["batch_size"] == 128
    with pytest.raises(ValueError, match="choose sgd or adamw"):
        hard_label_settings("lion", 10)  # type: ignore[arg-type]


@pytest.mark.parametrize("epochs", [1, 7, 30, 300, 500, 1000, 1300, 1500, 2000, 3000])
def test_milestones_are_floors_of_fractions(epochs: int) -> None:
    assert Recipe(**BASIC, epochs=epochs).milestone_epochs() == (2 * epochs // 3, 5 * epochs // 6)


@pytest.mark.parametrize(
    ("epochs", "evaluations", "points"),
    [(6, 3, (2, 4, 6)), (7, 3, (2, 4, 6, 7)), (3, 100, (1, 2, 3)), (1, 1, (1,)), (5, 1, (5,))],
)
def test_evaluation_points_always_end_with_the_last_epoch(epochs: int, evaluations: int, points: object) -> None:
    assert Recipe(**BASIC, epochs=epochs, evaluations=evaluations).evaluation_epochs() == points


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
        ({"jitter": (0.4, 0.4)}, "jitter"),
        ({"cutmix_probability": 1.5}, "cutmix_probability"),
        ({"milestones": (2 / 3, 1.5)}, "milestones"),
    ],
)
def test_recipe_names_what_is_out_of_range(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**{**BASIC, "epochs": 10, **change})


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; import workflow_scripts.evaluation.protocols, workflow_scripts.evaluation.statistics; "
        "sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
