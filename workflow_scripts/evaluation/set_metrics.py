"""How close a distilled set is to the real images, and how varied, measured on features without training anything.

All functions take float arrays: real features (n, d) and synthetic features (m, d), one row per image. What a number means
depends on the features, so name both with :func:`metric_name`; only Inception's features give what the literature calls
FID and KID. Nothing here draws at random unless it is given a generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

Features = NDArray[np.floating]
Labels = NDArray[np.integer]
Floats = NDArray[np.float64]

CHUNK = 2**24
"""Most distances or kernel values held at once by functions that only need their sums or extremes."""

SAFE_FRECHET_SAMPLE = 10_000
"""Images per set below which the Fréchet distance is biased upward so much that it does not compare sets of other sizes."""


def metric_name(metric: Literal["frechet", "kernel"], features: str) -> str:
    """Return how a distance is called in print: ``FID`` or ``KID`` on Inception's features, else with the features' name.

    Args:
        metric: ``frechet`` or ``kernel``.
        features: What the features are; ``inception`` for the 2048 of Inception-v3's last pooling.
    """
    if features == "inception":
        return {"frechet": "FID", "kernel": "KID"}[metric]
    return {"frechet": "Fréchet distance", "kernel": "kernel distance"}[metric] + f" ({features})"


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


def frechet_distance(real: Features, synthetic: Features) -> FrechetDistance:
    """Return |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) of Gaussians fitted to both sets (Heusel et al. 2017).

    The trace of the root is the sum of the singular values of A1 A2^T, with A the centred features over sqrt(n - 1), so
    that neither a matrix root nor a regulariser is needed, also where there are fewer images than features.

    Args:
        real: (n, d), n > 1.
        synthetic: (m, d), m > 1.

    Raises:
        ValueError: A set is not of that shape, is not finite, or has fewer than two images.
    """
    first, second = _pair(real, synthetic, least=2)
    roots = []
    for features in (first, second):
        centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
        if len(centred) > centred.shape[1]:
            centred = np.asarray(np.linalg.qr(centred, mode="r"))  # the same covariance in d rows
        roots.append(centred)
    means = float(((first.mean(0) - second.mean(0)) ** 2).sum())
    shared = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    covariances = max(0.0, float((roots[0] ** 2).sum() + (roots[1] ** 2).sum() - 2 * shared))
    fewest, width = min(len(first), len(second)), first.shape[1]
    warning = ""
    if fewest < SAFE_FRECHET_SAMPLE or fewest <= width:
        rank = f" for {width} features" if fewest <= width else ""
        warning = (
            f"biased upward: the smaller set has {fewest} images{rank}; compare sets of this size alone, "
            "and see the kernel distance, which is unbiased"
        )
    return FrechetDistance(means + covariances, means, covariances, warning)


def kernel_distance(real: Features, synthetic: Features, *, degree: int = 3) -> float:
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
    return _unbiased_mmd(first, second, lambda a, b: (a @ b.T / a.shape[1] + 1) ** degree)


def mmd(
    real: Features,
    synthetic: Features,
    *,
    gamma: float | None = None,
    limit: int = 6000,
    generator: np.random.Generator | None = None,
) -> float:
    """Return the squared MMD with the kernel exp(-gamma |x - y|^2), unbiased and so at times negative.

    ManifoldGD reports it with negative values set to 0 (Gretton et al. 2012, equation 3, is the estimator).

    Args:
        real: (n, d), n > 1.
        synthetic: (m, d), m > 1.
        gamma: The kernel's inverse width; without it, one over the median squared distance between different images of
            both sets together (median heuristic). Sets are comparable only under one gamma.
        limit: Most images of a set; a larger one is sampled.
        generator: Source of that sample; needed only where a set is larger than ``limit``.

    Raises:
        ValueError: A set is not of that shape, is not finite, has fewer than two images, or is larger than ``limit``
            without a generator; gamma is not positive; or all images are equal and gamma is not given.
    """
    sets = []
    for features in _pair(real, synthetic, least=2):
        if len(features) > limit:
            if generator is None:
                raise ValueError(f"a set has {len(features)} images, more than {limit}: sampling needs a generator")
            features = features[np.sort(generator.choice(len(features), limit, replace=False))]
        sets.append(features)
    if gamma is None:
        gamma = median_gamma(np.concatenate(sets))
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, not {gamma}")
    return _unbiased_mmd(sets[0], sets[1], lambda a, b: np.exp(-gamma * cdist(a, b, "sqeuclidean")))


def median_gamma(features: Features) -> float:
    """Return one over the median squared distance between different rows of (n, d).

    Raises:
        ValueError: More than half of the pairs are equal, or there is no pair.
    """
    from scipy.spatial.distance import pdist

    median = float(np.median(pdist(features, "sqeuclidean"))) if len(features) > 1 else 0.0
    if not median > 0:
        raise ValueError("the median distance is 0: give gamma")
    return 1 / median


@dataclass(frozen=True)
class MeanDistance:
    """How far the means of two sets are apart: Euclidean distance in units of the features, and cosine of the angle."""

    euclidean: float
    cosine: float


def mean_distance(real: Features, synthetic: Features) -> MeanDistance:
    """Compare the means of (n, d) and (m, d), as ManifoldGD does on ResNet-18's features.

    Raises:
        ValueError: A set is not of that shape or not finite, or a mean is 0 and has no direction.
    """
    first, second = (features.mean(0, keepdims=True) for features in _pair(real, synthetic))
    cosine = (_unit(first) @ _unit(second).T).item()
    return MeanDistance(float(np.linalg.norm(first - second)), cosine)


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

    first, second = _pair(real, synthetic)
    classes, members = [], []
    for features, labels in ((first, real_labels), (second, synthetic_labels)):
        _check_labels(features, labels)
        names, member = np.unique(labels, return_inverse=True)
        classes.append([features[labels == name] for name in names])
        members.append(member)
    distance = _gaussian_transport if label_distance == "gaussian" else _transport
    between = np.array([[distance(a, b) for b in classes[1]] for a in classes[0]])
    cost = cdist(first, second, "sqeuclidean") + between[members[0][:, None], members[1][None]]
    return float(np.sqrt(_solved(ot.emd2([], [], cost, numItermax=10_000_000, log=True))))


def _transport(first: Floats, second: Floats) -> float:
    import ot

    cost = cdist(first, second, "sqeuclidean")
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


def neighbourhoods(real: Features, synthetic: Features, *, k: int = 5) -> Neighbourhoods:
    """Return precision and recall (Kynkaanniemi et al. 2019) and density and coverage (Naeem et al. 2020).

    A neighbourhood is the open ball to the k-th nearest other image of the same set, as in the authors' ``prdc``.

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
    radii = neighbour_distances(first, k=k)
    others = neighbour_distances(second, k=k) if len(second) > k else None
    hits, covered, recalled = np.zeros(len(second)), [], []
    for rows in _chunks(len(first), len(second)):
        distances = cdist(first[rows], second)
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
        distances = cdist(features[rows], features)
        places = np.arange(len(distances))
        distances[places, places + rows.start] = np.inf
        found.append(np.partition(distances, k - 1, axis=1)[:, k - 1])
    return np.concatenate(found)


def coverage_within(real: Features, synthetic: Features, radius: float) -> float:
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
    near = [(cdist(first[rows], second) <= radius).any(1) for rows in _chunks(len(first), len(second))]
    return float(np.concatenate(near).mean())


# ---------------------------------------------------------------- representativeness and diversity


def representativeness(real: Features, synthetic: Features) -> float:
    """Return ManifoldGD's representativeness: the least, over synthetic images, of the largest cosine to a real one.

    An extreme over the whole set, so it falls as a set grows: compare sets of one size.

    Args:
        real: (n, d), ResNet-18's features in the paper.
        synthetic: (m, d).

    Raises:
        ValueError: A set is not of that shape or not finite, or a row is 0 and has no direction.
    """
    first, second = (_unit(features) for features in _pair(real, synthetic))
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
        nearest: (m,) index of the nearest real image, of any class.
        distances: (m,) distance to it, in units of the features.
        ratios: (m,) that distance over the median distance of the class's real images to their nearest one in the class;
            0 is a copy, 1 is as far as usual. nan where that median is 0.
        percentiles: (m,) percent of the class's real images that are nearer to their nearest one than this image is, ties
            counted half; close to 0 is suspicious.
    """

    nearest: NDArray[np.int64]
    distances: Floats
    ratios: Floats
    percentiles: Floats

    def suspects(self, percentile: float = 1.0) -> NDArray[np.int64]:
        """Return the indices of synthetic images at or below a percentile, the most suspicious first."""
        found = np.flatnonzero(self.percentiles <= percentile)
        return found[np.lexsort((self.distances[found], self.percentiles[found]))]


def memorisation(real: Features, real_labels: Labels, synthetic: Features, synthetic_labels: Labels) -> Memorisation:
    """Audit a distilled set for copies of real images.

    Real images as a set, such as a coreset's, are copies by construction.

    Args:
        real: (n, d).
        real_labels: (n,).
        synthetic: (m, d).
        synthetic_labels: (m,), each a label that at least two real images have.

    Raises:
        ValueError: A set is not of that shape, is not finite, has not one label per image, or a synthetic image's class has
            fewer than two real images.
    """
    first, second = _pair(real, synthetic)
    _check_labels(first, real_labels)
    _check_labels(second, synthetic_labels)
    nearest, distances = np.zeros(len(second), dtype=np.int64), np.full(len(second), np.inf)
    for rows in _chunks(len(first), len(second)):
        found = cdist(first[rows], second)
        place = found.argmin(0)
        closest = found[place, np.arange(len(second))]
        nearer = closest < distances
        nearest[nearer], distances[nearer] = place[nearer] + rows.start, closest[nearer]
    ratios, percentiles = np.zeros(len(second)), np.zeros(len(second))
    for label in np.unique(synthetic_labels):
        of_class = first[real_labels == label]
        if len(of_class) < 2:
            raise ValueError(f"class {label} has {len(of_class)} real images; an audit needs two")
        usual, mine = np.sort(neighbour_distances(of_class)), synthetic_labels == label
        below = np.searchsorted(usual, distances[mine]) + np.searchsorted(usual, distances[mine], side="right")
        percentiles[mine] = 100 * below / (2 * len(usual))
        median = float(np.median(usual))
        ratios[mine] = distances[mine] / median if median > 0 else np.nan
    return Memorisation(nearest, distances, ratios, percentiles)


# ---------------------------------------------------------------- shared


def _unbiased_mmd(first: Floats, second: Floats, kernel: Callable[[Floats, Floats], Floats]) -> float:
    """The U-statistic of Gretton et al. 2012, equation 3."""
    total = 0.0
    for features in (first, second):
        n, inside = len(features), 0.0
        for rows in _chunks(n, n):
            values = kernel(features[rows], features)
            inside += values.sum() - np.trace(values, offset=rows.start)
        total += inside / (n * (n - 1))
    across = sum(kernel(first[rows], second).sum() for rows in _chunks(len(first), len(second)))
    return float(total - 2 * across / (len(first) * len(second)))


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _checked(name: str, features: Features, least: int = 1) -> Floats:
    if features.ndim != 2 or len(features) < least or features.shape[1] == 0:
        raise ValueError(f"{name} must be features (images, d) of at least {least} images, not {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} has features that are not finite")
    return features.astype(np.float64)


def _pair(real: Features, synthetic: Features, least: int = 1) -> tuple[Floats, Floats]:
    first, second = _checked("real", real, least), _checked("synthetic", synthetic, least)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"real has {first.shape[1]} features and synthetic {second.shape[1]}")
    return first, second


def _check_labels(features: Floats, labels: Labels) -> None:
    if labels.shape != features.shape[:1]:
        raise ValueError(f"{len(features)} images need as many labels, not an array of shape {labels.shape}")


def _unit(features: Floats) -> Floats:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not norms.all():
        raise ValueError("a row of features is 0 and has no direction")
    return features / norms
