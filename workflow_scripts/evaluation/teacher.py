"""Teachers: networks whose logits are soft labels, and what has to be known of one before it is believed."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import nn

from workflow_scripts.errors import DataError
from workflow_scripts.evaluation.architectures import build
from workflow_scripts.evaluation.augment import normalise, to_float


@dataclass(frozen=True)
class TeacherCheck:
    """How good a teacher is on real test images.

    Attributes:
        top1: Top-1 accuracy in percent.
        chance: What guessing achieves.
        matched: The top-1 accuracy that the same outputs would have in the best order of classes.
        images: Test images.
    """

    top1: float
    chance: float
    matched: float
    images: int

    @property
    def fault(self) -> str | None:
        """What is wrong with the teacher, if it cannot be believed."""
        noise = 2 * (self.chance * (100 - self.chance) / self.images) ** 0.5
        if self.matched >= 2 * self.top1 and self.matched > self.chance + noise:
            return (
                f"is right on {self.top1:.1f} % of {self.images} real test images, but would be on {self.matched:.1f} % if its "
                "outputs stood for the classes in another order: its class order is not the run's. Name the classes that its "
                "outputs stand for in teacher.classes (a JSON list in the order of the outputs)."
            )
        if self.top1 <= self.chance + noise:
            return (
                f"is right on {self.top1:.1f} % of {self.images} test images, where guessing achieves {self.chance:.1f} %: "
                "its weights do not fit the architecture or these images, or were not trained for long enough."
            )
        return None


class ChosenOutputs(nn.Module):
    """A network of which only some outputs count: logits (n, K) in the order of ``rows``."""

    def __init__(self, network: nn.Module, rows: Sequence[int]):
        super().__init__()
        self.network = network
        self.register_buffer("rows", torch.tensor(rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the chosen logits of ``x``."""
        logits: torch.Tensor = self.network(x)[:, self.rows]
        return logits


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a network's tensors by name, without unpickling anything else.

    Raises:
        DataError: The file is damaged, or holds other objects than tensors.
    """
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: holds more than tensors, which are not unpickled because that can run any code. If you trust its source, "
            "save its state dict as safetensors."
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as a checkpoint ({error})") from error
    for part in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(part), dict):
            content = content[part]
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no tensors by name")
    return {key.removeprefix("module."): value for key, value in content.items() if isinstance(value, torch.Tensor)}


def load_teacher(
    path: Path,
    architecture: str,
    width: int | None,
    resolution: int,
    classes: Sequence[str],
    *,
    outputs: Sequence[str] | None = None,
    imagenet: Sequence[str] = (),
) -> nn.Module:
    """Build a teacher with weights from a file; its logits are in the order of ``classes``.

    Args:
        path: See ``read_weights``.
        architecture: A name in ``protocols.STUDENTS``.
        width: Its width, or None.
        resolution: Side in pixels of what it will see.
        classes: The run's classes in label order.
        outputs: What its outputs stand for; default: ``classes``, or ``imagenet`` if there are as many.
        imagenet: ImageNet's classes in label order, if the run's classes are among them.

    Raises:
        DataError: The file does not fit the architecture, or the outputs do not cover the classes.
    """
    weights = read_weights(path)
    count = _outputs(path, weights, architecture, width, resolution)
    if outputs is None:
        outputs = imagenet if count == len(imagenet) != len(classes) else classes
    if count != len(outputs):
        raise DataError(
            f"{path}: has {count} outputs, but stands for {len(outputs)} classes. Name what its outputs stand for in "
            "teacher.classes (a JSON list in the order of the outputs)."
        )
    if missing := [name for name in classes if name not in outputs]:
        raise DataError(f"{path}: knows no class {', '.join(missing[:5])}, which this run has.")
    with torch.random.fork_rng(devices=[]):
        network = build(architecture, classes=count, resolution=resolution, width=width)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise DataError(f"{path}: does not fit {architecture} at {resolution} px ({first})") from None
    network.eval().requires_grad_(False)
    return network if list(outputs) == list(classes) else ChosenOutputs(network, [outputs.index(n) for n in classes])


def _outputs(
    path: Path, weights: dict[str, torch.Tensor], architecture: str, width: int | None, resolution: int
) -> int:
    """Return the number of outputs: the rows of the architecture's last linear layer."""
    with torch.device("meta"):
        network = build(architecture, classes=1, resolution=resolution, width=width)
    last, _ = _last_layer(network)
    if f"{last}.weight" not in weights:
        raise DataError(
            f"{path}: does not fit {architecture} (it has no {last}.weight, but {', '.join(list(weights)[:3])})"
        )
    return len(weights[f"{last}.weight"])


def _last_layer(network: nn.Module) -> tuple[str, nn.Linear]:
    """Return the linear layer that gives the logits, and its name."""
    return [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]


class TeacherFeatures:
    """What a teacher makes of images before its last linear layer."""

    def __init__(self, network: nn.Module, resolution: int, resample: Literal["bilinear", "bicubic"]):
        """Listen to a teacher.

        Args:
            network: As ``load_teacher`` gives it, on any device.
            resolution: Side in pixels of what it was trained on.
            resample: How images of another size are scaled to it.
        """
        self._network, self._resolution, self._resample = network, resolution, resample
        self._device = next(network.parameters()).device
        self._seen = torch.empty(0)
        _last_layer(network)[1].register_forward_pre_hook(self._listen)

    def _listen(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._seen = inputs[0]

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return features (n, d) float32 of uint8 images (n, H, W, 3)."""
        images = to_float(torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2))
        side = (self._resolution, self._resolution)
        if images.shape[2:] != side:
            images = F.interpolate(images, side, mode=self._resample, antialias=True).clamp(0, 1)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            self._network(normalise(images))
        features: np.ndarray = self._seen.flatten(1).float().cpu().numpy()
        return features


@torch.inference_mode()
def check_teacher(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, classes: int) -> TeacherCheck:
    """Classify real test images (uint8 (M, 3, R, R), on the network's device) with a teacher."""
    confusion = torch.zeros(classes * classes, dtype=torch.int64)
    for batch, truth in zip(images.split(256), labels.split(256), strict=True):
        predicted = network(normalise(to_float(batch))).argmax(1)
        confusion += torch.bincount((truth * classes + predicted).cpu(), minlength=classes * classes)
    counts = confusion.view(classes, classes).numpy()
    best = counts[linear_sum_assignment(counts, maximize=True)].sum()
    total = int(counts.sum())
    return TeacherCheck(100 * int(np.trace(counts)) / total, 100 / classes, 100 * int(best) / total, total)
