from itertools import permutations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from workflow_scripts.evaluation.augment import (
    GREY,
    LIGHTING_EIGENVALUES,
    LIGHTING_EIGENVECTORS,
    TrainAugmentation,
    _constant,
    crop_boxes,
    cutmix,
    jitter_matrices,
    lighting_offsets,
    normalise,
    random_resized_crop,
    recolour,
    resized_crop,
    to_float,
)

NOTHING = TrainAugmentation(
    crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False, jitter=(0.0, 0.0, 0.0), lighting=0.0
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(count: int = 6, side: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=generator(1), dtype=torch.uint8)


def whole(count: int, side: int) -> torch.Tensor:
    return torch.tensor([[0, 0, side, side]]).expand(count, 4)


def test_boxes_lie_inside_and_keep_scale_and_ratio() -> None:
    side = 224
    top, left, height, width = crop_boxes(4000, side, side, generator(), scale=(0.3, 0.8)).unbind(1)
    assert (top >= 0).all() and (left >= 0).all()
    assert (height >= 1).all() and (width >= 1).all()
    assert (top + height <= side).all() and (left + width <= side).all()
    area, ratio = height * width / side**2, width / height
    rounding = 0.01
    assert area.min() >= 0.3 - rounding and area.max() <= 0.8 + rounding
    assert ratio.min() >= 3 / 4 - rounding and ratio.max() <= 4 / 3 + rounding
    assert area.mean().item() == pytest.approx(0.55, abs=0.02)
    assert (area < 0.35).any() and (area > 0.75).any()
    assert ratio.log().mean().item() == pytest.approx(0, abs=0.02)


def test_box_corners_reach_every_place() -> None:
    top, left, height, width = crop_boxes(2000, 8, 8, generator(), scale=(0.25, 0.25), ratio=(1.0, 1.0)).unbind(1)
    assert (height == 4).all() and (width == 4).all()
    assert top.unique().tolist() == left.unique().tolist() == [0, 1, 2, 3, 4]


def test_boxes_that_never_fit_fall_back_to_the_centre() -> None:
    boxes = crop_boxes(3, 10, 30, generator(), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert boxes.tolist() == [[0, 10, 10, 10]] * 3
    boxes = crop_boxes(3, 30, 10, generator(), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert boxes.tolist() == [[10, 0, 10, 10]] * 3


def test_resized_crop_is_torchvision_s_without_antialiasing() -> None:
    images = to_float(some_images(5, 24))
    boxes = crop_boxes(5, 24, 24, generator(), scale=(0.2, 0.9))
    expected = [
        reference.resized_crop(image, *box.tolist(), [24, 24], InterpolationMode.BILINEAR, antialias=False)
        for image, box in zip(images, boxes, strict=True)
    ]
    torch.testing.assert_close(resized_crop(images, boxes, 24), torch.stack(expected), atol=1e-5, rtol=0)


def test_the_whole_crop_is_the_identity() -> None:
    images = to_float(some_images())
    crops = random_resized_crop(images, generator(), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    torch.testing.assert_close(crops, images, atol=1e-5, rtol=0)


def test_mirroring_twice_is_the_identity() -> None:
    images = to_float(some_images())
    mirrored = torch.tensor([True, False] * 3)
    once = resized_crop(images, whole(6, 16), 16, mirrored)
    torch.testing.assert_close(once[0], images[0].flip(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(once[1], images[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(resized_crop(once, whole(6, 16), 16, mirrored), images, atol=2e-5, rtol=0)


def test_flip_mirrors_about_half() -> None:
    images = to_float(some_images(1).expand(400, -1, -1, -1))
    crops = random_resized_crop(images, generator(), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=True)
    mirrored = (crops - images.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-4
    kept = (crops - images).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert (mirrored ^ kept).all()
    assert 150 < mirrored.sum() < 250


def lerp(x: torch.Tensor, towards: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return factor[:, None, None, None] * x + (1 - factor[:, None, None, None]) * towards


def grey(x: torch.Tensor) -> torch.Tensor:
    return (x * torch.tensor(GREY)[:, None, None]).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("order", permutations(range(3)))
def test_jitter_is_its_three_operators_in_any_order(order: tuple[int, ...]) -> None:
    images = to_float(some_images())
    brightness, contrast, saturation = torch.rand((3, 6), generator=generator()) * 0.8 + 0.6
    operators = [
        lambda x: lerp(x, torch.zeros_like(x), brightness),
        lambda x: lerp(x, grey(x).mean(dim=(2, 3), keepdim=True), contrast),
        lambda x: lerp(x, grey(x), saturation),
    ]
    expected = images
    for index in order:
        expected = operators[index](expected)
    matrices, offsets = jitter_matrices(images, brightness, contrast, saturation)
    torch.testing.assert_close(recolour(images, matrices, offsets), expected, atol=1e-5, rtol=0)


def test_jitter_by_factors_of_one_is_the_identity() -> None:
    images, ones = to_float(some_images()), torch.ones(6)
    torch.testing.assert_close(recolour(images, *jitter_matrices(images, ones, ones, ones)), images)


def test_lighting_is_a_sum_of_scaled_components() -> None:
    assert not lighting_offsets(torch.zeros(2, 3)).any()
    alphas = torch.tensor([[0.1, -0.2, 0.3]])
    expected = [
        sum(v * a * e for v, a, e in zip(row, alphas[0].tolist(), LIGHTING_EIGENVALUES, strict=True))
        for row in LIGHTING_EIGENVECTORS
    ]
    torch.testing.assert_close(lighting_offsets(alphas), torch.tensor([expected]))


def test_augmentation_of_no_strength_is_normalisation() -> None:
    images = some_images()
    torch.testing.assert_close(NOTHING(images, generator()), normalise(to_float(images)), atol=1e-4, rtol=0)


def test_every_strength_acts_and_images_differ() -> None:
    images = some_images(1).expand(8, -1, -1, -1)
    plain = normalise(to_float(images))
    for change in (
        {"crop_scale": (0.5, 1.0)},
        {"flip": True},
        {"jitter": (0.4, 0.0, 0.0)},
        {"jitter": (0.0, 0.4, 0.0)},
        {"jitter": (0.0, 0.0, 0.4)},
        {"lighting": 0.1},
    ):
        augmented = TrainAugmentation(**{**vars(NOTHING), **change})(images, generator())
        assert (augmented - plain).abs().max() > 1e-3, change
        assert augmented.std(dim=0).max() > 1e-3, change


def test_augmentation_depends_on_its_generator_alone() -> None:
    images, augment = some_images(), TrainAugmentation()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = augment(images, generator(5))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, augment(images, generator(5)))
    assert not torch.equal(first, augment(images, generator(6)))


def test_cutmix_weights_are_the_pasted_area() -> None:
    count, side = 12, 20
    images = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 3, side, side)
    shares = []
    for seed in range(60):
        mixed, partners, own_share = cutmix(images, generator(seed))
        assert partners.sort().values.tolist() == list(range(count))
        moved = partners != torch.arange(count)
        own = (mixed == images)[moved].float().mean(dim=(1, 2, 3))
        torch.testing.assert_close(own, own_share.expand(len(own)))
        pasted = mixed != images
        assert torch.equal(mixed[pasted], images[partners][pasted])
        assert (pasted[moved] == pasted[moved][0]).all()
        shares.append(own_share.item())
    assert min(shares) < 0.3 and max(shares) > 0.95


def test_cutmix_box_is_a_rectangle_with_the_proportions_of_the_image() -> None:
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(40), indexing="ij")
    images = torch.stack([torch.zeros(3, 20, 40), torch.ones(3, 20, 40)])
    for seed in range(50):
        mixed, partners, own_share = cutmix(images, generator(seed))
        if partners[0] == 0 or own_share == 1:
            continue
        inside = mixed[0, 0] == 1
        height, width = (axis[inside].max() - axis[inside].min() + 1 for axis in (rows, columns))
        assert inside.sum() == height * width
        assert 1 - own_share.item() == pytest.approx((height * width / 800).item(), abs=1e-6)


def test_cutmix_of_probability_zero_changes_nothing() -> None:
    images = torch.rand((4, 3, 8, 8), generator=generator())
    for seed in range(20):
        mixed, _, own_share = cutmix(images, generator(seed), probability=0.0)
        assert torch.equal(mixed, images) and own_share == 1


def test_cutmix_probability_is_per_batch() -> None:
    images = torch.rand((2, 3, 8, 8), generator=generator())
    shared = generator(0)
    mixed = sum(bool(cutmix(images, shared, beta=20.0, probability=0.5)[2] < 1) for _ in range(200))
    assert 70 < mixed < 130


def test_nothing_waits_for_the_device() -> None:
    """Fake tensors have no values, so reading one on the host, which would wait for a GPU, is an error."""
    _constant.cache_clear()
    with FakeTensorMode():
        images = TrainAugmentation()(torch.empty(8, 3, 32, 32, dtype=torch.uint8), generator())
        mixed, partners, own_share = cutmix(images, generator())
        assert (mixed.shape, partners.shape, own_share.shape) == ((8, 3, 32, 32), (8,), ())
        with pytest.raises(DataDependentOutputException):
            own_share.item()
    _constant.cache_clear()
