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
CLASS_EMBEDDING = "class_embedding.safetensors"  # of a U-Net: "weight" (classes + 1, E), the last row for no class
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A backbone as results refer to it.

    Attributes:
        path: directory in diffusers format.
        vae: identity of the autoencoder: a hash of its content, or of the recipe that will fit it.
        denoiser: identity of the transformer or U-Net and its noise schedule, likewise.
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
    network = denoiser_of(path)
    parts = {
        "vae": [f"vae/{name}" for name in ("config.json", WEIGHTS)],
        network: [f"{network}/{name}" for name in ("config.json", WEIGHTS)],
        "scheduler": ["scheduler/scheduler_config.json"],
    }
    if network == "unet":
        parts["class embedding"] = [CLASS_EMBEDDING]
    for name in (*sorted(name for names in parts.values() for name in names), LABELS):
        if not (path / name).is_file():
            raise BackboneError(
                f"backbone.path: {path / name} is missing. A backbone is a directory in diffusers format with transformer/ "
                f"(or unet/ and {CLASS_EMBEDDING}), vae/, scheduler/ (weights as safetensors) and {LABELS}, the class names in "
                "label order."
            )
    identity = {part: digest(file_digests([path / name for name in names], cache)) for part, names in parts.items()}
    schedule = _read_json(path / "scheduler/scheduler_config.json", dict)
    timesteps = int(schedule.get("num_train_timesteps", TIMESTEPS))
    denoiser = digest([identity[part] for part in parts if part != "vae"])
    side = _read_json(path / network / "config.json", dict).get("sample_size")
    levels = len(_read_json(path / "vae/config.json", dict).get("block_out_channels", ()))
    resolution = side * 2 ** (levels - 1) if side and levels else None
    return Checkpoint(path, identity["vae"], denoiser, timesteps, read_labels(path), side, resolution)


@dataclass(frozen=True)
class AutoencoderFacts:
    """What a directory's autoencoder is.

    Attributes:
        quantises: it is a VQ model.
        scaling_factor: from its encoder's output to a latent.
    """

    quantises: bool
    scaling_factor: float


def autoencoder_of(path: Path) -> AutoencoderFacts:
    """Read which autoencoder a backbone has; diffusers' default for a missing factor is that of Stable Diffusion, VQ's is 1."""
    config = _read_json(path / "vae/config.json", dict)
    quantises = config.get("_class_name") == "VQModel"
    return AutoencoderFacts(quantises, float(config.get("scaling_factor", 1.0 if quantises else 0.18215)))


def denoiser_of(path: Path) -> str:
    """Return the folder of a backbone's denoiser, ``unet`` if there is one, or ``transformer``."""
    return "unet" if (path / "unet").is_dir() and not (path / "transformer").is_dir() else "transformer"


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
