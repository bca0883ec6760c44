import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18 as torchvision_resnet18

from workflow_scripts.evaluation.architectures import ARCHITECTURES, HalvingPool, build, display_name, instance_norm


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


@pytest.mark.parametrize("name", ARCHITECTURES)
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


@pytest.mark.parametrize("name", ARCHITECTURES)
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
    assert display_name("resnet18", resolution=32) == "ResNet-18"


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown architecture 'vgg'.*convnet"):
        build("vgg", classes=10, resolution=32)
    with pytest.raises(ValueError, match="at least 16 px"):
        build("resnet18", classes=10, resolution=8)
    with pytest.raises(ValueError, match="width"):
        build("convnet", classes=10, resolution=32, width=0)
