"""What a distilled set is and where it came from: ``dataset.json`` for programs, and the dataset card for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import yaml

from workflow_scripts.data.imagenet import class_title, wnids

# Licences of weights that the Hub knows under the same name in lower case.
HUB_LICENCES = ("apache-2.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-4.0", "mit", "openrail")
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
LISTED = 20
"""Up to so many classes are listed on the card itself."""


@dataclass(frozen=True)
class Description:
    """A distilled set without its images.

    Attributes:
        title: of the run.
        parameters: of the method, with its ``kind``.
        classes: in label order.
        digest: of the set, over ``results``, the digests of each class's images.
        resolution: side of the images in pixels.
        backbone: ``name``, ``denoiser`` and ``vae`` (their identities), and the ``dtype`` they ran in.
        licences: of the weights, by part.
        real_images: what they are, how many there were, and how each became a square.
        clustering: settings of the tree that prototypes come from, if they do.
        software: versions that made the images.
    """

    title: str
    method: str
    summary: str
    paper: str
    parameters: Mapping[str, Any]
    ipc: int
    seed: int
    classes: tuple[str, ...]
    digest: str
    results: Mapping[str, str]
    resolution: int
    backbone: Mapping[str, str]
    licences: Mapping[str, str]
    real_images: Mapping[str, Any]
    clustering: Mapping[str, Any]
    software: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the set: its method, IPC and seed."""
        return f"{self.method}-ipc{self.ipc}-seed{self.seed}"

    @property
    def count(self) -> int:
        """How many images it has."""
        return self.ipc * len(self.classes)

    @property
    def is_real(self) -> bool:
        """Say whether the images are real ones, chosen and not made."""
        return bool(self.parameters["kind"] == "coreset")

    @property
    def is_imagenet(self) -> bool:
        """Say whether the classes are ImageNet's."""
        return set(self.classes) <= set(wnids())


def facts(description: Description, format: str, side: int, resample: str | None, folders: tuple[str, ...]) -> Any:
    """Return the content of ``dataset.json``.

    Args:
        side: of the images as written; ``resample`` is the filter that brought them there, if any did.
        folders: of the classes, in label order.
    """
    position = {folder: index for index, folder in enumerate(sorted(folders))}
    return {
        "format": format,
        **asdict(description),
        "image": {"side": side, "resample": resample},
        "classes": [
            {"label": label, "class": name, "title": class_title(name), "folder": folder, "sorted": position[folder]}
            for label, (name, folder) in enumerate(zip(description.classes, folders, strict=True))
        ],
        "written_by": f"stillhouse {version('stillhouse')}",
    }


def card(description: Description, written: Mapping[str, Any]) -> str:
    """Return the dataset card: YAML that the Hub reads, and Markdown.

    Args:
        written: what ``dataset.json`` says.
    """
    licence, name = _licence(description)
    tags = ["dataset-distillation", "stillhouse", *([] if description.is_real else ["synthetic"])]
    front: dict[str, Any] = {
        "pretty_name": f"{description.title}: {description.method}, {description.ipc} images per class",
        "license": licence,
        **({"license_name": name.lower()} if licence == "other" else {}),
        "task_categories": ["image-classification"],
        "size_categories": [next((label for limit, label in SIZES if description.count < limit), "10M<n<100M")],
        **({"source_datasets": ["ILSVRC/imagenet-1k"]} if description.is_imagenet else {}),
        "tags": tags,
    }
    if written["format"] == "webdataset":
        tags.append("webdataset")
        front["configs"] = [{"config_name": "default", "data_files": [{"split": "train", "path": "train-*.tar"}]}]
    elif written["format"] == "huggingface":
        names = {str(label): name for label, name in enumerate(description.classes)}
        features = [
            {"name": "image", "dtype": "image"},
            {"name": "label", "dtype": {"class_label": {"names": names}}},
            {"name": "class", "dtype": "string"},
            {"name": "title", "dtype": "string"},
        ]
        files = [{"split": "train", "path": "train/**"}]
        front["configs"] = [{"config_name": "default", "data_files": files, "features": features}]
    body = _template().render(
        d=description,
        written=written,
        parameters=yaml.safe_dump(
            {**description.parameters, **({"tree": dict(description.clustering)} if description.clustering else {})},
            sort_keys=False,
        ).rstrip(),
        reordered=any(row["label"] != row["sorted"] for row in written["classes"]),
        listed=written["classes"] if len(description.classes) <= LISTED else [],
        non_commercial="NC" in " ".join(description.licences.values()).upper().split("-"),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body}"


def _licence(description: Description) -> tuple[str, str]:
    """Return the Hub's name of the licence, and another name where it has none.

    Sampled images go by the denoiser's licence. Real ones stay under the terms of where they are from.
    """
    if description.is_real:
        return "other", "that-of-the-real-images"
    licence = description.licences["denoiser"]
    if licence.lower() in HUB_LICENCES:
        return licence.lower(), licence
    return ("other", licence) if " " not in licence and licence != "unknown" else ("unknown", licence)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string((Path(__file__).parent / "card.md.j2").read_text())
