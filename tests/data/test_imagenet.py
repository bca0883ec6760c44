"""The class lists: a wrong class order is the most common cause of results that cannot be reproduced."""

import pytest

from workflow_scripts.config import Dataset
from workflow_scripts.data.imagenet import order_difference, subset_classes, subset_names


def test_imagenet_is_sorted_by_wordnet_id() -> None:
    whole = subset_classes("imagenet1k")
    assert len(set(whole)) == 1000
    assert list(whole) == sorted(whole)
    # DiT's and torchvision's index of some classes.
    assert [whole.index(wnid) for wnid in ("n01440764", "n02123045", "n03888257", "n15075141")] == [0, 281, 701, 999]


@pytest.mark.parametrize("name", subset_names())
def test_subsets_are_distinct_classes_of_imagenet(name: str) -> None:
    classes = subset_classes(name)
    assert len(set(classes)) == len(classes)
    assert set(classes) <= set(subset_classes("imagenet1k"))
    assert len(classes) == {"imagenet1k": 1000, "imagenet100": 100, "tinyimagenet": 200}.get(name, 10)


def test_label_orders_that_are_not_sorted() -> None:
    woof = subset_classes("imagewoof")
    assert woof[:3] == ("n02096294", "n02093754", "n02111889")
    assert list(woof) != sorted(woof)
    assert subset_classes("imageidc") == subset_classes("imagenet100")[:10]


def test_a_subset_is_checked(tmp_path: object) -> None:
    folders = {"root": str(tmp_path), "test_root": str(tmp_path)}
    chosen = Dataset.model_validate({"source": "imagefolder", "subset": "imagenette", **folders}).chosen_classes
    assert chosen == subset_classes("imagenette")
    with pytest.raises(ValueError, match="did you mean 'imagewoof'"):
        Dataset.model_validate({"source": "imagefolder", "subset": "imagewof", **folders})
    with pytest.raises(ValueError, match="not both"):
        Dataset.model_validate({"source": "imagefolder", "subset": "imagewoof", "classes": ["a"], **folders})


def test_a_wrong_order_of_classes_is_named() -> None:
    order = subset_classes("imagenette")
    assert order_difference(order, list(order)) is None
    swapped = [order[0], order[2], order[1], *order[3:]]
    assert order_difference(order, swapped) == (
        "label 1 is n02979186 (cassette player), expected n02102040 (English springer) (10 classes, expected 10)"
    )
    assert order_difference(order[:3], order[:2]) == (
        "label 2 is missing, expected n02979186 (cassette player) (2 classes, expected 3)"
    )
    assert order_difference(["ant"], ["ant", "bee"]) == "label 1 is bee, expected no more (2 classes, expected 1)"
