"""Train students on a small set and score them: one loop, whose parts a protocol chooses.

Images stay on the device as uint8 and are augmented there, many batches in one call, so that the device is never waited for
between two scores. Students of one recipe that differ in seed and images alone can be trained at once, as one network with
stacked weights: small networks leave most of a GPU idle. A large one can be trained by several processes, each with a GPU
of its own: every process draws the whole epoch from the same seeds and computes its share of each batch.
"""

from __future__ import annotations

import copy
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from workflow_scripts.evaluation.architectures import HalvingPool, build
from workflow_scripts.evaluation.augment import (
    Draws,
    augment,
    blend,
    draw_epoch,
    epoch_generator,
    normalise,
    own_shares,
    siamese,
    to_float,
)
from workflow_scripts.evaluation.batch_norm import share_statistics
from workflow_scripts.evaluation.protocols import DOUBLE_BATCHNORM, MOST_CONFUSED, Recipe
from workflow_scripts.store.files import TEMPORARY
from workflow_scripts.team import Team

__all__ = ["Network", "Recipe", "Score", "Soft", "Stopped", "can_stack", "train_student", "train_students"]

AUGMENTED_PIXELS = {"cpu": 2**17, "cuda": 2**25}
"""Most pixels augmented in one call, or one batch if that is more: small batches share the overhead, in the cache."""

TESTED_PIXELS = {"cpu": 2**19, "cuda": 2**24}
"""Most pixels of test images classified in one call."""

CHECKPOINT_SECONDS = 600.0

STACKABLE = (
    *(nn.Conv2d, nn.GroupNorm, nn.Linear, nn.ReLU, nn.Flatten, nn.Identity),
    *(HalvingPool, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
"""Layers whose stacked form computes what they do: no batch statistics, no chance."""

Network = Callable[[torch.Tensor], torch.Tensor]
"""From normalised images (n, 3, H, W) to logits (n, K)."""

Labelled = tuple[torch.Tensor, torch.Tensor]
"""Images uint8 (N, 3, S, S) and labels int64 (N,)."""

Progress = Callable[[int, float | None], None]


class Soft(Protocol):
    """Stored soft labels."""

    def epoch(self, epoch: int) -> tuple[Draws, torch.Tensor]:
        """Return an epoch's draws, and the teacher's logits (N, K) for its positions."""


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
        class_top1: Top-1 accuracy of each class after the last epoch (percent); None for a class without test images.
        confusion: Test images by true class (rows) and predicted class after the last epoch; None for over 100 classes.
        seconds: Wall time of training and testing, shared among students that were trained at once.
    """

    top1_best: float
    top1_last: float
    top5_last: float
    best_epoch: int
    epochs: int
    images_seen: int
    curve: list[tuple[int, float]]
    class_top1: list[float | None]
    confusion: list[list[int]] | None
    seconds: float = field(compare=False)


class Stopped(Exception):
    """A training ended before its last epoch, as it was told to; its checkpoint is written."""


def train_student(recipe: Recipe, train: Labelled, test: Labelled, **options: Any) -> Score:
    """Train one student, see ``train_students``."""
    return train_students([recipe], [train], test, **options)[0]


def train_students(
    recipes: Sequence[Recipe],
    train: Sequence[Labelled],
    test: Labelled,
    *,
    device: torch.device | str,
    teacher: Network | None = None,
    soft: Soft | None = None,
    compiled: bool = False,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    progress: Progress | None = None,
    stop: Callable[[float], bool] | None = None,
    keep: Callable[[nn.Module], None] | None = None,
    team: Team | None = None,
) -> list[Score]:
    """Train fresh students and score them on the test set.

    Global random state is left as it was. On a CPU a score is a function of the recipe, the images, the teacher and the
    number of threads; students that are trained at once differ by rounding from those trained alone, and so does a student
    that several processes train, but for what dropout and stochastic depth draw.

    Args:
        recipes: One per student; they differ in their seeds alone.
        train: One set per student, all of one size: uint8 (N, 3, S, S), S being the resolution unless ``train_size`` is
            ``native``; labels (N,) int64 in 0..classes-1.
        test: Images uint8 (M, 3, H, H) of the resolution, scored without augmentation, and labels.
        device: Where to train; all images are moved there.
        teacher: For ``target: teacher``.
        soft: For ``target: stored``.
        compiled: Compile the student; changes results by rounding.
        checkpoint: File from which an interrupted training resumes, with the same result; it is not removed. Any number
            of processes can go on from it.
        checkpoint_seconds: Least time between two checkpoints.
        progress: Called after each epoch with the epoch, from 1, and the first student's latest top-1 accuracy in percent,
            None before the first; an exception it raises ends the training.
        stop: Is asked after each epoch but the last, with the seconds of the longest so far, whether to stop there. With
            several processes the answer of any is that of all.
        keep: Is given the trained network, which is what was tested last; for one student only.
        team: The processes that train it together, this one on ``device``; for one student only.

    Raises:
        Stopped: As ``stop`` wanted.
        ValueError: A set has the wrong shape, type or labels, students cannot be trained at once, soft labels are missing,
            or the training diverged.
    """
    device = torch.device(device)
    team = team or Team(device)
    recipe = recipes[0]
    _check(recipes, train, test, teacher, soft, team)
    start = time.perf_counter()
    there = {id(own): (own[0].to(device), own[1].to(device)) for own in train}  # students may share a set
    sets = [there[id(own)] for own in train]
    first, last = team.share(0, len(test[1]))
    test_images, test_labels = (tensor[first:last].to(device) for tensor in test)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        students = Students(recipes, device, compiled, team)
        curves: list[list[tuple[int, float]]] = [[] for _ in recipes]
        begin = students.resume(checkpoint, curves) if checkpoint is not None else 0
        if team.word(begin) != begin:
            raise RuntimeError(f"{checkpoint}: is not the same file for all processes of the training")
        saved = began = time.monotonic()
        longest = 0.0
        points = set(recipe.evaluation_epochs())
        counts = _Counts(recipe, len(recipes), device)
        for epoch in range(begin, recipe.epochs):
            _seed_layers(recipes, epoch, team)
            students.set_rate(recipe.learning_rate * recipe.rate_factor(epoch))
            total = torch.zeros(len(recipes), device=device)
            for batch in batches(recipes, sets, epoch, soft, team):
                total += students.step(batch, teacher)
            if epoch + 1 in points:
                team.add_up([total])
                if not torch.isfinite(total).all():
                    raise ValueError(f"training diverged at epoch {epoch + 1} or before: lower the learning rate")
                counts = students.test(test_images, test_labels)
                for curve, top1 in zip(curves, counts.top1(), strict=True):
                    curve.append((epoch + 1, top1))
            now = time.monotonic()
            longest, began = max(longest, now - began), now
            more = epoch + 1 < recipe.epochs
            stopping = more and stop is not None and team.any(stop(longest))
            if checkpoint is not None and more and (stopping or now - saved >= checkpoint_seconds):
                if team.leads:
                    students.save(checkpoint, epoch + 1, curves)
                saved = time.monotonic()
            if progress is not None:
                progress(epoch + 1, curves[0][-1][1] if curves[0] else None)
            if stopping:
                raise Stopped(f"after {epoch + 1} of {recipe.epochs} epochs")
    if keep is not None:
        keep(students.tested())
    seconds = (time.perf_counter() - start) / len(recipes)
    return [_score(recipe, len(sets[0][0]), curve, counts, place, seconds) for place, curve in enumerate(curves)]


def can_stack(recipe: Recipe) -> bool:
    """Say whether students of a recipe can be trained at once."""
    with torch.device("meta"):
        network = build(recipe.architecture, classes=recipe.classes, resolution=recipe.resolution, width=recipe.width)
    return all(isinstance(module, STACKABLE) for module in network.modules() if not list(module.children()))


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """What R students see in one step: B images each, normalised, augmented and mixed.

    Attributes:
        images: (R, B, 3, H, W) float32.
        labels: (R, B) int64.
        partner_labels: Likewise, of what each image is mixed with; None without mixing.
        own_share: (R,) weight of ``labels``, the partners' having the rest.
        logits: (B, K) of the stored teacher, or None.
        whole: Images of the batch over all processes, if these are not all of them.
    """

    images: torch.Tensor
    labels: torch.Tensor
    partner_labels: torch.Tensor | None = None
    own_share: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    whole: int | None = None

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return what these images add (R,) to the mean over the batch of values (R, B)."""
        return values.sum(1) / (self.whole or values.shape[1])


def batches(
    recipes: Sequence[Recipe],
    sets: Sequence[Labelled],
    epoch: int,
    soft: Soft | None = None,
    team: Team | None = None,
) -> Iterator[Batch]:
    """Yield an epoch of batches, or this process's share of each, augmenting many of them in one call."""
    recipe, (images, _) = recipes[0], sets[0]
    count, device = len(images), images.device
    team = team or Team(device)
    logits = None
    if soft is not None:
        replayed, logits = soft.epoch(epoch)
        drawn = [replayed] * len(recipes)
        logits = _moved(logits, device)
    else:
        drawn = [draw_epoch(r, count, images.shape[-1], epoch_generator(r.seed, epoch)) for r in recipes]
    operations = [draws["operations"].tolist() if "operations" in draws else [] for draws in drawn]
    moved = [{name: _moved(tensor, device) for name, tensor in draws.items()} for draws in drawn]
    size = recipe.batch_size
    at_once = size * max(1, AUGMENTED_PIXELS[device.type] // (size * recipe.resolution**2 * len(recipes)))
    shares = torch.stack([own_shares(d, recipe.resolution) for d in moved]) if "partners" in moved[0] else None
    for first in range(0, count, at_once):
        ends = [(begin, min(begin + size, count)) for begin in range(first, min(first + at_once, count), size)]
        own = [team.share(*batch) for batch in ends]
        chunk = _chunk(recipe, sets, moved, operations, own, shared=team.size > 1)
        place = 0
        for (begin, end), (low, high) in zip(ends, own, strict=True):
            rows = slice(place, place + high - low)
            place = rows.stop
            yield Batch(
                chunk.images[:, rows],
                chunk.labels[:, rows],
                None if chunk.partner_labels is None else chunk.partner_labels[:, rows],
                None if shares is None else shares[:, begin // size],
                None if logits is None else logits[low:high],
                end - begin,
            )


def _chunk(
    recipe: Recipe,
    sets: Sequence[Labelled],
    drawn: Sequence[Draws],
    operations: Sequence[Sequence[int]],
    parts: Sequence[tuple[int, int]],
    *,
    shared: bool,
) -> Batch:
    """Augment and mix parts of successive batches of every student's epoch.

    Args:
        parts: positions where each begins and ends; whole batches, unless they are shared.
        shared: other processes have the rest, of one student; what its images are mixed with is augmented here once more.
    """
    device = sets[0][0].device
    first = parts[0][0]
    own = _moved(torch.cat([torch.arange(*part) for part in parts]), device)
    count, places = len(own), [own] * len(sets)
    mixes = "partners" in drawn[0]
    if shared and mixes:
        sets, drawn, operations = [*sets, *sets], [*drawn, *drawn], [*operations, *operations]
        places = [own, drawn[0]["partners"][own]]
    order = [draws["order"][rows] for draws, rows in zip(drawn, places, strict=True)]
    labels = torch.stack([truth[rows] for (_, truth), rows in zip(sets, order, strict=True)])
    pixels = torch.cat([images[rows] for (images, _), rows in zip(sets, order, strict=True)])
    per_image = [name for name in ("tiles", "boxes", "mirrored", "factors", "alphas") if name in drawn[0]]
    of_images = {
        name: torch.cat([draws[name][rows] for draws, rows in zip(drawn, places, strict=True)]) for name in per_image
    }
    x = augment(pixels, of_images, recipe)
    if recipe.dsa and count:
        lengths = [end - begin for begin, end in parts]
        pieces = [
            siamese(piece, recipe.dsa[chosen[begin // recipe.batch_size]], numbers)
            for images, draws, rows, chosen in zip(x.split(count), drawn, places, operations, strict=True)
            for piece, numbers, (begin, end) in zip(
                images.split(lengths), draws["numbers"][rows].split(lengths), parts, strict=True
            )
            if end > begin
        ]
        x = torch.cat(pieces)
    partner_labels = None
    if mixes:
        if shared:
            x, others = x.chunk(2)
            labels, partner_labels = labels.chunk(2)
        else:
            partners = [draws["partners"][own] - first for draws in drawn]
            partner_labels = torch.stack([truth[rows] for truth, rows in zip(labels, partners, strict=True)])
            others = x[torch.cat([rows + place * count for place, rows in enumerate(partners)])]
        batch_of = own // recipe.batch_size
        students = drawn[:1] if shared else drawn
        x = blend(
            x,
            others,
            torch.cat([draws["mix_boxes"][batch_of] for draws in students]),
            torch.cat([draws["mix_weights"][batch_of] for draws in students]),
        )
    return Batch(x.unflatten(0, (len(labels), count)), labels, partner_labels)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Bring draws to the device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


# ---------------------------------------------------------------- students


class Students:
    """R networks that are trained at once, with their optimiser and, if the recipe wants them, averaged weights."""

    def __init__(
        self, recipes: Sequence[Recipe], device: torch.device, compiled: bool = False, team: Team | None = None
    ):
        self.recipe = recipes[0]
        self.count = len(recipes)
        self.device = device
        self.team = team or Team(device)
        networks = [_fresh(recipe) for recipe in recipes]
        if self.team.size > 1:
            share_statistics(networks[0], self.team)
        networks = [network.to(device) for network in networks]
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.network = networks[0].to(memory_format=layout)
        self.layout = layout
        if self.count == 1:
            self.state: dict[str, torch.Tensor] = dict(self.network.named_parameters())
        else:
            self.state, _ = stack_module_state(networks)
            self.network = copy.deepcopy(self.network).to("meta")
        dimensions = {name: parameter.ndim for name, parameter in networks[0].named_parameters()}
        self.optimizer = _optimizer(self.recipe, self.state, dimensions)
        self.steps = 0
        self.average = None
        if self.recipe.ema is not None:
            self.average = {name: value.detach().clone() for name, value in self.state.items()}
        self.forward: Callable[..., torch.Tensor] = self._together if self.count > 1 else self._alone
        if compiled:
            self.forward = torch.compile(self.forward)
        half = self.recipe.dtype == "bfloat16"
        self.autocast: Callable[[], AbstractContextManager[Any]] = (
            (lambda: torch.autocast(device.type, torch.bfloat16)) if half else nullcontext
        )

    def _alone(self, state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        own = state is self.state  # as always but for averages: calling the network itself takes a millisecond less
        logits: torch.Tensor = self.network(images[0]) if own else functional_call(self.network, state, (images[0],))
        return logits[None]

    def _together(self, state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = vmap(lambda own, x: functional_call(self.network, own, (x,)))(state, images)
        return logits

    def set_rate(self, rate: float) -> None:
        """Set the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self, batch: Batch, teacher: Network | None) -> torch.Tensor:
        """Take one step and return each student's loss (R,), on the device: what this process's images add to it."""
        images = batch.images
        if self.count == 1:
            images = images[0].contiguous(memory_format=self.layout)[None]
        with self.autocast():
            if DOUBLE_BATCHNORM in self.recipe.published_quirks:
                with torch.no_grad():
                    self.forward(self.state, images)
            logits = self.forward(self.state, images).float()
        losses = (
            hard_loss(logits, batch)
            if self.recipe.target == "hard"
            else self._soft_loss(logits, images, batch, teacher)
        )
        for value in self.state.values():
            value.grad = None
        losses.sum().backward()
        self.team.add_up([value.grad for value in self.state.values() if value.grad is not None])
        self.optimizer.step()
        self.steps += 1
        if self.average is not None and self.recipe.ema is not None:
            decay = min(self.recipe.ema, self.steps / (self.steps + 1))
            current = [value.detach() for value in self.state.values()]
            torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)
        return losses.detach()

    def _soft_loss(
        self, logits: torch.Tensor, images: torch.Tensor, batch: Batch, teacher: Network | None
    ) -> torch.Tensor:
        if batch.logits is not None:
            wanted = batch.logits.float().expand_as(logits)
        else:
            assert teacher is not None
            with torch.no_grad(), self.autocast():
                wanted = teacher(images.flatten(0, 1)).float().view_as(logits)
        return batch.mean(divergences(logits, wanted, self.recipe.temperature))

    def test(self, images: torch.Tensor, labels: torch.Tensor) -> _Counts:
        """Classify the test set, of which this process has a part, with the averaged weights if there are any."""
        counts = _Counts(self.recipe, self.count, self.device)
        state = self.average if self.average is not None else self.state
        size = max(1, TESTED_PIXELS[self.device.type] // (self.recipe.resolution**2 * self.count))
        self.network.eval()
        with torch.inference_mode(), self.autocast():
            for batch, truth in zip(images.split(size), labels.split(size), strict=True):
                x = normalise(to_float(batch)).contiguous(memory_format=self.layout)
                counts.add(self.forward(state, x.expand(self.count, *x.shape)), truth)
        self.network.train()
        self.team.add_up([counts.pairs, counts.hits, counts.hits5, counts.images])
        return counts

    def tested(self) -> nn.Module:
        """Return the one network in evaluation mode, with the weights that are tested."""
        if self.average is not None:
            self.network.load_state_dict(self.average, strict=False)
        return self.network.eval()

    def save(self, path: Path, epoch: int, curves: list[list[tuple[int, float]]]) -> None:
        """Write everything that a training needs to go on after ``epoch`` epochs."""
        tensors = {f"weights.{name}": value for name, value in self.state.items()}
        tensors |= {f"buffers.{name}": value for name, value in self.network.named_buffers() if self.count == 1}
        tensors |= {f"average.{name}": value for name, value in (self.average or {}).items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items() if value is not None}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{TEMPORARY}{path.name}.{uuid.uuid4().hex}")
        about = {"epoch": str(epoch), "steps": str(self.steps), "curves": json.dumps(curves)}
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, temporary, metadata=about)
        temporary.replace(path)

    @torch.no_grad()
    def resume(self, path: Path, curves: list[list[tuple[int, float]]]) -> int:
        """Take a training up where ``save`` left it, and return the epochs that are done; 0 without a checkpoint."""
        if not path.exists():
            return 0
        parts = {"weights": self.state, "buffers": dict(self.network.named_buffers()), "average": self.average or {}}
        moments: dict[int, dict[str, Any]] = {}
        with safe_open(path, "pt") as file:
            about = file.metadata()
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                part, name = key.split(".", 1)
                if part == "optimizer":
                    index, _, what = name.partition(".")
                    moments.setdefault(int(index), {})[what] = file.get_tensor(key)
                else:
                    parts[part][name].copy_(file.get_tensor(key))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.steps = int(about["steps"])
        for curve, stored in zip(curves, json.loads(about["curves"]), strict=True):
            curve[:] = [(epoch, top1) for epoch, top1 in stored]
        return int(about["epoch"])


def _fresh(recipe: Recipe) -> nn.Module:
    torch.default_generator.manual_seed(recipe.seed)  # torch.manual_seed would also seed CUDA
    return build(recipe.architecture, classes=recipe.classes, resolution=recipe.resolution, width=recipe.width)


def _seed_layers(recipes: Sequence[Recipe], epoch: int, team: Team) -> None:
    """Seed what layers such as dropout draw from in an epoch; they take no generator of their own."""
    seed = epoch_generator(recipes[0].seed, epoch).initial_seed() + team.rank  # of images of its own
    torch.default_generator.manual_seed(seed)
    if team.device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _optimizer(
    recipe: Recipe, parameters: Mapping[str, torch.Tensor], dimensions: Mapping[str, int]
) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    spared = [name for name in parameters if recipe.decay == "matrices" and dimensions[name] <= 1]
    groups = [
        {"params": [value for name, value in parameters.items() if (name in spared) == without], "weight_decay": wanted}
        for without, wanted in ((False, decay), (True, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), fused=True)
    return torch.optim.SGD(groups, lr=rate, momentum=recipe.momentum, fused=True)


def hard_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return each student's mean cross-entropy (R,) with its images' labels, and their partners' by share."""
    own = batch.mean(_cross_entropy(logits, batch.labels))
    if batch.partner_labels is None or batch.own_share is None:
        return own
    others = batch.mean(_cross_entropy(logits, batch.partner_labels))
    return batch.own_share * own + (1 - batch.own_share) * others


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def divergences(logits: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return each image's Kullback-Leibler divergence from the teacher's logits (R, B), not times T^2."""
    target = (wanted / temperature).softmax(-1)
    return F.kl_div((logits / temperature).log_softmax(-1), target, reduction="none").sum(-1)


# ---------------------------------------------------------------- scores


class _Counts:
    """How R students classified test images, counted on the device."""

    def __init__(self, recipe: Recipe, students: int, device: torch.device):
        self.classes = recipe.classes
        self.students = torch.arange(students, device=device)[:, None]
        self.confused = self.classes <= MOST_CONFUSED
        columns = self.classes if self.confused else 1
        self.pairs = torch.zeros(students, self.classes, columns, dtype=torch.int64, device=device)
        self.hits = torch.zeros(students, self.classes, dtype=torch.int64, device=device)
        self.hits5 = torch.zeros(students, dtype=torch.int64, device=device)
        self.images = torch.zeros(self.classes, dtype=torch.int64, device=device)

    def add(self, logits: torch.Tensor, truth: torch.Tensor) -> None:
        """Count logits (R, n, K) of images with the labels (n,)."""
        ranking = logits.topk(min(5, self.classes), dim=2).indices
        right = ranking == truth[:, None]
        ones = torch.ones_like(truth)
        self.images.index_add_(0, truth, ones)
        self.hits.index_add_(1, truth, right[..., 0].to(torch.int64))
        self.hits5 += right.any(2).sum(1)
        if self.confused:
            students = self.students.expand(-1, len(truth))
            self.pairs.index_put_((students, truth.expand_as(students), ranking[..., 0]), ones, accumulate=True)

    def top1(self) -> list[float]:
        """Return each student's top-1 accuracy in percent; this waits for the device."""
        top1: list[float] = (100 * self.hits.sum(1).to(torch.float64) / self.images.sum()).tolist()
        return top1

    def top5(self, student: int) -> float:
        """Return the top-5 accuracy in percent."""
        return 100 * self.hits5[student].item() / int(self.images.sum())

    def by_class(self, student: int) -> list[float | None]:
        """Return the top-1 accuracy of each class in percent."""
        counts = zip(self.hits[student].tolist(), self.images.tolist(), strict=True)
        return [100 * hits / images if images else None for hits, images in counts]

    def confusion(self, student: int) -> list[list[int]] | None:
        """Return the counts by true and predicted class, unless there are too many classes."""
        return self.pairs[student].tolist() if self.confused else None


def _score(
    recipe: Recipe, images: int, curve: list[tuple[int, float]], counts: _Counts, student: int, seconds: float
) -> Score:
    best_epoch, best = max(curve, key=lambda point: point[1])
    return Score(
        top1_best=best,
        top1_last=curve[-1][1],
        top5_last=counts.top5(student),
        best_epoch=best_epoch,
        epochs=recipe.epochs,
        images_seen=recipe.epochs * images,
        curve=curve,
        class_top1=counts.by_class(student),
        confusion=counts.confusion(student),
        seconds=seconds,
    )


# ---------------------------------------------------------------- checks


def _check(
    recipes: Sequence[Recipe],
    train: Sequence[Labelled],
    test: Labelled,
    teacher: Network | None,
    soft: Soft | None,
    team: Team,
) -> None:
    recipe = recipes[0]
    if len(recipes) != len(train) or any(replace(other, seed=recipe.seed) != recipe for other in recipes):
        raise ValueError("students that are trained at once need one set each and recipes that differ in seed alone")
    if len(recipes) > 1 and not can_stack(recipe):
        raise ValueError(f"{recipe.architecture} has batch statistics or dropout, so that one is trained at a time")
    if len(recipes) > 1 and team.size > 1:
        raise ValueError("several processes train one student at a time")
    if len({len(labels) for _, labels in train}) > 1:
        raise ValueError("students that are trained at once need sets of one size")
    if recipe.target == "teacher" and teacher is None:
        raise ValueError("target teacher needs a teacher")
    if (recipe.target == "stored") != (soft is not None):
        raise ValueError("target stored needs stored labels, and no other does")
    native = recipe.train_size == "native"
    for images, labels in train:
        side = images.shape[-1] if native and images.ndim == 4 else recipe.resolution
        _check_set("train", images, labels, side, recipe.classes)
    _check_set("test", *test, recipe.resolution, recipe.classes)


def _check_set(name: str, images: torch.Tensor, labels: torch.Tensor, side: int, classes: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, side, side) or len(images) == 0:
        raise ValueError(
            f"{name} images must be uint8 of shape (N, 3, {side}, {side}) with N > 0, "
            f"not {images.dtype} of shape {tuple(images.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{name} labels must be int64 of shape ({len(images)},), not {labels.dtype} of shape {tuple(labels.shape)}"
        )
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= classes:
        raise ValueError(f"{name} labels must be in 0..{classes - 1}, but they range from {low} to {high}")
