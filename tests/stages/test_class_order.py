"""A set whose classes are in another order, or that lacks images, is refused before a classifier is trained on it."""

import json
from pathlib import Path

import pytest
import support

from workflow_scripts.errors import DataError
from workflow_scripts.recipes import Recipes, SampleSet
from workflow_scripts.stages.classifiers import load_set

WANTED = SampleSet("mgd3", 3, 0)


def exported(copied: support.Site) -> tuple[Recipes, Path]:
    recipes = Recipes(copied.config())
    return recipes, recipes.set_directory(WANTED)


def test_labels_follow_the_order_of_the_run(copied: support.Site) -> None:
    recipes, _ = exported(copied)
    images, labels = load_set(recipes, WANTED, 16)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and len(images) == 9


def test_the_first_class_that_differs_is_named(copied: support.Site) -> None:
    recipes, folder = exported(copied)
    card = json.loads((folder / "dataset.json").read_text())
    card["classes"] = ["ant", "cat", "bee"]
    (folder / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(
        DataError, match=r"dataset\.json: .*another order.*label 1 is cat, expected bee .*stillhouse verify"
    ):
        load_set(recipes, WANTED, 16)


def test_another_set_is_refused(copied: support.Site) -> None:
    recipes, folder = exported(copied)
    card = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(card | {"digest": "0" * 64}))
    with pytest.raises(DataError, match="is of another set"):
        load_set(recipes, WANTED, 16)


def test_classes_with_too_few_or_too_many_images_are_named(copied: support.Site) -> None:
    recipes, folder = exported(copied)
    (folder / "ant" / "0001.png").unlink()
    support.draw(0, 0).save(folder / "cat" / "0003.png")
    with pytest.raises(DataError, match="should hold 3 images of each class, but ant has 2, cat has 4"):
        load_set(recipes, WANTED, 16)
