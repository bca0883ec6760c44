from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18 as torchvision_resnet18

from workflow_scripts.evaluation.architectures import HalvingPool, build, display_name, instance_norm
from workflow_scripts.evaluation.protocols import STUDENTS

HARD = ("convnet", "resnet_ap10", "resnet18")


def parameters(name: str, classes: int, resolution: int) -> int:
    with torch.device("meta"):
        model = build(name, classes=classes, resolution=resolution)
    return sum(parameter.numel() for parameter in model.parameters())


def gmacs(name: str, resolution: int) -> float:
    with torch.device("meta"):
        model = build(name, classes=10, resolution=resolution)
        images = torch.empty(1, 3, resolution, resolution)
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(("name", "published"), [("convnet", 2.64), ("resnet_ap10", 1.82), ("resnet18", 1.81)])
def test_cost_at_224_is_the_published_one(name: str, published: float) -> None:
    assert gmacs(name, 224) == pytest.approx(published, rel=0.02)


def test_parameters_of_the_hard_label_students_are_those_of_their_tables() -> None:
    def conv(inputs: int, outputs: int, kernel: int, bias: bool = False) -> int:
        return inputs * outputs * kernel**2 + outputs * bias + 2 * outputs  # and the norm's scale and shift

    convnet = conv(3, 128, 3, True) + 5 * conv(128, 128, 3, True) + 1152 * 10 + 10
    widths = (64, 64, 128, 256, 512)
    blocks = sum(conv(i, o, 3) + conv(o, o, 3) + (conv(i, o, 1) if i != o else 0) for i, o in pairwise(widths))
    assert parameters("convnet", 10, 224) == convnet == 754_570
    assert parameters("resnet_ap10", 10, 224) == conv(3, 64, 7) + blocks + 512 * 10 + 10
    assert parameters("resnet18", 1000, 224) == 11_689_512, "torchvision's"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18_bn", 11_689_512),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("mobilenet_v2", 3_504_872),
        ("efficientnet_b0", 5_288_548),
        ("shufflenet_v2", 2_278_604),
        ("vgg11", 132_863_336),
        ("deit_ti", 5_717_416),
        ("swin_t", 28_288_354),
        ("alexnet", 61_100_840),
    ],
)
def test_parameters_of_the_soft_label_students_are_the_published_ones(name: str, count: int) -> None:
    assert parameters(name, 1000, 224) == count


def test_parameters_of_glad_s_pool_are_those_of_their_tables() -> None:
    def conv(inputs: int, outputs: int, kernel: int, norm: bool = False) -> int:
        return inputs * outputs * kernel**2 + outputs + 2 * outputs * norm

    alexnet = conv(3, 128, 5) + conv(128, 192, 5) + conv(192, 256, 3) + conv(256, 192, 3) + conv(192, 192, 3)
    assert parameters("glad_alexnet", 10, 128) == alexnet + 192 * 16**2 * 10 + 10
    widths = (3, 64, 128, 256, 256, 512, 512, 512, 512)
    vgg = sum(conv(i, o, 3, True) for i, o in pairwise(widths))
    assert parameters("glad_vgg11", 10, 128) == vgg + 512 * 49 * 10 + 10
    layer = 512 * 3 * 512 + (512 * 512 + 512) + 2 * (512 * 512 + 512)
    assert parameters("glad_vit", 10, 128) == conv(3, 512, 16) + 512 + 65 * 512 + 10 * layer + 512 * 10 + 10
    assert parameters("glad_resnet18", 10, 128) == parameters("resnet18", 10, 64)


@pytest.mark.parametrize("name", ["glad_alexnet", "glad_vgg11", "glad_resnet18", "glad_vit"])
def test_glad_s_networks_at_their_resolution(name: str) -> None:
    with torch.device("meta"):
        model = build(name, classes=7, resolution=128)
        assert model(torch.empty(2, 3, 128, 128)).shape == (2, 7)
    kinds = [type(layer).__name__ for layer in model.modules()]
    assert "LayerNorm" not in kinds and "BatchNorm2d" not in kinds
    assert kinds.count("GroupNorm") == {"glad_vgg11": 8, "glad_resnet18": 20}.get(name, 0)
    assert kinds.count("PlainTransformerLayer") == (10 if name == "glad_vit" else 0)


@pytest.mark.parametrize("name", ["resnet18_bn", "resnet50"])
def test_resnets_have_a_small_stem_for_small_images(name: str) -> None:
    with torch.device("meta"):
        small, large = (build(name, classes=7, resolution=side) for side in (64, 224))
    assert (small.conv1.kernel_size, small.conv1.stride, type(small.maxpool)) == ((3, 3), (1, 1), torch.nn.Identity)
    assert (large.conv1.kernel_size, large.conv1.stride) == ((7, 7), (2, 2))


@pytest.mark.parametrize("name", [name for name in STUDENTS if name not in ("alexnet", "vgg11", "resnet101", "swin_t")])
def test_a_step_can_be_taken_at_the_smallest_resolution(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        model = build(name, classes=7, resolution=(side := STUDENTS[name].smallest), width=STUDENTS[name].width and 8)
        logits = model.train()(torch.zeros(2, 3, side, side))
    assert logits.shape == (2, 7)
    logits.sum().backward()


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("resolution", [28, 32, 64, 128])
def test_logits_have_one_column_per_class(name: str, resolution: int) -> None:
    model = build(name, classes=7, resolution=resolution, width=4)
    assert model(torch.zeros(2, 3, resolution, resolution)).shape == (2, 7)


@pytest.mark.parametrize(
    ("resolution", "depth", "side"), [(32, 3, 4), (64, 4, 4), (128, 5, 4), (224, 6, 3), (256, 6, 4)]
)
def test_convnet_ends_in_a_small_map(resolution: int, depth: int, side: int) -> None:
    with torch.device("meta"):
        model = build("convnet", classes=10, resolution=resolution)
    convolutions = [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert len(convolutions) == depth
    assert all(layer.out_channels == 128 and layer.bias is not None for layer in convolutions)
    assert [layer.in_features for layer in model.modules() if isinstance(layer, torch.nn.Linear)] == [128 * side**2]


@pytest.mark.parametrize("name", HARD)
def test_every_norm_is_instance_norm(name: str) -> None:
    norms = [layer for layer in build(name, classes=10, resolution=32, width=4).modules() if "Norm" in str(type(layer))]
    assert norms
    assert all(isinstance(n, torch.nn.GroupNorm) and n.num_groups == n.num_channels and n.affine for n in norms)


def test_resnet18_computes_what_torchvision_s_does() -> None:
    ours = build("resnet18", classes=10, resolution=128)
    theirs = torchvision_resnet18(num_classes=10, norm_layer=instance_norm)
    assert [tuple(p.shape) for p in ours.parameters()] == [tuple(p.shape) for p in theirs.parameters()]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("name", ["resnet_ap10", "resnet18"])
def test_residual_convolutions_start_in_he_normal_fan_out(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = build(name, classes=10, resolution=32)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
            assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
            assert layer.bias is None


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 7, 7), (1, 2, 4, 6)])
def test_halving_pool_is_average_pooling(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(HalvingPool()(x), F.avg_pool2d(x, 2))


def test_display_names() -> None:
    assert display_name("convnet", resolution=224) == "ConvNet-6"
    assert display_name("convnet", resolution=32, width=32) == "ConvNet-3 (w32)"
    assert display_name("resnet_ap10", resolution=224, width=64) == "ResNetAP-10"
    assert display_name("resnet18", resolution=32) == display_name("resnet18_bn", resolution=224) == "ResNet-18"
    assert display_name("convnet_bn", resolution=64) == "ConvNet-BN".replace("Net", "Net-4")


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown architecture 'vgg'.*convnet"):
        build("vgg", classes=10, resolution=32)
    with pytest.raises(ValueError, match="at least 16 px"):
        build("resnet18", classes=10, resolution=8)
    with pytest.raises(ValueError, match="width"):
        build("convnet", classes=10, resolution=32, width=0)
    with pytest.raises(ValueError, match="deit_ti has one width only"):
        build("deit_ti", classes=10, resolution=32, width=64)
