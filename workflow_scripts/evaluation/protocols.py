"""Published evaluation protocols as plain data, and the recipe of one training that follows from them.

A protocol is a table of values; where the published value depends on IPC, the number of classes or the student, it is a
``Rule``. Every value can be overridden. Nothing here needs torch, so that a training can be planned without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

Optimizer = Literal["sgd", "adamw"]
Decay = Literal["all", "matrices"]
Schedule = Literal["step", "cosine", "half-cosine", "warmup-cosine"]
Target = Literal["hard", "teacher", "stored"]
TrainSize = Literal["resolution", "native"]
Dtype = Literal["float32", "bfloat16"]
Quirk = Literal["double-batchnorm"]

DOUBLE_BATCHNORM: Quirk = "double-batchnorm"
"""A second forward pass of the student in training mode per step, which moves BatchNorm's running statistics twice."""

MOST_CONFUSED = 100
"""Most classes for which a score has the confusion matrix."""

# ---------------------------------------------------------------- students

ArchitectureName = Literal[
    "convnet",
    "resnet_ap10",
    "resnet18",
    "convnet_bn",
    "resnet18_bn",
    "resnet50",
    "resnet101",
    "mobilenet_v2",
    "efficientnet_b0",
    "shufflenet_v2",
    "vgg11",
    "deit_ti",
    "swin_t",
    "alexnet",
    "glad_alexnet",
    "glad_vgg11",
    "glad_resnet18",
    "glad_vit",
]


@dataclass(frozen=True)
class Student:
    """A classifier, as far as planning needs to know it.

    Attributes:
        title: Its name in print.
        width: Its published width, which can be changed; None if it has one width only.
        smallest: Least resolution that it takes. In instance norm: below it a stage has one pixel, whose norm is undefined.
    """

    title: str
    width: int | None = None
    smallest: int = 16


STUDENTS: Mapping[ArchitectureName, Student] = MappingProxyType(
    {
        "convnet": Student("ConvNet", 128),
        "resnet_ap10": Student("ResNetAP-10", 64),
        "resnet18": Student("ResNet-18", 64),
        "convnet_bn": Student("ConvNet-BN", 128),
        "resnet18_bn": Student("ResNet-18"),
        "resnet50": Student("ResNet-50"),
        "resnet101": Student("ResNet-101"),
        "mobilenet_v2": Student("MobileNet-V2", smallest=32),
        "efficientnet_b0": Student("EfficientNet-B0", smallest=32),
        "shufflenet_v2": Student("ShuffleNet-V2", smallest=32),
        "vgg11": Student("VGG-11", smallest=32),
        "deit_ti": Student("DeiT-Ti"),
        "swin_t": Student("Swin-T", smallest=32),
        "alexnet": Student("AlexNet", smallest=64),
        "glad_alexnet": Student("AlexNet"),
        "glad_vgg11": Student("VGG-11", smallest=32),
        "glad_resnet18": Student("ResNet-18", 64),
        "glad_vit": Student("ViT", smallest=32),
    }
)
"""The classifiers by name: in instance norm for hard labels, RDED's ConvNet in batch norm, torchvision's, and GLaD's."""


def convnet_depth(resolution: int) -> int:
    """Return the number of ConvNet blocks that leave a map of at least 3x3: 6 at 224 and 256 px, 3 at 32 px."""
    return int(math.log2(resolution / 3))


# ---------------------------------------------------------------- one training


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a student's training, except images and teacher. Defaults: the hard-label SGD protocol.

    Attributes:
        architecture: A name in ``architectures.ARCHITECTURES``.
        width: Channels of the first stage; None for the published width.
        resolution: Side in pixels of the square images that the student sees.
        classes: Number of classes.
        seed: Seed of the weights and of all draws.
        epochs: Passes over the training images.
        batch_size: Images per step; the last batch of an epoch may be smaller.
        optimizer: ``sgd`` or ``adamw`` (betas 0.9 and 0.999).
        learning_rate: Highest learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        decay: Which parameters decay: ``all``, or ``matrices``, those of more than one dimension.
        schedule: Course of the learning rate, see ``rate_factor``.
        milestones: Of ``step``: fractions of the epochs after which the rate is multiplied by ``gamma``.
        gamma: See ``milestones``.
        ema: Decay of the averaged weights that are tested in place of the last ones; None for no averaging.
        train_size: Size of the training images before the random crop: ``resolution``, or ``native`` as they are stored.
        patches: Each image is cut into ``patches`` x ``patches`` pieces that are shuffled; 1 for none.
        crop_scale: Area of RandomResizedCrop as a range of fractions; None for no crop.
        flip: Mirror half of the images; off where left and right matter, as in digits.
        jitter: Strength of brightness, contrast and saturation.
        lighting: Strength of PCA lighting.
        dsa: Operations of differentiable Siamese augmentation, one of which is drawn per batch.
        cutmix: Share of the batches that get CutMix.
        mixup: Share of the batches that get MixUp, if not CutMix.
        mix_alpha: Both parameters of the mixing's Beta distribution.
        target: ``hard`` labels, a ``teacher`` asked at every step, or its ``stored`` logits.
        temperature: Of student and teacher in the Kullback-Leibler divergence.
        test_resize: Short side of a test image before the centre crop, in units of the resolution.
        evaluations: About how many times the test set is scored in as many epochs, see ``evaluation_epochs``.
        test_from: Fraction of the epochs up to which it is not.
        dtype: ``bfloat16`` for autocast.
        published_quirks: Oddities of published code that change results.

    Raises:
        ValueError: A value is out of its range.
    """

    architecture: str
    resolution: int
    classes: int
    epochs: int
    width: int | None = None
    seed: int = 0
    batch_size: int = 64
    optimizer: Optimizer = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay: Decay = "all"
    schedule: Schedule = "step"
    milestones: tuple[float, ...] = (2 / 3, 5 / 6)
    gamma: float = 0.2
    ema: float | None = None
    train_size: TrainSize = "resolution"
    patches: int = 1
    crop_scale: tuple[float, float] | None = (0.5, 1.0)
    flip: bool = True
    jitter: float = 0.4
    lighting: float = 0.1
    dsa: tuple[str, ...] = ()
    cutmix: float = 1.0
    mixup: float = 0.0
    mix_alpha: float = 1.0
    target: Target = "hard"
    temperature: float = 1.0
    test_resize: float = 1.0
    evaluations: int = 100
    test_from: float = 0.0
    dtype: Dtype = "float32"
    published_quirks: tuple[Quirk, ...] = ()

    def __post_init__(self) -> None:
        low, high = self.crop_scale or (1.0, 1.0)
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
            "ema must be in [0, 1)": self.ema is None or 0 <= self.ema < 1,
            "patches must be at least 1": self.patches >= 1,
            "crop_scale must be a range within (0, 1]": 0 < low <= high <= 1,
            "jitter must be in [0, 1]": 0 <= self.jitter <= 1,
            "lighting must not be negative": self.lighting >= 0,
            "cutmix and mixup must be shares that add up to 1 at most": min(self.cutmix, self.mixup) >= 0
            and self.cutmix + self.mixup <= 1,
            "mix_alpha must be positive": self.mix_alpha > 0,
            "temperature must be positive": self.temperature > 0,
            "test_resize must be at least 1": self.test_resize >= 1,
            "evaluations must be at least 1": self.evaluations >= 1,
            "test_from must be in [0, 1]": 0 <= self.test_from <= 1,
            "train_size native needs crop_scale, which brings images to the resolution": self.train_size != "native"
            or self.crop_scale is not None,
        }
        broken = [requirement for requirement, holds in requirements.items() if not holds]
        if broken:
            raise ValueError("; ".join(broken))

    def milestone_epochs(self) -> tuple[int, ...]:
        """Return the epochs after which the learning rate drops: floors of fractions, up to rounding error."""
        return tuple(int(fraction * self.epochs + 1e-6) for fraction in self.milestones)

    def rate_factor(self, epoch: int) -> float:
        """Return the factor of the learning rate in an epoch, counted from 0.

        ``cosine`` ends near 0 (SRe2L), ``half-cosine`` at one half (RDED, whose code has half the angle), ``warmup-cosine``
        rises in a line over the first half of the epochs and falls over the second (GLaD).
        """
        share = epoch / self.epochs
        if self.schedule == "step":
            return self.gamma ** sum(epoch >= milestone for milestone in self.milestone_epochs())
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * share)) / 2
        if self.schedule == "half-cosine":
            return (1 + math.cos(math.pi * share / 2)) / 2
        half = max(self.epochs // 2, 1)
        if epoch < half:
            return (epoch + 1) / half
        return (1 + math.cos(math.pi * (epoch - half) / max(self.epochs - half, 1))) / 2

    def evaluation_epochs(self) -> tuple[int, ...]:
        """Return the epochs, from 1, after which the test set is scored: at equal steps beyond ``test_from``, and the last."""
        step = max(1, self.epochs // self.evaluations)
        points = [e for e in range(step, self.epochs, step) if e > self.test_from * self.epochs + 1e-9]
        return (*points, self.epochs)


# ---------------------------------------------------------------- protocols


@dataclass(frozen=True)
class Case:
    """What a published value may depend on."""

    architecture: str
    ipc: int
    classes: int


@dataclass(frozen=True)
class Rule:
    """A value that depends on the case, and how a table would put it."""

    text: str
    of: Callable[[Case], Any]


@dataclass(frozen=True)
class Protocol:
    """A published protocol.

    Attributes:
        summary: What it is, in a sentence.
        papers: The papers that used it.
        architectures: Its students.
        values: The fields of ``Recipe`` and ``repeats``, the trainings per distilled set; values or ``Rule``.
        unseen: The students whose mean is the protocol's cross-architecture score.
    """

    summary: str
    papers: tuple[str, ...]
    architectures: tuple[str, ...]
    values: Mapping[str, Any]
    unseen: tuple[str, ...] = ()

    def at(self, case: Case) -> dict[str, Any]:
        """Return the values of one case."""
        return {key: value.of(case) if isinstance(value, Rule) else value for key, value in self.values.items()}


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


def _online_batch(case: Case) -> int:
    """RDED's batch: small for small sets, twice as large for 100 and 1000 classes, never above the set."""
    batch = 10 if case.ipc <= 1 else 50 if case.ipc <= 10 else 100
    return min(batch * (2 if case.classes in (100, 1000) else 1), case.ipc * case.classes)


def _d3hr_batch(case: Case) -> int:
    return min(10 if case.ipc <= 1 else 50 if case.ipc <= 10 else 100, case.ipc * case.classes)


_ONLINE_RATES = (
    ("efficientnet", 2e-3),
    ("mobilenet", 2.5e-3),
    ("alexnet", 1e-4),
    ("deit", 1e-4),
    ("swin", 1e-4),
    ("vgg11", 5e-4),
)


def _online_rate(case: Case) -> float:
    return next((rate for name, rate in _ONLINE_RATES if case.architecture.startswith(name)), 1e-3)


_HARD: Mapping[str, Any] = {
    "resolution": 224,
    "epochs": Rule(
        "IPC 1: 3000, to 10: 2000, to 50: 1500, to 200: 1000, to 500: 500, more: 300; for 100 classes 2/3, in hundreds",
        lambda case: published_epochs(case.ipc, case.classes),
    ),
    "batch_size": Rule("64; 1000 classes: 128", lambda case: 128 if case.classes == 1000 else 64),
    "decay": "all",
    "schedule": "step",
    "milestones": (2 / 3, 5 / 6),
    "gamma": 0.2,
    "ema": None,
    "train_size": "resolution",
    "patches": 1,
    "crop_scale": (0.5, 1.0),
    "flip": True,
    "jitter": 0.4,
    "lighting": 0.1,
    "dsa": (),
    "cutmix": 1.0,
    "mixup": 0.0,
    "mix_alpha": 1.0,
    "target": "hard",
    "temperature": 1.0,
    "test_resize": 1.0,
    "evaluations": 100,
    "test_from": 0.0,
    "dtype": "float32",
    "published_quirks": (),
}

_ONLINE: Mapping[str, Any] = {
    "resolution": 224,
    "repeats": 1,
    "epochs": 300,
    "batch_size": Rule(
        "IPC 1: 10, to 10: 50, more: 100; twice that for 100 and 1000 classes; the set at most", _online_batch
    ),
    "optimizer": "adamw",
    "learning_rate": Rule(
        "1e-3; EfficientNet 2e-3, MobileNet 2.5e-3, VGG 5e-4, AlexNet, DeiT and Swin 1e-4", _online_rate
    ),
    "momentum": 0.9,
    "weight_decay": 0.01,
    "decay": "matrices",
    "schedule": "half-cosine",
    "milestones": (),
    "gamma": 1.0,
    "ema": None,
    "train_size": "native",
    "patches": 2,
    "crop_scale": (0.5, 1.0),
    "flip": True,
    "jitter": 0.0,
    "lighting": 0.0,
    "dsa": (),
    "cutmix": 1.0,
    "mixup": 0.0,
    "mix_alpha": 1.0,
    "target": "teacher",
    "temperature": 20.0,
    "test_resize": 256 / 224,
    "evaluations": 30,
    "test_from": 0.8,
    "dtype": "float32",
    "published_quirks": (),
}

_TORCHVISION = (
    "resnet18_bn",
    "resnet50",
    "resnet101",
    "mobilenet_v2",
    "efficientnet_b0",
    "shufflenet_v2",
    "vgg11",
    "deit_ti",
    "swin_t",
    "alexnet",
)

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        "hard-sgd": Protocol(
            summary="Hard labels, SGD (IDC's evaluation as Minimax has it).",
            papers=("Minimax, CVPR 2024", "MGD3, ICML 2025", "ManifoldGD, CVPR 2026"),
            architectures=("convnet", "resnet_ap10", "resnet18"),
            values={
                **_HARD,
                "repeats": 1,  # as MGD3 and ManifoldGD: the spread is over three generated sets
                "optimizer": "sgd",
                "learning_rate": Rule("0.01; 1000 classes: 0.1", lambda case: 0.1 if case.classes == 1000 else 0.01),
                "momentum": 0.9,
                "weight_decay": Rule("5e-4; 1000 classes: 1e-4", lambda case: 1e-4 if case.classes == 1000 else 5e-4),
            },
        ),
        "hard-adamw": Protocol(
            summary="The same with AdamW (UAG too, but for its epochs).",
            papers=("IGD, ICLR 2025", "DMGD, CVPR 2026"),
            architectures=("convnet", "resnet_ap10", "resnet18"),
            values={
                **_HARD,
                "repeats": 5,
                "optimizer": "adamw",
                "learning_rate": 1e-3,
                "momentum": 0.9,
                "weight_decay": 0.01,
            },
        ),
        "soft-rded": Protocol(
            summary="A teacher labels every mixed batch; patches are shuffled, the learning rate ends at one half.",
            papers=("RDED, CVPR 2024", "Minimax, MGD3 and DMGD on ImageNet-1K"),
            architectures=_TORCHVISION[:1],
            values=_ONLINE,
        ),
        "soft-d3hr": Protocol(
            summary="The same without shuffling, with crops from 8 %; every epoch of the last nine is tested.",
            papers=("D3HR, ICML 2025",),
            architectures=_TORCHVISION[:1],
            values={
                **_ONLINE,
                "repeats": 5,
                "batch_size": Rule("IPC 1: 10, to 10: 50, more: 100; the set at most", _d3hr_batch),
                "patches": 1,
                "crop_scale": (0.08, 1.0),
                "evaluations": 300,
                "test_from": 0.97,
            },
        ),
        "soft-cao2": Protocol(
            summary="RDED's evaluation, three times per set.",
            papers=("CaO2, ICCV 2025",),
            architectures=_TORCHVISION[:1],
            values={**_ONLINE, "repeats": 3},
        ),
        "soft-fkd": Protocol(
            summary="A teacher labels every mixed batch once and for all; trainings replay crops, mixes and logits.",
            papers=("SRe2L, NeurIPS 2023", "CDA, TMLR 2024", "D4M, CVPR 2024"),
            architectures=_TORCHVISION[:1],
            values={
                **_ONLINE,
                "batch_size": Rule("1024; the set at most", lambda case: min(1024, case.ipc * case.classes)),
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "patches": 1,
                "crop_scale": (0.08, 1.0),
                "target": "stored",
                "test_from": 0.0,
            },
        ),
        "glad": Protocol(
            summary="Five architectures in SGD with a warm-up, DSA and averaged weights; the score is the mean of the unseen.",
            papers=("GLaD, CVPR 2023", "LD3M, NeurIPS 2025"),
            architectures=("convnet", "glad_alexnet", "glad_vgg11", "glad_resnet18", "glad_vit"),
            unseen=("glad_alexnet", "glad_vgg11", "glad_resnet18", "glad_vit"),
            values={
                **_HARD,
                "resolution": 128,
                "repeats": 5,
                "epochs": 1000,
                "batch_size": 256,
                "optimizer": "sgd",
                "learning_rate": Rule(
                    "1e-3; VGG-11 1e-4", lambda case: 1e-4 if case.architecture == "glad_vgg11" else 1e-3
                ),
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "schedule": "warmup-cosine",
                "milestones": (),
                "gamma": 1.0,
                "ema": 0.995,
                "crop_scale": None,
                "flip": False,
                "jitter": 0.0,
                "lighting": 0.0,
                "dsa": ("color", "crop", "cutout", "flip", "scale", "rotate"),
                "cutmix": 0.0,
                "evaluations": 1,
                "test_from": 0.0,
            },
        ),
    }
)

RECIPE_FIELDS = tuple(field.name for field in fields(Recipe))
"""Names of what a recipe holds."""
