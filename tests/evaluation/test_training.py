import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from workflow_scripts.evaluation.augment import draw_epoch, epoch_generator, normalise, to_float
from workflow_scripts.evaluation.training import (
    Batch,
    Recipe,
    Score,
    Students,
    batches,
    can_stack,
    divergences,
    hard_loss,
    train_student,
    train_students,
)

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
    return train_student(recipe(**changes), stripes(3, seed=0), stripes(5, seed=1), device="cpu")


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

    data = (stripes(3, seed=0), stripes(5, seed=1))
    with pytest.raises(KeyboardInterrupt):
        train_student(recipe(epochs=4, evaluations=2), *data, device="cpu", progress=progress)
    assert [epoch for epoch, _ in calls] == [1, 2, 3]
    assert calls[0][1] is None and calls[1][1] == calls[2][1] is not None


def test_inputs_are_left_alone() -> None:
    data = (stripes(3, seed=0), stripes(5, seed=1))
    copies = [tensor.clone() for pair in data for tensor in pair]
    train_student(recipe(epochs=1), *data, device="cpu")
    given = [tensor for pair in data for tensor in pair]
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, copies, strict=True))


def test_divergence_is_reported() -> None:
    with pytest.raises(ValueError, match=r"diverged at epoch \d+ or before: lower the learning rate"):
        train(learning_rate=1e20)


def test_mistakes_in_the_data_are_named() -> None:
    images, labels = stripes(3, seed=0)

    def attempt(
        train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            train_student(recipe(), train, test, device="cpu")

    good = (images, labels)
    attempt((images.float(), labels), good, "train images must be uint8")
    attempt((images[:, :, :8, :8], labels), good, r"train images .* \(9, 3, 8, 8\)")
    attempt((images[:0], labels[:0]), good, "N > 0")
    attempt(good, (images[:, :1], labels), "test images must")
    attempt((images, labels[:-1]), good, r"train labels must be int64 of shape \(9,\)")
    attempt((images, labels.int()), good, "train labels must be int64")
    attempt((images, labels + 1), good, r"train labels must be in 0\.\.2, but they range from 1 to 3")
    attempt(good, (images, labels - 1), r"test labels must be in 0\.\.2, but they range from -1 to 1")
    with pytest.raises(ValueError, match="target teacher needs a teacher"):
        train_student(recipe(target="teacher"), good, good, device="cpu")
    with pytest.raises(ValueError, match="target stored needs stored labels"):
        train_student(recipe(target="stored"), good, good, device="cpu")


# ---------------------------------------------------------------- batches


def test_an_epoch_has_every_image_once_in_batches_of_the_recipe() -> None:
    images, labels = stripes(3, seed=0)
    plain = recipe(crop_scale=None, flip=False, jitter=0.0, lighting=0.0, cutmix=0.0)
    drawn = draw_epoch(plain, 9, SIDE, epoch_generator(1, 0))
    found = list(batches([plain], [(images, labels)], 0))
    assert [len(batch.labels[0]) for batch in found] == [4, 4, 1]
    assert torch.equal(torch.cat([batch.labels[0] for batch in found]), labels[drawn["order"]])


def test_how_many_images_are_augmented_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data, chosen = stripes(3, seed=0), recipe(dsa=("color", "rotate"), patches=2)
    together = list(batches([chosen], [data], 3))
    monkeypatch.setattr("workflow_scripts.evaluation.training.AUGMENTED_PIXELS", {"cpu": 1})
    for one, other in zip(together, batches([chosen], [data], 3), strict=True):
        torch.testing.assert_close(one.images, other.images, atol=1e-5, rtol=1e-5)
        assert torch.equal(one.labels, other.labels)
        assert one.partner_labels is not None and other.partner_labels is not None
        assert torch.equal(one.partner_labels, other.partner_labels)
        assert torch.equal(one.own_share, other.own_share)  # type: ignore[arg-type]


def test_native_images_are_brought_to_the_resolution() -> None:
    images = torch.zeros(5, 3, 24, 24, dtype=torch.uint8)
    native = recipe(train_size="native", crop_scale=(0.08, 1.0))
    assert next(batches([native], [(images, torch.zeros(5, dtype=torch.int64))], 0)).images.shape == (
        1,
        4,
        3,
        SIDE,
        SIDE,
    )


# ---------------------------------------------------------------- losses


def test_the_hard_loss_is_cross_entropy_with_mixed_labels() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, CLASSES, generator=draw)
    labels, partners = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]]), torch.tensor([[1, 1, 0, 2], [0, 2, 2, 1]])
    share = torch.tensor([0.3, 0.8])
    found = hard_loss(logits, Batch(torch.empty(0), labels, partners, share))
    for student in range(2):
        mixed = share[student] * F.one_hot(labels[student], CLASSES)
        mixed = mixed + (1 - share[student]) * F.one_hot(partners[student], CLASSES)
        torch.testing.assert_close(found[student], F.cross_entropy(logits[student], mixed))


def test_the_soft_loss_is_the_divergence_per_image_without_the_square_of_the_temperature() -> None:
    student, teacher = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[20.0 * torch.log(torch.tensor(3.0)).item(), 0.0]]])
    expected = 0.75 * torch.log(torch.tensor(1.5)) + 0.25 * torch.log(
        torch.tensor(0.5)
    )  # of (3/4, 1/4) from (1/2, 1/2)
    torch.testing.assert_close(divergences(student, teacher, 20.0), expected[None, None])
    draw = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 1, 6, 5, generator=draw)
    reference = nn.KLDivLoss(reduction="batchmean")((one[0] / 4).log_softmax(1), (two[0] / 4).softmax(1))
    torch.testing.assert_close(divergences(one, two, 4.0).mean(1)[0], reference)


# ---------------------------------------------------------------- optimiser, averages, quirks


def test_only_matrices_decay_where_the_protocol_says_so() -> None:
    for decay, spared in (("matrices", True), ("all", False)):
        students = Students([recipe(architecture="convnet_bn", optimizer="adamw", decay=decay)], torch.device("cpu"))
        for group in students.optimizer.param_groups:
            for parameter in group["params"]:
                assert group["weight_decay"] == (0.0 if spared and parameter.ndim == 1 else 5e-4)
    stacked = Students([recipe(optimizer="adamw", decay="matrices", seed=seed) for seed in (0, 1)], torch.device("cpu"))
    lengths = {group["weight_decay"]: len(group["params"]) for group in stacked.optimizer.param_groups}
    assert lengths == {5e-4: 3, 0.0: 7}, "two convolutions and the linear layer; their biases and the norms"


def test_one_step_of_sgd_is_the_plain_one() -> None:
    chosen = recipe(cutmix=0.0, learning_rate=0.1, momentum=0.0, weight_decay=0.02)
    students = Students([chosen], torch.device("cpu"))
    before = {name: value.detach().clone() for name, value in students.state.items()}
    batch = next(batches([chosen], [stripes(3, seed=0)], 0))
    loss = F.cross_entropy(students.network(batch.images[0]), batch.labels[0])
    gradients = torch.autograd.grad(loss, list(students.state.values()))
    students.set_rate(0.1)
    torch.testing.assert_close(students.step(batch, None)[0], loss.detach())
    for gradient, (name, value) in zip(gradients, before.items(), strict=True):
        torch.testing.assert_close(students.state[name].detach(), value - 0.1 * (gradient + 0.02 * value))


def test_averaged_weights_follow_with_a_warm_up() -> None:
    chosen = recipe(ema=0.6)
    students = Students([chosen], torch.device("cpu"))
    name = next(iter(students.state))
    expected = students.state[name].detach().clone()
    for step, batch in enumerate(batches([chosen], [stripes(3, seed=0)], 0), start=1):
        students.step(batch, None)
        decay = min(0.6, step / (step + 1))
        expected = decay * expected + (1 - decay) * students.state[name].detach()
    assert students.average is not None
    torch.testing.assert_close(students.average[name], expected)


def test_the_averaged_weights_are_tested_and_kept() -> None:
    kept: list[nn.Module] = []
    data = (stripes(3, seed=0), stripes(5, seed=1))
    train_student(recipe(ema=0.9, learning_rate=0.05), *data, device="cpu", keep=kept.append)
    last: list[nn.Module] = []
    train_student(recipe(learning_rate=0.05), *data, device="cpu", keep=last.append)
    assert not kept[0].training
    pairs = list(zip(kept[0].parameters(), last[0].parameters(), strict=True))
    assert any(not torch.equal(one, other) for one, other in pairs)
    assert train(ema=0.0).top1_last == train().top1_last, "no averaging"


def test_the_published_quirk_moves_running_statistics_twice() -> None:
    def statistics(**changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = recipe(architecture="convnet_bn", **changes)
        students = Students([chosen], torch.device("cpu"))
        batch = next(batches([chosen], [stripes(3, seed=0)], 0))
        students.step(batch, None)
        norm = next(module for module in students.network.modules() if isinstance(module, nn.BatchNorm2d))
        weight = next(value for value in students.state.values())
        return norm.running_mean, weight.detach()  # type: ignore[return-value]

    (once, weight), (twice, same) = statistics(), statistics(published_quirks=("double-batchnorm",))
    torch.testing.assert_close(twice, once * (1 - 0.9**2) / 0.1)  # from 0, on the same batch
    assert torch.equal(weight, same), "and nothing else"


# ---------------------------------------------------------------- soft targets


class Opinion(nn.Module):
    """A teacher that tells stripes apart: fixed random projections of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[torch.Tensor] = []
        self.weights = torch.randn(3 * SIDE * SIDE, CLASSES, generator=torch.Generator().manual_seed(5)) / 20

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked.append(x.clone())
        return x.flatten(1) @ self.weights


def test_the_teacher_sees_what_the_student_sees() -> None:
    teacher, chosen = Opinion(), recipe(target="teacher", temperature=4.0, epochs=1)
    data = (stripes(3, seed=0), stripes(5, seed=1))
    train_student(chosen, *data, device="cpu", teacher=teacher)
    seen = [batch.images[0] for batch in batches([chosen], [data[0]], 0)]
    assert all(torch.equal(one, other) for one, other in zip(teacher.asked, seen, strict=True))


class Replay:
    """Soft labels kept in memory."""

    def __init__(self, chosen: Recipe, data: tuple[torch.Tensor, torch.Tensor]):
        self.kept = []
        for epoch in range(chosen.epochs):
            logits = [Opinion()(batch.images[0]) for batch in batches([chosen], [data], epoch)]
            self.kept.append(
                (draw_epoch(chosen, len(data[0]), SIDE, epoch_generator(chosen.seed, epoch)), torch.cat(logits))
            )

    def epoch(self, epoch: int) -> Any:
        return self.kept[epoch]


def test_stored_labels_are_those_of_the_teacher_at_every_step() -> None:
    data = (stripes(3, seed=0), stripes(5, seed=1))
    online, stored = recipe(target="teacher", temperature=4.0), recipe(target="stored", temperature=4.0)
    one = train_student(online, *data, device="cpu", teacher=Opinion())
    other = train_student(stored, *data, device="cpu", soft=Replay(stored, data[0]))
    assert one == other
    replayed = Replay(dataclasses.replace(stored, seed=9), data[0])
    assert train_student(stored, *data, device="cpu", soft=replayed).curve != [], (
        "another seed's views and weights of its own"
    )


# ---------------------------------------------------------------- several at once


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "learning_rate": 1e-3, "decay": "matrices"},
        {"architecture": "resnet_ap10", "width": 4, "dsa": ("color", "scale"), "ema": 0.9, "cutmix": 0.0},
        {"architecture": "resnet18", "width": 4, "learning_rate": 1e-3},
    ],
)
def test_students_trained_at_once_are_those_trained_alone(changes: dict[str, Any]) -> None:
    """After two epochs on sets of their own: logits to 1e-3.

    Not weights: AdamW makes steps of full size from the rounding errors that are a bias's gradient before instance norm.
    """
    sets = [stripes(3, seed=0), stripes(3, seed=7), stripes(3, seed=8)]
    recipes = [recipe(**changes, seed=seed) for seed in (1, 2, 1001)]
    together = Students(recipes, torch.device("cpu"))
    alone = [Students([one], torch.device("cpu")) for one in recipes]
    for epoch in range(2):
        for batch in batches(recipes, sets, epoch):
            together.step(batch, None)
        for student, one, data in zip(alone, recipes, sets, strict=True):
            for batch in batches([one], [data], epoch):
                student.step(batch, None)
    x = normalise(to_float(stripes(5, seed=1)[0]))
    logits = together.forward(together.state, x.expand(3, *x.shape))
    for place, student in enumerate(alone):
        torch.testing.assert_close(logits[place], student.forward(student.state, x[None])[0], atol=1e-3, rtol=1e-3)


def test_students_at_once_have_a_score_each() -> None:
    sets = [stripes(3, seed=0), stripes(3, seed=7)]
    recipes = [recipe(seed=seed, learning_rate=0.05, epochs=30, evaluations=3) for seed in (1, 2)]
    scores = train_students(recipes, sets, stripes(5, seed=1), device="cpu")
    assert [len(score.curve) for score in scores] == [3, 3]
    assert all(score.top1_best >= 80 for score in scores)


def test_what_cannot_be_trained_at_once() -> None:
    assert all(can_stack(recipe(architecture=name)) for name in ("convnet", "resnet_ap10", "resnet18", "glad_resnet18"))
    assert can_stack(recipe(architecture="glad_alexnet", width=None))
    for name in ("convnet_bn", "resnet18_bn", "glad_vit", "mobilenet_v2", "deit_ti"):
        chosen = recipe(architecture=name, width=None, resolution=32)
        assert not can_stack(chosen)
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1])
        with pytest.raises(ValueError, match="one is trained at a time"):
            train_students([chosen, dataclasses.replace(chosen, seed=2)], [images] * 2, images, device="cpu")
    data = stripes(3, seed=0)
    with pytest.raises(ValueError, match="seed alone"):
        train_students([recipe(), recipe(epochs=9)], [data, data], data, device="cpu")
    with pytest.raises(ValueError, match="sets of one size"):
        train_students([recipe(), recipe(seed=2)], [data, stripes(4, seed=0)], data, device="cpu")


# ---------------------------------------------------------------- interruptions, precision, counts


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architecture": "mobilenet_v2", "width": None, "resolution": 32, "batch_size": 3, "ema": 0.9},  # with dropout
        {"architecture": "convnet_bn", "optimizer": "adamw", "learning_rate": 1e-3},
    ],
)
def test_an_interrupted_training_ends_as_if_it_had_not_been(changes: dict[str, Any], tmp_path: Path) -> None:
    chosen = recipe(**changes, evaluations=4)
    scale = (1, 1, chosen.resolution // SIDE, chosen.resolution // SIDE)
    train_set, test_set = (
        (images.repeat(scale), labels) for images, labels in (stripes(3, seed=0), stripes(5, seed=1))
    )
    expected: list[nn.Module] = []
    whole = train_student(chosen, train_set, test_set, device="cpu", keep=expected.append)

    def stop(epoch: int, top1: float | None) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    path = tmp_path / "checkpoints" / "one.safetensors"
    options: dict[str, Any] = {"device": "cpu", "checkpoint": path, "checkpoint_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        train_student(chosen, train_set, test_set, **options, progress=stop)
    assert path.exists()
    begun: list[int] = []
    found: list[nn.Module] = []
    resumed = train_student(
        chosen, train_set, test_set, **options, progress=lambda epoch, _: begun.append(epoch), keep=found.append
    )
    assert begun == [4]
    assert resumed == whole
    for name, value in expected[0].state_dict().items():
        assert torch.equal(found[0].state_dict()[name], value), name


def test_students_at_once_resume_too(tmp_path: Path) -> None:
    recipes, data = [recipe(seed=seed, ema=0.9) for seed in (1, 2)], stripes(3, seed=0)
    whole = train_students(recipes, [data] * 2, data, device="cpu")
    options: dict[str, Any] = {"device": "cpu", "checkpoint": tmp_path / "two.safetensors", "checkpoint_seconds": 0}

    def stop(epoch: int, top1: float | None) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_students(recipes, [data] * 2, data, **options, progress=stop)
    assert train_students(recipes, [data] * 2, data, **options) == whole


def test_half_precision_is_near_single() -> None:
    losses = []
    for dtype in ("float32", "bfloat16"):
        chosen = recipe(dtype=dtype)
        students = Students([chosen], torch.device("cpu"))
        losses.append(torch.cat([students.step(b, None) for b in batches([chosen], [stripes(3, seed=0)], 0)]))
        assert all(value.dtype == torch.float32 for value in students.state.values())
    torch.testing.assert_close(*losses, atol=0.05, rtol=0)
    assert not torch.equal(*losses)


def test_classes_and_confusions_are_counted() -> None:
    score = train(learning_rate=0.05, epochs=20, evaluations=2)
    assert score.confusion is not None
    counts = torch.tensor(score.confusion)
    assert counts.sum(1).tolist() == [5] * CLASSES, "rows are true classes"
    assert 100 * counts.trace().item() / 15 == pytest.approx(score.top1_last)
    assert [100 * counts[k, k].item() / 5 for k in range(CLASSES)] == pytest.approx(score.class_top1)


def test_over_a_hundred_classes_have_no_confusion_matrix() -> None:
    score = train(classes=101, epochs=1)
    assert score.confusion is None
    assert len(score.class_top1) == 101 and score.class_top1[3:] == [None] * 98, "no test images of these"
