"""What is measured of a distilled set against the real images, while those pass class by class.

Most of it is conditional on the class: a number for each class, averaged over them. What compares whole distributions
(Fréchet and kernel distance, means, transport) is of all classes together, as published. Real features of one class at a time
are held, beside moments and a sample of all, so that memory does not grow with the real images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from workflow_scripts.evaluation.set_metrics import (
    Audit,
    Features,
    Floats,
    Labels,
    Memorisation,
    Moments,
    Reference,
    coverage_within,
    dataset_distance,
    diversity,
    frechet_distance,
    kernel_distance,
    mean_distance,
    metric_name,
    mmd,
    neighbourhoods,
    representativeness,
    vendi_score,
)

NEIGHBOURS = 5
COPY = 0.01
"""A synthetic image is called a copy below this share of the usual distance between real images: rounding, not likeness."""
KERNEL_SAMPLE = 5000
"""Most images of either side in the kernel distance."""
TRANSPORT_CLASSES, TRANSPORT_REAL, TRANSPORT_SYNTHETIC = 10, 200, 100
"""Most classes, and most images of each, in the data-set distance."""


Scope = Literal["all classes", "per class"]


@dataclass(frozen=True)
class Metric:
    """How a metric is called, which way is better, and what it says."""

    title: str
    better: Literal["lower", "higher"]
    scope: Scope
    meaning: str


def metrics(space: str) -> dict[str, Metric]:
    """Return the metrics of a feature space in the order in which tables show them."""
    together: Scope = "all classes"
    each: Scope = "per class"
    return {
        "frechet": Metric(
            metric_name("frechet", space), "lower", together, "squared, between Gaussians fitted to both sets"
        ),
        "kernel": Metric(
            _capital(metric_name("kernel", space)), "lower", together,
            "squared MMD with a cubic kernel, unbiased, at times negative",
        ),
        "mmd": Metric("MMD²", "lower", each, "with a Gaussian kernel, unbiased, at times negative"),
        "mean_euclidean": Metric("Distance of means", "lower", together, "Euclidean"),
        "mean_cosine": Metric("Cosine of means", "higher", together, "1 where the means have one direction"),
        "otdd": Metric("OT data-set distance", "lower", together, "transport between labelled sets, on a sample"),
        "precision": Metric("Precision", "higher", each, "share of synthetic images that lie among real ones"),
        "recall": Metric("Recall", "higher", each, "share of real images that lie among synthetic ones"),
        "density": Metric("Density", "higher", each, "how many real neighbourhoods hold a synthetic image; real images: 1"),
        "coverage": Metric("Coverage", "higher", each, "share of real images with a synthetic one in their neighbourhood"),
        "coverage_within": Metric(
            "Coverage (one radius)", "higher", each, "share of real images with a synthetic one as near as the median "
            "nearest real one",
        ),
        "representativeness": Metric(
            "Representativeness", "higher", each, "ManifoldGD's: cosine of the synthetic image that is farthest from all real"
        ),
        "diversity": Metric("Diversity", "higher", each, "ManifoldGD's: one minus the largest cosine of two images"),
        "vendi": Metric("Vendi score", "higher", each, "effective number of different images"),
    }  # fmt: skip


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


class RealImages:
    """What is kept of the real images of all classes: moments, and samples for the metrics that need images themselves."""

    def __init__(self, classes: int):
        self.moments = Moments()
        self._per_class = -(-KERNEL_SAMPLE // classes)
        self._transported = set(spread(classes, TRANSPORT_CLASSES).tolist())
        self._sample: list[Floats] = []
        self._transport: dict[int, Floats] = {}

    def add(self, reference: Reference, label: int) -> None:
        """Take in a class."""
        features = reference.features
        self.moments.add(features)
        self._sample.append(features[spread(len(features), self._per_class)])
        if label in self._transported:
            self._transport[label] = features[spread(len(features), TRANSPORT_REAL)]

    @property
    def sample(self) -> Reference:
        """Real images of all classes, equally many of each."""
        return Reference(np.concatenate(self._sample))

    def transport_distance(self, synthetic: Features, labels: Labels) -> float:
        """Return the data-set distance of some classes, see :func:`dataset_distance`."""
        chosen = {label: np.flatnonzero(labels == label) for label in self._transport}
        rows = {label: found[spread(len(found), TRANSPORT_SYNTHETIC)] for label, found in chosen.items()}
        return dataset_distance(
            np.concatenate(list(self._transport.values())),
            np.repeat(list(self._transport), [len(part) for part in self._transport.values()]),
            synthetic[np.concatenate(list(rows.values()))],
            np.repeat(list(rows), [len(found) for found in rows.values()]),
        )


@dataclass
class SetMeasures:
    """The metrics of one distilled set (m, d) with labels (m,), while real classes are added.

    Attributes:
        space: name of the features.
    """

    features: Features
    labels: Labels
    space: str
    _values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _fewest_real: int = 0

    def __post_init__(self) -> None:
        self._audit = Audit(self.features, self.labels)

    def add(self, reference: Reference, label: int) -> None:
        """Measure the set's images of a class against the real ones."""
        self._audit.add(reference, label)
        mine = self.features[self.labels == label].astype(np.float64)
        self._fewest_real = min(self._fewest_real or len(reference), len(reference))
        values: dict[str, float | None] = {
            "coverage_within": coverage_within(reference, mine, float(np.median(reference.neighbour_distances()))),
            "representativeness": representativeness(reference, mine),
            "vendi": vendi_score(mine),
        }
        if len(reference) > NEIGHBOURS:
            near = neighbourhoods(reference, mine, k=NEIGHBOURS)
            values |= {k: getattr(near, k) for k in ("precision", "recall", "density", "coverage")}
        if len(mine) > 1:
            values |= {"mmd": mmd(reference, mine), "diversity": diversity(mine)}
        for key, value in values.items():
            if value is not None:
                self._values[key].append(value)

    def result(self, real: RealImages, sample: Reference) -> tuple[dict[str, float], dict[str, str]]:
        """Return the value of each metric that is defined, and what to know of it, also of those that are not."""
        classes, count = len(np.unique(self.labels)), len(self.labels)
        per_class = count // classes
        values = {key: float(np.mean(found)) for key, found in self._values.items() if len(found) == classes}
        warnings: dict[str, str] = {}
        frechet = frechet_distance(real.moments, self.features)
        means = mean_distance(real.moments, self.features)
        synthetic = self.features[spread(count, KERNEL_SAMPLE)].astype(np.float64)
        values |= {
            "frechet": frechet.distance,
            "kernel": kernel_distance(sample, synthetic),
            "mean_euclidean": means.euclidean,
            "mean_cosine": means.cosine,
            "otdd": real.transport_distance(self.features, self.labels),
        }
        if frechet.warning:
            warnings["frechet"] = frechet.warning
        if count < 1000:
            warnings["kernel"] = f"unbiased, but noisy at {count} images"
        if per_class == 1:
            warnings |= dict.fromkeys(("mmd", "diversity"), "needs two images of a class")
        elif per_class < 50:
            warnings["mmd"] = f"unbiased, but noisy at {per_class} images of a class"
        if per_class <= NEIGHBOURS:
            warnings["recall"] = f"needs more than {NEIGHBOURS} images of a class"
        elif per_class < 50:
            warnings["recall"] = f"biased: {per_class} images span wide neighbourhoods; compare sets of this size alone"
        if self._fewest_real <= NEIGHBOURS:
            warnings |= dict.fromkeys(("precision", "density"), f"needs more than {NEIGHBOURS} real images of a class")
        limit = NEIGHBOURS * per_class / self._fewest_real
        if limit < 1:
            warnings["coverage"] = f"at most {limit:.2g} times the density, as there are few synthetic images"
        for key in ("representativeness", "diversity"):
            warnings.setdefault(key, "an extreme, which falls as sets grow: compare sets of one size")
        warnings["vendi"] = f"at most {per_class}, the images of a class"
        warnings["otdd"] = f"on {min(classes, TRANSPORT_CLASSES)} classes and a sample of their real images"
        return values, warnings

    def audit(self) -> Memorisation:
        """Return the search for copies."""
        return self._audit.result()


def spread(count: int, most: int) -> np.ndarray:
    """Return at most ``most`` indices below ``count``, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def measure(
    sets: dict[str, SetMeasures], classes: int, real: Callable[[int], Features]
) -> dict[str, tuple[dict[str, float], dict[str, str], Memorisation]]:
    """Measure distilled sets in one pass over the real images.

    Args:
        sets: By any name.
        classes: Their number.
        real: Gives the real features (n, d) of a class; called once for each, in label order.

    Returns:
        For each set: values, warnings, and the search for copies.
    """
    everything = RealImages(classes)
    for label in range(classes):
        reference = Reference(real(label))
        everything.add(reference, label)
        for one in sets.values():
            one.add(reference, label)
    sample = everything.sample
    return {name: (*one.result(everything, sample), one.audit()) for name, one in sets.items()}


def audit_summary(audit: Memorisation, labels: Labels) -> dict[str, Any]:
    """Summarise a search for copies; all but the counts in percent or as shares of the usual distance."""
    ratios = audit.ratios[np.isfinite(audit.ratios)]
    return {
        "images": len(labels),
        "copies": int((ratios < COPY).sum()),
        "suspect_percent": 100 * float((audit.percentiles <= 1).mean()),
        "median_ratio": float(np.median(ratios)) if len(ratios) else None,
        "other_class_percent": 100 * float((audit.labels != labels).mean()),
    }
