"""Train a student on a small set and score it: the evaluation that all published tables report.

Images stay on the device as uint8, and all shuffling and augmentation happens there, so that the device is never
waited for between two scores.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from workflow_scripts.evaluation.architectures import build
from workflow_scripts.evaluation.augment import TrainAugmentation, cutmix, normalise, to_float
from workflow_scripts.evaluation.protocols import Recipe

__all__ = ["Recipe", "Score", "train_student"]

AUGMENTED_PIXELS = 2**17
"""Most pixels augmented in one call, or one batch if that is more: small batches share the overhead, in the cache."""

Progress = Callable[[int, float | None], None]


@dataclass(frozen=True)
class Score:
    """How well a student did on the test set.

    Two scores are equal if all but ``seconds`` is.

    Attributes:
        top1_best: Best top-1 accuracy over all points of ``curve`` (percent); what the literature reports.
        top1_last: Top-1 accuracy after the last epoch (percent), free of selection on the test set.
        top5_last: Top-5 accuracy after the last epoch (percent); top-k of all classes where there are fewer than five.
        best_epoch: Epoch of ``top1_best``, counted from 1; the earliest of equals.
        epochs: Epochs trained.
        images_seen: Images trained on, repeats included.
        curve: Pairs of an epoch and the top-1 accuracy after it (percent).
        seconds: Wall time of training and testing.
    """

    top1_best: float
    top1_last: float
    top5_last: float
    best_epoch: int
    epochs: int
    images_seen: int
    curve: list[tuple[int, float]]
    seconds: float = field(compare=False)


def _check_set(name: str, images: torch.Tensor, labels: torch.Tensor, recipe: Recipe) -> None:
    side = recipe.resolution
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, side, side) or len(images) == 0:
        raise ValueError(
            f"{name}_images must be uint8 of shape (N, 3, {side}, {side}) with N > 0, "
            f"not {images.dtype} of shape {tuple(images.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{name}_labels must be int64 of shape ({len(images)},), not {labels.dtype} of shape {tuple(labels.shape)}"
        )
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= recipe.classes:
        raise ValueError(f"{name}_labels must be in 0..{recipe.classes - 1}, but they range from {low} to {high}")


def _student(recipe: Recipe) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # torch.manual_seed would also seed CUDA
        return build(recipe.architecture, classes=recipe.classes, resolution=recipe.resolution, width=recipe.width)


def _optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=decay, fused=True)
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=recipe.momentum, weight_decay=decay, fused=True)


def _augmented_batches(
    recipe: Recipe, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield one epoch of batches in random order, augmenting many of them in one call."""
    augment = TrainAugmentation(
        crop_scale=recipe.crop_scale, flip=recipe.flip, jitter=recipe.jitter, lighting=recipe.lighting
    )
    batches_at_once = max(1, AUGMENTED_PIXELS // (recipe.batch_size * recipe.resolution**2))
    order = torch.randperm(len(images), generator=generator, device=images.device)
    for chunk in order.split(batches_at_once * recipe.batch_size):
        augmented = augment(images[chunk], generator)
        yield from zip(augmented.split(recipe.batch_size), labels[chunk].split(recipe.batch_size), strict=True)


def _accuracies(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int,
    autocast: AbstractContextManager[object],
) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy in percent."""
    hits = torch.zeros(2, dtype=torch.int64, device=images.device)
    model.eval()
    with torch.inference_mode(), autocast:
        for batch, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            logits = model(normalise(to_float(batch)))
            ranking = logits.topk(min(5, logits.shape[1]), dim=1).indices == truth[:, None]
            hits += torch.stack([ranking[:, 0].sum(), ranking.sum()])
    model.train()
    top1, top5 = (100 * hits.to(torch.float64) / len(images)).tolist()
    return top1, top5


def train_student(
    recipe: Recipe,
    train_images: torch.Tensor,
    train_labels: torch.Tensor,
    test_images: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    device: torch.device | str,
    channels_last: bool = False,
    progress: Progress | None = None,
) -> Score:
    """Train a fresh student and score it on the test set (Minimax/IDC hard-label protocol).

    Global random state is neither used nor changed. On a CPU the score is a function of the recipe, the images and the
    number of threads.

    Args:
        recipe: The training.
        train_images: (N, 3, H, H) uint8 with H = ``recipe.resolution``.
        train_labels: (N,) int64 in 0..classes-1.
        test_images: (M, 3, H, H) uint8, scored without augmentation.
        test_labels: (M,) int64.
        device: Where to train; all images are moved there.
        channels_last: Keep weights and activations in channels-last layout, which may be faster on CUDA.
        progress: Called after each epoch with the epoch, from 1, and the latest top-1 accuracy in percent, None before
            the first; an exception it raises ends the training.

    Raises:
        ValueError: A set has the wrong shape, type or labels, ``recipe.amp`` is asked for without CUDA, or the training
            diverged.
    """
    device = torch.device(device)
    if recipe.amp and device.type != "cuda":
        raise ValueError(f"amp needs a CUDA device, not {device}")
    _check_set("train", train_images, train_labels, recipe)
    _check_set("test", test_images, test_labels, recipe)

    start = time.perf_counter()
    train_images, train_labels = train_images.to(device), train_labels.to(device)
    test_images, test_labels = test_images.to(device), test_labels.to(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = _student(recipe).to(device).to(memory_format=layout)
    optimizer = _optimizer(recipe, model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, recipe.milestone_epochs(), recipe.gamma)
    generator = torch.Generator(device).manual_seed(recipe.seed)
    autocast = torch.autocast("cuda", torch.bfloat16) if recipe.amp else nullcontext()

    points = set(recipe.evaluation_epochs())
    curve: list[tuple[int, float]] = []
    top5 = 0.0
    for epoch in range(1, recipe.epochs + 1):
        total_loss = torch.zeros((), device=device)
        for batch, labels in _augmented_batches(recipe, train_images, train_labels, generator):
            mixed, partners, own_share = cutmix(
                batch, generator, beta=recipe.cutmix_beta, probability=recipe.cutmix_probability
            )
            with autocast:
                logits = model(mixed.contiguous(memory_format=layout))
                own, other = F.cross_entropy(logits, labels), F.cross_entropy(logits, labels[partners])
                loss = own_share * own + (1 - own_share) * other
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.detach()
        scheduler.step()
        if epoch in points:
            if not torch.isfinite(total_loss):
                raise ValueError(f"training diverged at epoch {epoch} or before: lower the learning rate")
            top1, top5 = _accuracies(model, test_images, test_labels, recipe.batch_size, autocast)
            curve.append((epoch, top1))
        if progress is not None:
            progress(epoch, curve[-1][1] if curve else None)

    best_epoch, best = max(curve, key=lambda point: point[1])
    return Score(
        top1_best=best,
        top1_last=curve[-1][1],
        top5_last=top5,
        best_epoch=best_epoch,
        epochs=recipe.epochs,
        images_seen=recipe.epochs * len(train_images),
        curve=curve,
        seconds=time.perf_counter() - start,
    )
