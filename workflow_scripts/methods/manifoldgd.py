"""ManifoldGD (CVPR 2026): the mode pull, kept on the local tangent space of the class's latent manifold.

``TangentGuidance`` is the paper's definition with a usable geometry: neighbours are real latents, and tangent spaces live
where clean latents live, so one basis per image serves every step. Two options come closer to the paper at a price per step:
neighbours of the current prediction (``around: x0``), and a patch brought to the noise level (``noisy``). ``ReleasedManifold``
is the released code's additive term: its cloud is synthetic noise around the prototype, and its size is bounded by ``scale``
in a space of thousands of dimensions, so that it hardly acts. It is here to be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from workflow_scripts.config import TangentTerm
from workflow_scripts.diffusion.sampler import Rows, Step


@dataclass(frozen=True)
class TangentGuidance:
    """g = lambda (P_T v + kappa (I - P_T) v) - eta (I - P_T)(x0 - m), with v = prototype - x0 (eq. 4).

    What it reads of the rows is made by :func:`tangent_rows` and, for ``around: x0``, by :func:`shared_latents`.
    """

    scale: float
    stop: int
    kappa: float
    normal_pull: float
    around: str = "prototype"
    noisy: bool = False
    neighbours: int = 64
    variance: float = 0.9
    dimension: int | None = None

    def acts_at(self, index: int) -> bool:
        """Act while the step index is above ``stop``."""
        return index > self.stop

    def __call__(self, step: Step, rows: Rows) -> torch.Tensor:
        """Return the projected pull of each row."""
        pull = rows["prototype"] - step.x0
        if self.kappa == 1 and not self.normal_pull:  # MGD3, to the bit
            return self.scale * pull
        if self.around == "prototype" and not self.noisy:
            basis, centre = rows["basis"], rows["centre"].view_as(pull)
        else:
            basis, centre = self._plane_at(step, rows)
        force = self.scale * pull
        if self.kappa != 1:
            tangent = project(basis, pull)
            force = self.scale * (tangent + self.kappa * (pull - tangent))
        if self.normal_pull:
            offset = step.x0 - centre
            force = force - self.normal_pull * (offset - project(basis, offset))
        return force

    def _plane_at(self, step: Step, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Fit this step's planes; return bases (n, D, K) and the neighbours' means (n, c, h, w), at the scale of x0."""
        if self.around == "x0":
            own = rows["owner"][:, None] == rows["pool_owner"]
            near, inside = nearest(step.x0.flatten(1), rows["limit"], rows["pool"], self.neighbours, own)
        else:
            near, inside = rows["near"].double(), rows["inside"].double()
        if not self.noisy:
            basis, centre = plane(near, inside, self.variance, self.dimension)
            return basis, centre.view_as(step.x0)
        noise = torch.stack([self._noise(key, step) for key in rows["patch_key"].tolist()])[:, : near.shape[1]]
        patch = math.sqrt(step.abar) * near + math.sqrt(1 - step.abar) * noise  # eq. 5
        basis, centre = plane(patch, inside, self.variance, self.dimension)
        return basis, centre.view_as(step.x0) / math.sqrt(step.abar)

    def _noise(self, key: int, step: Step) -> torch.Tensor:
        """Return one row's noise (K, D) at a step."""
        x = step.x
        return torch.randn(
            self.neighbours, x[0].numel(), generator=_generator(key, step.index, x.device), device=x.device
        )


def tangent_rows(
    term: TangentTerm, prototypes: torch.Tensor, sizes: torch.Tensor, latents: torch.Tensor | None, keys: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Prepare what :class:`TangentGuidance` reads of the rows of one class.

    Args:
        prototypes: (k, D).
        sizes: (k,) int64, how many real latents each prototype stands for.
        latents: (n, D), the class's real latents; not needed for ``around: x0``, which takes them from a pool.
        keys: k seeds below 2^31, one for each row's patch noise.

    Returns:
        per-row tensors: ``basis`` (k, D, K), orthonormal tangent directions with zero columns where there are fewer, and
        ``centre`` (k, D), the neighbours' mean; for ``noisy`` instead the neighbours ``near`` (k, K, D), which of them count,
        ``inside`` (k, K, 1), and ``patch_key`` (k,) on the CPU; for ``around: x0`` ``limit`` (k,) in place of neighbours.
    """
    limit = sizes if term.neighbourhood == "cluster" else torch.full_like(sizes, term.neighbours)
    rows = {"patch_key": torch.tensor(keys)} if term.noisy else {}
    if term.around == "x0":
        return rows | {"limit": limit}
    assert latents is not None
    if term.noisy:
        near, inside = nearest(prototypes, limit, latents, term.neighbours)
        missing = (0, 0, 0, term.neighbours - near.shape[1])
        near, inside = (torch.nn.functional.pad(value.float(), missing) for value in (near, inside))
        return rows | {"near": near, "inside": inside}
    basis, centre = tangent_spaces(prototypes, limit, latents, term.neighbours, term.tangent_variance, term.tangent_dim)
    return {"basis": torch.nn.functional.pad(basis, (0, term.neighbours - basis.shape[2])), "centre": centre}


def shared_latents(names: Sequence[str], latents_of: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gather the real latents that the rows of a batch choose neighbours from, each class's once.

    Args:
        names: each row's class.
        latents_of: a class's latents (n, D).

    Returns:
        ``pool`` (N, D) float64 with its classes' numbers ``pool_owner`` (N,), and each row's, ``owner`` (n,).
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    parts = [latents_of(name) for name in numbers]
    pool = torch.cat(parts).double()
    counts = torch.tensor([len(part) for part in parts], device=pool.device)
    owner = torch.tensor([numbers[name] for name in names], device=pool.device)
    return {
        "pool": pool,
        "pool_owner": torch.arange(len(parts), device=pool.device).repeat_interleave(counts),
        "owner": owner,
    }


def project(basis: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Project (n, c, h, w) vectors on the columns of (n, D, K) bases."""
    flat = vector.flatten(1).unsqueeze(2)
    return (basis @ (basis.mT @ flat)).squeeze(2).view_as(vector)


def tangent_spaces(
    prototypes: torch.Tensor,
    sizes: torch.Tensor,
    latents: torch.Tensor,
    neighbours: int,
    variance: float,
    dimension: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit a plane to the real latents nearest to each prototype, by the Gram matrix of the centred neighbours.

    Args:
        prototypes: (k, D).
        sizes: (k,) int64, how many neighbours each prototype may have; at least 2 are used, at most ``neighbours``.
        latents: (n, D), the class's real latents.
        variance: share of the neighbourhood's variance that the plane must hold.
        dimension: of the plane, instead of ``variance``.

    Returns:
        bases (k, D, K) with zero columns beyond each plane's dimension, and neighbourhood means (k, D).
    """
    return plane(*nearest(prototypes, sizes, latents, neighbours), variance, dimension)


def nearest(
    points: torch.Tensor,
    sizes: torch.Tensor,
    latents: torch.Tensor,
    neighbours: int,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the real latents nearest to each point.

    Args:
        points: (k, D).
        sizes: (k,) int64, how many neighbours each may have; at least 2 are used, at most ``neighbours``.
        latents: (n, D).
        allowed: (k, n), which latents each point may choose; default: all.

    Returns:
        neighbours (k, K, D) float64, nearest first, and 1 or 0 for those that count (k, K, 1).
    """
    count = min(neighbours, len(latents))
    distances = torch.cdist(points.double(), latents.double())
    if allowed is not None:
        distances = distances.masked_fill(~allowed, torch.inf)
    near, order = distances.topk(count, largest=False)
    limit = sizes.clamp(2, count)
    inside = (torch.arange(count, device=latents.device) < limit[:, None]) & near.isfinite()
    return latents.double()[order], inside.double()[:, :, None]


def plane(
    near: torch.Tensor, inside: torch.Tensor, variance: float, dimension: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit a plane to each row of (k, K, D) neighbours, of which those ``inside`` (k, K, 1) count.

    Returns:
        bases (k, D, K) with zero columns beyond each plane's dimension, and neighbourhood means (k, D), float32.
    """
    centre = (near * inside).sum(1) / inside.sum(1)
    centred = (near - centre[:, None]) * inside
    values, vectors = torch.linalg.eigh(centred @ centred.mT)
    values, vectors = values.flip(1).clamp(min=0), vectors.flip(2)
    real = values > 1e-10 * values[:, :1].clamp(min=1e-30)
    if dimension is None:
        before = (values.cumsum(1) - values) / values.sum(1, keepdim=True).clamp(min=1e-30)
        keep = real & (before < variance)
    else:
        keep = real & (torch.arange(near.shape[1], device=values.device) < dimension)
    scale = torch.where(keep, values.clamp(min=1e-30).rsqrt(), 0)
    return (centred.mT @ (vectors * scale[:, None])).float(), centre.float()


def _generator(key: int, index: int, device: torch.device) -> torch.Generator:
    """Return a row's generator at a step: one-to-one in the key, within the 32 bits that torch's CPU generator keeps."""
    return torch.Generator(device).manual_seed((key + index * 2654435761) % 2**32)


@dataclass(frozen=True)
class ReleasedManifold:
    """The normal pull of the released code (specification 1.4), with a thin SVD in place of its D x D eigenproblem.

    ``rows["key"]`` (n,) int64 on the CPU seeds each row's cloud at each step.
    """

    scale: float
    stop: int
    steps: int
    radius: float
    radius_growth: float
    warmup: int
    schedule: str
    cloud: int
    neighbours: int
    tangent_dim: int
    bandwidth: float

    def acts_at(self, index: int) -> bool:
        """Act while the step index is above ``stop``."""
        return index > self.stop

    def __call__(self, step: Step, rows: Rows) -> torch.Tensor:
        """Return b / sigma, so that the sampler adds b itself to the posterior mean."""
        x, prototype = step.x.flatten(1), rows["prototype"].flatten(1)
        normals, radii = self._draw(step.index, rows["key"], x)
        inner = torch.linspace(0.1, self.radius_at(step.index), self.cloud // 2, device=x.device)
        radii = torch.cat([inner.expand(len(x), -1), radii * self.radius_at(step.index)], dim=1)
        directions = normals[:, 0] / normals[:, 0].norm(dim=2, keepdim=True)
        points = prototype[:, None] + radii[:, :, None] * directions
        points = math.sqrt(step.abar) * points + math.sqrt(1 - step.abar) * normals[:, 1]
        distances = (points - x[:, None]).norm(dim=2)
        nearest, order = distances.topk(self.neighbours, largest=False)
        near = torch.gather(points, 1, order[:, :, None].expand(-1, -1, points.shape[2]))
        mean = near.mean(1)
        # The ridge of the published covariance shifts all eigenvalues alike and leaves the eigenvectors as they are.
        basis = torch.linalg.svd(near - mean[:, None], full_matrices=False).Vh[:, : self.tangent_dim].mT
        offset = x - mean
        normal = offset - (basis @ (basis.mT @ offset[:, :, None])).squeeze(2)
        size = self.scale * torch.tanh(nearest[:, :1] / self.bandwidth)
        pull = -size * normal / normal.norm(dim=1, keepdim=True)
        return pull.view_as(step.x) / step.sigma

    def radius_at(self, index: int) -> float:
        """Return the cloud's radius at a step: grown during the first ``warmup`` guided steps, then constant."""
        first = max(self.stop, self.steps - 1 - self.warmup)
        progress = min(max((index - first) / self.warmup, 0.0), 1.0)
        shape = {
            "exp": (math.exp(progress) - 1) / (math.e - 1),
            "linear": progress,
            "cosine": (1 + math.cos(math.pi * (1 - progress))) / 2,
        }[self.schedule]
        return self.radius * (1 + (self.radius_growth - 1) * shape)

    def _draw(self, index: int, keys: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each row's directions and noise (n, 2, cloud, D), and its uniform radii (n, cloud - cloud // 2)."""
        normals, uniforms = [], []
        for key in keys.tolist():
            generator = _generator(key, index, x.device)
            normals.append(torch.randn(2, self.cloud, x.shape[1], generator=generator, device=x.device))
            uniforms.append(torch.rand(self.cloud - self.cloud // 2, generator=generator, device=x.device))
        return torch.stack(normals), torch.stack(uniforms)
