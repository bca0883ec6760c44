"""The objectives by which LD3M compares synthetic images with real ones, and the students that they look through.

DC compares gradients of random networks (arXiv 2006.05929), DM their mean features (2110.04181), MTT where short trainings
end (2203.11932) with TESLA's gradient of constant memory (2211.10586). All take images as normalised float (n, 3, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from workflow_scripts.diffusion.noise import seed_for
from workflow_scripts.evaluation.architectures import convnet
from workflow_scripts.evaluation.augment import IMAGENET_MEAN, IMAGENET_STD

LEGACY_MEAN = (0.4377, 0.4438, 0.4728)
"""What the released code subtracts from synthetic images, in place of ImageNet's mean."""


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 images (n, H, W, 3) to float32 (n, 3, H, W) in [-1, 1], on their device."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def normalised(images: torch.Tensor, mean: Sequence[float] = IMAGENET_MEAN) -> torch.Tensor:
    """Map images (n, 3, H, W) in [-1, 1] to those that students see."""
    centre, spread = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, IMAGENET_STD))
    return ((images + 1) / 2 - centre) / spread


def student(
    classes: int, resolution: int, width: int, seed: int, number: int, device: torch.device, purpose: str = "student"
) -> nn.Sequential:
    """Return ConvNet ``number`` of a seed, untrained; the weights below its last layer do not depend on ``classes``."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            seed_for(seed, "", number, purpose)
        )  # torch.manual_seed would also seed CUDA
        network = convnet(classes, resolution, width)
    return network.to(device)


# ---------------------------------------------------------------- DM


def feature_distance(network: nn.Sequential, real: torch.Tensor, synthetic: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of mean features before the last layer, of one class (DM, eq. 4)."""
    features = network[:-1]
    with torch.no_grad():
        target = features(real).mean(0)
    distance: torch.Tensor = (features(synthetic).mean(0) - target).square().sum()
    return distance


# ---------------------------------------------------------------- DC


def gradient_distance(network: nn.Module, real: torch.Tensor, synthetic: torch.Tensor, label: int) -> torch.Tensor:
    """Return how much the cross-entropy's gradients differ, of one class (DC, eq. 9)."""
    parameters = list(network.parameters())

    def gradients(images: torch.Tensor, graph: bool) -> tuple[torch.Tensor, ...]:
        labels = torch.full((len(images),), label, device=images.device)
        return torch.autograd.grad(F.cross_entropy(network(images), labels), parameters, create_graph=graph)

    target = [gradient.detach() for gradient in gradients(real, False)]
    return row_distance(target, gradients(synthetic, True))


def row_distance(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of 1 - cosine over the rows (output units) of all tensors but those of one dimension."""
    total = torch.zeros((), dtype=two[0].dtype, device=two[0].device)
    for left, right in zip(one, two, strict=True):
        if left.ndim > 1:
            left, right = left.flatten(1), right.flatten(1)
            total = total + (1 - (left * right).sum(1) / (left.norm(dim=1) * right.norm(dim=1) + 1e-6)).sum()
    return total


# ---------------------------------------------------------------- MTT


class FlatNetwork:
    """A network as a function of one vector of parameters (P,)."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.shapes = {name: parameter.shape for name, parameter in network.named_parameters()}

    def __call__(self, vector: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Return logits (n, classes)."""
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        parameters = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        logits: torch.Tensor = functional_call(self.network, parameters, (images,))
        return logits

    def gradient(
        self, vector: torch.Tensor, images: torch.Tensor, labels: torch.Tensor, *, graph: bool = False
    ) -> torch.Tensor:
        """Return the cross-entropy's gradient (P,) at a vector that requires it."""
        loss = F.cross_entropy(self(vector, images), labels)
        return torch.autograd.grad(loss, vector, create_graph=graph)[0]


def flatten(network: nn.Module) -> torch.Tensor:
    """Return a network's parameters as one vector (P,)."""
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


Feed = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From a step and all images to the images (augmented, with a graph) and labels of that step."""


@dataclass(frozen=True)
class Match:
    """What an objective says of the images.

    Attributes:
        losses: one number per class, or one for all.
        gradient: for the images (n, 3, H, W).
        rate_gradient: for the student's learning rate, if that is learned.
    """

    losses: list[float]
    gradient: torch.Tensor
    rate_gradient: float = 0.0


def tesla(
    network: FlatNetwork,
    start: torch.Tensor,
    target: torch.Tensor,
    images: torch.Tensor,
    feed: Feed,
    steps: int,
    rate: float,
) -> Match:
    """Match a student's end with an expert's, each of its steps' parameters taken as constant (TESLA, eq. 7-9).

    The image gradient is 2 [beta (target - start) + beta^2 sum_k g_k] dg_i/ds_i / |start - target|^2; its memory does not grow
    with ``steps``, because each step's graph is built again in turn.

    Args:
        start, target: parameters (P,) of the expert at the start and at the epoch to be reached.
        images: (n, 3, H, W).
        rate: beta, the student's learning rate.
    """
    images = images.detach()
    vector, total, seen = start.detach(), torch.zeros_like(start), []
    for step in range(steps):
        seen.append(vector)
        with torch.enable_grad():
            gradient = network.gradient(vector.detach().requires_grad_(), *feed(step, images))
        total += gradient
        vector = vector - rate * gradient
    scale = (start - target).square().sum()
    gap = start - rate * total - target
    direction = -2 * rate * gap / scale
    pixels = torch.zeros_like(images)
    for step in range(steps):
        with torch.enable_grad():
            leaf = images.clone().requires_grad_()
            gradient = network.gradient(seen[step].detach().requires_grad_(), *feed(step, leaf), graph=True)
            pixels += torch.autograd.grad(gradient @ direction, leaf)[0]
    return Match([float(gap.square().sum() / scale)], pixels, float(-2 * (gap @ total) / scale))


def unrolled(
    network: FlatNetwork,
    start: torch.Tensor,
    target: torch.Tensor,
    images: torch.Tensor,
    feed: Feed,
    steps: int,
    rate: float,
) -> Match:
    """Match likewise, with the gradient through all steps (MTT): as many graphs in memory as steps."""
    with torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        beta = torch.tensor(rate, dtype=start.dtype, device=start.device, requires_grad=True)
        vector = start.detach().clone().requires_grad_()
        for step in range(steps):
            vector = vector - beta * network.gradient(vector, *feed(step, leaf), graph=True)
        loss = (vector - target).square().sum() / (start - target).square().sum()
        pixels, slope = torch.autograd.grad(loss, (leaf, beta))
    return Match([float(loss.detach())], pixels, float(slope))


def batches(count: int, size: int | None, steps: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Return the image indices of each step: all of them, or the next ``size`` of a random order, drawn anew when used up."""
    if size is None or size >= count:
        return [np.arange(count)] * steps
    drawn: list[np.ndarray] = []
    while len(drawn) < steps:
        order = generator.permutation(count)
        cuts = [*range(0, count, size), count]
        drawn += [order[low:high] for low, high in pairwise(cuts)]
    return drawn[:steps]
