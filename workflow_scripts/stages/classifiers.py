"""What the stages that train or ask classifiers read: real images, exported sets, teachers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from workflow_scripts.data.imagenet import order_difference, titled
from workflow_scripts.data.preprocess import load_labelled
from workflow_scripts.data.sources import BadImage, ImageFolder, Source, Split
from workflow_scripts.errors import DataError
from workflow_scripts.evaluation.protocols import Recipe
from workflow_scripts.evaluation.teacher import load_teacher
from workflow_scripts.recipes import Recipes, SampleSet
from workflow_scripts.stages.export import CARD
from workflow_scripts.store.digests import digest

Labelled = tuple[torch.Tensor, torch.Tensor]


def train_side(recipes: Recipes, recipe: Recipe) -> int:
    """Return the side in pixels at which a training reads its set."""
    return recipes.config.dataset.resolution if recipe.train_size == "native" else recipe.resolution


def load_set(recipes: Recipes, wanted: SampleSet, side: int) -> Labelled:
    """Read an exported set, after checking that it is the one that is meant and that its class order is the run's.

    Returns:
        images uint8 (n, 3, side, side) and labels int64 (n,).

    Raises:
        DataError: naming the first class that is another one, or the classes that have too few or too many images.
    """
    folder = recipes.set_directory(wanted)
    try:
        card = json.loads((folder / CARD).read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder / CARD}: cannot be read ({error}). Run `stillhouse verify`, then the same command again."
        ) from None
    remedy = "Run `stillhouse verify`, which sets the folder aside, then the same command again."
    if (difference := order_difference(recipes.classes, card["classes"])) is not None:
        raise DataError(f"{folder / CARD}: has the classes in another order than this run: {difference}. {remedy}")
    if card["digest"] != recipes.set_digest(wanted):
        raise DataError(f"{folder / CARD}: is of another set than this run's. {remedy}")
    source = ImageFolder(folder, folder)
    counts = {name: len(source.entries(name, "train")) for name in recipes.classes}
    if wrong := [f"{titled(name)} has {count}" for name, count in counts.items() if count != wanted.ipc]:
        more = f", and {len(wrong) - 5} more classes" if wrong[5:] else ""
        raise DataError(
            f"{folder}: should hold {wanted.ipc} images of each class, but {', '.join(wrong[:5])}{more}. {remedy}"
        )
    return _read(recipes, source, "train", side)


def load_real(
    recipes: Recipes, split: Split, resolution: int, skipped: list[BadImage], resize: float = 1.0
) -> Labelled:
    """Read real images at a resolution; with ``on_bad_image: skip`` those that cannot be read are added to ``skipped``.

    Args:
        resize: short side before the centre crop, in units of the resolution.
    """
    skip = recipes.config.dataset.on_bad_image == "skip"
    return _read(recipes, recipes.catalog.source, split, resolution, resize, skipped.append if skip else None)


def read_teacher(recipes: Recipes, protocol: str, resolution: int, device: torch.device) -> nn.Module:
    """Load a protocol's teacher, with its outputs in the run's order of classes."""
    teacher = recipes.teacher(protocol)
    outputs = None
    if teacher.classes is not None:
        try:
            outputs = json.loads(teacher.classes.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{teacher.classes}: cannot be read as a JSON list of class names ({error})") from None
    network = load_teacher(
        recipes.teacher_weights(protocol),
        teacher.architecture.name,
        teacher.architecture.width,
        resolution,
        recipes.classes,
        outputs=outputs,
        imagenet=recipes.config.dataset.label_names or (),
    )
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return network.to(device, memory_format=layout)  # type: ignore[call-overload]


def teacher_top1(recipes: Recipes, protocol: str) -> float:
    """Return how good a protocol's teacher was found to be on the real test images (percent).

    Raises:
        DataError: Its record is not there or is another's.
    """
    path = recipes.teacher_record(protocol)
    try:
        record = json.loads(path.read_text())
        if record["digest"] != digest(recipes.teacher_check(protocol)):
            raise ValueError("it is the record of another teacher")
        return float(record["top1"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Run `stillhouse verify`, then the same command again."
        ) from None


def _read(
    recipes: Recipes,
    source: Source,
    split: Literal["train", "test"],
    resolution: int,
    resize: float = 1.0,
    on_bad: Callable[[BadImage], None] | None = None,
) -> Labelled:
    """Read a split: uint8 (n, 3, R, R), and labels (n,) in the run's order."""
    pixels, labels = load_labelled(
        source,
        {name: source.entries(name, split) for name in recipes.classes},
        resolution=round(resolution * resize),
        crop="resize",
        resample=recipes.config.evaluation.resample,
        workers=recipes.config.compute.workers,
        inner=resolution,
        channels_first=True,
        on_bad=on_bad,
    )
    return torch.from_numpy(pixels), torch.from_numpy(labels)
