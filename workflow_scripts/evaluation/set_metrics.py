"""How close a distilled set is to the real images, and how varied, measured on features without training anything.

All functions take float arrays: real features (n, d) and synthetic features (m, d), one row per image. What a number means
depends on the features, so name both with :func:`metric_name`; only Inception's features give what the literature calls
FID and KID. Nothing here draws at random unless it is given a generator.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.floating]
Labels = NDArray[np.integer]
Floats = NDArray[np.float64]

CHUNK = 2**24
"""Most distances or kernel values held at once by functions that only need their sums or extremes."""

SAFE_FRECHET_SAMPLE = 10_000
"""Images per set below which the Fréchet distance is biased upward so much that it does not compare sets of other sizes."""


class Reference:
    """Real features (n, d), and what metrics need of them alone: computed once, however many distilled sets follow.

    Attributes:
        features: (n, d) float64.

    Raises:
        ValueError: They are not of that shape, or not finite.
    """

    def __init__(self, features: Features):
        self.features = _checked("real", features)
        self._known: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self.features)

    def neighbour_distances(self, k: int = 1) -> Floats:
        """Return (n,) distances to the k-th nearest other image, see :func:`neighbour_distances`."""
        return self.once(("neighbours", k), lambda: neighbour_distances(self.features, k=k))

    @cached_property
    def gamma(self) -> float:
        """Inverse width of MMD's kernel by the median heuristic on these images; see :func:`median_gamma`."""
        return median_gamma(self.features)

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return what ``compute`` gave the first time."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


class Moments:
    """Mean and covariance of features that come in parts, such as class by class: memory for (d, d), whatever n is."""

    def __init__(self) -> None:
        self.count = 0
        self._shift: Floats | None = None  # near the mean, so that no digits are lost in the difference of large sums

    def add(self, features: Features) -> None:
        """Take in (n, d) features.

        Raises:
            ValueError: They are not of that shape, or not finite.
        """
        checked = _checked("real", features)
        if self._shift is None:
            self._shift = checked.mean(0)
            self._sum = np.zeros_like(self._shift)
            self._outer = np.zeros((len(self._shift),) * 2)
        centred = checked - self._shift
        self.count += len(centred)
        self._sum += centred.sum(0)
        self._outer += centred.T @ centred

    @property
    def mean(self) -> Floats:
        """Mean (d,)."""
        assert self._shift is not None, "nothing was added"
        return self._shift + self._sum / self.count

    @cached_property
    def root(self) -> Floats:
        """A matrix A (d, d) with A^T A the sample covariance; nothing may be added after it was asked for."""
        offset = self._sum / self.count
        covariance = (self._outer - self.count * np.outer(offset, offset)) / (self.count - 1)
        values, vectors = np.linalg.eigh(covariance)
        return np.asarray(np.sqrt(np.maximum(values, 0))[:, None] * vectors.T)


def metric_name(metric: Literal["frechet", "kernel"], features: str) -> str:
    """Return how a distance is called in print: ``FID`` or ``KID`` on Inception's features, else with the features' name.

    Args:
        metric: ``frechet`` or ``kernel``.
        features: What the features are; ``inception`` for the 2048 of Inception-v3's last pooling, ``teacher ...`` for a
            teacher's.
    """
    if features == "inception":
        return {"frechet": "FID", "kernel": "KID"}[metric]
    shown = "teacher's features" if features.startswith("teacher ") else features
    return {"frechet": "Fréchet distance", "kernel": "kernel distance"}[metric] + f" ({shown})"


# ---------------------------------------------------------------- distances between distributions


@dataclass(frozen=True)
class FrechetDistance:
    """A Fréchet distance and what it is the sum of, in squared units of the features.

    Attributes:
        distance: Squared distance, as FID is reported.
        means: Squared distance of the means.
        covariances: What the covariances add.
        warning: Why the sample sizes make the distance too large; empty if they do not.
    """

    distance: float
    means: float
    covariances: float
    warning: str


def frechet_distance(real: Features | Moments, synthetic: Features) -> FrechetDistance:
    """Return |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) of Gaussians fitted to both sets (Heusel et al. 2017).

    The trace of the root is the sum of the singular values of A1 A2^T, with A the centred features over sqrt(n - 1), so
    that neither a matrix root nor a regulariser is needed, also where there are fewer images than features.

    Args:
        real: (n, d), n > 1, or their moments.
        synthetic: (m, d), m > 1.

    Raises:
        ValueError: A set is not of that shape, is not finite, or has fewer than two images.
    """
    if isinstance(real, Moments):
        count, mean, root = real.count, real.mean, real.root
    else:
        first = _checked("real", real, least=2)
        count, mean, root = len(first), first.mean(0), _root(first)
    second = _checked("synthetic", synthetic, least=2)
    width = second.shape[1]
    if len(mean) != width:
        raise ValueError(f"real has {len(mean)} features and synthetic {width}")
    roots = [root, _root(second)]
    means = float(((mean - second.mean(0)) ** 2).sum())
    shared = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    covariances = max(0.0, float((roots[0] ** 2).sum() + (roots[1] ** 2).sum() - 2 * shared))
    fewest = min(count, len(second))
    warning = ""
    if fewest < SAFE_FRECHET_SAMPLE or fewest <= width:
        rank = f" for {width} features" if fewest <= width else ""
        warning = (
            f"biased upward: the smaller set has {fewest} images{rank}; compare sets of this size alone, "
            "and see the kernel distance, which is unbiased"
        )
    return FrechetDistance(means + covariances, means, covariances, warning)


def _root(features: Floats) -> Floats:
    """A matrix A of at most d rows with A^T A the sample covariance of (n, d)."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    return centred if len(centred) <= centred.shape[1] else np.asarray(np.linalg.qr(centred, mode="r"))


def kernel_distance(real: Features | Reference, synthetic: Features, *, degree: int = 3) -> float:
    """Return the squared MMD with the kernel (x.y / d + 1)^degree, unbiased and so at times negative.

    On Inception's features, with degree 3, this is KID (Binkowski et al. 2018), computed from all images at once instead
    of as a mean over random subsets.

    Args:
        real: (n, d), n > 1.
        synthetic: (m, d), m > 1.
        degree: Degree of the polynomial.

    Raises:
        ValueError: A set is not of that shape, is not finite, or has fewer than two images.
    """
    first, second = _pair(real, synthetic, least=2)
    return _unbiased_mmd(first, second, ("polynomial", degree), lambda a, b: (a @ b.T / a.shape[1] + 1) ** degree)


def mmd(real: Features | Reference, synthetic: Features, *, gamma: float | None = None) -> float:
    """Return the squared MMD with the kernel exp(-gamma |x - y|^2), unbiased and so at times negative.

    ManifoldGD reports it with negative values set to 0 (Gretton et al. 2012, equation 3, is the estimator), and with the
    median heuristic over both sets; here it is over the real images alone, so that all sets are under one gamma.

    Args:
        real: (n, d), n > 1.
        synthetic: (m, d), m > 1.
        gamma: The kernel's inverse width; without it ``Reference.gamma``. Sets are comparable only under one gamma.

    Raises:
        ValueError: A set is not of that shape, is not finite, or has fewer than two images; gamma is not positive; or all
            real images are equal and gamma is not given.
    """
    first, second = _pair(real, synthetic, least=2)
    width = first.gamma if gamma is None else gamma
    if not width > 0:
        raise ValueError(f"gamma must be positive, not {width}")
    return _unbiased_mmd(first, second, ("gaussian", width), lambda a, b: np.exp(-width * _squares(a, b)))


def median_gamma(features: Features) -> float:
    """Return one over the median squared distance between different rows of (n, d).

    Raises:
        ValueError: More than half of the pairs are equal, or there is no pair.
    """
    parts = []
    for rows in _chunks(len(features), len(features)):
        squares = _squares(features[rows], features)
        parts.append(squares[np.arange(len(features)) > np.arange(rows.start, rows.stop)[:, None]])
    median = float(np.median(np.concatenate(parts))) if len(features) > 1 else 0.0
    if not median > 0:
        raise ValueError("the median distance is 0: give gamma")
    return 1 / median


@dataclass(frozen=True)
class MeanDistance:
    """How far the means of two sets are apart: Euclidean distance in units of the features, and cosine of the angle."""

    euclidean: float
    cosine: float


def mean_distance(real: Features | Moments, synthetic: Features) -> MeanDistance:
    """Compare the means of (n, d) and (m, d), as ManifoldGD does on ResNet-18's features.

    Raises:
        ValueError: A set is not of that shape or not finite, or a mean is 0 and has no direction.
    """
    centre = real.mean if isinstance(real, Moments) else _checked("real", real).mean(0)
    first, second = _pair(centre[None], _checked("synthetic", synthetic).mean(0, keepdims=True))
    cosine = (_unit(first.features) @ _unit(second).T).item()
    return MeanDistance(float(np.linalg.norm(first.features - second)), cosine)


def dataset_distance(
    real: Features,
    real_labels: Labels,
    synthetic: Features,
    synthetic_labels: Labels,
    *,
    label_distance: Literal["gaussian", "exact"] = "gaussian",
) -> float:
    """Return the optimal-transport data-set distance of two labelled sets (Alvarez-Melis and Fusi 2020, equation 4, p = 2).

    The root of the cost of the best transport between images, where moving one costs the squared distance of the features
    plus the squared 2-Wasserstein distance between the two labels' own features. DMGD reports an OTDD; its features, scale
    and solver are not known to us, so that numbers compare only among sets measured here.

    Args:
        real: (n, d).
        real_labels: (n,).
        synthetic: (m, d).
        synthetic_labels: (m,).
        label_distance: ``gaussian`` fits a Gaussian to each class (the paper's Bures form; a class of one image is a
            point), ``exact`` solves the transport between classes.

    Raises:
        ValueError: A set is not of that shape, is not finite, or has not one label per image.
    """
    import ot  # slow to import, and needed only here

    reference, second = _pair(real, synthetic)
    first = reference.features
    classes, members = [], []
    for features, labels in ((first, real_labels), (second, synthetic_labels)):
        _check_labels(features, labels)
        names, member = np.unique(labels, return_inverse=True)
        classes.append([features[labels == name] for name in names])
        members.append(member)
    distance = _gaussian_transport if label_distance == "gaussian" else _transport
    between = np.array([[distance(a, b) for b in classes[1]] for a in classes[0]])
    cost = _squares(first, second) + between[members[0][:, None], members[1][None]]
    return float(np.sqrt(_solved(ot.emd2([], [], cost, numItermax=10_000_000, log=True))))


def _transport(first: Floats, second: Floats) -> float:
    import ot

    cost = _squares(first, second)
    return _solved(ot.emd2([], [], cost, numItermax=10_000_000, log=True))


def _solved(result: tuple[Any, dict[str, Any]]) -> float:
    value, log = result
    if log["warning"] is not None:
        raise ValueError(f"the transport problem was not solved: {log['warning']}")
    return max(0.0, float(value))


def _gaussian_transport(first: Floats, second: Floats) -> float:
    means = float(((first.mean(0) - second.mean(0)) ** 2).sum())
    if min(len(first), len(second)) > 1:
        return frechet_distance(first, second).distance
    return means + sum(float(part.var(0, ddof=1).sum()) for part in (first, second) if len(part) > 1)


# ---------------------------------------------------------------- neighbours


@dataclass(frozen=True)
class Neighbourhoods:
    """Fidelity and diversity by nearest neighbours, each a share of images but for the density.

    Attributes:
        precision: Share of synthetic images within the k-th neighbour's distance of some real image.
        recall: Share of real images within the k-th neighbour's distance of some synthetic image; None where there are no
            more than k synthetic images.
        density: Mean number of real neighbourhoods that hold a synthetic image, over k; 1 is expected of real images, and
            it may be larger.
        coverage: Share of real images whose neighbourhood holds a synthetic image; at most density times k m / n, so small
            for a small distilled set.
    """

    precision: float
    recall: float | None
    density: float
    coverage: float


def neighbourhoods(real: Features | Reference, synthetic: Features, *, k: int = 5) -> Neighbourhoods:
    """Return precision and recall (Kynkaanniemi et al. 2019) and density and coverage (Naeem et al. 2020).

    A neighbourhood is the open ball to the k-th nearest other image of the same set, as in the authors' ``prdc``, but for a
    billionth of its radius, which is left to rounding.

    Args:
        real: (n, d), n > k.
        synthetic: (m, d).
        k: Which neighbour.

    Raises:
        ValueError: A set is not of that shape or not finite, or there are no more than k real images.
    """
    first, second = _pair(real, synthetic)
    if not 1 <= k < len(first):
        raise ValueError(f"k must be in 1..{len(first) - 1}, one less than the real images, not {k}")
    radii = first.neighbour_distances(k) * (1 - 1e-9)
    others = neighbour_distances(second, k=k) * (1 - 1e-9) if len(second) > k else None
    hits, covered, recalled = np.zeros(len(second)), [], []
    for rows in _chunks(len(first), len(second)):
        distances = np.sqrt(_squares(first.features[rows], second))
        inside = distances < radii[rows, None]
        hits += inside.sum(0)
        covered.append(inside.any(1))
        if others is not None:
            recalled.append((distances < others).any(1))
    return Neighbourhoods(
        precision=float((hits > 0).mean()),
        recall=float(np.concatenate(recalled).mean()) if recalled else None,
        density=float(hits.mean() / k),
        coverage=float(np.concatenate(covered).mean()),
    )


def neighbour_distances(features: Features, *, k: int = 1) -> Floats:
    """Return (n,) distances to the k-th nearest other row of (n, d).

    Raises:
        ValueError: k is not in 1..n - 1.
    """
    if not 1 <= k < len(features):
        raise ValueError(f"k must be in 1..{len(features) - 1}, not {k}")
    found = []
    for rows in _chunks(len(features), len(features)):
        distances = np.sqrt(_squares(features[rows], features))
        places = np.arange(len(distances))
        distances[places, places + rows.start] = np.inf
        found.append(np.partition(distances, k - 1, axis=1)[:, k - 1])
    return np.concatenate(found)


def coverage_within(real: Features | Reference, synthetic: Features, radius: float) -> float:
    """Return the share of real images that have a synthetic image within ``radius``.

    One radius for all methods makes this comparable between them. DMGD reports a coverage that its code does not hold and
    our sources do not define; whether it is this one or that of :func:`neighbourhoods` is not known.

    Args:
        real: (n, d).
        synthetic: (m, d).
        radius: Distance in units of the features, for instance the median of ``neighbour_distances(real)``.

    Raises:
        ValueError: A set is not of that shape or not finite, or the radius is negative.
    """
    if not radius >= 0:
        raise ValueError(f"radius must not be negative, but is {radius}")
    first, second = _pair(real, synthetic)
    near = [
        (np.sqrt(_squares(first.features[rows], second)) <= radius).any(1) for rows in _chunks(len(first), len(second))
    ]
    return float(np.concatenate(near).mean())


# ---------------------------------------------------------------- representativeness and diversity


def representativeness(real: Features | Reference, synthetic: Features) -> float:
    """Return ManifoldGD's representativeness: the least, over synthetic images, of the largest cosine to a real one.

    An extreme over the whole set, so it falls as a set grows: compare sets of one size.

    Args:
        real: (n, d), ResNet-18's features in the paper.
        synthetic: (m, d).

    Raises:
        ValueError: A set is not of that shape or not finite, or a row is 0 and has no direction.
    """
    reference, checked = _pair(real, synthetic)
    first: Floats = reference.once("unit", lambda: _unit(reference.features))
    second = _unit(checked)
    best = np.full(len(second), -np.inf)
    for rows in _chunks(len(first), len(second)):
        best = np.maximum(best, (first[rows] @ second.T).max(0))
    return float(best.min())


def diversity(synthetic: Features) -> float:
    """Return ManifoldGD's diversity of (m, d): one minus the largest cosine of two images. An extreme, as above.

    Raises:
        ValueError: The set is not of that shape or not finite, has one image, or a row is 0 and has no direction.
    """
    unit = _unit(_checked("synthetic", synthetic, least=2))
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    return float(1 - cosines.max())


def vendi_score(features: Features, *, order: float = 1.0) -> float:
    """Return the Vendi score of (n, d), the effective number of different images, from 1 to n (Friedman and Dieng 2023).

    The exponential of the Renyi entropy of the given order (Pasarkar and Dieng 2024) of the eigenvalues of K / n, with K the
    cosines of the features; order 1 is the published score, exp(-sum(p log p)).

    Args:
        features: (n, d).
        order: Positive, also infinite; larger orders count frequent kinds of image more.

    Raises:
        ValueError: The set is not of that shape or not finite, a row is 0, or the order is not positive.
    """
    if not order > 0:
        raise ValueError(f"order must be positive, not {order}")
    unit = _unit(_checked("features", features))
    shares = np.linalg.svd(unit, compute_uv=False) ** 2 / len(unit)
    shares = shares[shares > 1e-15]
    if order == 1:
        return float(np.exp(-(shares * np.log(shares)).sum()))
    if np.isinf(order):
        return float(1 / shares.max())
    return float((shares**order).sum() ** (1 / (1 - order)))


# ---------------------------------------------------------------- memorisation


@dataclass(frozen=True)
class Memorisation:
    """How near each synthetic image is to a real one, against how near real images of its class are to each other.

    Attributes:
        labels: (m,) class of the nearest real image; it need not be the synthetic image's own.
        nearest: (m,) its index in that class.
        distances: (m,) distance to it, in units of the features.
        ratios: (m,) that distance over the median distance of the own class's real images to their nearest one in the
            class; 0 is a copy, 1 is as far as usual. nan where that median is 0.
        percentiles: (m,) percent of the own class's real images that are nearer to their nearest one than this image is,
            ties counted half; close to 0 is suspicious.
    """

    labels: NDArray[np.int64]
    nearest: NDArray[np.int64]
    distances: Floats
    ratios: Floats
    percentiles: Floats

    def closest(self) -> NDArray[np.int64]:
        """Return the indices of all synthetic images, the most suspicious first."""
        return np.lexsort((self.distances, np.nan_to_num(self.ratios), self.percentiles))

    def suspects(self, percentile: float = 1.0) -> NDArray[np.int64]:
        """Return the indices of synthetic images at or below a percentile, the most suspicious first."""
        order = self.closest()
        return order[self.percentiles[order] <= percentile]


class Audit:
    """Search real images that come class by class for copies among synthetic ones (m, d) with labels (m,).

    Real images as a set, such as a coreset's, are copies by construction. Nearest images are found in single precision,
    and their distances then computed in double, so that a copy is at distance 0.

    Raises:
        ValueError: The set is not of that shape, is not finite, or has not one label per image.
    """

    def __init__(self, synthetic: Features, labels: Labels):
        self._synthetic = _checked("synthetic", synthetic).astype(np.float32)
        _check_labels(self._synthetic, labels)
        self._own = labels
        self._labels, self._nearest = np.full((2, len(labels)), -1, dtype=np.int64)
        self._distances = np.full(len(labels), np.inf)
        self._usual: dict[int, Floats] = {}

    def add(self, real: Features | Reference, label: int) -> None:
        """Compare with the (n, d) real images of a class.

        Raises:
            ValueError: They are not of that shape or not finite, or there are fewer than two and a synthetic image is of
                their class.
        """
        reference, _ = _pair(real, self._synthetic[:1])
        single = reference.features.astype(np.float32)
        for rows in _chunks(len(self._synthetic), len(single)):
            part = self._synthetic[rows]
            squares = _squares(part, single)
            place = squares.argmin(1)
            nearer = np.flatnonzero(squares[np.arange(len(part)), place] < self._distances[rows] ** 2)
            differences = part[nearer] - single[place[nearer]].astype(np.float64)
            exact = np.sqrt((differences**2).sum(1))
            better = nearer[exact < self._distances[rows][nearer]] + rows.start
            self._distances[better] = exact[exact < self._distances[rows][nearer]]
            self._nearest[better], self._labels[better] = place[better - rows.start], label
        if (self._own == label).any():
            if len(reference) < 2:
                raise ValueError(f"class {label} has {len(reference)} real images; an audit needs two")
            self._usual[label] = np.sort(reference.neighbour_distances())

    def result(self) -> Memorisation:
        """Return the audit after all classes.

        Raises:
            ValueError: The real images of a synthetic image's class were not added.
        """
        ratios, percentiles = np.zeros(len(self._own)), np.zeros(len(self._own))
        for label in np.unique(self._own):
            if label not in self._usual:
                raise ValueError(f"class {label} has 0 real images; an audit needs two")
            usual, mine = self._usual[label], self._own == label
            distances = self._distances[mine]
            below = np.searchsorted(usual, distances) + np.searchsorted(usual, distances, side="right")
            percentiles[mine] = 100 * below / (2 * len(usual))
            median = float(np.median(usual))
            ratios[mine] = distances / median if median > 0 else np.nan
        return Memorisation(self._labels, self._nearest, self._distances, ratios, percentiles)


# ---------------------------------------------------------------- shared


def _unbiased_mmd(
    real: Reference, synthetic: Floats, name: Hashable, kernel: Callable[[Floats, Floats], Floats]
) -> float:
    """The U-statistic of Gretton et al. 2012, equation 3."""
    inside = real.once(name, lambda: _mean_of_pairs(real.features, kernel)) + _mean_of_pairs(synthetic, kernel)
    across = sum(kernel(real.features[rows], synthetic).sum() for rows in _chunks(len(real), len(synthetic)))
    return float(inside - 2 * across / (len(real) * len(synthetic)))


def _mean_of_pairs(features: Floats, kernel: Callable[[Floats, Floats], Floats]) -> float:
    """The mean of a kernel over pairs of different rows."""
    n, total = len(features), 0.0
    for rows in _chunks(n, n):
        values = kernel(features[rows], features)
        total += float(values.sum() - np.trace(values, offset=rows.start))
    return total / (n * (n - 1))


def _squares(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """Squared distances (n, m) between the rows of (n, d) and (m, d): by one matrix product, many times faster than pairs."""
    squares = first @ second.T
    squares *= -2
    squares += (first**2).sum(1)[:, None]
    squares += (second**2).sum(1)
    return np.maximum(squares, 0, out=squares)


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _checked(name: str, features: Features, least: int = 1) -> Floats:
    if features.ndim != 2 or len(features) < least or features.shape[1] == 0:
        raise ValueError(f"{name} must be features (images, d) of at least {least} images, not {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} has features that are not finite")
    return features.astype(np.float64, copy=False)


def _pair(real: Features | Reference, synthetic: Features, least: int = 1) -> tuple[Reference, Floats]:
    first = real if isinstance(real, Reference) else Reference(real)
    second = _checked("synthetic", synthetic, least)
    _checked("real", first.features, least)
    if first.features.shape[1] != second.shape[1]:
        raise ValueError(f"real has {first.features.shape[1]} features and synthetic {second.shape[1]}")
    return first, second


def _check_labels(features: NDArray[Any], labels: Labels) -> None:
    if labels.shape != features.shape[:1]:
        raise ValueError(f"{len(features)} images need as many labels, not an array of shape {labels.shape}")


def _unit(features: Floats) -> Floats:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not norms.all():
        raise ValueError("a row of features is 0 and has no direction")
    return features / norms
