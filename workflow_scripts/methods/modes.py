"""Modes of a class: k-means, and the hierarchical divisive tree that serves every IPC.

Clustering may run on average-pooled latents; means are always those of the full latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans


@dataclass(frozen=True)
class Modes:
    """Prototypes of a class.

    Attributes:
        means: (k, D) float32.
        sizes: (k,) int64, how many real latents each stands for.
    """

    means: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class Tree:
    """A binary tree of clusters; split s made nodes 2s+1 and 2s+2, so that its first 2k-1 nodes are the tree with k leaves.

    Attributes:
        parent: (m,) int64, -1 for the root, which is node 0.
        depth: (m,) int64.
        size: (m,) int64, members of the node.
        sse: (m,) float64, sum of squared distances to the node's mean, in the clustering space.
        mean: (m, D) float32, mean of the members' full latents.
        member: (n,) int64, the leaf of each latent in the fully grown tree.
    """

    parent: np.ndarray
    depth: np.ndarray
    size: np.ndarray
    sse: np.ndarray
    mean: np.ndarray
    member: np.ndarray

    def leaves(self, k: int) -> Modes:
        """Return the k leaves of the tree grown to k leaves, as ManifoldGD's released code does."""
        nodes = np.arange(2 * k - 1)
        if nodes[-1] >= len(self.parent):
            raise ValueError(f"the tree has {(len(self.parent) + 1) // 2} leaves, fewer than the {k} asked for")
        return self._modes(np.setdiff1d(nodes, self.parent[nodes]))

    def multiscale(self, k: int, start_depth: int) -> Modes:
        """Return k nodes, level by level from ``start_depth`` down, the largest SSE of a level first.

        If the levels below hold fewer than k nodes, the levels above follow, nearest first (ManifoldGD, section 3.2).
        """
        if k > len(self.parent):
            raise ValueError(f"the tree has {len(self.parent)} nodes, fewer than the {k} asked for")
        order = np.lexsort((np.arange(len(self.sse)), -self.sse, self.depth))
        below = order[self.depth[order] >= start_depth]
        above = order[self.depth[order] < start_depth]
        above = above[np.argsort(-self.depth[above], kind="stable")]
        return self._modes(np.concatenate([below, above])[:k])

    def _modes(self, nodes: np.ndarray) -> Modes:
        return Modes(self.mean[nodes], self.size[nodes])


def grow_tree(latents: np.ndarray, max_leaves: int, restarts: int, seed: int, pool: int = 1) -> Tree:
    """Split the leaf of largest SSE by 2-means until there are ``max_leaves``, or only points that coincide are left.

    Args:
        latents: (n, c, h, w).
        restarts: of each 2-means.

    Returns:
        the tree, deterministic for a seed.
    """
    flat = latents.reshape(len(latents), -1).astype(np.float32)
    space = pooled(latents, pool)
    random = np.random.RandomState(seed)
    parent, depth = [-1], [0]
    members = [np.arange(len(flat))]
    sse = [_sse(space)]
    leaves = {0}
    while len(leaves) < max_leaves:
        node = max(leaves, key=lambda leaf: (sse[leaf], -leaf))
        if sse[node] == 0:  # a single latent, or copies of one
            break
        kmeans = KMeans(2, n_init=restarts, random_state=random.randint(2**31 - 1)).fit(space[members[node]])
        leaves.remove(node)
        for side in (0, 1):
            part = members[node][kmeans.labels_ == side]
            leaves.add(len(parent))
            parent.append(node)
            depth.append(depth[node] + 1)
            members.append(part)
            sse.append(_sse(space[part]))
    member = np.empty(len(flat), dtype=np.int64)
    for leaf in leaves:
        member[members[leaf]] = leaf
    mean = np.stack([_mean(flat[part]) for part in members])
    sizes = np.array([len(part) for part in members])
    return Tree(np.array(parent), np.array(depth), sizes, np.array(sse), mean, member)


def kmeans(latents: np.ndarray, k: int, restarts: int, seed: int, pool: int = 1) -> tuple[Modes, np.ndarray]:
    """Cluster (n, c, h, w) latents by k-means++ and Lloyd (MGD3, mode discovery).

    Returns:
        the modes, and the index (k,) of the real latent nearest to each.

    Raises:
        ValueError: if there are fewer than k distinct latents.
    """
    space = pooled(latents, pool)
    fitted = KMeans(k, n_init=restarts, random_state=seed).fit(space)
    flat = latents.reshape(len(latents), -1)
    sizes = np.bincount(fitted.labels_, minlength=k)
    if not sizes.all():
        raise ValueError(
            f"its latents form only {np.count_nonzero(sizes)} distinct clusters, fewer than the {k} asked for"
        )
    means = np.stack([_mean(flat[fitted.labels_ == mode]) for mode in range(k)])
    return Modes(means, sizes), _distinct_nearest(fitted.transform(space))


def pooled(latents: np.ndarray, pool: int) -> np.ndarray:
    """Average-pool (n, c, h, w) by ``pool`` and flatten to (n, D / pool^2), float32."""
    n, c, h, w = latents.shape
    if h % pool or w % pool:
        raise ValueError(f"pool {pool} does not divide latents of {h}x{w}")
    return latents.astype(np.float32).reshape(n, c, h // pool, pool, w // pool, pool).mean((3, 5)).reshape(n, -1)


def _distinct_nearest(distances: np.ndarray) -> np.ndarray:
    """For each column in turn choose the nearest row that no earlier column took."""
    distances = distances.copy()
    chosen = []
    for mode in range(distances.shape[1]):
        chosen.append(int(distances[:, mode].argmin()))
        distances[chosen[-1]] = np.inf
    return np.array(chosen)


def _mean(points: np.ndarray) -> np.ndarray:
    return points.mean(0, dtype=np.float64).astype(np.float32)


def _sse(points: np.ndarray) -> float:
    if (points == points[0]).all():
        return 0.0
    return float(((points - points.mean(0, dtype=np.float64)) ** 2).sum())
