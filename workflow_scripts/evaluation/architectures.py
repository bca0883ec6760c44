"""Classifiers of the published protocols: students, and teachers.

ConvNet, ResNetAP-10 and ResNet-18 in instance norm are those of the hard-label protocol (Minimax/IDC); at 224 px and
default width a forward pass costs 2.64, 1.82 and 1.81 GMAC. Those of the soft-label protocols are torchvision's, except
that a ResNet at 64 px and less has RDED's small stem; ``glad_*`` are those of GLaD's cross-architecture protocol. Inputs
are normalised images (N, 3, H, W) with H = W = ``resolution``, outputs are logits (N, classes).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from workflow_scripts.evaluation.protocols import STUDENTS, ArchitectureName, Student, convnet_depth

Norm = Callable[[int], nn.Module]


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


def convnet(classes: int, resolution: int, width: int, norm: Norm = instance_norm) -> nn.Sequential:
    """Build the ConvNet: blocks of 3x3 convolution, norm, ReLU and 2x2 average pooling, then one linear layer.

    All blocks have ``width`` channels; weights keep PyTorch's default initialisation.
    """
    depth = convnet_depth(resolution)
    layers: list[nn.Module] = []
    for channels in [3] + [width] * (depth - 1):
        conv = nn.Conv2d(channels, width, 3, padding=1)
        layers += [conv, norm(width), nn.ReLU(inplace=True), HalvingPool()]
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


def convnet_bn(classes: int, resolution: int, width: int) -> nn.Sequential:
    """Build the ConvNet in batch norm, RDED's teacher and student for small images."""
    return convnet(classes, resolution, width, nn.BatchNorm2d)


# ---------------------------------------------------------------- torchvision


def _torchvision(name: str) -> Callable[[int, int, int], nn.Module]:
    def build(classes: int, resolution: int, width: int) -> nn.Module:
        from torchvision import models

        network: nn.Module = getattr(models, name)(num_classes=classes)
        if name.startswith("resnet") and resolution <= 64:
            network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
            network.maxpool = nn.Identity()
        return network

    return build


def deit_ti(classes: int, resolution: int, width: int) -> nn.Module:
    """Build DeiT-Ti (Touvron et al. 2021): ViT of 12 layers, 3 heads and 192 channels on patches of 16 pixels."""
    from torchvision.models import VisionTransformer

    network: nn.Module = VisionTransformer(resolution, 16, 12, 3, 192, 768, num_classes=classes)
    return network


# ---------------------------------------------------------------- GLaD's pool


def _conv_relu(inputs: int, channels: int, kernel: int = 3, norm: Norm | None = None) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, channels, kernel, padding=kernel // 2)
    return [conv, *([] if norm is None else [norm(channels)]), nn.ReLU(inplace=True)]


def glad_alexnet(classes: int, resolution: int, width: int) -> nn.Sequential:
    """Build GLaD's AlexNet: five convolutions of stride 1 without norm, three max-poolings, one linear layer."""
    return nn.Sequential(
        *_conv_relu(3, 128, 5),
        nn.MaxPool2d(2),
        *_conv_relu(128, 192, 5),
        nn.MaxPool2d(2),
        *_conv_relu(192, 256),
        *_conv_relu(256, 192),
        *_conv_relu(192, 192),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(192 * (resolution // 8) ** 2, classes),
    )


def glad_vgg11(classes: int, resolution: int, width: int) -> nn.Sequential:
    """Build GLaD's VGG-11: instance norm, five max-poolings, an adaptive one to 7x7 and one linear layer."""
    layers: list[nn.Module] = []
    inputs = 3
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for channels in stage:
            layers += _conv_relu(inputs, channels, norm=instance_norm)
            inputs = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(7), nn.Flatten(), nn.Linear(512 * 49, classes))


def glad_resnet18(classes: int, resolution: int, width: int) -> nn.Sequential:
    """Build GLaD's ResNet-18: instance norm, and a 3x3 stem of stride 1 without max-pooling at any resolution."""
    return _residual(_stem(width, kernel=3, stride=1, pool=None), _strided_stage, 2, classes, width)


class PlainViT(nn.Module):
    """GLaD's ViT: patches of 16 pixels, a class token, ten layers of attention and MLP, and no layer norm anywhere."""

    def __init__(self, classes: int, resolution: int, dim: int = 512, layers: int = 10, heads: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 16, stride=16)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, (resolution // 16) ** 2 + 1, dim))
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList(PlainTransformerLayer(dim, heads) for _ in range(layers))
        self.head = nn.Linear(dim, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of ``x``."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.dropout(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x[:, 0])
        return logits


class PlainTransformerLayer(nn.Module):
    """Attention and an MLP of the same width, each added to its input: (N, tokens, ``dim``) to the same shape."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.1))
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(dim, dim), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for ``x``."""
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.queries_keys_values(x).chunk(3, dim=2)
        )
        dropped = 0.1 if self.training else 0.0
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=dropped).transpose(1, 2).flatten(2))
        mixed: torch.Tensor = x + self.mlp(x)
        return mixed


def glad_vit(classes: int, resolution: int, width: int) -> nn.Module:
    """Build GLaD's ViT."""
    return PlainViT(classes, resolution)


BUILDERS: Mapping[ArchitectureName, Callable[[int, int, int], nn.Module]] = MappingProxyType(
    {
        "convnet": convnet,
        "resnet_ap10": resnet_ap10,
        "resnet18": resnet18,
        "convnet_bn": convnet_bn,
        "resnet18_bn": _torchvision("resnet18"),
        "resnet50": _torchvision("resnet50"),
        "resnet101": _torchvision("resnet101"),
        "mobilenet_v2": _torchvision("mobilenet_v2"),
        "efficientnet_b0": _torchvision("efficientnet_b0"),
        "shufflenet_v2": _torchvision("shufflenet_v2_x1_0"),
        "vgg11": _torchvision("vgg11"),
        "deit_ti": deit_ti,
        "swin_t": _torchvision("swin_t"),
        "alexnet": _torchvision("alexnet"),
        "glad_alexnet": glad_alexnet,
        "glad_vgg11": glad_vgg11,
        "glad_resnet18": glad_resnet18,
        "glad_vit": glad_vit,
    }
)
"""How each classifier is built from (classes, resolution, width)."""


def _student(name: str) -> tuple[ArchitectureName, Student]:
    for known, student in STUDENTS.items():
        if known == name:
            return known, student
    raise ValueError(f"unknown architecture {name!r}: choose one of {', '.join(STUDENTS)}")


def build(name: str, *, classes: int, resolution: int, width: int | None = None) -> nn.Module:
    """Build a classifier with fresh weights from the global random state of the CPU.

    Args:
        name: A key of ``STUDENTS``.
        classes: Number of logits.
        resolution: Side of the square input in pixels.
        width: Channels of the first stage; the published width if None.

    Raises:
        ValueError: The name is unknown, a size is too small, or the architecture has one width only.
    """
    known, student = _student(name)
    if width is not None and student.width is None:
        raise ValueError(f"{name} has one width only, so width must not be given")
    width = student.width if width is None else width
    if classes < 1 or (width is not None and width < 1):
        raise ValueError(f"classes and width must be at least 1, not {classes} and {width}")
    if resolution < student.smallest:
        raise ValueError(f"resolution must be at least {student.smallest} px for {name}, not {resolution}")
    return BUILDERS[known](classes, resolution, width or 0)


def display_name(name: str, *, resolution: int, width: int | None = None) -> str:
    """Return a student's name in print, such as ``ConvNet-6``, or ``ConvNet-3 (w32)`` where the width is not default.

    Raises:
        ValueError: The name is unknown.
    """
    known, student = _student(name)
    title = student.title
    if known in ("convnet", "convnet_bn"):
        title = title.replace("ConvNet", f"ConvNet-{convnet_depth(resolution)}")
    return title if width in (None, student.width) else f"{title} (w{width})"
