"""The files of a backbone: what identifies them, and which label each class has. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from workflow_scripts.errors import BackboneError
from workflow_scripts.store.digests import digest, file_digest

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
    """

    path: Path
    vae: str
    denoiser: str
    timesteps: int
    labels: dict[str, int]

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
    files = {name: file_digest(path / name, cache) for name in (*CONFIGS, *WEIGHTS)}
    parts = {
        part: digest({n: d for n, d in files.items() if n.startswith(part)})
        for part in ("transformer", "vae", "scheduler")
    }
    schedule = json.loads((path / "scheduler/scheduler_config.json").read_text())
    timesteps = int(schedule.get("num_train_timesteps", TIMESTEPS))
    return Checkpoint(
        path, parts["vae"], digest([parts["transformer"], parts["scheduler"]]), timesteps, read_labels(path)
    )


def read_labels(path: Path) -> dict[str, int]:
    """Read the class names of a backbone in label order."""
    names = json.loads((path / LABELS).read_text())
    return {name: index for index, name in enumerate(names)}
