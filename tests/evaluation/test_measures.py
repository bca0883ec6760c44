"""All metrics of a set in one pass over the real images, against the same metrics on everything at once."""

from collections.abc import Callable

import numpy as np
import pytest

from workflow_scripts.evaluation import measures
from workflow_scripts.evaluation.measures import SetMeasures, audit_summary, measure, metrics, spread
from workflow_scripts.evaluation.set_metrics import (
    diversity,
    frechet_distance,
    kernel_distance,
    mean_distance,
    mmd,
    neighbourhoods,
    representativeness,
    vendi_score,
)

CLASSES, REAL, WIDTH = 3, 20, 4


def real(label: int) -> np.ndarray:
    return np.random.default_rng(label).normal(4 * label, 1, (REAL, WIDTH)).astype(np.float32)


def synthetic(ipc: int, seed: int = 9) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat(np.arange(CLASSES), ipc)
    noise = np.random.default_rng(seed).normal(0, 1.2, (len(labels), WIDTH))
    return (noise + 4 * labels[:, None]).astype(np.float32), labels


def one(features: np.ndarray, labels: np.ndarray, of: Callable[[int], np.ndarray] = real):  # type: ignore[no-untyped-def]
    return measure({"a": SetMeasures(features, labels, "latents")}, CLASSES, of)["a"]


def test_one_pass_is_the_metrics_on_everything() -> None:
    features, labels = synthetic(8)
    values, warnings, _ = one(features, labels)
    everything = np.concatenate([real(label) for label in range(CLASSES)])
    assert values["frechet"] == pytest.approx(frechet_distance(everything, features).distance)
    assert values["kernel"] == pytest.approx(kernel_distance(everything, features))
    assert values["mean_euclidean"] == pytest.approx(mean_distance(everything, features).euclidean)
    per_class = [(real(label), features[labels == label]) for label in range(CLASSES)]
    for key, metric in {
        "mmd": mmd,
        "representativeness": representativeness,
        "precision": lambda a, b: neighbourhoods(a, b).precision,
        "recall": lambda a, b: neighbourhoods(a, b).recall,
        "density": lambda a, b: neighbourhoods(a, b).density,
        "coverage": lambda a, b: neighbourhoods(a, b).coverage,
        "vendi": lambda _, b: vendi_score(b),
        "diversity": lambda _, b: diversity(b),
    }.items():
        assert values[key] == pytest.approx(np.mean([metric(a, b) for a, b in per_class])), key  # type: ignore[operator]
    assert set(values) == set(metrics("latents"))
    assert set(warnings) <= set(values) and "frechet" in warnings and "noisy at 24 images" in warnings["kernel"]


def test_sets_do_not_influence_each_other() -> None:
    sets = {str(ipc): synthetic(ipc) for ipc in (1, 8)}
    together = measure({k: SetMeasures(*v, "latents") for k, v in sets.items()}, CLASSES, real)
    for key, found in sets.items():
        values, warnings, audit = one(*found)
        assert (values, warnings) == together[key][:2]
        np.testing.assert_array_equal(audit.distances, together[key][2].distances)


def test_what_one_image_per_class_cannot_tell() -> None:
    values, warnings, _ = one(*synthetic(1))
    assert {"mmd", "diversity", "recall"} & values.keys() == set()
    assert {"mmd", "diversity", "recall", "coverage", "frechet"} <= warnings.keys()
    assert values["vendi"] == pytest.approx(1)


def test_few_real_images_leave_neighbourhoods_out() -> None:
    values, warnings, _ = one(*synthetic(2), lambda label: real(label)[:4])
    assert "precision" not in values and "needs more than 5 real images" in warnings["precision"]


def test_copies_are_found_whatever_their_class() -> None:
    features, labels = synthetic(4)
    features[0] = real(2)[7]  # a copy of another class
    features[5] = real(1)[3]
    _, _, audit = one(features, labels)
    assert (audit.labels[0], audit.nearest[0], audit.distances[0]) == (2, 7, 0)
    assert (audit.labels[5], audit.nearest[5], audit.ratios[5]) == (1, 3, 0)
    assert set(audit.closest()[:2].tolist()) == {0, 5}
    summary = audit_summary(audit, labels)
    assert summary["copies"] == 2 and summary["images"] == 12
    assert summary["other_class_percent"] == pytest.approx(100 / 12)


def test_samples_bound_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "KERNEL_SAMPLE", 9)
    monkeypatch.setattr(measures, "TRANSPORT_CLASSES", 2)
    monkeypatch.setattr(measures, "TRANSPORT_REAL", 5)
    features, labels = synthetic(8)
    values, warnings, _ = one(features, labels)
    rows = np.concatenate([real(label)[spread(REAL, 3)] for label in range(CLASSES)])
    assert values["kernel"] == pytest.approx(kernel_distance(rows, features[spread(24, 9)]))
    assert "on 2 classes" in warnings["otdd"] and values["otdd"] > 0


def test_names_depend_on_the_features() -> None:
    assert metrics("inception")["frechet"].title == "FID" and metrics("inception")["kernel"].title == "KID"
    for space in ("latents", "inception-torchvision"):
        assert metrics(space)["frechet"].title == f"Fréchet distance ({space})"
        assert not {"FID", "KID"} & {metric.title for metric in metrics(space).values()}


def test_spread() -> None:
    assert spread(10, 3).tolist() == [0, 4, 9] and spread(2, 5).tolist() == [0, 1] and spread(1, 1).tolist() == [0]
