import dataclasses
from typing import Any

import pytest
import torch

from workflow_scripts.evaluation.training import Recipe, Score, train_student

SIDE, CLASSES = 16, 3


def recipe(**changes: Any) -> Recipe:
    settings = {"architecture": "convnet", "width": 8, "resolution": SIDE, "classes": CLASSES, "epochs": 4}
    return Recipe(**{**settings, "batch_size": 4, "seed": 1, **changes})


def stripes(per_class: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes that nobody can confuse: horizontal stripes, vertical stripes and checks, under a little noise."""
    labels = torch.arange(CLASSES).repeat_interleave(per_class)
    columns = (torch.arange(SIDE) // 2 % 2).expand(SIDE, SIDE)
    patterns = 200 * torch.stack([columns.T, columns, columns ^ columns.T])
    noise = torch.randint(0, 40, (len(labels), 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
    return (patterns[labels][:, None] + noise).to(torch.uint8), labels


def train(**changes: Any) -> Score:
    return train_student(recipe(**changes), *stripes(3, seed=0), *stripes(5, seed=1), device="cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.05},
        {"architecture": "resnet_ap10", "width": 4, "learning_rate": 0.05},
        {"optimizer": "adamw", "learning_rate": 3e-3, "weight_decay": 0.01},
    ],
)
def test_a_separable_set_is_learned(changes: dict[str, Any]) -> None:
    score = train(epochs=60, evaluations=6, **changes)
    assert score.top1_best == 100
    assert score.top1_last >= 80


def test_score_fits_its_curve() -> None:
    score = train(epochs=7, evaluations=3)
    accuracies = [top1 for _, top1 in score.curve]
    assert [epoch for epoch, _ in score.curve] == [2, 4, 6, 7]
    assert score.top1_best == max(accuracies) >= score.top1_last == accuracies[-1]
    assert (score.best_epoch, score.top1_best) in score.curve
    assert score.top5_last == 100  # fewer than five classes
    assert (score.epochs, score.images_seen) == (7, 63)
    assert score.seconds > 0


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw", "learning_rate": 1e-3}])
def test_the_same_training_gives_the_same_score(changes: dict[str, Any]) -> None:
    assert train(**changes) == train(**changes)


def test_global_random_state_is_neither_used_nor_changed() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = train()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert train() == first


def test_progress_follows_the_epochs_and_may_stop() -> None:
    calls: list[tuple[int, float | None]] = []

    def progress(epoch: int, top1: float | None) -> None:
        calls.append((epoch, top1))
        if epoch == 3:
            raise KeyboardInterrupt

    data = (*stripes(3, seed=0), *stripes(5, seed=1))
    with pytest.raises(KeyboardInterrupt):
        train_student(recipe(epochs=4, evaluations=2), *data, device="cpu", progress=progress)
    assert [epoch for epoch, _ in calls] == [1, 2, 3]
    assert calls[0][1] is None and calls[1][1] == calls[2][1] is not None


def test_inputs_are_left_alone() -> None:
    data = (*stripes(3, seed=0), *stripes(5, seed=1))
    copies = [tensor.clone() for tensor in data]
    train_student(recipe(epochs=1), *data, device="cpu", channels_last=True)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(data, copies, strict=True))


def test_divergence_is_reported() -> None:
    with pytest.raises(ValueError, match=r"diverged at epoch \d+ or before: lower the learning rate"):
        train(learning_rate=1e20)


def test_mistakes_in_the_data_are_named() -> None:
    images, labels = stripes(3, seed=0)
    good = (images, labels, images, labels)

    def attempt(place: int, tensor: torch.Tensor, message: str) -> None:
        data = [tensor if index == place else value for index, value in enumerate(good)]
        with pytest.raises(ValueError, match=message):
            train_student(recipe(), *data, device="cpu")

    attempt(0, images.float(), "train_images must be uint8")
    attempt(0, images[:, :, :8, :8], r"train_images .* \(9, 3, 8, 8\)")
    attempt(0, images[:0], "N > 0")
    attempt(2, images[:, :1], "test_images must")
    attempt(1, labels[:-1], r"train_labels must be int64 of shape \(9,\)")
    attempt(1, labels.int(), "train_labels must be int64")
    attempt(1, labels + 1, r"train_labels must be in 0\.\.2, but they range from 1 to 3")
    attempt(3, labels - 1, r"test_labels must be in 0\.\.2, but they range from -1 to 1")
    with pytest.raises(ValueError, match="amp needs a CUDA device"):
        train_student(dataclasses.replace(recipe(), amp=True), *good, device="cpu")
