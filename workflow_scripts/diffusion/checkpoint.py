"""The files of a backbone: where they are, what identifies them, and which label each class has.

A backbone is a directory in diffusers format or one file in its authors' layout (:mod:`workflow_scripts.diffusion.original`),
here or in the Hugging Face cache. Needs no torch, but once per one-file checkpoint to read its shapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from workflow_scripts.data.imagenet import class_names
from workflow_scripts.errors import BackboneError, ConfigError
from workflow_scripts.store.digests import PREFIX, digest, file_digests, note_on
from workflow_scripts.store.files import write_atomically

LABELS = "labels.json"
PIPELINE = "model_index.json"  # of a diffusers pipeline; DiT's has the names of its classes
TIMESTEPS = 1000  # diffusers' default, and what fit_backbone trains
CLASS_EMBEDDING = "class_embedding.safetensors"  # of a U-Net: "weight" (classes + 1, E), the last row for no class
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED_WEIGHTS = "diffusion_pytorch_model.bin"  # older repositories have no other; read as tensors only

# Licences of published weights whose files do not say it, and where they come from; patterns of their paths.
PUBLISHED = (
    (r"DiT-XL-2-(256|512)(?!x)", "CC-BY-NC-4.0", "uv run hf download facebook/DiT-XL-2-{0}"),
    (
        r"DiT-XL-2-(256x256|512x512)\.pt",
        "CC-BY-NC-4.0",
        "curl -L -o {path} https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{0}.pt",
    ),
    (r"sd-vae-ft-(mse|ema)", "MIT", "uv run hf download stabilityai/sd-vae-ft-{0}"),
)
OWN = "trained by this project"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Checkpoint:
    """A backbone as results refer to it.

    Attributes:
        path: directory in diffusers format, or a file in its authors' layout.
        vae: identity of the autoencoder: a hash of its content, or of the recipe that will fit it.
        denoiser: identity of the transformer or U-Net and its noise schedule, likewise.
        timesteps: length of the training schedule.
        labels: the label index of every class that the backbone was trained on.
        latent_side: side of the square latents, if known.
        resolution: side in pixels of the square images, if known.
        multiple: of a convolutional denoiser, which takes other sizes too: the number that divides every side of its latents.
        vae_path: where the autoencoder is, if not at ``path``.
        licences: of the weights, by part: ``denoiser`` and ``vae``.
        denoiser_config: the denoiser's arguments in diffusers, as far as they are known.
        vae_config: the autoencoder's, likewise.
    """

    path: Path
    vae: str
    denoiser: str
    timesteps: int
    labels: dict[str, int]
    latent_side: int | None = None
    resolution: int | None = None
    multiple: int | None = None
    vae_path: Path | None = None
    licences: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(("denoiser", "vae"), OWN))
    denoiser_config: Mapping[str, Any] = field(default_factory=dict)
    vae_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def autoencoder(self) -> Path:
        """Where the autoencoder is."""
        return self.vae_path or self.path

    def at(self, resolution: int) -> Checkpoint:
        """Return this backbone for images of another side in pixels; a U-Net at another size counts as another denoiser.

        Raises:
            ConfigError: if it does not take this size.
        """
        if self.resolution is None or self.latent_side is None or self.resolution == resolution:
            return self
        factor = self.resolution // self.latent_side
        side, rest = divmod(resolution, factor)
        if self.multiple is None or rest or side % self.multiple:
            sizes = f"multiples of {self.multiple * factor}" if self.multiple else self.resolution
            raise ConfigError(f"dataset.resolution: got {resolution}, but backbone {self.path} takes {sizes} pixels")
        return replace(self, denoiser=digest([self.denoiser, side]), latent_side=side, resolution=resolution)

    def label_of(self, class_name: str) -> int:
        """Return a class's label index in the backbone."""
        try:
            return self.labels[class_name]
        except KeyError:
            source = self.path / LABELS
            raise BackboneError(
                f"class {class_name}: backbone {self.path} was not trained on it, but on {', '.join(list(self.labels)[:10])}"
                f"{', ...' if len(self.labels) > 10 else ''} ({source if source.is_file() else 'the classes of ImageNet'}). "
                "Choose classes with dataset.classes, or fit a backbone."
            ) from None

    def licence_note(self) -> str | None:
        """Return a line that says under which licences others' weights are, if any is known."""
        if set(self.licences.values()) <= {OWN, UNKNOWN}:
            return None
        parts = ", ".join(f"{part} {licence}" for part, licence in self.licences.items())
        limits = " Non-commercial use only." if "NC" in parts.upper().split("-") else ""
        return f"Licence of the backbone's weights: {parts}.{limits}"


def open_checkpoint(name: str, cache: Path, vae: str | None = None) -> Checkpoint:
    """Check that a backbone is whole, and identify it by the content of its files.

    Args:
        name: a directory, a file, or the id of a repository in the Hugging Face cache.
        cache: directory of remembered hashes and shapes.
        vae: an autoencoder to use in place of its own, likewise a directory or an id.

    Raises:
        BackboneError: naming the file that is missing and how to get it, or what does not fit.
    """
    path = locate(name, "backbone.path")
    return _open_file(path, cache, vae) if path.is_file() else _open_directory(path, name, cache, vae)


def notes_of(checkpoint: Checkpoint, cache: Path) -> list[Path]:
    """Return the files in ``cache`` that hold, or would hold, what is remembered of a backbone."""
    path = checkpoint.path
    if not path.exists():
        return []
    own = vae_folder(checkpoint.autoencoder)
    if path.is_dir():
        folders = [path, path / denoiser_of(path), path / "scheduler", own]
        return [note_on(folder, cache) for folder in folders]
    return [note_on(path.parent, cache / path.name), _facts(_content(path, cache), cache), note_on(own, cache)]


def _content(path: Path, cache: Path) -> str:
    return digest(file_digests([path], cache / path.name))  # its own folder: two files of one folder share no note


def _facts(content: str, cache: Path) -> Path:
    return cache / f"{content[:PREFIX]}.facts.json"


def _open_directory(path: Path, name: str, cache: Path, vae: str | None) -> Checkpoint:
    network = denoiser_of(path)
    parts = {network: ["config.json", weights_of(path / network)], "scheduler": ["scheduler_config.json"]}
    files = {part: [path / part / name for name in names] for part, names in parts.items()}
    if network == "unet":
        files["class embedding"] = [path / CLASS_EMBEDDING]
    own = [] if vae else _vae_files(path)
    for file in sorted([*own, *(file for part in files.values() for file in part)]):
        if not file.is_file():
            raise BackboneError(
                f"backbone.path: {file} is missing. A backbone is a directory in diffusers format with transformer/ "
                f"(or unet/ and {CLASS_EMBEDDING}), vae/, scheduler/ (weights as safetensors) and {LABELS}, the class names in "
                f"label order.{_how_to_get(name)}"
            )
    identity = {part: digest(file_digests(names, cache)) for part, names in files.items()}
    schedule = _read_json(path / "scheduler/scheduler_config.json", dict)
    config = _read_json(path / network / "config.json", dict)
    return _assemble(
        path,
        vae,
        cache,
        denoiser=digest([identity[part] for part in files]),
        timesteps=int(schedule.get("num_train_timesteps", TIMESTEPS)),
        labels=read_labels(path, _classes(path, network, config)),
        network=config,
        multiple=unet_multiple(config) if network == "unet" else None,
    )


def _open_file(path: Path, cache: Path, vae: str | None) -> Checkpoint:
    content = _content(path, cache)
    note = _facts(content, cache)
    try:
        facts = json.loads(note.read_text())
        network = facts["network"]
    except (OSError, ValueError, KeyError):
        from workflow_scripts.diffusion.original import describe  # here, because it imports torch

        facts = describe(path)
        network = facts["network"]
        write_atomically(note, json.dumps(facts))
    if facts["vae"] is None and vae is None:
        raise BackboneError(
            f"backbone.vae: {path} has no autoencoder. Name one, for instance backbone.vae: stabilityai/sd-vae-ft-mse."
        )
    return _assemble(
        path,
        vae,
        cache,
        denoiser=digest([content, facts["denoiser"]]),
        timesteps=TIMESTEPS,
        labels=imagenet_labels(facts["classes"], path),
        network=network,
        multiple=facts["multiple"],
        own_vae=(digest([content, "vae"]), facts["vae"]),
    )


def _assemble(
    path: Path,
    vae: str | None,
    cache: Path,
    *,
    denoiser: str,
    timesteps: int,
    labels: dict[str, int],
    network: Mapping[str, Any],
    multiple: int | None,
    own_vae: tuple[str, dict[str, Any]] | None = None,
) -> Checkpoint:
    """Add the autoencoder to what is known of a denoiser, and check that they fit."""
    place = locate(vae, "backbone.vae") if vae else path
    if own_vae and not vae:
        identity, config = own_vae
    else:
        files = _vae_files(place)
        for file in files:
            if not file.is_file():
                raise BackboneError(
                    f"backbone.vae: {file} is missing. An autoencoder is a directory in diffusers format with config.json and "
                    f"its weights.{_how_to_get(vae or '')}"
                )
        identity = digest(file_digests(files, cache))
        config = _read_json(files[0], dict)
    latent, channels, side = config.get("latent_channels"), network.get("in_channels"), network.get("sample_size")
    if channels and latent and channels != latent:
        raise BackboneError(
            f"{'backbone.vae' if vae else 'backbone.path'}: the autoencoder in {place} has latents of {latent} channels, the "
            f"denoiser in {path} takes {channels}"
        )
    levels = len(config.get("block_out_channels", ()))
    return Checkpoint(
        path,
        identity,
        denoiser,
        timesteps,
        labels,
        side,
        side * 2 ** (levels - 1) if side and levels else None,
        multiple,
        place if vae else None,
        {"denoiser": licence_of(path), "vae": licence_of(place)},
        network,
        config,
    )


# ---------------------------------------------------------------- where things are


def locate(name: str, key: str) -> Path:
    """Return the place of weights: a path, or the snapshot of a repository in the Hugging Face cache. Asks no network.

    Args:
        name: a path or a repository's id.
        key: the configuration key that has it, for the error.

    Raises:
        BackboneError: if it is neither, with the command that would fetch it.
    """
    path = Path(name)
    if path.exists():
        return path
    elsewhere = ""
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        from huggingface_hub import constants, try_to_load_from_cache  # here, because it takes a moment

        for file in (PIPELINE, "config.json"):
            found = try_to_load_from_cache(name, file, cache_dir=constants.HF_HUB_CACHE)
            if isinstance(found, str):
                return Path(found).parent
        elsewhere = f", nor is it in the Hugging Face cache ({constants.HF_HUB_CACHE})"
    raise BackboneError(f"{key}: {name} is missing: there is no such directory or file{elsewhere}.{_how_to_get(name)}")


def _how_to_get(name: str) -> str:
    """Return a sentence with the command that fetches published weights, if ``name`` looks like them."""
    for pattern, _, command in PUBLISHED:
        if found := re.search(pattern, name):
            fetch = command.format(found[1], path=name)
            local = "" if fetch.startswith("curl") or fetch.endswith(f" {name}") else f" --local-dir {name}"
            return f" Fetch it with: {fetch}{local}"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).parent.exists():
        return f" If it is a repository of the Hugging Face hub, fetch it with: uv run hf download {name}"
    return ""


def denoiser_of(path: Path) -> str:
    """Return the folder of a backbone's denoiser, ``unet`` if there is one, or ``transformer``."""
    return "unet" if (path / "unet").is_dir() and not (path / "transformer").is_dir() else "transformer"


def vae_folder(path: Path) -> Path:
    """Return the folder of an autoencoder: ``vae/`` of a backbone, or the directory itself if it is one's alone."""
    return path if (path / "config.json").is_file() and not (path / "vae").is_dir() else path / "vae"


def weights_of(folder: Path) -> str:
    """Return the name of a folder's weights: safetensors, unless there is only the older format."""
    return PICKLED_WEIGHTS if (folder / PICKLED_WEIGHTS).is_file() and not (folder / WEIGHTS).is_file() else WEIGHTS


def _vae_files(path: Path) -> list[Path]:
    folder = vae_folder(path)
    return [folder / "config.json", folder / weights_of(folder)]


# ---------------------------------------------------------------- what they say


def licence_of(path: Path) -> str:
    """Return the licence of weights: what the model card beside them says, what is known of published ones, or ``unknown``."""
    if path.resolve().is_relative_to(Path(__file__).resolve().parent.parent):
        return OWN
    try:
        card = (path if path.is_dir() else path.parent) / "README.md"
        front = re.match(r"---\n(.*?)\n---", card.read_text(), re.DOTALL)
        licence = yaml.safe_load(front[1]).get("license") if front else None
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        licence = None
    known = (licence for pattern, licence, _ in PUBLISHED if re.search(pattern, path.as_posix()))
    return str(licence).upper() if licence else next(known, UNKNOWN)


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
    """Read which autoencoder a place has; in a one-file checkpoint it is VQ-f4.

    diffusers' default for a missing factor is that of Stable Diffusion, VQ's is 1.
    """
    if path.is_file():
        return AutoencoderFacts(True, 1.0)
    config = _read_json(vae_folder(path) / "config.json", dict)
    quantises = config.get("_class_name") == "VQModel"
    return AutoencoderFacts(quantises, float(config.get("scaling_factor", 1.0 if quantises else 0.18215)))


def read_labels(path: Path, classes: int | None = None) -> dict[str, int]:
    """Read the class names of a backbone in label order; one of ``classes`` = 1000 without ``labels.json`` is ImageNet's."""
    if not (path / LABELS).is_file():
        return imagenet_labels(classes, path)
    names = _read_json(path / LABELS, list)
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise BackboneError(f"{path / LABELS}: must be a list of distinct class names, in label order")
    return {name: index for index, name in enumerate(names)}


def imagenet_labels(classes: int | None, path: Path) -> dict[str, int]:
    """Return the WordNet ids of ImageNet in label order, compared with the names that the pipeline has, if it has any.

    Raises:
        BackboneError: if there are not 1000 classes, or a name is not that of its class.
    """
    known = class_names()
    if classes != len(known):
        raise BackboneError(
            f"{path}: has {classes} classes; of one-file checkpoints, only those of ImageNet's {len(known)} can be used"
            if path.is_file()
            else f"backbone.path: {path / LABELS} is missing, the class names in label order. Only 1000 are ImageNet's."
        )
    names = _read_json(path / PIPELINE, dict).get("id2label") if (path / PIPELINE).is_file() else {}
    names = names if isinstance(names, dict) else {}
    wrong = [
        f"{index} is {names[str(index)]!r}, but {wnid} is {name!r}"
        for index, (wnid, name) in enumerate(known.items())
        if str(index) in names and not _synonyms(names[str(index)]) & _synonyms(name)
    ]
    if wrong:
        raise BackboneError(
            f"{path / PIPELINE}: id2label has ImageNet's classes in another order: {'; '.join(wrong[:3])}"
            f"{f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. Write the WordNet ids in the backbone's label order "
            f"to {path / LABELS}."
        )
    return {wnid: index for index, wnid in enumerate(known)}


def _synonyms(name: str) -> set[str]:
    return {synonym.strip().casefold() for synonym in str(name).split(",")}


def unet_multiple(config: Mapping[str, Any]) -> int:
    """Return the number that divides every side of latents that a U-Net takes: it halves them between its levels."""
    return int(2 ** (len(config.get("block_out_channels", ())) - 1))


def _classes(path: Path, network: str, config: Mapping[str, Any]) -> int | None:
    """Return the number of a denoiser's classes without the null class, if its files say it."""
    if network == "transformer":
        return config.get("num_embeds_ada_norm")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path / CLASS_EMBEDDING, "numpy") as file:
            return int(file.get_slice("weight").get_shape()[0]) - 1
    except (OSError, SafetensorError):  # whoever loads it says what is wrong
        return None


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, kind):
        raise BackboneError(f"{path}: must hold a JSON {'object' if kind is dict else 'list'}")
    return content
