"""Published one-file checkpoints: their equations, written out here once more, and their true shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from analytic import CPU, linear_schedule
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, VQModel
from safetensors.torch import save_file

from workflow_scripts.diffusion import original
from workflow_scripts.diffusion.backbone import Autoencoder, Denoiser
from workflow_scripts.errors import BackboneError

State = dict[str, torch.Tensor]
Make = Callable[..., torch.Tensor]


def on_meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def drawing(seed: int = 0) -> Make:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.5 / math.sqrt(math.prod(shape[1:]) or 1)

    return draw


def linear(make: Make, name: str, rows: int, columns: int, bias: bool = True) -> State:
    return {f"{name}.weight": make(rows, columns)} | ({f"{name}.bias": make(rows)} if bias else {})


def norm(make: Make, name: str, channels: int) -> State:
    return {f"{name}.weight": make(channels), f"{name}.bias": make(channels)}


def conv(make: Make, name: str, rows: int, columns: int, side: int = 3) -> State:
    return {f"{name}.weight": make(rows, columns, side, side), f"{name}.bias": make(rows)}


# ---------------------------------------------------------------- DiT


def position(width: int, side: int) -> torch.Tensor:
    """DiT's fixed embedding of places (1, side^2, width): half of it for the column, half for the row."""
    rates = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    row, column = np.divmod(np.arange(side * side), side)
    parts = [f(np.outer(place, rates)) for place in (column, row) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float()[None]


def dit_state(make: Make, width: int, depth: int, side: int, classes: int = 1000, patch: int = 2) -> State:
    """A DiT checkpoint of latents with 4 channels and variance, as its authors name things."""
    pos = make(1, (side // patch) ** 2, width)
    state = {"pos_embed": pos if pos.is_meta else position(width, side // patch)}
    state |= conv(make, "x_embedder.proj", width, 4, patch)
    state |= linear(make, "t_embedder.mlp.0", width, 256) | linear(make, "t_embedder.mlp.2", width, width)
    state |= linear(make, "y_embedder.embedding_table", classes + 1, width, bias=False)
    for block in (f"blocks.{number}" for number in range(depth)):
        state |= linear(make, f"{block}.attn.qkv", 3 * width, width) | linear(make, f"{block}.attn.proj", width, width)
        state |= linear(make, f"{block}.mlp.fc1", 4 * width, width) | linear(make, f"{block}.mlp.fc2", width, 4 * width)
        state |= linear(make, f"{block}.adaLN_modulation.1", 6 * width, width)
    state |= linear(make, "final_layer.linear", patch * patch * 8, width)
    return state | linear(make, "final_layer.adaLN_modulation.1", 2 * width, width)


def reference_dit(state: State, x: torch.Tensor, time: torch.Tensor, label: torch.Tensor, heads: int) -> torch.Tensor:
    """DiT's equations (its section 3.2), from the weights alone."""

    def apply(name: str, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def modulated(inputs: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        mean, variance = inputs.mean(-1, keepdim=True), inputs.var(-1, unbiased=False, keepdim=True)
        return (inputs - mean) / (variance + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]

    width, _, patch, _ = state["x_embedder.proj.weight"].shape
    tokens = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    side = tokens.shape[-1]
    tokens = tokens.flatten(2).transpose(1, 2) + state["pos_embed"]
    angles = time[:, None] * 10000 ** (-torch.arange(128) / 128)
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    condition = apply("t_embedder.mlp.2", F.silu(apply("t_embedder.mlp.0", waves)))
    condition = F.silu(condition + state["y_embedder.embedding_table.weight"][label])
    for number in range(len({key.split(".")[1] for key in state if key.startswith("blocks.")})):
        block = f"blocks.{number}"
        shift, scale, gate, shift2, scale2, gate2 = apply(f"{block}.adaLN_modulation.1", condition).chunk(6, dim=1)
        qkv = apply(f"{block}.attn.qkv", modulated(tokens, shift, scale))
        q, k, v = qkv.unflatten(-1, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1) @ v
        tokens = tokens + gate[:, None] * apply(f"{block}.attn.proj", mixed.transpose(1, 2).flatten(2))
        inner = F.gelu(apply(f"{block}.mlp.fc1", modulated(tokens, shift2, scale2)), approximate="tanh")
        tokens = tokens + gate2[:, None] * apply(f"{block}.mlp.fc2", inner)
    shift, scale = apply("final_layer.adaLN_modulation.1", condition).chunk(2, dim=1)
    out = apply("final_layer.linear", modulated(tokens, shift, scale))
    out = out.unflatten(-1, (patch, patch, 8)).unflatten(1, (side, side))
    return out.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 8, side * patch, side * patch)


@pytest.fixture(scope="module")
def dit_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    state = dit_state(drawing(), width=384, depth=2, side=8, classes=5)
    path = tmp_path_factory.mktemp("dit") / "small.pt"
    torch.save(state, path)
    return path, state


X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([4, 0, 5])


@pytest.mark.parametrize("time", [0, 17, 999])
def test_a_converted_dit_follows_its_authors_equations(time: int, dit_file: tuple[Path, State]) -> None:
    path, state = dit_file
    denoiser = Denoiser.load(path, CPU, torch.float32)
    eps, raw = denoiser.predict(X, time, LABELS, cfg_scale=1.0, cfg_channels=4)
    expected = reference_dit(state, X, torch.full((3,), float(time)), LABELS, heads=6)
    assert raw is not None
    torch.testing.assert_close(torch.cat([eps, raw], dim=1), expected, atol=1e-4, rtol=1e-4)
    assert float(expected.std()) > 0.1


def test_diffusers_own_dit_spaces_its_frequencies_differently(dit_file: tuple[Path, State]) -> None:
    """The same weights as a diffusers directory are another network: a reason to say which of the two was used."""
    path, state = dit_file
    model = DiTTransformer2DModel(**original.dit_config(state, path)).eval()
    model.load_state_dict(original.convert_dit(state))
    time = torch.full((3,), 500)
    expected = reference_dit(state, X, time.float(), LABELS, heads=6)
    with torch.inference_mode():
        plain = model(X, time, LABELS).sample
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        corrected = model(X, time, LABELS).sample
    assert float((plain - expected).std() / expected.std()) > 0.01
    torch.testing.assert_close(corrected, expected, atol=1e-4, rtol=1e-4)


def test_a_converted_dit_knows_its_schedule_labels_and_shape(dit_file: tuple[Path, State]) -> None:
    denoiser = Denoiser.load(dit_file[0], CPU, torch.bfloat16)
    assert (denoiser.null_label, denoiser.latent_shape) == (5, (4, 8, 8))
    assert denoiser.label_table is not None and denoiser.label_table.shape == (6, 1, 384), "one table for all blocks"
    np.testing.assert_allclose(denoiser.abar, linear_schedule(), rtol=1e-5)
    assert {parameter.dtype for parameter in denoiser.model.parameters()} == {torch.bfloat16}


def test_the_averaged_weights_of_a_training_checkpoint(dit_file: tuple[Path, State], tmp_path: Path) -> None:
    _, state = dit_file
    torch.save({"model": {}, "ema": state}, tmp_path / "0400000.pt")
    save_file(state, tmp_path / "small.safetensors")
    for name in ("0400000.pt", "small.safetensors"):
        read = original.read_state(tmp_path / name)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], value) for key, value in state.items())


@pytest.mark.parametrize("side", [32, 64])
def test_the_true_shapes_of_dit_xl_2(side: int) -> None:
    state = dit_state(on_meta, width=1152, depth=28, side=side)
    config = original.dit_config(state, Path("DiT.pt"))
    assert (config["sample_size"], config["num_layers"], config["num_attention_heads"]) == (side, 28, 16)
    fits(DiTTransformer2DModel, config, original.convert_dit(state))
    assert len(state) == 292
    learned = sum(tensor.numel() for key, tensor in state.items() if key != "pos_embed")
    assert learned + 256 * 1152 == 675_129_632, "what DiT's code prints at 256 pixels, position embedding included"


def fits(kind: Any, config: Mapping[str, Any], converted: Mapping[str, torch.Tensor]) -> None:
    """Every tensor of the module is there, in its shape, and no other."""
    with torch.device("meta"):
        wanted = {key: tensor.shape for key, tensor in kind(**config).state_dict().items()}
    assert {key: tensor.shape for key, tensor in converted.items()} == wanted


# ---------------------------------------------------------------- latent diffusion


def residual(make: Make, name: str, inputs: int, outputs: int, time: int) -> State:
    state = norm(make, f"{name}.in_layers.0", inputs) | conv(make, f"{name}.in_layers.2", outputs, inputs)
    state |= linear(make, f"{name}.emb_layers.1", outputs, time)
    state |= norm(make, f"{name}.out_layers.0", outputs) | conv(make, f"{name}.out_layers.3", outputs, outputs)
    return state | (conv(make, f"{name}.skip_connection", outputs, inputs, 1) if inputs != outputs else {})


def attention(make: Make, name: str, width: int, context: int) -> State:
    block = f"{name}.transformer_blocks.0"
    state = norm(make, f"{name}.norm", width)
    state |= conv(make, f"{name}.proj_in", width, width, 1) | conv(make, f"{name}.proj_out", width, width, 1)
    for number, source in ((1, width), (2, context)):
        state |= linear(make, f"{block}.attn{number}.to_q", width, width, bias=False)
        for what in "kv":
            state |= linear(make, f"{block}.attn{number}.to_{what}", width, source, bias=False)
        state |= linear(make, f"{block}.attn{number}.to_out.0", width, width)
    state |= linear(make, f"{block}.ff.net.0.proj", 8 * width, width) | linear(
        make, f"{block}.ff.net.2", width, 4 * width
    )
    for number in (1, 2, 3):
        state |= norm(make, f"{block}.norm{number}", width)
    return state


def ldm_unet(make: Make, base: int, multiples: tuple[int, ...], context: int) -> State:
    """CompVis' U-Net with 2 residual blocks a level and attention on every level but the first."""
    name, time = original.UNET.removesuffix("."), 4 * base
    state = linear(make, f"{name}.time_embed.0", time, base) | linear(make, f"{name}.time_embed.2", time, time)
    state |= conv(make, f"{name}.input_blocks.0.0", base, 3)
    skips, width, place = [base], base, 1
    for level, multiple in enumerate(multiples):
        for _ in range(2):
            state |= residual(make, f"{name}.input_blocks.{place}.0", width, base * multiple, time)
            width = base * multiple
            state |= attention(make, f"{name}.input_blocks.{place}.1", width, context) if level else {}
            skips.append(width)
            place += 1
        if level < len(multiples) - 1:
            state |= conv(make, f"{name}.input_blocks.{place}.0.op", width, width)
            skips.append(width)
            place += 1
    state |= residual(make, f"{name}.middle_block.0", width, width, time)
    state |= attention(make, f"{name}.middle_block.1", width, context)
    state |= residual(make, f"{name}.middle_block.2", width, width, time)
    place = 0
    for level, multiple in reversed(list(enumerate(multiples))):
        for number in range(3):
            block = f"{name}.output_blocks.{place}"
            state |= residual(make, f"{block}.0", width + skips.pop(), base * multiple, time)
            width = base * multiple
            state |= attention(make, f"{block}.1", width, context) if level else {}
            if level and number == 2:
                state |= conv(make, f"{block}.2.conv", width, width)
            place += 1
    return state | norm(make, f"{name}.out.0", width) | conv(make, f"{name}.out.2", 3, width)


def ldm_autoencoder(make: Make, base: int, multiples: tuple[int, ...], codes: int) -> State:
    """CompVis' VQ autoencoder with 2 residual blocks a level and attention in the middle."""

    def block(name: str, inputs: int, outputs: int) -> State:
        state = norm(make, f"{name}.norm1", inputs) | conv(make, f"{name}.conv1", outputs, inputs)
        state |= norm(make, f"{name}.norm2", outputs) | conv(make, f"{name}.conv2", outputs, outputs)
        return state | (conv(make, f"{name}.nin_shortcut", outputs, inputs, 1) if inputs != outputs else {})

    def middle(name: str, width: int) -> State:
        state = block(f"{name}.block_1", width, width) | block(f"{name}.block_2", width, width)
        state |= norm(make, f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            state |= conv(make, f"{name}.attn_1.{part}", width, width, 1)
        return state

    name, width = original.FIRST_STAGE.removesuffix("."), base
    state = conv(make, f"{name}.encoder.conv_in", base, 3)
    for level, multiple in enumerate(multiples):
        for number in range(2):
            state |= block(f"{name}.encoder.down.{level}.block.{number}", width, base * multiple)
            width = base * multiple
        if level < len(multiples) - 1:
            state |= conv(make, f"{name}.encoder.down.{level}.downsample.conv", width, width)
    state |= middle(f"{name}.encoder.mid", width) | norm(make, f"{name}.encoder.norm_out", width)
    state |= conv(make, f"{name}.encoder.conv_out", 3, width)
    state |= conv(make, f"{name}.decoder.conv_in", width, 3) | middle(f"{name}.decoder.mid", width)
    for level, multiple in reversed(list(enumerate(multiples))):
        for number in range(3):
            state |= block(f"{name}.decoder.up.{level}.block.{number}", width, base * multiple)
            width = base * multiple
        if level:
            state |= conv(make, f"{name}.decoder.up.{level}.upsample.conv", width, width)
    state |= norm(make, f"{name}.decoder.norm_out", width) | conv(make, f"{name}.decoder.conv_out", 3, width)
    state |= conv(make, f"{name}.quant_conv", 3, 3, 1) | conv(make, f"{name}.post_quant_conv", 3, 3, 1)
    return state | {f"{name}.quantize.embedding.weight": make(codes, 3), f"{name}.loss.perceptual.lin0": make(1, 4)}


def cin256(make: Make = on_meta) -> State:
    """cin256-v2: the U-Net of 64x64 latents, VQ-f4, and embeddings of 1000 classes and none (ld3m.md, 2)."""
    state = ldm_unet(make, 192, (1, 2, 3, 5), 512) | ldm_autoencoder(make, 128, (1, 2, 4), 8192)
    return state | {original.LABEL_EMBEDDING: make(1001, 512), "betas": make(1000)}


def test_the_true_shapes_of_cin256() -> None:
    state = cin256()
    config = original.unet_config(state)
    assert config["block_out_channels"] == (192, 384, 576, 960)
    assert config["down_block_types"] == ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3)
    assert (config["cross_attention_dim"], config["layers_per_block"]) == (512, 2)
    fits(UNet2DConditionModel, config, original.convert_unet(state, config))
    config = original.vq_config(state)
    assert (config["block_out_channels"], config["num_vq_embeddings"]) == ((128, 256, 512), 8192)
    fits(VQModel, config, original.convert_vq(state, config))


@pytest.fixture(scope="module")
def ldm_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    make = drawing(1)
    state = ldm_unet(make, 32, (1, 2), 16) | ldm_autoencoder(make, 32, (1, 2, 2), 64)
    path = tmp_path_factory.mktemp("ldm") / "model.safetensors"
    save_file(state | {original.LABEL_EMBEDDING: make(4, 16)}, path)
    yield path


def test_a_latent_diffusion_checkpoint_runs(ldm_file: Path) -> None:
    denoiser = Denoiser.load(ldm_file, CPU, torch.float32)
    assert (denoiser.null_label, denoiser.latent_shape) == (3, (3, 64, 64))
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    np.testing.assert_allclose(denoiser.abar, np.cumprod(1 - betas), rtol=1e-4)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    eps, raw = denoiser.predict(x, 500, torch.tensor([0, 2]), cfg_scale=2.0, cfg_channels=3)
    assert (eps.shape, raw) == (x.shape, None)
    autoencoder = Autoencoder.load(ldm_file, CPU, torch.float32)
    assert autoencoder.scaling_factor == 1
    mean, _ = autoencoder.encode(np.zeros((1, 16, 16, 3), np.uint8))
    assert mean.shape == (1, 3, 4, 4)
    assert autoencoder.decode(mean).shape == (1, 16, 16, 3)
    assert Denoiser.load(ldm_file, CPU, torch.float32, side=32).latent_shape == (3, 32, 32)
    assert (original.describe(ldm_file)["denoiser"], original.describe(ldm_file)["multiple"]) == ("unet", 2)


# ---------------------------------------------------------------- refusals


class Callback:
    """Something that a training framework leaves in its checkpoints."""


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": Callback()}, path)
    with pytest.raises(BackboneError, match="save its tensors as safetensors") as caught:
        original.read_state(path)
    assert str(path.with_suffix(".safetensors")) in str(caught.value)
    command = str(caught.value).split('-c "')[1].split('"')[0]
    compile(command, "command", "exec")


def test_damaged_and_foreign_files_are_named(tmp_path: Path, dit_file: tuple[Path, State]) -> None:
    whole, state = dit_file
    for name in ("short.pt", "short.safetensors"):
        (tmp_path / name).write_bytes(whole.read_bytes()[:5000])
        with pytest.raises(BackboneError, match=name):
            original.read_state(tmp_path / name)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(BackboneError, match="neither a DiT checkpoint"):
        original.describe(tmp_path / "other.pt")
    torch.save({key: value for key, value in state.items() if "fc1" not in key}, tmp_path / "holes.pt")
    with pytest.raises(BackboneError, match=r"holes\.pt: does not fit DiTTransformer2DModel"):
        Denoiser.load(tmp_path / "holes.pt", CPU, torch.float32)
    torch.save(state | {"pos_embed": state["pos_embed"] + 0.01}, tmp_path / "learned.pt")
    with pytest.raises(BackboneError, match="pos_embed"):
        Denoiser.load(tmp_path / "learned.pt", CPU, torch.float32)
    with pytest.raises(BackboneError, match=r"backbone\.vae"):
        Autoencoder.load(whole, CPU, torch.float32)
    assert json.dumps(original.describe(whole))
