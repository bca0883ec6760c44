"""Train classifiers on exported sets and measure their accuracy on the real test images, one score file per training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from workflow_scripts.data.imagenet import order_difference, titled
from workflow_scripts.data.preprocess import load_labelled
from workflow_scripts.data.sources import BadImage, ImageFolder, Source, Split
from workflow_scripts.errors import DataError
from workflow_scripts.evaluation.training import train_student
from workflow_scripts.recipes import Recipes, SampleSet, Training
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.export import CARD
from workflow_scripts.stages.worker import Loop, environment, pick_device
from workflow_scripts.store.digests import digest
from workflow_scripts.store.files import write_atomically

Labelled = tuple[torch.Tensor, torch.Tensor]


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Run one job's trainings that have no score yet."""
    trainings = recipes.trainings_of(shard)
    missing = [training for training in trainings if not recipes.training_path(training).exists()]

    @cache
    def test_images() -> tuple[Labelled, list[BadImage]]:
        skipped: list[BadImage] = []
        return load_test(recipes, skipped), skipped

    def compute(missing: Iterator[Training]) -> Iterator[tuple[Training, dict[str, Any]]]:
        device = pick_device(recipes.config.compute.device)
        test, skipped = test_images()
        for training in missing:
            yield training, evaluate(recipes, training, load_set(recipes, training.set), test, skipped, device)

    def commit(made: tuple[Training, dict[str, Any]], _: float) -> None:
        write_atomically(recipes.training_path(made[0]), json.dumps(made[1]))

    if missing:
        loop = Loop(
            recipes,
            "evaluate",
            shard,
            place=recipes.training_place,
            name=lambda training: training.name,
            exists=lambda training: recipes.training_path(training).exists(),
            commit=commit,
        )
        loop.run(missing, len(trainings), compute)
    return {"scores": [str(recipes.training_path(t).relative_to(recipes.config.results)) for t in trainings]}


def evaluate(
    recipes: Recipes,
    training: Training,
    train: Labelled,
    test: Labelled,
    skipped: Sequence[BadImage],
    device: torch.device,
) -> dict[str, Any]:
    """Train one classifier and return its score, with everything that determines it."""
    recipe = recipes.training_recipe(training)
    score = train_student(recipes.student(training), *train, *test, device=device)
    return {
        "digest": digest(recipe),
        "recipe": recipe,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **environment(str(device)),
        "top1_best": score.top1_best,
        "top1_last": score.top1_last,
        "top5_last": score.top5_last,
        "best_epoch": score.best_epoch,
        "epochs": score.epochs,
        "images_seen": score.images_seen,
        "seconds": score.seconds,
        "curve": score.curve,
        "skipped": [{"class": bad.class_name, "path": bad.path, "reason": bad.reason} for bad in skipped],
    }


def load_set(recipes: Recipes, wanted: SampleSet) -> Labelled:
    """Read an exported set, after checking that it is the one that is meant and that its class order is the run's.

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
    return _read(recipes, source, "train")


def load_test(recipes: Recipes, skipped: list[BadImage]) -> Labelled:
    """Read the real test images; with ``on_bad_image: skip`` those that cannot be read are added to ``skipped``."""
    skip = recipes.config.dataset.on_bad_image == "skip"
    return _read(recipes, recipes.catalog.source, "test", skipped.append if skip else None)


def _read(recipes: Recipes, source: Source, split: Split, on_bad: Callable[[BadImage], None] | None = None) -> Labelled:
    """Read a split at the evaluation's resolution: uint8 (n, 3, R, R), and labels (n,) in the run's order."""
    settings = recipes.config.evaluation
    pixels, labels = load_labelled(
        source,
        {name: source.entries(name, split) for name in recipes.classes},
        resolution=settings.resolution,
        crop="resize",
        resample=settings.resample,
        workers=recipes.config.compute.workers,
        on_bad=on_bad,
    )
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


if __name__ == "__main__":
    stage_main("evaluate", __doc__, work, "METHOD-ipcN-NNN, for instance mgd3-ipc10-000")
