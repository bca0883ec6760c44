"""The objectives of matching and their gradients, and the augmentation that real and synthetic images share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from workflow_scripts.evaluation import dsa
from workflow_scripts.methods.matching import (
    FlatNetwork,
    batches,
    feature_distance,
    flatten,
    gradient_distance,
    normalised,
    row_distance,
    student,
    tesla,
    to_pixels,
    unrolled,
)

CPU = torch.device("cpu")


def network(classes: int = 3, seed: int = 0) -> nn.Sequential:
    return student(classes, 16, 4, seed, 0, CPU).double()


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_gradient(loss: Callable[[torch.Tensor], float], images: torch.Tensor, gradient: torch.Tensor) -> None:
    """Compare a gradient with central differences in random directions."""
    for seed in range(4):
        direction = pictures(len(images), 100 + seed)
        direction /= direction.norm()
        step = 1e-5
        slope = (loss(images + step * direction) - loss(images - step * direction)) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-4, abs=1e-9)


# ---------------------------------------------------------------- students


def test_students_have_their_own_random_state() -> None:
    state = torch.get_rng_state()
    one, again, other = (student(3, 16, 4, 0, number, CPU) for number in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(flatten(one), flatten(again)) and not torch.equal(flatten(one), flatten(other))
    assert not torch.equal(flatten(one), flatten(student(3, 16, 4, 1, 0, CPU)))
    assert not torch.equal(flatten(one), flatten(student(3, 16, 4, 0, 0, CPU, "expert")))


def test_features_do_not_depend_on_the_number_of_classes() -> None:
    few, many = (student(classes, 16, 4, 0, 5, CPU)[:-1] for classes in (1, 50))
    assert torch.equal(flatten(few), flatten(many))


def test_images_are_normalised_alike() -> None:
    grey = torch.full((1, 2, 2, 3), 128, dtype=torch.uint8)
    assert to_pixels(grey).abs().max() < 0.01
    torch.testing.assert_close(
        normalised(to_pixels(grey))[0, :, 0, 0], torch.tensor([0.074, 0.205, 0.426]), atol=2e-3, rtol=0
    )


# ---------------------------------------------------------------- DM and DC


def test_dm_is_the_squared_distance_of_mean_features_and_differentiable() -> None:
    net, real, synthetic = network(), pictures(5), pictures(2, 1).requires_grad_()
    features = [net[:-1](images).mean(0) for images in (real, synthetic)]
    loss = feature_distance(net, real, synthetic)
    assert float(loss.detach()) == pytest.approx(float((features[0] - features[1]).square().sum().detach()))
    assert float(feature_distance(net, real, real)) == 0
    gradient = torch.autograd.grad(loss, synthetic)[0]
    check_gradient(lambda images: float(feature_distance(net, real, images)), synthetic.detach(), gradient)


def test_dc_counts_rows_and_ignores_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((5, 3, 3, 3), (5,), (7, 20), (7,))]
    opposite = [-tensor for tensor in tensors]
    assert float(row_distance(tensors, tensors)) == pytest.approx(0, abs=1e-4)
    assert float(row_distance(tensors, opposite)) == pytest.approx(2 * (5 + 7), rel=1e-5)
    changed = [tensors[0], opposite[1], tensors[2], 3 * tensors[3]]
    assert float(row_distance(tensors, changed)) == pytest.approx(0, abs=1e-4)


def test_dc_gradient() -> None:
    net, real, synthetic = network(), pictures(5), pictures(2, 1).requires_grad_()
    loss = gradient_distance(net, real, synthetic, 1)
    assert float(gradient_distance(net, real, real, 1).detach()) == pytest.approx(0, abs=1e-3)
    gradient = torch.autograd.grad(loss, synthetic)[0]
    check_gradient(lambda images: float(gradient_distance(net, real, images, 1).detach()), synthetic.detach(), gradient)


# ---------------------------------------------------------------- MTT

STEPS, RATE = 3, 0.05
LABELS = torch.tensor([0, 1, 2, 0])


def trajectory() -> tuple[FlatNetwork, torch.Tensor, torch.Tensor]:
    net = network()
    start = flatten(net)
    return FlatNetwork(net), start, start + 0.01 * torch.randn(start.shape, generator=torch.Generator().manual_seed(5))


def feed(step: int, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images * (1 + 0.1 * step), LABELS


def travelled(net: FlatNetwork, start: torch.Tensor, images: torch.Tensor, rate: float) -> list[torch.Tensor]:
    """The student's parameters at every step."""
    path = [start]
    for step in range(STEPS):
        path.append(path[-1] - rate * net.gradient(path[-1].clone().requires_grad_(), *feed(step, images)))
    return path


def distance(end: torch.Tensor, start: torch.Tensor, target: torch.Tensor) -> float:
    return float((end - target).square().sum() / (start - target).square().sum())


def test_tesla_is_the_gradient_with_the_students_parameters_frozen() -> None:
    net, start, target = trajectory()
    images = pictures(4)
    match = tesla(net, start, target, images, feed, STEPS, RATE)
    path = travelled(net, start, images, RATE)
    assert match.losses == [pytest.approx(distance(path[-1], start, target))]

    def frozen(changed: torch.Tensor) -> float:
        gradients = [net.gradient(path[step].clone().requires_grad_(), *feed(step, changed)) for step in range(STEPS)]
        return distance(start - RATE * torch.stack(gradients).sum(0), start, target)

    check_gradient(frozen, images, match.gradient)
    total = (start - path[-1]) / RATE
    high, low = (distance(start - (RATE + shift) * total, start, target) for shift in (1e-6, -1e-6))
    assert match.rate_gradient == pytest.approx((high - low) / 2e-6, rel=1e-5)


def test_the_unrolled_gradient_is_that_of_the_whole_training() -> None:
    net, start, target = trajectory()
    images = pictures(4)
    match = unrolled(net, start, target, images, feed, STEPS, RATE)

    def whole(changed: torch.Tensor, rate: float = RATE) -> float:
        return distance(travelled(net, start, changed, rate)[-1], start, target)

    assert match.losses == [pytest.approx(whole(images))]
    check_gradient(whole, images, match.gradient)
    assert match.rate_gradient == pytest.approx(
        (whole(images, RATE + 1e-6) - whole(images, RATE - 1e-6)) / 2e-6, rel=1e-5
    )
    assert not torch.allclose(match.gradient, tesla(net, start, target, images, feed, STEPS, RATE).gradient)


def test_both_gradients_agree_for_a_single_step() -> None:
    net, start, target = trajectory()
    images = pictures(4)
    one, two = (method(net, start, target, images, feed, 1, RATE) for method in (tesla, unrolled))
    torch.testing.assert_close(one.gradient, two.gradient)
    assert one.rate_gradient == pytest.approx(two.rate_gradient)


def test_batches_use_every_image_before_any_twice() -> None:
    generator = np.random.default_rng(0)
    assert [list(part) for part in batches(3, None, 2, generator)] == [[0, 1, 2]] * 2
    drawn = batches(5, 2, 6, generator)
    assert [len(part) for part in drawn] == [2, 2, 1] * 2
    assert sorted(np.concatenate(drawn[:3])) == sorted(np.concatenate(drawn[3:])) == list(range(5))


# ---------------------------------------------------------------- DSA


@pytest.mark.parametrize("name", dsa.OPERATIONS)
def test_matched_augmentation_treats_all_images_alike(name: str) -> None:
    image = pictures(1)
    same = image.expand(6, -1, -1, -1)
    seen = set()
    for seed in range(8):
        augment = dsa.draw(np.random.default_rng(seed), [name])
        torch.testing.assert_close(augment(same), augment(image).expand_as(same))
        torch.testing.assert_close(augment(same), augment(same))
        seen.add(float(augment(image).square().sum() + (augment(image) * pictures(1, 9)).sum()))
    assert len(seen) > 1
    each = dsa.draw(np.random.default_rng(0), [name], 6)(same)
    assert any(not torch.allclose(each[0], other) for other in each[1:])


@pytest.mark.parametrize("name", dsa.OPERATIONS)
def test_augmentation_is_differentiable(name: str) -> None:
    images, weights = pictures(3), pictures(3, 2)
    augment = dsa.draw(np.random.default_rng(3), [name], 3)
    leaf = images.clone().requires_grad_()
    gradient = torch.autograd.grad((augment(leaf) * weights).sum(), leaf)[0]
    check_gradient(lambda changed: float((augment(changed) * weights).sum()), images, gradient)


def test_operations_are_drawn_evenly_and_without_any_there_is_none() -> None:
    generator = np.random.default_rng(0)
    names = [dsa.draw(generator, tuple(dsa.OPERATIONS)).name for _ in range(600)]
    counts = [names.count(name) for name in dsa.OPERATIONS]
    assert min(counts) > 60 and sum(counts) == 600
    images = pictures(2)
    assert dsa.draw(generator, ())(images) is images


def with_numbers(name: str, *numbers: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return dsa.Augmentation(name, np.array([numbers]))


def test_the_ranges_of_the_operations() -> None:
    images = pictures(2)
    torch.testing.assert_close(with_numbers("color", 0.5, 0.5, 0.5)(images), images)
    grey = with_numbers("color", 0.5, 0.0, 0.5)(images)
    torch.testing.assert_close(grey[:, 0], images.mean(1))
    flat = with_numbers("color", 1.0, 0.5, 0.0)(images) - images.mean((1, 2, 3), keepdim=True) - 0.5
    torch.testing.assert_close(flat, (images - images.mean((1, 2, 3), keepdim=True)) / 2)
    torch.testing.assert_close(with_numbers("crop", 0.5, 0.5, 0)(images), images)
    moved = with_numbers("crop", 0.0, 0.999, 0)(images)
    torch.testing.assert_close(moved[:, :, 2:, :-2], images[:, :, :-2, 2:])
    assert not moved[:, :, :2].any() and not moved[..., -2:].any()
    assert (with_numbers("cutout", 0.5, 0.5, 0)(images) == 0).sum() == 2 * 3 * 64
    assert (with_numbers("cutout", 0.0, 0.0, 0)(images) == 0).sum() == 2 * 3 * 16
    torch.testing.assert_close(with_numbers("flip", 0.4, 0, 0)(images), images.flip(3))
    torch.testing.assert_close(with_numbers("flip", 0.6, 0, 0)(images), images)
    unscaled = (1 - 1 / 1.2) / (1.2 - 1 / 1.2)
    torch.testing.assert_close(with_numbers("scale", unscaled, unscaled, 0)(images), images)
    torch.testing.assert_close(with_numbers("rotate", 0.5, 0, 0)(images), images)
