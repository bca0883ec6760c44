from __future__ import annotations

import itertools

import numpy as np
import pytest

from workflow_scripts.diffusion.noise import stream
from workflow_scripts.methods.coresets import herding, select
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


@pytest.mark.parametrize("rule", ["random", "herding", "kmeans"])
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


def test_herding_ignores_the_stream() -> None:
    a, b = (select("herding", latents(), 9, stream(seed, "a", 0, "coreset")) for seed in (0, 1))
    np.testing.assert_array_equal(a, b)


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
