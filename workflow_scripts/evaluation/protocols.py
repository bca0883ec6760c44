"""Published evaluation protocols as plain data and pure functions.

The hard-label protocol is that of IDC (Kim et al. 2022) as used by Minimax, MGD3, CaO2 and ManifoldGD; IGD and DMGD
differ from it in the optimiser. Nothing here needs torch, so that a training can be planned without it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

Optimizer = Literal["sgd", "adamw"]

PUBLISHED_WIDTHS: Mapping[str, int] = MappingProxyType({"convnet": 128, "resnet_ap10": 64, "resnet18": 64})
"""Channels of the ConvNet, or of the first ResNet stage."""


def convnet_depth(resolution: int) -> int:
    """Return the number of ConvNet blocks that leave a map of at least 3x3: 6 at 224 and 256 px, 3 at 32 px."""
    return int(math.log2(resolution / 3))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a student's training, except the images. Defaults are the published SGD protocol.

    Attributes:
        architecture: A name in ``architectures.ARCHITECTURES``.
        width: Channels of the ConvNet, or of the first ResNet stage; None for the published width.
        resolution: Side of the square images in pixels.
        classes: Number of classes.
        epochs: Passes over the training images.
        batch_size: Images per step; the last batch of an epoch may be smaller.
        optimizer: ``sgd`` or ``adamw``.
        learning_rate: Initial learning rate.
        momentum: Momentum of SGD; AdamW has betas 0.9 and 0.999.
        weight_decay: Weight decay.
        milestones: Fractions of the epochs after which the learning rate is multiplied by ``gamma``.
        gamma: See ``milestones``.
        evaluations: About how many times the test set is scored, see ``evaluation_epochs``.
        crop_scale: Area of the random crop, as a range of fractions.
        flip: Mirror half of the images; off where left and right matter, as in digits.
        jitter: Strengths of brightness, contrast and saturation.
        lighting: Strength of PCA lighting.
        cutmix_probability: Share of the batches that get CutMix.
        cutmix_beta: Both parameters of CutMix's Beta distribution.
        amp: Compute in bfloat16 autocast, on CUDA only.
        seed: Seed of the weights and of all draws.

    Raises:
        ValueError: A value is out of its range.
    """

    architecture: str
    resolution: int
    classes: int
    epochs: int
    width: int | None = None
    batch_size: int = 64
    optimizer: Optimizer = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = (2 / 3, 5 / 6)
    gamma: float = 0.2
    evaluations: int = 100
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    jitter: tuple[float, float, float] = (0.4, 0.4, 0.4)
    lighting: float = 0.1
    cutmix_probability: float = 1.0
    cutmix_beta: float = 1.0
    amp: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        requirements = {
            "epochs must be at least 1": self.epochs >= 1,
            "batch_size must be at least 1": self.batch_size >= 1,
            "classes must be at least 1": self.classes >= 1,
            "optimizer must be sgd or adamw": self.optimizer in ("sgd", "adamw"),
            "learning_rate must be positive": self.learning_rate > 0,
            "momentum must be in [0, 1)": 0 <= self.momentum < 1,
            "weight_decay must not be negative": self.weight_decay >= 0,
            "milestones must be fractions in (0, 1]": all(0 < fraction <= 1 for fraction in self.milestones),
            "gamma must be positive": self.gamma > 0,
            "evaluations must be at least 1": self.evaluations >= 1,
            "crop_scale must be a range within (0, 1]": 0 < low <= high <= 1,
            "jitter must be three strengths in [0, 1]": len(self.jitter) == 3 and all(0 <= s <= 1 for s in self.jitter),
            "lighting must not be negative": self.lighting >= 0,
            "cutmix_probability must be in [0, 1]": 0 <= self.cutmix_probability <= 1,
            "cutmix_beta must be positive": self.cutmix_beta > 0,
        }
        broken = [requirement for requirement, holds in requirements.items() if not holds]
        if broken:
            raise ValueError("; ".join(broken))

    def milestone_epochs(self) -> tuple[int, ...]:
        """Return the epochs after which the learning rate drops: floors of fractions, up to rounding error."""
        return tuple(int(fraction * self.epochs + 1e-6) for fraction in self.milestones)

    def evaluation_epochs(self) -> tuple[int, ...]:
        """Return the epochs, counted from 1, after which the test set is scored: at equal steps and after the last."""
        step = max(1, self.epochs // self.evaluations)
        points = range(step, self.epochs + 1, step)
        return (*points, self.epochs) if self.epochs % step else tuple(points)


HARD_SGD: Mapping[str, Any] = MappingProxyType(
    {"optimizer": "sgd", "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 64}
)
"""Hard-label protocol of Minimax, MGD3, CaO2 and ManifoldGD."""

HARD_SGD_1000: Mapping[str, Any] = MappingProxyType(
    {**HARD_SGD, "learning_rate": 0.1, "weight_decay": 1e-4, "batch_size": 128}
)
"""The same for 1000 classes, where 128 is the smallest published batch."""

HARD_ADAMW: Mapping[str, Any] = MappingProxyType(
    {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.01, "batch_size": 64}
)
"""Hard-label protocol of IGD and DMGD, and of UAG but for its epochs."""

HARD_ADAMW_1000: Mapping[str, Any] = MappingProxyType({**HARD_ADAMW, "batch_size": 128})
"""The same for 1000 classes: only the batch grows, as the other exceptions are published for SGD."""


def hard_label_settings(optimizer: Optimizer, classes: int) -> dict[str, Any]:
    """Return the optimisation fields of ``Recipe`` that the hard-label protocol publishes.

    Raises:
        ValueError: There is no published setting for the optimiser.
    """
    presets = {"sgd": (HARD_SGD, HARD_SGD_1000), "adamw": (HARD_ADAMW, HARD_ADAMW_1000)}
    if optimizer not in presets:
        raise ValueError(f"unknown optimizer {optimizer!r}: choose sgd or adamw")
    usual, thousand = presets[optimizer]
    return dict(thousand if classes == 1000 else usual)


def published_epochs(ipc: int, classes: int) -> int:
    """Return the epochs of the hard-label protocol (Minimax/IDC); exactly 100 classes train for two thirds of them.

    Raises:
        ValueError: ``ipc`` or ``classes`` is less than 1.
    """
    if ipc < 1 or classes < 1:
        raise ValueError(f"ipc and classes must be at least 1, not {ipc} and {classes}")
    steps = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500))
    epochs = next((epochs for limit, epochs in steps if ipc <= limit), 300)
    return 2 * epochs // 3 // 100 * 100 if classes == 100 else epochs
