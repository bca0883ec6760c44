from __future__ import annotations

import itertools

import numpy as np
import pytest

from workflow_scripts.config import CoresetMethod
from workflow_scripts.diffusion.noise import stream
from workflow_scripts.methods.coresets import collage, herding, kcenter, select
from workflow_scripts.methods.modes import kmeans


def latents(n: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.5, 1, (n, 2, 2, 2)).astype(np.float32)


def gap(points: np.ndarray, chosen: list[int]) -> float:
    return float(np.linalg.norm(points[chosen].mean(0) - points.mean(0)))


def test_herding_is_the_greedy_choice() -> None:
    points = latents(15).reshape(15, -1).astype(np.float64)
    chosen: list[int] = []
    for _ in range(15):
        free = [index for index in range(15) if index not in chosen]
        chosen.append(min(free, key=lambda index: gap(points, [*chosen, index])))
    assert herding(points, 15).tolist() == chosen
    assert herding(points, 6).tolist() == chosen[:6]


def test_herding_follows_the_mean_faster_than_chance() -> None:
    points = latents(300).reshape(300, -1).astype(np.float64)
    chosen = herding(points, 64).tolist()
    errors = [gap(points, chosen[:k]) for k in (1, 2, 4, 8, 16, 32, 64)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    random = np.random.default_rng(0)
    assert gap(points, chosen) < 0.3 * min(gap(points, random.permutation(300)[:64].tolist()) for _ in range(20))


def test_herding_everything_reaches_the_mean() -> None:
    points = latents(20).reshape(20, -1).astype(np.float64)
    chosen = herding(points, 20)
    assert sorted(chosen) == list(range(20))
    assert gap(points, chosen.tolist()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rule", ["random", "herding", "kmeans", "kcenter", "crops"])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_choices_are_distinct_and_reproducible(rule: str, count: int) -> None:
    chosen = select(rule, latents(), count, stream(0, "class", 0, "coreset"))
    assert chosen.shape == (count,)
    assert len(set(chosen.tolist())) == count
    assert set(chosen.tolist()) <= set(range(40))
    np.testing.assert_array_equal(chosen, select(rule, latents(), count, stream(0, "class", 0, "coreset")))


def test_random_depends_on_the_stream() -> None:
    keys = [(0, "a"), (1, "a"), (0, "b")]
    draws = [tuple(select("random", latents(), 10, stream(seed, name, 0, "coreset"))) for seed, name in keys]
    assert len(set(draws)) == 3


def test_random_is_uniform() -> None:
    counts = np.zeros(8)
    for seed in range(2000):
        counts[select("random", latents(8), 3, stream(seed, "a", 0, "coreset"))] += 1
    np.testing.assert_allclose(counts / 2000, 3 / 8, atol=5 * np.sqrt(3 / 8 * 5 / 8 / 2000))


@pytest.mark.parametrize("rule", ["herding", "kcenter"])
def test_greedy_rules_ignore_the_stream(rule: str) -> None:
    a, b = (select(rule, latents(), 9, stream(seed, "a", 0, "coreset")) for seed in (0, 1))
    np.testing.assert_array_equal(a, b)
    assert not CoresetMethod(kind="coreset", select=rule).seeded


# ---------------------------------------------------------------- k-center


def radius(points: np.ndarray, chosen: list[int]) -> float:
    """Return the largest distance to the nearest of those chosen: what k-center minimises."""
    return float(np.linalg.norm(points[:, None] - points[chosen], axis=2).min(1).max())


def test_kcenter_starts_at_the_mean_and_takes_the_farthest() -> None:
    points = latents(25).reshape(25, -1).astype(np.float64)
    chosen = [int(np.linalg.norm(points - points.mean(0), axis=1).argmin())]
    while len(chosen) < 25:
        chosen.append(int(np.linalg.norm(points[:, None] - points[chosen], axis=2).min(1).argmax()))
    assert kcenter(points, 25).tolist() == chosen
    assert kcenter(points, 6).tolist() == chosen[:6], "sets are nested in IPC"


@pytest.mark.parametrize("count", [2, 3, 4])
def test_kcenter_is_within_twice_the_best_radius(count: int) -> None:
    """Gonzalez's bound, for any first centre, against every choice there is."""
    for seed in range(5):
        points = np.random.default_rng(seed).normal(size=(12, 3))
        best = min(radius(points, list(some)) for some in itertools.combinations(range(12), count))
        assert radius(points, kcenter(points, count).tolist()) <= 2 * best + 1e-12


def test_kcenter_reaches_every_blob() -> None:
    """Far blobs of 1 to 30 points get one centre each; a random choice of as many misses the small ones."""
    random = np.random.default_rng(0)
    blob = np.repeat(np.arange(5), [1, 2, 5, 15, 30])
    points = random.normal(0, 20, (5, 4))[blob] + random.normal(0, 0.1, (53, 4))
    assert set(blob[kcenter(points, 5)]) == set(range(5))
    assert np.mean([len(set(blob[random.permutation(53)[:5]])) for _ in range(200)]) < 3.5


def test_kcenter_of_copies_takes_each_once() -> None:
    points = np.repeat(latents(3).reshape(3, -1), 4, 0).astype(np.float64)
    assert sorted(kcenter(points, 12)) == list(range(12))
    assert len({tuple(points[index]) for index in kcenter(points, 3)}) == 3


# ---------------------------------------------------------------- collages


@pytest.mark.parametrize("side", [4, 8])
def test_a_collage_is_four_images_at_half_their_side(side: int) -> None:
    squares = np.random.default_rng(0).integers(0, 256, (8, 3, side, side)).astype(np.uint8)
    made = collage(squares)
    assert (made.shape, made.dtype) == ((2, 3, side, side), np.float32)
    halves = squares.astype(np.float64).reshape(8, 3, side // 2, 2, side // 2, 2).mean((3, 5))
    half = side // 2
    for image in range(2):
        a, b, c, d = halves[4 * image : 4 * image + 4]
        np.testing.assert_allclose(made[image, :, :half, :half], a, rtol=1e-5)
        np.testing.assert_allclose(made[image, :, :half, half:], b, rtol=1e-5)
        np.testing.assert_allclose(made[image, :, half:, :half], c, rtol=1e-5)
        np.testing.assert_allclose(made[image, :, half:, half:], d, rtol=1e-5)


def test_a_collage_of_an_odd_side_has_that_side() -> None:
    made = collage(np.stack([np.full((1, 5, 5), value, np.float32) for value in range(4)]))
    expected = np.array([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [2, 2, 3, 3, 3], [2, 2, 3, 3, 3], [2, 2, 3, 3, 3]])
    np.testing.assert_array_equal(made[0, 0], expected)


def test_crops_take_the_random_choice_of_four_times_as_many() -> None:
    crops, random = (select(rule, latents(), 12, stream(0, "a", 0, "coreset")) for rule in ("crops", "random"))
    np.testing.assert_array_equal(crops, random)
    assert [CoresetMethod(kind="coreset", select=rule).parts for rule in ("crops", "random", "kcenter")] == [4, 1, 1]


# ---------------------------------------------------------------- k-means


def test_kmeans_takes_the_medoids_of_blobs() -> None:
    random = np.random.default_rng(0)
    centres = random.normal(0, 10, (5, 2, 2, 2))
    points = (np.repeat(centres, 6, 0) + random.normal(0, 0.1, (30, 2, 2, 2))).astype(np.float32)
    chosen = select("kmeans", points, 5, stream(0, "a", 0, "coreset"))
    flat = points.reshape(5, 6, -1)
    medoids = [6 * blob + int(((own - own.mean(0)) ** 2).sum(1).argmin()) for blob, own in enumerate(flat)]
    assert sorted(chosen) == medoids
    _, nearest = kmeans(points, 5, 10, 0)
    assert sorted(nearest) == medoids
