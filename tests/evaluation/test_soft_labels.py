from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from workflow_scripts.errors import StoreError
from workflow_scripts.evaluation.augment import draw_epoch, epoch_generator
from workflow_scripts.evaluation.protocols import Recipe
from workflow_scripts.evaluation.soft_labels import SoftLabels

RECIPE = Recipe(architecture="convnet", resolution=16, classes=3, epochs=3, batch_size=4, patches=2, dsa=("color",))


def epoch(number: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    draws = draw_epoch(RECIPE, 6, 20, epoch_generator(42, number))
    return draws, torch.randn(6, 3, generator=torch.Generator().manual_seed(number))


@pytest.fixture
def whole(tmp_path: Path) -> SoftLabels:
    labels = SoftLabels(tmp_path / "labels.zarr")
    for number in range(3):
        labels.write(number, 3, *epoch(number))
    labels.finish({"epochs": 3})
    return labels


def test_epochs_come_back_as_they_were_but_for_half_precision(whole: SoftLabels) -> None:
    for number in (2, 0, 1):
        draws, logits = epoch(number)
        found, stored = SoftLabels(whole.path).epoch(number)
        assert found.keys() == draws.keys()
        for name, value in draws.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        assert torch.equal(stored, logits.to(torch.float16))


def test_logits_are_fp16_in_one_chunk_per_epoch(whole: SoftLabels) -> None:
    array = zarr.open_array(str(whole.path / "logits"), mode="r")
    assert (array.shape, array.chunks, array.dtype) == ((3, 6, 3), (1, 6, 3), np.float16)
    assert sorted(zarr.open_group(str(whole.path), mode="r").array_keys()) == whole.record()["arrays"]


def test_writing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = SoftLabels(tmp_path / "labels.zarr")
    first.write(0, 3, *epoch(0))
    second = SoftLabels(first.path)
    assert [second.has(number) for number in range(3)] == [True, False, False]
    assert not second.whole
    for number in (1, 2):
        second.write(number, 3, *epoch(number))
    second.finish({"epochs": 3})
    assert SoftLabels(first.path).whole
    assert torch.equal(SoftLabels(first.path).epoch(0)[1], epoch(0)[1].to(torch.float16))


def test_what_is_missing_or_damaged_is_never_replayed(whole: SoftLabels) -> None:
    chunk = whole.path / "logits" / "c.1.0.0"
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(StoreError, match=r"epoch 1 of the labels .*stillhouse verify"):
        SoftLabels(whole.path).epoch(1)
    chunk.unlink()
    with pytest.raises(StoreError, match="missing"):
        SoftLabels(whole.path).epoch(1)
    SoftLabels(whole.path).epoch(2)
    with pytest.raises(StoreError):
        SoftLabels(whole.path.with_name("nothing.zarr")).epoch(0)
