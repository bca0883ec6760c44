"""Floating-point operations of networks, from their configurations alone.

Matrix products and convolutions are counted, a multiply-add as two.
Published "Gflops" of DiT are multiply-adds, half of what is counted here. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workflow_scripts.config import FitDiT, FitVAE
from workflow_scripts.evaluation.protocols import STUDENTS, convnet_depth

Config = Mapping[str, Any]

_DIT_XL: Config = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
}
_SD_VAE: Config = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}
ARCHITECTURES: Mapping[str, tuple[Config, Config]] = {
    "DiT-XL/2-256": (_DIT_XL, _SD_VAE),
    "DiT-XL/2-512": ({**_DIT_XL, "sample_size": 64}, _SD_VAE),
}
"""Denoiser and autoencoder of published backbones, as diffusers' arguments."""


def network_name(config: Config) -> str | None:
    """Return a short name that denoisers of equal shape share, such as ``dit-28x1152-p2-32``; None if the shape is unknown."""
    try:
        if "block_out_channels" in config:
            return f"unet-{'-'.join(map(str, config['block_out_channels']))}-{config['sample_size']}"
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return f"dit-{config['num_layers']}x{width}-p{config['patch_size']}-{config['sample_size']}"
    except (KeyError, TypeError):
        return None


def coder_name(config: Config) -> str | None:
    """Return a short name that autoencoders of equal shape share; None if the shape is unknown."""
    try:
        kind = "vq" if "num_vq_embeddings" in config else "kl"
        return f"{kind}-{'-'.join(map(str, config['block_out_channels']))}x{config['layers_per_block']}"
    except (KeyError, TypeError):
        return None


def dit_flop(config: Config) -> float | None:
    """Return the operations of one forward pass of diffusers' DiT for one latent: 237.3e9 for DiT-XL/2 at 256 pixels."""
    try:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        layers, patch, channels = config["num_layers"], config["patch_size"], config["in_channels"]
        tokens = (config["sample_size"] // patch) ** 2
        outputs = config.get("out_channels") or channels
    except (KeyError, TypeError):
        return None
    modulation = 6 * width**2 + 256 * width + width**2  # with the timestep's embedder, of which each block has one
    block = 12 * width**2 * tokens + 2 * width * tokens**2 + modulation
    ends = tokens * width * patch**2 * (channels + outputs) + 2 * width**2 + 256 * width + width**2
    return 2.0 * (layers * block + ends)


def encoder_flop(config: Config, side: int) -> float | None:
    """Return the operations of encoding one image of ``side`` pixels, for an AutoencoderKL or VQModel."""
    try:
        channels, layers = list(config["block_out_channels"]), config["layers_per_block"]
        latent, moments = config["latent_channels"], config["latent_channels"]
    except (KeyError, TypeError):
        return None
    if "num_vq_embeddings" not in config:
        moments = 2 * latent
    total, width = float(_conv(side, config.get("in_channels", 3), channels[0])), channels[0]
    for level, out in enumerate(channels):
        total += _resnets(side, width, out, layers)
        width = out
        if level < len(channels) - 1:
            side //= 2
            total += _conv(side, out, out)
    total += _middle(side, width, config) + _conv(side, width, moments) + _conv(side, moments, moments, 1)
    return 2 * total


def decoder_flop(config: Config, side: int) -> float | None:
    """Return the operations of decoding one image of ``side`` pixels."""
    try:
        channels, layers = list(config["block_out_channels"])[::-1], config["layers_per_block"]
        latent = config["latent_channels"]
    except (KeyError, TypeError):
        return None
    side //= 2 ** (len(channels) - 1)
    width = channels[0]
    total = float(_conv(side, latent, latent, 1) + _conv(side, latent, width)) + _middle(side, width, config)
    for level, out in enumerate(channels):
        total += _resnets(side, width, out, layers + 1)
        width = out
        if level < len(channels) - 1:
            side *= 2
            total += _conv(side, out, out)
    return 2 * (total + _conv(side, width, config.get("out_channels", 3)))


GMACS_AT_224: Mapping[str, float] = {
    "resnet18_bn": 1.81,
    "resnet50": 4.09,
    "resnet101": 7.80,
    "mobilenet_v2": 0.30,
    "efficientnet_b0": 0.39,
    "shufflenet_v2": 0.14,
    "vgg11": 7.61,
    "deit_ti": 1.26,
    "swin_t": 4.49,
    "alexnet": 0.71,
    "glad_alexnet": 12.0,
    "glad_vgg11": 7.49,
    "glad_vit": 3.47,
}
"""Thousands of millions of multiply-adds of a forward pass at 224 pixels; at other sizes they are taken to go with the area."""

_WIDTHS: Mapping[str, int | None] = {name: student.width for name, student in STUDENTS.items()}


def student_flop(name: str, width: int | None, side: int, classes: int) -> float:
    """Return the operations of one forward pass of a student for one image of ``side`` pixels.

    Raises:
        KeyError: if the name is unknown.
    """
    if name in GMACS_AT_224 and not (name == "resnet18_bn" and side <= 64):  # whose small stem is another network
        return 2e9 * GMACS_AT_224[name] * (side / 224) ** 2
    width = width or _WIDTHS[name] or 64
    if name in ("convnet", "convnet_bn"):
        total, inputs = 0, 3
        for _ in range(convnet_depth(side)):
            total += _conv(side, inputs, width)
            inputs, side = width, side // 2
        return 2.0 * (total + width * side**2 * classes)
    strided = name != "resnet_ap10"
    if name == "glad_resnet18" or side <= 64:
        kernel, stride, pool = 3, 1, 1
    elif side > 128 or (strided and side > 64):
        kernel, stride, pool = (7, 2, 2) if strided else (7, 1, 4)
    else:
        kernel, stride, pool = 3, 1, 2 if side > 64 else 1
    side = -(-side // stride)
    total = _conv(side, 3, width, kernel)
    side = -(-side // pool) if strided else side // pool
    inputs = width
    for stage in range(4):
        out = width * 2**stage
        small = side if stage == 0 else -(-side // 2) if strided else side // 2
        total += _conv(small if strided else side, inputs, out) + _conv(small, out, out)
        total += 2 * _conv(small, out, out) if strided else 0  # ResNet-18's second block
        if stage:
            total += _conv(small if strided else side, inputs, out, 1)
        inputs, side = out, small
    return 2.0 * (total + inputs * classes)


INCEPTION_GMACS = 5.73
"""Thousands of millions of multiply-adds of Inception-v3 at its 299 pixels."""
INCEPTION_WIDTH = 2048

_PENULTIMATE: Mapping[str, int] = {
    "resnet18_bn": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "mobilenet_v2": 1280,
    "efficientnet_b0": 1280,
    "shufflenet_v2": 1024,
    "vgg11": 4096,
    "deit_ti": 192,
    "swin_t": 768,
    "alexnet": 4096,
    "glad_vgg11": 512 * 49,
    "glad_vit": 512,
}


def penultimate_width(name: str, width: int | None, side: int) -> int:
    """Return how many numbers a student's last linear layer takes for an image of ``side`` pixels.

    Raises:
        KeyError: if the name is unknown.
    """
    if name in _PENULTIMATE:
        return _PENULTIMATE[name]
    if name == "glad_alexnet":
        return 192 * (side // 8) ** 2
    width = width or _WIDTHS[name] or 64
    return width * (side >> convnet_depth(side)) ** 2 if name in ("convnet", "convnet_bn") else 8 * width


def fitted_dit(fit: FitDiT, side: int, channels: int, classes: int) -> Config:
    """Return the configuration of the DiT that a fit will make."""
    return {
        "num_attention_heads": fit.heads,
        "attention_head_dim": fit.head_dim,
        "num_layers": fit.layers,
        "patch_size": fit.patch_size,
        "in_channels": channels,
        "out_channels": 2 * channels,
        "sample_size": side,
        "num_embeds_ada_norm": classes,
    }


def fitted_coder(fit: FitVAE, quantises: bool) -> Config:
    """Return the configuration of the autoencoder that a fit will make."""
    shape = {
        "block_out_channels": fit.channels,
        "layers_per_block": fit.layers_per_block,
        "latent_channels": fit.latent_channels,
    }
    return {**shape, "num_vq_embeddings": fit.codes} if quantises else shape


def _conv(side: int, inputs: int, outputs: int, kernel: int = 3) -> int:
    """Multiply-adds of a convolution onto a map of ``side`` x ``side``."""
    return side**2 * inputs * outputs * kernel**2


def _resnets(side: int, inputs: int, outputs: int, count: int) -> int:
    first = _conv(side, inputs, outputs) + _conv(side, outputs, outputs)
    shortcut = _conv(side, inputs, outputs, 1) if inputs != outputs else 0
    return first + shortcut + (count - 1) * 2 * _conv(side, outputs, outputs)


def _middle(side: int, width: int, config: Config) -> int:
    """Two residual blocks around an attention of one head."""
    attention = 4 * side**2 * width**2 + 2 * side**4 * width
    return _resnets(side, width, width, 2) + (attention if config.get("mid_block_add_attention", True) else 0)


def parameters(config: Config) -> float | None:
    """Return about how many weights a DiT has."""
    try:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        block = 18 * width**2 + 256 * width + width**2 + (config["num_embeds_ada_norm"] + 1) * width
        return float(config["num_layers"] * block)
    except (KeyError, TypeError):
        return None


def convnet_parameters(width: int, side: int, classes: int) -> int:
    """Return how many weights a ConvNet has."""
    depth = convnet_depth(side)
    convolutions = 9 * width * (3 + (depth - 1) * width) + 3 * width * depth  # each with a bias and a norm
    return convolutions + width * (side >> depth) ** 2 * classes + classes
