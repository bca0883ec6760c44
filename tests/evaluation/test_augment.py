from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as reference

from workflow_scripts.evaluation.augment import (
    GREY,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LIGHTING_EIGENVALUES,
    LIGHTING_EIGENVECTORS,
    _constant,
    augment,
    blend,
    crop_boxes,
    draw_epoch,
    epoch_generator,
    jitter_matrices,
    lighting_offsets,
    normalise,
    own_shares,
    recolour,
    resized_crop,
    shuffle_tiles,
    to_float,
)
from workflow_scripts.evaluation.protocols import Recipe

HARD = Recipe(architecture="convnet", resolution=16, classes=3, epochs=1, batch_size=4)
NOTHING = replace(HARD, crop_scale=None, flip=False, jitter=0.0, lighting=0.0, cutmix=0.0)
ALL = replace(HARD, patches=2, dsa=("color", "flip"), mixup=0.5, cutmix=0.5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(count: int = 6, side: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=generator(1), dtype=torch.uint8)


def smooth_images(count: int, side: int) -> torch.Tensor:
    """Pictures as cameras see them: rounding to whole levels is small against their contrast."""
    coarse = torch.rand((count, 3, 6, 6), generator=generator(2))
    return (reference.resize(coarse, [side, side], InterpolationMode.BICUBIC).clamp(0, 1) * 255).to(torch.uint8)


def drawn(recipe: Recipe, count: int = 6, side: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    return draw_epoch(recipe, count, side, generator(seed))


# ---------------------------------------------------------------- draws


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


def test_boxes_are_distributed_as_torchvision_s() -> None:
    ours = crop_boxes(3000, 64, 64, generator(), scale=(0.08, 1.0)).to(torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draw = v2.RandomResizedCrop(64, scale=(0.08, 1.0)).make_params
        theirs = torch.tensor(
            [
                [p[k] for k in ("top", "left", "height", "width")]
                for p in (draw([torch.zeros(3, 64, 64)]) for _ in range(3000))
            ]
        )
    torch.testing.assert_close(ours.mean(0), theirs.double().mean(0), atol=1.2, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.double().std(0), atol=1.2, rtol=0)


def test_box_corners_reach_every_place() -> None:
    top, left, height, width = crop_boxes(2000, 8, 8, generator(), scale=(0.25, 0.25), ratio=(1.0, 1.0)).unbind(1)
    assert (height == 4).all() and (width == 4).all()
    assert top.unique().tolist() == left.unique().tolist() == [0, 1, 2, 3, 4]


def test_boxes_that_never_fit_fall_back_to_the_centre() -> None:
    boxes = crop_boxes(3, 10, 30, generator(), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert boxes.tolist() == [[0, 10, 10, 10]] * 3
    boxes = crop_boxes(3, 30, 10, generator(), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert boxes.tolist() == [[10, 0, 10, 10]] * 3


def test_only_what_a_recipe_needs_is_drawn() -> None:
    assert set(drawn(NOTHING)) == {"order"}
    mixing = {"partners", "mix_boxes", "mix_weights"}
    assert set(drawn(HARD)) == {"order", "boxes", "mirrored", "factors", "alphas"} | mixing
    assert set(drawn(ALL)) == set(drawn(HARD)) | {"tiles", "operations", "numbers"}


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = draw_epoch(ALL, 6, 16, epoch_generator(5, 2))
    assert torch.equal(state, torch.get_rng_state())
    again = draw_epoch(ALL, 6, 16, epoch_generator(5, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (epoch_generator(5, 3), epoch_generator(6, 2)):
        assert not torch.equal(first["boxes"], draw_epoch(ALL, 6, 16, other)["boxes"])


def test_partners_are_of_the_same_batch() -> None:
    partners = drawn(HARD, count=4000)["partners"]
    assert torch.equal(partners // 4, torch.arange(4000) // 4)
    assert torch.equal(partners.sort().values, torch.arange(4000))
    places = (partners % 4).view(-1, 4)
    assert places.float().mean(0).tolist() == pytest.approx([1.5] * 4, abs=0.15), "every place is as likely"
    assert torch.equal(drawn(HARD, count=6)["partners"][4:].sort().values, torch.tensor([4, 5])), "a last batch of two"


def test_half_of_the_images_are_mirrored_and_factors_fill_their_range() -> None:
    draws = drawn(HARD, count=4000)
    assert draws["mirrored"].float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert 0.6 <= draws["factors"].min() < 0.61 and 1.39 < draws["factors"].max() <= 1.4
    assert draws["alphas"].std().item() == pytest.approx(0.1, abs=0.005)


# ---------------------------------------------------------------- pixels


def test_resized_crop_is_torchvision_s() -> None:
    """Enlarging and shrinking, with antialiasing: to 2e-5 of the range."""
    for side, size in ((24, 24), (40, 16), (16, 40), (256, 224)):
        images = to_float(some_images(4, side))
        boxes = crop_boxes(4, side, side, generator(), scale=(0.08, 1.0))
        expected = [
            reference.resized_crop(image, *box.tolist(), [size, size], InterpolationMode.BILINEAR, antialias=True)
            for image, box in zip(images, boxes, strict=True)
        ]
        torch.testing.assert_close(resized_crop(images, boxes, size), torch.stack(expected), atol=2e-5, rtol=0)


def test_resized_crop_is_pillow_s_but_for_rounding() -> None:
    """PIL rounds to whole levels after each axis: to 1.5 / 255."""
    images = smooth_images(4, 40)
    boxes = crop_boxes(4, 40, 40, generator(), scale=(0.08, 1.0))
    for image, box, ours in zip(images, boxes.tolist(), resized_crop(to_float(images), boxes, 32), strict=True):
        top, left, height, width = box
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
        theirs = torch.from_numpy(np.array(picture.resize((32, 32), Image.Resampling.BILINEAR))).permute(2, 0, 1)
        torch.testing.assert_close(ours * 255, theirs.float(), atol=1.5, rtol=0)


def test_the_whole_crop_is_the_identity() -> None:
    images = to_float(some_images())
    whole = torch.tensor([[0, 0, 16, 16]]).expand(6, 4)
    torch.testing.assert_close(resized_crop(images, whole, 16), images, atol=1e-6, rtol=0)


def test_mirroring_is_torchvision_s() -> None:
    images = some_images()
    mirrored = torch.tensor([True, False] * 3)
    expected = torch.stack([reference.horizontal_flip(x) if m else x for x, m in zip(images, mirrored, strict=True)])
    flipped = augment(images, {"mirrored": mirrored}, replace(NOTHING, flip=True))
    torch.testing.assert_close(flipped, normalise(to_float(expected)), atol=1e-5, rtol=0)
    boxes = crop_boxes(6, 16, 16, generator(), scale=(0.3, 1.0))
    crops = resized_crop(to_float(images), boxes, 16)
    expected = torch.where(mirrored[:, None, None, None], crops.flip(3), crops)
    torch.testing.assert_close(resized_crop(to_float(images), boxes, 16, mirrored), expected, atol=1e-6, rtol=0)


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


@pytest.mark.parametrize("operator", range(3))
def test_jitter_is_torchvision_s_where_nothing_is_clipped(operator: int) -> None:
    """torchvision's weights of grey end after four digits: to 5e-4 of the range."""
    images = 0.3 + 0.3 * to_float(some_images())
    factors = torch.ones(3, 6)
    factors[operator] = torch.rand(6, generator=generator()) * 0.8 + 0.6
    theirs = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation)[operator]
    expected = [theirs(image, factor.item()) for image, factor in zip(images, factors[operator], strict=True)]
    ours = recolour(images, *jitter_matrices(images, *factors))
    torch.testing.assert_close(ours, torch.stack(expected), atol=5e-4, rtol=0)


def test_normalisation_is_torchvision_s() -> None:
    images = to_float(some_images())
    expected = reference.normalize(images, list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(normalise(images), expected)
    torch.testing.assert_close(augment(some_images(), {}, NOTHING), expected)


def test_the_whole_transform_is_the_chain_of_its_parts() -> None:
    """One linear map of colours against one operator after another, and torchvision's crops: to 1e-4."""
    images, draws = some_images(6, 20), drawn(HARD, side=20)
    expected = []
    for index, image in enumerate(to_float(images)):
        x = reference.resized_crop(image, *draws["boxes"][index].tolist(), [16, 16], antialias=True)[None]
        x = x.flip(3) if draws["mirrored"][index] else x
        brightness, contrast, saturation = (factor[None] for factor in draws["factors"][index])
        x = lerp(x, torch.zeros_like(x), brightness)
        x = lerp(x, grey(x).mean(dim=(2, 3), keepdim=True), contrast)
        x = lerp(x, grey(x), saturation)
        x = x + lighting_offsets(draws["alphas"][index][None])[:, :, None, None]
        expected.append(reference.normalize(x, list(IMAGENET_MEAN), list(IMAGENET_STD)))
    torch.testing.assert_close(augment(images, draws, HARD), torch.cat(expected), atol=1e-4, rtol=0)


def test_every_strength_acts_and_images_differ() -> None:
    images = some_images(1).expand(8, -1, -1, -1)
    plain = normalise(to_float(images))
    changes: tuple[dict[str, Any], ...] = (
        {"crop_scale": (0.5, 1.0)},
        {"flip": True},
        {"jitter": 0.4},
        {"lighting": 0.1},
        {"patches": 2},
    )
    for change in changes:
        recipe = replace(NOTHING, **change)
        augmented = augment(images, drawn(recipe, 8), recipe)
        assert (augmented - plain).abs().max() > 1e-3, change
        assert augmented.std(dim=0).max() > 1e-3, change


def test_tiles_are_moved_whole() -> None:
    images = to_float(some_images(2, 8))
    tiles = torch.tensor([[0, 1, 2, 3], [3, 0, 2, 1]])
    same, moved = shuffle_tiles(images, tiles, 2)
    assert torch.equal(same, images[0])
    quarter = {0: (0, 0), 1: (0, 4), 2: (4, 0), 3: (4, 4)}
    for place, tile in enumerate(tiles[1].tolist()):
        (y, x), (v, u) = quarter[place], quarter[tile]
        assert torch.equal(moved[:, y : y + 4, x : x + 4], images[1, :, v : v + 4, u : u + 4])
    with pytest.raises(ValueError, match="9 x 9 px cannot be cut into 2 x 2"):
        shuffle_tiles(torch.zeros(1, 3, 9, 9), tiles[:1], 2)


# ---------------------------------------------------------------- mixing


def test_cutmix_weights_are_the_pasted_area() -> None:
    count, side = 12, 16
    recipe = replace(HARD, batch_size=count)
    images = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 3, side, side)
    shares = []
    for seed in range(150):
        draws = drawn(recipe, count, seed=seed)
        partners, own_share = draws["partners"], own_shares(draws, side)[0]
        mixed = blend(images, images[partners], draws["mix_boxes"].expand(count, 4), draws["mix_weights"].expand(count))
        moved = partners != torch.arange(count)
        own = (mixed == images)[moved].float().mean(dim=(1, 2, 3))
        torch.testing.assert_close(own, own_share.expand(len(own)))
        pasted = mixed != images
        assert torch.equal(mixed[pasted], images[partners][pasted])
        assert (pasted[moved] == pasted[moved][0]).all(), "one box for the batch"
        shares.append(own_share.item())
    assert min(shares) < 0.35 and max(shares) > 0.95


def test_cutmix_boxes_are_distributed_as_published() -> None:
    """A square of side sqrt(1 - lambda), lambda uniform, around a uniform centre, cut at the border."""
    draws = drawn(replace(HARD, batch_size=1, resolution=200), 4000)
    top, left, bottom, right = draws["mix_boxes"].unbind(1)
    assert top.min() >= 0 and left.min() >= 0 and bottom.max() <= 200 and right.max() <= 200
    uncut = (top > 0) & (left > 0) & (bottom < 200) & (right < 200)
    assert torch.equal((bottom - top)[uncut], (right - left)[uncut])
    random = np.random.default_rng(0)
    half = np.floor(np.floor(np.sqrt(random.random(4000)) * 200) / 2)
    y, x = np.floor(random.random((2, 4000)) * 200)
    areas = [np.minimum(c + half, 200) - np.maximum(c - half, 0) for c in (y, x)]
    expected = 1 - areas[0] * areas[1] / 200**2
    shares = own_shares(draws, 200).numpy()
    np.testing.assert_allclose(
        np.quantile(shares, [0.1, 0.3, 0.5, 0.7, 0.9]), np.quantile(expected, [0.1, 0.3, 0.5, 0.7, 0.9]), atol=0.03
    )


def test_mixing_is_torchvision_s() -> None:
    images = torch.rand((4, 3, 8, 8), generator=generator())
    partners = torch.tensor([3, 0, 1, 2])  # torchvision's, who rolls the batch
    labels = torch.arange(4)
    box = (1, 2, 6, 5)  # left, top, right, bottom
    shared = {"labels": labels, "batch_size": 4}
    cut = v2.CutMix(num_classes=4).transform(images, {**shared, "box": box, "lam_adjusted": 1 - 15 / 64})
    ours = blend(images, images[partners], torch.tensor([[2, 1, 5, 6]]).expand(4, 4), torch.ones(4))
    assert torch.equal(ours, cut)
    blended = v2.MixUp(num_classes=4).transform(images, {**shared, "lam": 0.3})
    ours = blend(images, images[partners], torch.zeros(4, 4, dtype=torch.int64), torch.full((4,), 0.3))
    torch.testing.assert_close(ours, blended)


def test_chances_of_mixing_are_per_batch() -> None:
    draws = drawn(replace(HARD, batch_size=2, cutmix=0.3, mixup=0.5, mix_alpha=5.0), 4000)
    area = (draws["mix_boxes"][:, 2:] - draws["mix_boxes"][:, :2]).prod(1)
    cut, blended = area > 0, draws["mix_weights"] < 1
    assert not (cut & blended).any()
    assert cut.float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert blended.float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert draws["mix_weights"][blended].mean().item() == pytest.approx(0.5, abs=0.02)


# ---------------------------------------------------------------- speed


def test_nothing_waits_for_the_device() -> None:
    """Fake tensors have no values, so reading one on the host, which would wait for a GPU, is an error."""
    recipe = replace(ALL, dsa=())
    draws = drawn(recipe, 8, 32)
    _constant.cache_clear()
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in draws.items()}
        images = augment(torch.empty(8, 3, 32, 32, dtype=torch.uint8), fake, recipe)
        batch_of = torch.arange(8) // 4
        mixed = blend(images, images[fake["partners"]], fake["mix_boxes"][batch_of], fake["mix_weights"][batch_of])
        assert (mixed.shape, own_shares(fake, 16).shape) == ((8, 3, 16, 16), (2,))
        with pytest.raises(DataDependentOutputException):
            mixed.sum().item()
    _constant.cache_clear()
