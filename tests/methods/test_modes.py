from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from workflow_scripts.methods.modes import Tree, grow_tree, kmeans, pooled

SHAPE = (2, 4, 4)


def latents(n: int = 60, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Return clumps of unequal size and spread."""
    random = np.random.default_rng(seed)
    centres = random.normal(0, 3, (5, *shape))
    of = random.choice(5, n, p=[0.4, 0.25, 0.2, 0.1, 0.05])
    return (centres[of] + random.normal(size=(n, *shape)) * (0.3 + of.reshape(-1, 1, 1, 1) / 4)).astype(np.float32)


def members(tree: Tree, node: int) -> np.ndarray:
    """Return which latents are below a node, by walking up from each leaf."""
    inside = np.zeros(len(tree.member), dtype=bool)
    for index, leaf in enumerate(tree.member):
        at = int(leaf)
        while at not in (node, -1):
            at = int(tree.parent[at])
        inside[index] = at == node
    return inside


def squares(points: np.ndarray) -> float:
    points = points.reshape(len(points), -1).astype(np.float64)
    return float(((points - points.mean(0)) ** 2).sum())


def assert_equal(a: Tree, b: Tree) -> None:
    for field in fields(Tree):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


@pytest.fixture(scope="module")
def grown() -> tuple[np.ndarray, Tree]:
    points = latents()
    return points, grow_tree(points, 16, restarts=3, seed=0)


# ---------------------------------------------------------------- the tree


def test_nodes_describe_their_members(grown: tuple[np.ndarray, Tree]) -> None:
    points, tree = grown
    for node in range(len(tree.parent)):
        below = points[members(tree, node)]
        assert tree.size[node] == len(below) > 0
        np.testing.assert_allclose(tree.mean[node], below.reshape(len(below), -1).mean(0), rtol=1e-4, atol=1e-5)
        assert tree.sse[node] == pytest.approx(squares(below), rel=1e-5, abs=1e-9)


def test_leaves_partition_the_class(grown: tuple[np.ndarray, Tree]) -> None:
    points, tree = grown
    leaves = np.setdiff1d(np.arange(len(tree.parent)), tree.parent)
    assert len(leaves) == 16
    assert set(tree.member) == set(leaves)
    assert tree.size[leaves].sum() == len(points)
    for k in range(1, 17):
        modes = tree.leaves(k)
        assert modes.sizes.sum() == len(points)
        assert len(modes.means) == k
        average = (modes.means * modes.sizes[:, None]).sum(0) / len(points)
        np.testing.assert_allclose(average, points.reshape(len(points), -1).mean(0), rtol=1e-4, atol=1e-4)


def test_a_split_never_adds_squares(grown: tuple[np.ndarray, Tree]) -> None:
    _, tree = grown
    for node in np.unique(tree.parent[1:]):
        children = np.flatnonzero(tree.parent == node)
        assert len(children) == 2
        assert tree.sse[node] >= tree.sse[children].sum() * (1 - 1e-6)
        assert tree.size[node] == tree.size[children].sum()
        assert (tree.depth[children] == tree.depth[node] + 1).all()


def test_the_leaf_of_most_squares_is_split(grown: tuple[np.ndarray, Tree]) -> None:
    """Split s made nodes 2s + 1 and 2s + 2; its node had the largest SSE of the leaves that there were."""
    _, tree = grown
    leaves = {0}
    for split in range(15):
        node = int(tree.parent[2 * split + 1])
        assert tree.parent[2 * split + 2] == node
        assert tree.sse[node] == max(tree.sse[list(leaves)])
        leaves = leaves - {node} | {2 * split + 1, 2 * split + 2}


@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_one_tree_serves_every_ipc(grown: tuple[np.ndarray, Tree], k: int) -> None:
    points, tree = grown
    small = grow_tree(points, k, restarts=3, seed=0)
    assert len(small.parent) == 2 * k - 1
    for name in ("depth", "size", "sse", "mean"):
        np.testing.assert_array_equal(getattr(small, name), getattr(tree, name)[: 2 * k - 1], err_msg=name)
    np.testing.assert_array_equal(small.parent, tree.parent[: 2 * k - 1])
    leaves = np.setdiff1d(np.arange(2 * k - 1), small.parent)
    np.testing.assert_array_equal(tree.leaves(k).means, small.mean[leaves])
    np.testing.assert_array_equal(tree.leaves(k).sizes, small.size[leaves])


def test_the_tree_is_deterministic_and_the_seed_matters() -> None:
    points = latents(200)
    assert_equal(grow_tree(points, 12, 1, 3), grow_tree(points, 12, 1, 3))
    assert not np.array_equal(grow_tree(points, 12, 1, 3).mean, grow_tree(points, 12, 1, 4).mean)


def test_blobs_are_the_leaves() -> None:
    """Four separated blobs in two pairs: the first split parts the pairs, the next two the blobs."""
    random = np.random.default_rng(0)
    centres = np.zeros((4, *SHAPE))
    centres[:, 0, 0, 0] = [-20, -20, 20, 20]
    centres[:, 1, 2, 3] = [-4, 4, -5, 5]
    points = (np.repeat(centres, [3, 5, 7, 9], 0) + random.normal(0, 0.01, (24, *SHAPE))).astype(np.float32)
    tree = grow_tree(points, 4, 5, 0)
    assert sorted(tree.leaves(2).sizes) == [8, 16]
    modes = tree.leaves(4)
    order = np.argsort(modes.sizes)
    assert modes.sizes[order].tolist() == [3, 5, 7, 9]
    np.testing.assert_allclose(modes.means[order], centres.reshape(4, -1), atol=0.05)


def test_too_many_leaves_or_nodes_are_refused(grown: tuple[np.ndarray, Tree]) -> None:
    _, tree = grown
    with pytest.raises(ValueError, match="16 leaves, fewer than the 17"):
        tree.leaves(17)
    with pytest.raises(ValueError, match="31 nodes, fewer than the 32"):
        tree.multiscale(32, 0)


def test_single_points_end_the_growth() -> None:
    points = latents(9)
    tree = grow_tree(points, 50, 2, 0)
    assert len(tree.parent) == 17
    assert (tree.leaves(9).sizes == 1).all()
    np.testing.assert_array_equal(np.unique(tree.leaves(9).means, axis=0), np.unique(points.reshape(9, -1), axis=0))


@pytest.mark.parametrize("copies", [2, 5])
def test_exact_duplicates_end_the_growth(copies: int) -> None:
    """Values that binary floats hold exactly, so that means of copies are the copies."""
    points = np.round(latents(6) * 4) / 4
    tree = grow_tree(np.repeat(points, copies, 0), 50, 2, 0)
    assert len(tree.parent) == 11
    assert (tree.leaves(6).sizes == copies).all()


@pytest.mark.filterwarnings("ignore:Number of distinct clusters", "ignore:Mean of empty slice", "ignore:invalid value")
@pytest.mark.parametrize("copies", [3, 7])
def test_copies_of_an_image_end_the_growth(copies: int) -> None:
    points = np.random.default_rng(0).normal(size=(10, 4, 32, 32)).astype(np.float32)
    tree = grow_tree(np.concatenate([points, np.repeat(points[:1], copies - 1, 0)]), 16, 1, 0)
    assert (tree.size > 0).all()
    assert np.isfinite(tree.mean).all()
    assert len(tree.parent) == 19


# ---------------------------------------------------------------- multiscale


def by_hand(tree: Tree, k: int, start_depth: int) -> list[int]:
    """Level by level from ``start_depth`` down, then the levels above, nearest first; largest SSE of a level first."""
    deepest = int(tree.depth.max())
    levels = [*range(start_depth, deepest + 1), *range(min(start_depth, deepest + 1) - 1, -1, -1)]
    order = []
    for level in levels:
        nodes = np.flatnonzero(tree.depth == level)
        order += sorted(nodes.tolist(), key=lambda node: (-tree.sse[node], node))
    return order[:k]


@pytest.mark.parametrize("start_depth", [0, 1, 2, 3, 5, 30])
@pytest.mark.parametrize("k", [1, 4, 10, 31])
def test_multiscale_takes_level_by_level(grown: tuple[np.ndarray, Tree], k: int, start_depth: int) -> None:
    _, tree = grown
    modes, nodes = tree.multiscale(k, start_depth), by_hand(tree, k, start_depth)
    np.testing.assert_array_equal(modes.means, tree.mean[nodes])
    np.testing.assert_array_equal(modes.sizes, tree.size[nodes])


def test_start_depth_changes_the_set(grown: tuple[np.ndarray, Tree]) -> None:
    _, tree = grown
    sets = {depth: frozenset(map(bytes, tree.multiscale(5, depth).means)) for depth in range(5)}
    assert len(set(sets.values())) == 5
    leaves = frozenset(map(bytes, tree.leaves(5).means))
    assert leaves not in sets.values()
    assert tree.multiscale(1, 0).sizes[0] == len(tree.member)


def test_multiscale_is_nested_in_ipc(grown: tuple[np.ndarray, Tree]) -> None:
    _, tree = grown
    np.testing.assert_array_equal(tree.multiscale(12, 2).means[:5], tree.multiscale(5, 2).means)


# ---------------------------------------------------------------- k-means


def test_kmeans_finds_separated_blobs_and_their_nearest_members() -> None:
    random = np.random.default_rng(1)
    centres = random.normal(0, 10, (4, *SHAPE)).astype(np.float32)
    of = random.permutation(np.repeat(np.arange(4), [3, 6, 9, 12]))
    points = (centres[of] + random.normal(0, 0.05, (30, *SHAPE))).astype(np.float32)
    modes, nearest = kmeans(points, 4, restarts=10, seed=0)
    order = np.argsort(modes.sizes)
    assert modes.sizes[order].tolist() == [3, 6, 9, 12]
    for blob, mode in enumerate(order):
        own = points[of == blob].reshape(-1, 32)
        np.testing.assert_allclose(modes.means[mode], own.mean(0), rtol=1e-4, atol=1e-4)
        distances = ((points.reshape(30, -1) - own.mean(0)) ** 2).sum(1)
        assert nearest[mode] == distances.argmin()
    assert modes.means.dtype == np.float32


def test_kmeans_is_deterministic_and_the_seed_matters() -> None:
    points = latents(100)
    a, b, c = (kmeans(points, 10, 1, seed)[0].means for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_nearest_members_are_distinct() -> None:
    """As many centroids as points: each point must serve once, however close others are."""
    points = latents(12)
    points[1] = points[0] + 0.05
    _, nearest = kmeans(points, 12, 1, 0)
    assert sorted(nearest) == list(range(12))
    rng = np.random.default_rng(0)
    crowd = rng.normal(size=(40, *SHAPE)).astype(np.float32)
    assert len(set(kmeans(crowd, 30, 1, 0)[1])) == 30


def test_a_latent_nearest_to_two_centroids_serves_once() -> None:
    """A ring of radius 10, and a clump 9 above its centre: the clump's middle is the nearest latent to both centroids."""
    angle = np.arange(40)[:, None] * 2 * np.pi / 40
    ring = 10 * (np.cos(angle) * np.eye(8)[0] + np.sin(angle) * np.eye(8)[1])
    clump = 9 * np.eye(8)[2] + np.arange(-150, 151)[:, None] / 300 * np.eye(8)[3]
    points = np.concatenate([ring, clump]).reshape(-1, 2, 2, 2).astype(np.float32)
    modes, nearest = kmeans(points, 2, 10, 0)
    assert sorted(modes.sizes) == [40, 301]
    middle = 40 + 150
    assert middle in nearest
    assert set(nearest) <= {middle - 1, middle, middle + 1}
    assert len(set(nearest)) == 2


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_pooling_averages_blocks(pool: int) -> None:
    points = latents(3)
    flat = pooled(points, pool).reshape(3, 2, 4 // pool, 4 // pool)
    for i in range(4 // pool):
        for j in range(4 // pool):
            block = points[:, :, i * pool : (i + 1) * pool, j * pool : (j + 1) * pool]
            np.testing.assert_allclose(flat[:, :, i, j], block.mean((2, 3)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="pool 3 does not divide latents of 4x4"):
        pooled(points, 3)


def test_pooled_clusters_have_full_means() -> None:
    """A pattern of zero block mean outweighs the class difference in the full space, and vanishes in the pooled one."""
    random = np.random.default_rng(0)
    checker = np.indices((4, 4)).sum(0) % 2 * 2.0 - 1
    level = np.repeat([-1.0, 1.0], 20)
    stripe = np.tile([-5.0, 5.0], 20)
    points = level[:, None, None, None] + stripe[:, None, None, None] * checker + random.normal(0, 0.01, (40, 1, 4, 4))
    points = points.astype(np.float32)
    modes, _ = kmeans(points, 2, 5, 0, pool=2)
    assert sorted(modes.means.mean(1).round(1)) == [-1, 1]
    np.testing.assert_allclose(np.sort(modes.means, 0), np.repeat([[-1.0], [1.0]], 16, 1), atol=0.05)
    tree = grow_tree(points, 2, 5, 0, pool=2)
    assert sorted(tree.mean[1:].mean(1).round(1)) == [-1, 1]
    assert tree.mean.shape == (3, 16)
    assert tree.sse[0] == pytest.approx(squares(pooled(points, 2)), rel=1e-5)
    full, _ = kmeans(points, 2, 5, 0)
    np.testing.assert_allclose(full.means.mean(1), 0, atol=0.05)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters", "ignore:Mean of empty slice", "ignore:invalid value")
def test_kmeans_of_duplicates_is_finite_or_refused() -> None:
    points = np.repeat(latents(3), 4, 0)
    try:
        modes, _ = kmeans(points, 5, 1, 0)
    except ValueError:
        return
    assert np.isfinite(modes.means).all()
    assert (modes.sizes > 0).all()
