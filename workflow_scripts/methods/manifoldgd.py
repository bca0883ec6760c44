"""ManifoldGD (CVPR 2026): the mode pull, kept on the local tangent space of the class's latent manifold.

``TangentGuidance`` is the paper's definition with a usable geometry: neighbours are real latents, and tangent spaces live
where clean latents live, so one basis per image serves every step. ``ReleasedManifold`` is the released code's additive
term: its cloud is synthetic noise around the prototype, and its size is bounded by ``scale`` in a space of thousands of
dimensions, so that it hardly acts. It is here to be compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from workflow_scripts.diffusion.sampler import Rows, Step


@dataclass(frozen=True)
class TangentGuidance:
    """g = lambda (P_T v + kappa (I - P_T) v) - eta (I - P_T)(x0 - m), with v = prototype - x0 (eq. 4).

    ``rows["basis"]`` (n, D, K) holds orthonormal tangent directions, zero columns where there are fewer, and
    ``rows["centre"]`` (n, c, h, w) the mean m of the neighbours.
    """

    scale: float
    stop: int
    kappa: float
    normal_pull: float

    def acts_at(self, index: int) -> bool:
        """Act while the step index is above ``stop``."""
        return index > self.stop

    def __call__(self, step: Step, rows: Rows) -> torch.Tensor:
        """Return the projected pull of each row."""
        pull = rows["prototype"] - step.x0
        if self.kappa == 1:  # MGD3, to the bit
            force = self.scale * pull
        else:
            tangent = project(rows["basis"], pull)
            force = self.scale * (tangent + self.kappa * (pull - tangent))
        if self.normal_pull:
            offset = step.x0 - rows["centre"]
            force = force - self.normal_pull * (offset - project(rows["basis"], offset))
        return force


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
    count = min(neighbours, len(latents))
    order = torch.cdist(prototypes.double(), latents.double()).topk(count, largest=False).indices
    limit = sizes.clamp(2, count)
    inside = (torch.arange(count, device=latents.device) < limit[:, None]).double()[:, :, None]
    near = latents.double()[order]
    centre = (near * inside).sum(1) / inside.sum(1)
    centred = (near - centre[:, None]) * inside
    values, vectors = torch.linalg.eigh(centred @ centred.mT)
    values, vectors = values.flip(1).clamp(min=0), vectors.flip(2)
    real = values > 1e-10 * values[:, :1].clamp(min=1e-30)
    if dimension is None:
        before = (values.cumsum(1) - values) / values.sum(1, keepdim=True).clamp(min=1e-30)
        keep = real & (before < variance)
    else:
        keep = real & (torch.arange(count, device=values.device) < dimension)
    scale = torch.where(keep, values.clamp(min=1e-30).rsqrt(), 0)
    return (centred.mT @ (vectors * scale[:, None])).float(), centre.float()


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
            # One-to-one in the key at each step, within the 32 bits of its seed that torch's CPU generator keeps.
            generator = torch.Generator(x.device).manual_seed((key + index * 2654435761) % 2**32)
            normals.append(torch.randn(2, self.cloud, x.shape[1], generator=generator, device=x.device))
            uniforms.append(torch.rand(self.cloud - self.cloud // 2, generator=generator, device=x.device))
        return torch.stack(normals), torch.stack(uniforms)
