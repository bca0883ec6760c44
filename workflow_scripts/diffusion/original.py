"""Published checkpoints that are one file in their authors' layout: DiT, and CompVis' class-conditional latent diffusion.

They are converted to diffusers' modules in memory whenever they are loaded, so that there is no second copy on disk and
nothing half-written. Files are mapped into memory and never unpickled beyond tensors.

- DiT (https://github.com/facebookresearch/DiT, ``models.py``), such as ``DiT-XL-2-256x256.pt``. It has no autoencoder. The
  module evaluates the authors' equations, from which diffusers' own ``DiTTransformer2DModel`` departs in two constants: it
  spaces the frequencies of the timestep embedding by 127 instead of 128, and normalises with another epsilon.
- Latent diffusion on ImageNet (https://github.com/CompVis/latent-diffusion, ``cin256-v2``): U-Net, VQ-f4 autoencoder and
  label embeddings.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from workflow_scripts.diffusion.checkpoint import unet_multiple
from workflow_scripts.errors import BackboneError

State = Mapping[str, torch.Tensor]

DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: DiT-S, B, L, XL
DIT_MAP = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
DIT_MAP_ONCE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
DIT_MAP_EVERY_BLOCK = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
DIT_BETAS = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}

UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
LABEL_EMBEDDING = "cond_stage_model.embedding.weight"
LDM_BETAS = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
LDM_SIDE = 64  # a U-Net's weights do not say for which latents they were trained; cin256-v2's config does

_RESAVE = (
    "import sys, torch; from safetensors.torch import save_file; s = torch.load(sys.argv[1], map_location='cpu', "
    "weights_only=False)['state_dict']; save_file({k: v.clone() for k, v in s.items() if k.startswith(('"
    f"{UNET}', '{FIRST_STAGE}', 'cond_stage_model.'))}}, sys.argv[2])"
)


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint's tensors by name; of a training checkpoint, DiT's averaged ones.

    Raises:
        BackboneError: if it is damaged, or holds other objects than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise BackboneError(
            f"{path}: is damaged, or holds more than tensors, which are not unpickled because that can run any code. If you "
            "trust its source, save its tensors as safetensors, where PyTorch Lightning is installed if the file asks for it, "
            f'and set backbone.path to the new file:\n  python -c "{_RESAVE}" {path} {path.with_suffix(".safetensors")}'
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        raise BackboneError(f"{path}: cannot be read as a checkpoint ({error})") from error
    for part in ("ema", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(part), dict):
            content = content[part]
    if not isinstance(content, dict):
        raise BackboneError(f"{path}: holds no tensors by name")
    return {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}


def is_dit(state: State, path: Path) -> bool:
    """Say whether a checkpoint is DiT's, or else latent diffusion's.

    Raises:
        BackboneError: if it is neither.
    """
    if "x_embedder.proj.weight" in state:
        return True
    if f"{UNET}input_blocks.0.0.weight" in state and LABEL_EMBEDDING in state:
        return False
    raise BackboneError(
        f"{path}: is neither a DiT checkpoint (x_embedder.*, blocks.*) nor a class-conditional latent diffusion checkpoint "
        f"({UNET}*, {FIRST_STAGE}*, {LABEL_EMBEDDING}); it begins with {', '.join(list(state)[:3])}"
    )


def describe(path: Path) -> dict[str, Any]:
    """Return what a planner must know of a checkpoint.

    Returns:
        ``denoiser``: ``transformer`` or ``unet``; ``network``: its arguments in diffusers; ``classes`` without the null
        class; ``multiple`` as in Checkpoint; and ``vae``: the arguments of its autoencoder, if it has one.
    """
    state = read_state(path)
    try:
        if is_dit(state, path):
            config = dit_config(state, path)
            classes, multiple, vae = config["num_embeds_ada_norm"], None, None
        else:
            config = unet_config(state)
            classes, multiple, vae = len(state[LABEL_EMBEDDING]) - 1, unet_multiple(config), vq_config(state)
    except (KeyError, IndexError, ValueError) as error:
        raise BackboneError(f"{path}: tensors are missing from it ({error})") from error
    return {
        "denoiser": "unet" if multiple else "transformer",
        "network": config,
        "multiple": multiple,
        "classes": classes,
        "vae": vae,
    }


def load_denoiser(
    path: Path, dtype: torch.dtype
) -> tuple[DiTTransformer2DModel | UNet2DConditionModel, torch.Tensor | None, DDIMScheduler]:
    """Load a DiT, or a U-Net with its label embeddings (classes + 1, E), and the noise schedule it was trained with.

    Raises:
        BackboneError: if weights are missing, are too many or have other shapes.
    """
    state = read_state(path)
    if is_dit(state, path):
        dit = _filled(DiTTransformer2DModel, dit_config(state, path), convert_dit(state), path)
        dit.pos_embed.pos_embed = position_embedding(state, path)
        for block in dit.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        return dit.to(dtype), None, DDIMScheduler(clip_sample=False, **DIT_BETAS)
    config = unet_config(state)
    unet = _filled(UNet2DConditionModel, config, convert_unet(state, config), path)
    return unet.to(dtype), state[LABEL_EMBEDDING].to(dtype), DDIMScheduler(clip_sample=False, **LDM_BETAS)


def load_autoencoder(path: Path, dtype: torch.dtype) -> VQModel:
    """Load the autoencoder of a latent diffusion checkpoint.

    Raises:
        BackboneError: if there is none.
    """
    state = read_state(path)
    if is_dit(state, path):
        raise BackboneError(f"{path}: has no autoencoder; name one with backbone.vae")
    config = vq_config(state)
    return _filled(VQModel, config, convert_vq(state, config), path).to(dtype)


# ---------------------------------------------------------------- DiT


def dit_config(state: State, path: Path) -> dict[str, Any]:
    """Return the arguments of diffusers' DiT for a checkpoint, from its shapes."""
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    if width not in DIT_HEADS:
        raise BackboneError(f"{path}: a DiT of width {width}; known are {', '.join(map(str, DIT_HEADS))}")
    return {
        "num_attention_heads": DIT_HEADS[width],
        "attention_head_dim": width // DIT_HEADS[width],
        "in_channels": channels,
        "out_channels": len(state["final_layer.linear.weight"]) // patch**2,
        "num_layers": _count(state, "blocks."),
        "sample_size": round(state["pos_embed"].shape[1] ** 0.5) * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": len(state["y_embedder.embedding_table.weight"]) - 1,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
    }


def convert_dit(state: State) -> dict[str, torch.Tensor]:
    """Rename a DiT's tensors; diffusers' blocks each have the embedders of timestep and label, which here share memory."""
    blocks = range(_count(state, "blocks."))
    converted: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")
        if module in DIT_MAP_ONCE:
            converted[f"{DIT_MAP_ONCE[module]}.{kind}"] = tensor
        elif module in DIT_MAP_EVERY_BLOCK:
            for number in blocks:
                converted[f"transformer_blocks.{number}.norm1.emb.{DIT_MAP_EVERY_BLOCK[module]}.{kind}"] = tensor
        elif key != "pos_embed":
            place, _, inner = module.removeprefix("blocks.").partition(".")
            if inner == "attn.qkv":
                for name, part in zip("qkv", tensor.chunk(3), strict=True):
                    converted[f"transformer_blocks.{place}.attn1.to_{name}.{kind}"] = part
            else:
                converted[f"transformer_blocks.{place}.{DIT_MAP.get(inner, inner)}.{kind}"] = tensor
    return converted


def position_embedding(state: State, path: Path) -> torch.Tensor:
    """Return a DiT's position embedding (1, N, D), which must be the fixed one that diffusers computes (DiT, section 3.2)."""
    given = state["pos_embed"].float()
    side = round(given.shape[1] ** 0.5)
    own = get_2d_sincos_pos_embed(given.shape[2], side, base_size=side, output_type="pt").float()[None]
    if given.shape != own.shape or not torch.allclose(given, own, atol=1e-4):
        raise BackboneError(f"{path}: pos_embed is not DiT's fixed sine-cosine embedding")
    return own


# ---------------------------------------------------------------- latent diffusion


def unet_config(state: State) -> dict[str, Any]:
    """Return the arguments of diffusers' U-Net for a latent diffusion checkpoint, from its shapes; it has one head."""
    inputs = f"{UNET}input_blocks"
    down = sorted(int(key[len(inputs) + 1 :].split(".")[0]) for key in state if key.endswith(".0.op.weight"))
    layers = down[0] - 1
    firsts = [level * (layers + 1) + 1 for level in range(len(down) + 1)]
    attends = [f"{inputs}.{first}.1.proj_in.weight" in state for first in firsts]
    last = max(first for first, attention in zip(firsts, attends, strict=True) if attention)
    return {
        "sample_size": LDM_SIDE,
        "in_channels": state[f"{inputs}.0.0.weight"].shape[1],
        "out_channels": len(state[f"{UNET}out.2.weight"]),
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        "block_out_channels": tuple(len(state[f"{inputs}.{first}.0.in_layers.2.weight"]) for first in firsts),
        "layers_per_block": layers,
        "attention_head_dim": 1,  # diffusers' name for the number of heads
        "cross_attention_dim": state[f"{inputs}.{last}.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
    }


def convert_unet(state: State, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Rename the U-Net's tensors, as diffusers does."""
    converted: dict[str, torch.Tensor] = convert_ldm_unet_checkpoint(_part(state, UNET), config)
    return converted


def vq_config(state: State) -> dict[str, Any]:
    """Return the arguments of diffusers' VQ autoencoder for a latent diffusion checkpoint, from its shapes."""
    down = f"{FIRST_STAGE}encoder.down."
    levels = _count(state, down)
    codes, width = state[f"{FIRST_STAGE}quantize.embedding.weight"].shape
    return {
        "in_channels": state[f"{FIRST_STAGE}encoder.conv_in.weight"].shape[1],
        "out_channels": len(state[f"{FIRST_STAGE}decoder.conv_out.weight"]),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(len(state[f"{down}{level}.block.0.conv1.weight"]) for level in range(levels)),
        "layers_per_block": _count(state, f"{down}0.block."),
        "latent_channels": len(state[f"{FIRST_STAGE}encoder.conv_out.weight"]),
        "sample_size": LDM_SIDE * 2 ** (levels - 1),
        "num_vq_embeddings": codes,
        "vq_embed_dim": width,
        "scaling_factor": 1.0,
    }


def convert_vq(state: State, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Rename the autoencoder's tensors, as diffusers does, which forgets the codes; its loss network is left out."""
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    known = _part(state, *(f"{FIRST_STAGE}{part}" for part in parts))
    converted: dict[str, torch.Tensor] = convert_ldm_vae_checkpoint(known, config)
    return converted | {"quantize.embedding.weight": state[f"{FIRST_STAGE}quantize.embedding.weight"]}


# ---------------------------------------------------------------- both


def _filled(kind: Any, config: Mapping[str, Any], converted: State, path: Path) -> Any:
    """Build a module around tensors, without memory of its own."""
    with torch.device("meta"):
        model: nn.Module = kind(**config)
    try:
        model.load_state_dict(converted, assign=True)
    except RuntimeError as error:
        raise BackboneError(f"{path}: does not fit {kind.__name__} ({error})") from error
    return model


def _part(state: State, *prefixes: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if key.startswith(prefixes)}


def _count(state: Iterable[str], prefix: str) -> int:
    """Count the numbers that follow a prefix in the keys."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})
