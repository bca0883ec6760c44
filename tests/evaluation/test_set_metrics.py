import math

import numpy as np
import pytest

from workflow_scripts.evaluation import set_metrics
from workflow_scripts.evaluation.set_metrics import (
    Audit,
    Memorisation,
    Moments,
    Reference,
    coverage_within,
    dataset_distance,
    diversity,
    frechet_distance,
    kernel_distance,
    mean_distance,
    median_gamma,
    metric_name,
    mmd,
    neighbour_distances,
    neighbourhoods,
    representativeness,
    vendi_score,
)


def normal(n: int, d: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, d))


def exact(n: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> np.ndarray:
    """Points whose sample mean and covariance are the given ones."""
    points = normal(n, len(mean), seed)
    points -= points.mean(0)
    whitening = np.linalg.inv(np.linalg.cholesky(np.cov(points.T))).T
    return points @ whitening @ np.linalg.cholesky(covariance).T + mean


def memorisation(real: np.ndarray, labels: np.ndarray, synthetic: np.ndarray, own: np.ndarray) -> Memorisation:
    audit = Audit(synthetic, own)
    for label in np.unique(labels):
        audit.add(real[labels == label], int(label))
    return audit.result()


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)[:, None]


def directions(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.arange(1, len(angles) + 1)[:, None]


def test_only_inception_features_give_the_known_names() -> None:
    assert metric_name("frechet", "inception") == "FID"
    assert metric_name("kernel", "inception") == "KID"
    assert metric_name("frechet", "resnet18") == "Fréchet distance (resnet18)"
    assert metric_name("kernel", "vae") == "kernel distance (vae)"
    assert metric_name("frechet", "teacher resnet18_bn of soft-rded") == "Fréchet distance (teacher's features)"


# ---------------------------------------------------------------- Fréchet


def test_frechet_of_axis_aligned_gaussians() -> None:
    first = exact(50, np.array([1.0, 2, 3]), np.diag([1.0, 4, 9]), 0)
    second = exact(40, np.array([1.0, 0, 6]), np.diag([4.0, 4, 1]), 1)
    found = frechet_distance(first, second)
    assert found.means == pytest.approx(4 + 9)
    assert found.covariances == pytest.approx((1 - 2) ** 2 + 0 + (3 - 1) ** 2)
    assert found.distance == pytest.approx(18)
    assert frechet_distance(second, first).distance == pytest.approx(18)


@pytest.mark.parametrize(("n", "m", "d"), [(60, 50, 6), (60, 4, 6), (3, 2, 6), (8, 7, 7)])
def test_frechet_is_the_formula_with_the_eigenvalues_of_the_product(n: int, m: int, d: int) -> None:
    first, second = normal(n, d, 2) @ normal(d, d, 3), normal(m, d, 4, shift=0.5)
    one, two = np.cov(first.T), np.cov(second.T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(one @ two).real, 0)).sum()
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(one) + np.trace(two) - 2 * root
    assert frechet_distance(first, second).distance == pytest.approx(expected, rel=1e-6)


def test_frechet_of_a_set_with_itself_is_nothing_and_of_a_shift_its_square() -> None:
    points = normal(30, 8)
    assert frechet_distance(points, points[::-1]).distance == pytest.approx(0, abs=1e-10)
    assert frechet_distance(points, points + 3).distance == pytest.approx(8 * 9)
    assert frechet_distance(points.astype(np.float32), points.astype(np.float32)).covariances >= 0


def test_frechet_warns_where_it_is_biased_and_it_is() -> None:
    reference = normal(12_000, 4)
    small, large = frechet_distance(reference, normal(20, 4, 1)), frechet_distance(reference, normal(12_000, 4, 2))
    assert small.distance > 20 * large.distance
    assert "20 images" in small.warning
    assert large.warning == ""
    assert "for 64 features" in frechet_distance(normal(90, 64), normal(40, 64, 1)).warning


@pytest.mark.parametrize(("n", "d"), [(60, 6), (5, 9)])
def test_moments_in_parts_are_those_of_the_whole(n: int, d: int) -> None:
    points = normal(n, d, 2, shift=1000.0) @ normal(d, d, 3)
    moments = Moments()
    for part in np.array_split(points, 3):
        moments.add(part)
    np.testing.assert_allclose(moments.mean, points.mean(0))
    np.testing.assert_allclose(moments.root.T @ moments.root, np.cov(points.T), atol=1e-8 * np.abs(points).max())
    other = normal(20, d, 4, shift=900.0)
    assert frechet_distance(moments, other).distance == pytest.approx(frechet_distance(points, other).distance)
    assert mean_distance(moments, other).euclidean == pytest.approx(mean_distance(points, other).euclidean)


def test_a_reference_serves_many_sets_and_changes_nothing() -> None:
    real = normal(30, 4)
    reference = Reference(real)
    for seed in (1, 2):
        synthetic = normal(9, 4, seed, shift=0.4)
        for metric in (neighbourhoods, mmd, kernel_distance, representativeness):
            assert metric(reference, synthetic) == metric(real, synthetic)  # type: ignore[operator]


# ---------------------------------------------------------------- kernels


def by_pairs(first: np.ndarray, second: np.ndarray, kernel) -> float:  # type: ignore[no-untyped-def]
    def inside(points: np.ndarray) -> float:
        n = len(points)
        return sum(kernel(points[i], points[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    return inside(first) + inside(second) - 2 * np.mean([[kernel(x, y) for y in second] for x in first])


@pytest.mark.parametrize("chunk", [2**24, 10])
def test_kernel_distances_are_their_definitions(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_metrics, "CHUNK", chunk)
    first, second = normal(9, 3), normal(5, 3, 1, shift=0.3)
    assert kernel_distance(first, second) == pytest.approx(by_pairs(first, second, lambda x, y: (x @ y / 3 + 1) ** 3))
    assert mmd(first, second, gamma=0.2) == pytest.approx(
        by_pairs(first, second, lambda x, y: math.exp(-0.2 * ((x - y) ** 2).sum()))
    )


def test_a_linear_kernel_distance_is_the_unbiased_squared_distance_of_means() -> None:
    first, second = normal(9, 3), normal(5, 3, 1, shift=0.3)
    gap = ((first.mean(0) - second.mean(0)) ** 2).sum()
    noise = sum(points.var(0, ddof=1).sum() / len(points) for points in (first, second))
    assert kernel_distance(first, second, degree=1) == pytest.approx((gap - noise) / 3)


def test_kernel_distances_are_unbiased_at_small_samples() -> None:
    rng = np.random.default_rng(0)
    draws = [(rng.normal(0, 1, (20, 1)), rng.normal(0, 1, (5, 1)), rng.normal(1, 1, (5, 1))) for _ in range(600)]
    gamma, shift = 0.5, 1.0
    spread = 1 + 4 * gamma  # the difference of two standard normals has variance 2
    expected = 2 / math.sqrt(spread) * (1 - math.exp(-gamma * shift**2 / spread))
    for values, truth in (
        ([kernel_distance(a, b) for a, b, _ in draws], 0.0),
        ([mmd(a, b, gamma=gamma) for a, b, _ in draws], 0.0),
        ([mmd(a, c, gamma=gamma) for a, _, c in draws], expected),
    ):
        assert abs(np.mean(values) - truth) < 4 * np.std(values) / math.sqrt(len(values))
        assert min(values) < 0


def test_the_median_heuristic_of_mmd() -> None:
    assert median_gamma(column(0, 1, 3)) == pytest.approx(1 / 4)
    first, second = normal(40, 2), normal(12, 2, 1, shift=1)
    assert mmd(first, second) == pytest.approx(mmd(first, second, gamma=median_gamma(first)))
    with pytest.raises(ValueError, match="median distance is 0"):
        mmd(np.ones((5, 2)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="gamma must be positive"):
        mmd(first, second, gamma=0)


def test_distance_of_means() -> None:
    found = mean_distance(np.array([[2.0, 0], [4, 0]]), np.array([[0.0, 4]]))
    assert (found.euclidean, found.cosine) == (5.0, 0.0)
    assert mean_distance(np.array([[1.0, 1]]), np.array([[2.0, 0]])).cosine == pytest.approx(math.sqrt(0.5))


# ---------------------------------------------------------------- optimal transport between data sets


@pytest.mark.parametrize("labels", ["gaussian", "exact"])
def test_dataset_distance_of_a_set_and_its_shift(labels: str) -> None:
    points, names = normal(12, 3), np.repeat([0, 1, 2], 4)
    points += 50 * names[:, None]
    order = np.random.default_rng(0).permutation(12)
    assert dataset_distance(points, names, points[order], names[order], label_distance=labels) == pytest.approx(
        0, abs=1e-5
    )
    shifted = points + np.array([3.0, 4, 0])
    assert dataset_distance(points, names, shifted, names + 7, label_distance=labels) == pytest.approx(5 * math.sqrt(2))


def test_dataset_distance_sees_labels_that_the_images_alone_do_not_show() -> None:
    points = column(0, 1, 10, 11)
    mixed = dataset_distance(points, np.array([0, 0, 1, 1]), points, np.array([0, 1, 0, 1]), label_distance="exact")
    # images stay; the classes {0, 1} and {10, 11} move to {0, 10} or {1, 11}: at 81 / 2 where one image stays, else 101 / 2
    assert mixed == pytest.approx(math.sqrt((81 + 101) / 4))
    assert dataset_distance(points, np.zeros(4, int), points, np.zeros(4, int), label_distance="exact") == 0


@pytest.mark.parametrize("labels", ["gaussian", "exact"])
def test_dataset_distance_with_one_image_per_class(labels: str) -> None:
    real, synthetic = column(0, 10), column(1, 12)
    found = dataset_distance(real, np.arange(2), synthetic, np.arange(2), label_distance=labels)
    assert found == pytest.approx(math.sqrt((2 * 1 + 2 * 4) / 2))


def test_a_class_of_one_image_is_a_point_to_the_gaussian_label_distance() -> None:
    real, one = column(-1, 1), column(3)
    # to the image 16 and 4; between the classes: 3^2 and the variance 2
    found = dataset_distance(real, np.zeros(2, int), one, np.zeros(1, int))
    assert found == pytest.approx(math.sqrt((16 + 4) / 2 + 9 + 2))


# ---------------------------------------------------------------- neighbours


def test_neighbourhoods_by_hand() -> None:
    found = neighbourhoods(column(0, 1, 2, 3, 10), column(0.5, 5, 20), k=1)
    assert found.precision == pytest.approx(2 / 3)
    assert found.density == pytest.approx((2 + 1 + 0) / 3)
    assert found.coverage == pytest.approx(3 / 5)
    assert found.recall == pytest.approx(1)
    narrow = neighbourhoods(column(0, 1, 2, 3, 10), column(0.5, 0.75, 0.8), k=1)
    assert narrow.recall == pytest.approx(0)  # radii 0.25, 0.05 and 0.05 reach no real point: 1 is 0.2 from 0.8
    assert neighbourhoods(column(0, 1, 2), column(7, 9), k=2).recall is None


def test_neighbour_distances_by_hand() -> None:
    points = column(0, 1, 3, 7)
    np.testing.assert_array_equal(neighbour_distances(points), [1, 1, 2, 4])
    np.testing.assert_array_equal(neighbour_distances(points, k=3), [7, 6, 4, 7])
    with pytest.raises(ValueError, match="k must be"):
        neighbour_distances(points, k=4)


@pytest.mark.parametrize("k", [1, 5])
def test_a_set_is_its_own_neighbourhood(k: int) -> None:
    points = normal(40, 5)
    found = neighbourhoods(points, points.copy(), k=k)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert found.density == pytest.approx(1)  # itself and the k - 1 nearest


def test_chunks_do_not_change_neighbourhoods(monkeypatch: pytest.MonkeyPatch) -> None:
    real, synthetic = normal(33, 4), normal(17, 4, 1)
    labels = np.zeros(33, int), np.zeros(17, int)
    whole, audit = neighbourhoods(real, synthetic), memorisation(real, labels[0], synthetic, labels[1])
    covered, extreme = coverage_within(real, synthetic, 1.5), representativeness(real, synthetic)
    monkeypatch.setattr(set_metrics, "CHUNK", 40)
    assert neighbourhoods(real, synthetic) == whole
    again = memorisation(real, labels[0], synthetic, labels[1])
    np.testing.assert_array_equal(again.nearest, audit.nearest)
    np.testing.assert_array_equal(again.percentiles, audit.percentiles)
    assert coverage_within(real, synthetic, 1.5) == covered
    assert representativeness(real, synthetic) == pytest.approx(extreme)


def test_coverage_and_density_have_the_expectations_of_their_paper() -> None:
    n, m, k = 30, 20, 3
    found = [neighbourhoods(normal(n, 2, seed), normal(m, 2, 1000 + seed), k=k) for seed in range(400)]
    # the k nearest of the n - 1 + m others are all real: nothing synthetic is inside
    expected = 1 - math.prod((n - 1 - i) / (n + m - 1 - i) for i in range(k))
    coverage = [one.coverage for one in found]
    assert abs(np.mean(coverage) - expected) < 4 * np.std(coverage) / 20
    density = [one.density for one in found]
    assert abs(np.mean(density) - 1) < 4 * np.std(density) / 20
    assert all(one.coverage <= one.density * k * m / n + 1e-12 for one in found)


def test_coverage_within_a_radius() -> None:
    assert coverage_within(column(0, 1, 2, 5), column(1.0), 1.0) == 0.75
    assert coverage_within(column(0, 1, 2, 5), column(1.0), 0.0) == 0.25
    with pytest.raises(ValueError, match="radius"):
        coverage_within(column(0), column(1), math.nan)


# ---------------------------------------------------------------- representativeness, diversity, Vendi


def test_representativeness_and_diversity_are_cosines_of_known_angles() -> None:
    real, synthetic = directions(0, 90), directions(10, 30, 100)
    assert representativeness(real, synthetic) == pytest.approx(math.cos(math.radians(30)))
    assert diversity(synthetic) == pytest.approx(1 - math.cos(math.radians(20)))
    assert diversity(directions(40, 40)) == pytest.approx(0)
    assert diversity(directions(0, 180)) == pytest.approx(2)


def test_vendi_counts_different_images() -> None:
    assert vendi_score(np.eye(5) * np.arange(1, 6)[:, None]) == pytest.approx(5)
    assert vendi_score(np.eye(5)[:, :1].repeat(3, axis=1)[:1].repeat(4, axis=0)) == pytest.approx(1)
    groups = np.repeat(np.eye(2), [3, 1], axis=0)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert vendi_score(groups) == pytest.approx(math.exp(entropy))
    assert vendi_score(groups, order=2) == pytest.approx(1 / (0.75**2 + 0.25**2))
    assert vendi_score(groups, order=math.inf) == pytest.approx(1 / 0.75)
    assert vendi_score(groups, order=1 + 1e-6) == pytest.approx(vendi_score(groups), rel=1e-5)


@pytest.mark.parametrize(("n", "d"), [(20, 3), (4, 30)])
def test_vendi_is_the_entropy_of_the_kernel(n: int, d: int) -> None:
    points = normal(n, d)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(unit @ unit.T / n)
    shares = shares[shares > 1e-12]
    assert vendi_score(points) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))


# ---------------------------------------------------------------- memorisation


def test_memorisation_by_hand() -> None:
    real, labels = column(0, 1, 2, 3, 100, 102, 104), np.array([0, 0, 0, 0, 1, 1, 1])
    found = memorisation(real, labels, column(2, 2.25, -1, 50, 100.5), np.array([0, 0, 0, 0, 1]))
    assert found.labels.tolist() == [0, 0, 0, 0, 1]
    assert found.nearest.tolist() == [2, 2, 0, 3, 0]
    np.testing.assert_allclose(found.distances, [0, 0.25, 1, 47, 0.5])
    np.testing.assert_allclose(found.ratios, [0, 0.25, 1, 47, 0.25])
    np.testing.assert_allclose(found.percentiles, [0, 0, 50, 100, 0])
    assert found.suspects().tolist() == [0, 1, 4]


def test_a_copy_of_another_class_is_found() -> None:
    real, labels = column(0, 1, 2, 50, 51), np.array([0, 0, 0, 1, 1])
    found = memorisation(real, labels, column(50), np.array([0]))
    assert (found.labels[0], found.nearest[0], found.ratios[0]) == (1, 0, 0)


def test_fresh_images_are_not_suspect_and_near_copies_are() -> None:
    real, fresh = normal(400, 6), normal(300, 6, 1)
    copies = real[:20] + 0.01 * normal(20, 6, 2)
    found = memorisation(real, np.zeros(400, int), np.concatenate([fresh, copies]), np.zeros(320, int))
    assert 45 < found.percentiles[:300].mean() < 55
    assert set(range(300, 320)) <= set(found.suspects(1.0).tolist())
    assert found.nearest[300:].tolist() == list(range(20))
    assert len(found.suspects(1.0)) <= 20 + 10


def test_an_audit_needs_two_real_images_of_a_class_and_copes_with_duplicates() -> None:
    with pytest.raises(ValueError, match="class 1 has 1 real images"):
        memorisation(column(0, 1, 9), np.array([0, 0, 1]), column(9), np.array([1]))
    with pytest.raises(ValueError, match="class 2 has 0 real images"):
        memorisation(column(0, 1, 9), np.array([0, 0, 0]), column(9), np.array([2]))
    found = memorisation(column(0, 0, 0), np.zeros(3, int), column(0, 1), np.zeros(2, int))
    assert np.isnan(found.ratios).all()
    np.testing.assert_allclose(found.percentiles, [50, 100])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("function", [frechet_distance, kernel_distance, mmd])
def test_distances_need_two_images(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="synthetic must be features"):
        function(normal(5, 2), normal(1, 2))


def test_bad_features_are_rejected() -> None:
    with pytest.raises(ValueError, match="real has 2 features and synthetic 3"):
        mean_distance(normal(5, 2), normal(5, 3))
    with pytest.raises(ValueError, match="not finite"):
        representativeness(normal(5, 2), np.array([[math.nan, 1]]))
    with pytest.raises(ValueError, match="must be features"):
        neighbourhoods(np.zeros(5), normal(5, 1))
    with pytest.raises(ValueError, match="k must be in"):
        neighbourhoods(normal(5, 2), normal(5, 2))
    with pytest.raises(ValueError, match="no direction"):
        vendi_score(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="order"):
        vendi_score(np.eye(2), order=0)
    with pytest.raises(ValueError, match="as many labels"):
        memorisation(normal(5, 2), np.zeros(5, int), normal(5, 2), np.zeros(4, int))
    with pytest.raises(ValueError, match="at least 2 images"):
        diversity(normal(1, 2))
