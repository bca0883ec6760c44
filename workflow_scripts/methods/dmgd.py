"""DMGD (CVPR 2026): dynamic soft labels, and optimal transport from a class's images to its k-means masses.

Both parts are free of training. :class:`SoftLabels` tells the network a label that sharpens while sampling goes on
(semantic matching). :class:`TransportGuidance` pulls the prediction of the clean latents down the gradient of an entropic
transport cost (distribution matching); the gradient passes through Tweedie's formula alone, never through the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from workflow_scripts.config import SoftLabelSchedule
from workflow_scripts.diffusion.backbone import Denoiser
from workflow_scripts.diffusion.sampler import Rows, Step

# ---------------------------------------------------------------- semantic matching


@dataclass(frozen=True)
class SoftLabels:
    """The label schedule: exploration, dynamic soft label, refinement (section 3.2 of the paper).

    With s = :meth:`sharpness`, E the embeddings of the class and of the null label, y* another class and U noise,
    ``code`` mixes E' = sqrt(s) E + sqrt(1-s) (beta_n U + beta_s f(y*)) and gives E' back the mean and spread of E;
    ``paper`` mixes f' = sqrt(s) f(y) + (1-sqrt(s)) (beta_s f(y*) + beta_n U).

    ``rows["label"]`` (n,) and ``rows["other"]`` (n,) hold int64 labels, ``rows["label_noise"]`` (n, S, 2, P, E) the noise
    of each step for the class and the null row.
    """

    denoiser: Denoiser
    settings: SoftLabelSchedule

    def sharpness(self, timestep: int) -> float:
        """Return s: 0 while exploring, 1 while refining, linear in the timestep between."""
        explore, refine = self.settings.explore_above, self.settings.refine_below
        return min(max((explore - timestep) / (explore - refine), 0.0), 1.0)

    def __call__(self, index: int, timestep: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the embeddings (n, P, E) of the class and the null rows, or None where the label is plain."""
        sharpness, settings = self.sharpness(timestep), self.settings
        if sharpness == 1:
            return None
        label = rows["label"]
        plain = torch.stack(
            [self.denoiser.embed(label), self.denoiser.embed(torch.full_like(label, self.denoiser.null_label))], dim=1
        )
        keep = sharpness**0.5
        share = (1 - sharpness) ** 0.5 if settings.mixing == "variance" else 1 - keep
        disturbance = settings.noise * rows["label_noise"][:, index]
        if settings.other and (timestep <= settings.explore_above or settings.other_while_exploring):
            disturbance = disturbance + settings.other * self.denoiser.embed(rows["other"])[:, None]
        mixed = keep * plain + share * disturbance
        if settings.null_label == "plain":
            mixed = torch.cat([mixed[:, :1], plain[:, 1:]], dim=1)
        if settings.renormalise:
            mixed = renormalise(mixed, plain)
        return mixed[:, 0], mixed[:, 1]


def renormalise(mixed: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """Give each row of ``mixed`` (n, ...) the mean and the standard deviation of that row of ``plain``."""
    dims = tuple(range(1, mixed.ndim))
    spread = plain.std(dims, keepdim=True) / mixed.std(dims, keepdim=True)
    return (mixed - mixed.mean(dims, keepdim=True)) * spread + plain.mean(dims, keepdim=True)


# ---------------------------------------------------------------- distribution matching


@dataclass(frozen=True)
class TransportGuidance:
    """g = -rho grad_x <P, C>: transport of a class's images so far to its k-means masses (section 3.3).

    The images of a group are unit vectors of equal mass 1/N, the targets unit vectors u of mass m; C is their chord distance
    and P the entropic plan. ``greedy`` groups are a row and the finished images of its class, ``rows["memory"]`` (n, M, D);
    ``synchronous`` groups are the rows of one set, which share a number in ``rows["set"]`` (n,), on the CPU.
    ``rows["targets"]`` (n, K, D) and ``rows["masses"]`` (n, K) describe the class.

    With ``unit_gradient`` each row's gradient is scaled to length sqrt(D), so that the pull neither fades with N nor depends
    on the noise level; the published gradient loses both to 1/N and to the sphere's curvature.
    """

    scale: float
    window: tuple[int, int]
    epsilon: float
    sweeps: int
    log_domain: bool
    unit_gradient: bool
    differentiate_plan: bool
    matching: Literal["greedy", "synchronous"]

    def acts_at(self, index: int) -> bool:
        """Act inside the window, both ends included."""
        return self.window[0] <= index <= self.window[1]

    def __call__(self, step: Step, rows: Rows) -> torch.Tensor:
        """Return the pull of each row."""
        x0 = step.x0.flatten(1)
        if self.matching == "greedy":
            points = torch.cat([rows["memory"], x0[:, None]], dim=1)
            weights = torch.full(points.shape[:2], 1 / points.shape[1], device=x0.device)
            gradient = self.gradient(points, weights, rows["targets"], rows["masses"])[:, -1]
        else:
            group, place, first = layout(rows["set"])
            points = x0.new_zeros(len(first), int(place.max()) + 1, x0.shape[1])
            weights = x0.new_zeros(points.shape[:2])
            points[group, place] = x0
            weights[group, place] = 1.0
            weights = weights / weights.sum(1, keepdim=True)
            gradient = self.gradient(points, weights, rows["targets"][first], rows["masses"][first])[group, place]
        if self.unit_gradient:
            size = gradient.norm(dim=1, keepdim=True).clamp(min=1e-12)
            gradient = gradient * (x0.shape[1] ** 0.5 / size)
        else:
            gradient = gradient / step.abar**0.5  # dx0/dx of Tweedie's formula at a fixed epsilon
        return -self.scale * gradient.view_as(step.x0)

    def gradient(
        self, points: torch.Tensor, weights: torch.Tensor, targets: torch.Tensor, masses: torch.Tensor
    ) -> torch.Tensor:
        """Return d<P, C>/dpoints (G, N, D), zero for points without weight.

        Args:
            points: (G, N, D) latents, not yet on the sphere.
            weights: (G, N), masses: (G, K): both sum to 1 over their last dimension.
            targets: (G, K, D).
        """
        targets = torch.nn.functional.normalize(targets, dim=2)
        if not self.differentiate_plan:
            return transport_gradient(points, targets, self.plan(chord(points, targets), weights, masses))
        with torch.inference_mode(False), torch.enable_grad():
            leaf = points.clone().requires_grad_()
            cost = chord(leaf, targets.clone())
            loss = (self.plan(cost, weights.clone(), masses.clone()) * cost).sum()
            return torch.autograd.grad(loss, leaf)[0]

    def plan(self, cost: torch.Tensor, weights: torch.Tensor, masses: torch.Tensor) -> torch.Tensor:
        """Return the transport plan (G, N, K) of a cost."""
        return sinkhorn(cost, weights, masses, self.epsilon, self.sweeps, log_domain=self.log_domain)


def chord(points: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the distances (G, N, K) between points (G, N, D), put on the unit sphere, and targets (G, K, D) that are there."""
    cosine = torch.nn.functional.normalize(points, dim=2) @ targets.mT
    return (2 - 2 * cosine).clamp(min=1e-12).sqrt()


def transport_gradient(points: torch.Tensor, targets: torch.Tensor, plan: torch.Tensor) -> torch.Tensor:
    """Return d<P, C>/dpoints (G, N, D) for a fixed plan (G, N, K): (I - u u') sum_j P_j (u - v_j) / C_j / |x|."""
    size = points.norm(dim=2, keepdim=True).clamp(min=1e-12)
    unit = points / size
    pull = plan / chord(points, targets)
    gradient = unit * pull.sum(2, keepdim=True) - pull @ targets
    return (gradient - unit * (unit * gradient).sum(2, keepdim=True)) / size


def sinkhorn(
    cost: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, epsilon: float, sweeps: int, *, log_domain: bool
) -> torch.Tensor:
    """Return entropic transport plans (G, N, K) after ``sweeps`` scalings of the rows, then the columns (Cuturi, 2013).

    Batched over G problems of unequal size: rows without mass take no part. POT solves one problem at a time.

    Args:
        cost: (G, N, K).
        rows: masses (G, N), columns: masses (G, K).
        log_domain: iterate on potentials, which stays accurate where exp(-cost / epsilon) underflows.
    """
    if log_domain:
        kernel = -cost / epsilon
        log_rows, log_columns = rows.log(), columns.log()
        g = torch.zeros_like(columns)
        for _ in range(sweeps):
            f = log_rows - torch.logsumexp(kernel + g[:, None], dim=2)
            g = log_columns - torch.logsumexp(kernel + f[:, :, None], dim=1)
        return torch.exp(kernel + f[:, :, None] + g[:, None])
    kernel = torch.exp(-cost / epsilon)
    v = torch.ones_like(columns)
    for _ in range(sweeps):
        u = rows / (kernel @ v[:, :, None]).squeeze(2)
        v = columns / (kernel.mT @ u[:, :, None]).squeeze(2)
    return u[:, :, None] * kernel * v[:, None]


def layout(sets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Number the rows of each set.

    Args:
        sets: (n,) int64, on the CPU; a negative number is a set of its own (padding).

    Returns:
        each row's group (n,) and its place in it (n,), and each group's first row (G,).
    """
    groups: dict[int, int] = {}
    counts: list[int] = []
    group, place, first = [], [], []
    for row, number in enumerate(sets.tolist()):
        known = groups.setdefault(number if number >= 0 else -1 - row, len(counts))
        if known == len(counts):
            counts.append(0)
            first.append(row)
        group.append(known)
        place.append(counts[known])
        counts[known] += 1
    return torch.tensor(group), torch.tensor(place), torch.tensor(first)
