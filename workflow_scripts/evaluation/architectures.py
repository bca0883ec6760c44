"""Student classifiers of the hard-label protocol: ConvNet, ResNetAP-10 and ResNet-18, all in instance norm.

The shapes are those of the Minimax/IDC hard-label protocol; at 224 px and default width a forward pass costs
2.64, 1.82 and 1.81 GMAC. Inputs are normalised images (N, 3, H, W) with H = W = ``resolution``, outputs are
logits (N, classes).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from workflow_scripts.evaluation.protocols import PUBLISHED_WIDTHS, convnet_depth

SMALLEST_RESOLUTION = 16
"""Below this, the last ResNet stage has a single pixel, on which instance norm is undefined."""


def instance_norm(channels: int) -> nn.GroupNorm:
    """Return affine instance norm, written as GroupNorm with one group per channel."""
    return nn.GroupNorm(channels, channels)


class HalvingPool(nn.Module):
    """Average pooling over 2x2 pixels: (N, C, H, W) to (N, C, H // 2, W // 2).

    Adding rows, then columns is over twice as fast as PyTorch's own pooling on a CPU, backward pass included.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the pooled map."""
        if x.is_cuda:
            return F.avg_pool2d(x, 2)
        height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        rows = x[:, :, 0:height:2] + x[:, :, 1:height:2]
        return (rows[..., 0:width:2] + rows[..., 1:width:2]) * 0.25


def convnet(classes: int, resolution: int, width: int) -> nn.Sequential:
    """Build the ConvNet: blocks of 3x3 convolution, instance norm, ReLU and 2x2 average pooling, then one linear layer.

    All blocks have ``width`` channels; weights keep PyTorch's default initialisation.
    """
    depth = convnet_depth(resolution)
    layers: list[nn.Module] = []
    for channels in [3] + [width] * (depth - 1):
        conv = nn.Conv2d(channels, width, 3, padding=1)
        layers += [conv, instance_norm(width), nn.ReLU(inplace=True), HalvingPool()]
    side = resolution >> depth
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, classes))


class AveragePoolBlock(nn.Module):
    """Basic residual block that shrinks by average pooling instead of strided convolution.

    Maps (N, ``inputs``, H, W) to (N, ``channels``, H / stride, W / stride) for a ``stride`` of 1 or 2.
    """

    def __init__(self, inputs: int, channels: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.norm1 = instance_norm(channels)
        self.pool = HalvingPool() if stride > 1 else nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = instance_norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample if downsample is not None else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output for ``x``."""
        y = self.pool(self.relu(self.norm1(self.conv1(x))))
        return self.relu(self.norm2(self.conv2(y)) + self.downsample(x))


def _average_pool_stage(inputs: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride > 1:
        shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, bias=False), HalvingPool(), instance_norm(channels))
    first = AveragePoolBlock(inputs, channels, stride, shortcut)
    return nn.Sequential(first, *(AveragePoolBlock(channels, channels) for _ in range(blocks - 1)))


def _strided_stage(inputs: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride > 1:
        shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride=stride, bias=False), instance_norm(channels))
    from torchvision.models.resnet import BasicBlock  # seconds to import: only for those who need it

    first = BasicBlock(inputs, channels, stride, shortcut, norm_layer=instance_norm)
    return nn.Sequential(first, *(BasicBlock(channels, channels, norm_layer=instance_norm) for _ in range(blocks - 1)))


def _stem(width: int, kernel: int, stride: int, pool: nn.Module | None) -> nn.Sequential:
    conv = nn.Conv2d(3, width, kernel, stride=stride, padding=kernel // 2, bias=False)
    layers = [conv, instance_norm(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *([] if pool is None else [pool]))


def _residual(
    stem: nn.Module, stage: Callable[[int, int, int, int], nn.Module], blocks: int, classes: int, width: int
) -> nn.Sequential:
    """Join a stem, four stages that double the width and halve the map, global average pooling and a linear layer."""
    network = nn.Sequential(
        stem,
        stage(width, width, blocks, 1),
        stage(width, 2 * width, blocks, 2),
        stage(2 * width, 4 * width, blocks, 2),
        stage(4 * width, 8 * width, blocks, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def resnet_ap10(classes: int, resolution: int, width: int) -> nn.Sequential:
    """Build ResNetAP-10: one average-pooling block per stage, convolutions in He normal initialisation (fan-out)."""
    if resolution > 128:
        stem = _stem(width, kernel=7, stride=1, pool=nn.AvgPool2d(4))
    elif resolution > 64:
        stem = _stem(width, kernel=3, stride=1, pool=HalvingPool())
    else:
        stem = _stem(width, kernel=3, stride=1, pool=None)
    return _residual(stem, _average_pool_stage, 1, classes, width)


def resnet18(classes: int, resolution: int, width: int) -> nn.Sequential:
    """Build ResNet-18 from torchvision's blocks, convolutions in He normal initialisation (fan-out).

    torchvision's own ``resnet18`` fixes the first stage at 64 channels; this one takes any width. Up to 64 px the stem
    is a 3x3 convolution of stride 1 without max-pooling.
    """
    if resolution > 64:
        stem = _stem(width, kernel=7, stride=2, pool=nn.MaxPool2d(3, stride=2, padding=1))
    else:
        stem = _stem(width, kernel=3, stride=1, pool=None)
    return _residual(stem, _strided_stage, 2, classes, width)


@dataclass(frozen=True)
class Architecture:
    """A student: how it is built from (classes, resolution, width), its name in print and its published width."""

    build: Callable[[int, int, int], nn.Module]
    title: str
    width: int


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "convnet": Architecture(convnet, "ConvNet", PUBLISHED_WIDTHS["convnet"]),
        "resnet_ap10": Architecture(resnet_ap10, "ResNetAP-10", PUBLISHED_WIDTHS["resnet_ap10"]),
        "resnet18": Architecture(resnet18, "ResNet-18", PUBLISHED_WIDTHS["resnet18"]),
    }
)


def _architecture(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}: choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def build(name: str, *, classes: int, resolution: int, width: int | None = None) -> nn.Module:
    """Build a student with fresh weights from the global random state of the CPU.

    Args:
        name: A key of ``ARCHITECTURES``.
        classes: Number of logits.
        resolution: Side of the square input in pixels.
        width: Channels of the ConvNet, or of the first ResNet stage; the published width if None.

    Raises:
        ValueError: The name is unknown, or a size is too small.
    """
    architecture = _architecture(name)
    width = architecture.width if width is None else width
    if classes < 1 or width < 1:
        raise ValueError(f"classes and width must be at least 1, not {classes} and {width}")
    if resolution < SMALLEST_RESOLUTION:
        raise ValueError(f"resolution must be at least {SMALLEST_RESOLUTION} px, not {resolution}")
    return architecture.build(classes, resolution, width)


def display_name(name: str, *, resolution: int, width: int | None = None) -> str:
    """Return a student's name in print, such as ``ConvNet-6``, or ``ConvNet-3 (w32)`` where the width is not default.

    Raises:
        ValueError: The name is unknown.
    """
    architecture = _architecture(name)
    title = f"{architecture.title}-{convnet_depth(resolution)}" if name == "convnet" else architecture.title
    return title if width in (None, architecture.width) else f"{title} (w{width})"
