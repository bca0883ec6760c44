"""The files of a backbone: what identifies them, and which label each class has. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow_scripts.errors import BackboneError
from workflow_scripts.store.digests import digest, file_digests

LABELS = "labels.json"
TIMESTEPS = 1000  # diffusers' default, and what fit_backbone trains
CONFIGS = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
WEIGHTS = ("transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A backbone as results refer to it.

    Attributes:
        path: directory in diffusers format.
        vae: identity of the autoencoder: a hash of its content, or of the recipe that will fit it.
        denoiser: identity of the transformer and its noise schedule, likewise.
        timesteps: length of the training schedule.
        labels: the label index of every class that the backbone was trained on.
        latent_side: side of the square latents, if known.
        resolution: side in pixels of the square images, if known.
    """

    path: Path
    vae: str
    denoiser: str
    timesteps: int
    labels: dict[str, int]
    latent_side: int | None = None
    resolution: int | None = None

    def label_of(self, class_name: str) -> int:
        """Return a class's label index in the backbone."""
        try:
            return self.labels[class_name]
        except KeyError:
            raise BackboneError(
                f"class {class_name}: backbone {self.path} was not trained on it, but on {', '.join(list(self.labels)[:10])}"
                f"{', ...' if len(self.labels) > 10 else ''} ({self.path / LABELS}). "
                "Choose classes with dataset.classes, or fit a backbone."
            ) from None


def open_checkpoint(path: Path, cache: Path) -> Checkpoint:
    """Check that a directory holds a whole backbone, and identify it by the content of its files.

    Raises:
        BackboneError: naming the file that is missing.
    """
    for name in (*CONFIGS, *WEIGHTS, LABELS):
        if not (path / name).is_file():
            raise BackboneError(
                f"backbone.path: {path / name} is missing. A backbone is a directory in diffusers format with "
                f"transformer/, vae/, scheduler/ (weights as safetensors) and {LABELS}, the class names in label order."
            )
    parts = {
        part: digest(file_digests([path / name for name in (*CONFIGS, *WEIGHTS) if name.startswith(part)], cache))
        for part in ("transformer", "vae", "scheduler")
    }
    schedule = _read_json(path / "scheduler/scheduler_config.json", dict)
    timesteps = int(schedule.get("num_train_timesteps", TIMESTEPS))
    denoiser = digest([parts["transformer"], parts["scheduler"]])
    side = _read_json(path / "transformer/config.json", dict).get("sample_size")
    levels = len(_read_json(path / "vae/config.json", dict).get("block_out_channels", ()))
    resolution = side * 2 ** (levels - 1) if side and levels else None
    return Checkpoint(path, parts["vae"], denoiser, timesteps, read_labels(path), side, resolution)


def read_labels(path: Path) -> dict[str, int]:
    """Read the class names of a backbone in label order."""
    names = _read_json(path / LABELS, list)
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise BackboneError(f"{path / LABELS}: must be a list of distinct class names, in label order")
    return {name: index for index, name in enumerate(names)}


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, kind):
        raise BackboneError(f"{path}: must hold a JSON {'object' if kind is dict else 'list'}")
    return content
