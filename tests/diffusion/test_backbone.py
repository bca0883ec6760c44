from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from analytic import CPU, Mixture, MixtureNetwork, dit_denoiser, linear_schedule
from diffusers import DDIMScheduler
from torch import nn

from workflow_scripts.config import FitVAE
from workflow_scripts.diffusion.backbone import Autoencoder, Denoiser, open_label_embeddings, to_unit
from workflow_scripts.diffusion.fit import build_vae
from workflow_scripts.errors import BackboneError


class Affine(nn.Module):
    """eps = x + 10 label + time / 1000, variance channels = label: every part of the answer can be told apart."""

    def __init__(self, variance: bool = True, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros((), dtype=dtype))
        self.variance = variance
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        assert x.dtype == self.anchor.dtype
        assert len(x) == len(timestep) == len(labels)
        self.seen.append(labels)
        label = labels.view(-1, 1, 1, 1).to(x)
        eps = x + 10 * label + timestep.view(-1, 1, 1, 1).to(x) / 1000
        return SimpleNamespace(sample=torch.cat([eps, label.expand_as(eps)], 1) if self.variance else eps)


def around(model: nn.Module) -> Denoiser:
    return Denoiser(model, linear_schedule(), 7, (4, 2, 2), CPU)


X = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
WIDE = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([2, 0, 5])
OWN = 10.0 * LABELS.view(3, 1, 1, 1)


def test_scale_one_never_asks_for_the_null_class() -> None:
    model = Affine()
    eps, raw = around(model).predict(X, 500, LABELS, cfg_scale=1.0, cfg_channels=3)
    assert [labels.tolist() for labels in model.seen] == [LABELS.tolist()]
    torch.testing.assert_close(eps, X + OWN + 0.5)
    assert raw is not None
    torch.testing.assert_close(raw, (OWN / 10).expand_as(X))


@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_guidance_extrapolates_the_leading_channels(scale: float, channels: int) -> None:
    model = Affine()
    eps, raw = around(model).predict(X, 500, LABELS, cfg_scale=scale, cfg_channels=channels)
    null = 70.0
    guided = X + null + scale * (OWN - null) + 0.5
    torch.testing.assert_close(eps[:, :channels], guided[:, :channels])
    torch.testing.assert_close(eps[:, channels:], (X + OWN + 0.5)[:, channels:])
    torch.testing.assert_close(raw, (OWN / 10).expand_as(X))  # the class's variance, not the null's
    assert [sorted(labels.tolist()) for labels in model.seen] == [sorted([*LABELS.tolist(), 7, 7, 7])]


def test_a_network_without_variance_channels() -> None:
    for scale in (1.0, 4.0):
        eps, raw = around(Affine(variance=False)).predict(X, 0, LABELS, cfg_scale=scale, cfg_channels=4)
        assert raw is None
        assert eps.shape == X.shape


def test_half_precision_networks_answer_in_float32() -> None:
    eps, raw = around(Affine(dtype=torch.bfloat16)).predict(X, 0, LABELS, cfg_scale=4.0, cfg_channels=3)
    assert eps.dtype == torch.float32
    assert raw is not None and raw.dtype == torch.float32


def test_a_dit_sees_its_timestep_label_and_null() -> None:
    denoiser = dit_denoiser(classes=3)
    x, labels = WIDE[:2], torch.tensor([0, 2])
    one, raw = denoiser.predict(x, 500, labels, cfg_scale=1.0, cfg_channels=4)
    null, _ = denoiser.predict(x, 500, torch.full_like(labels, denoiser.null_label), cfg_scale=1.0, cfg_channels=4)
    four, raw_four = denoiser.predict(x, 500, labels, cfg_scale=4.0, cfg_channels=3)
    torch.testing.assert_close(four[:, :3], (null + 4 * (one - null))[:, :3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(four[:, 3], one[:, 3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raw_four, raw, rtol=1e-4, atol=1e-5)
    assert float((one - null).abs().max()) > 1e-3
    other, _ = denoiser.predict(x, 501, labels, cfg_scale=1.0, cfg_channels=4)
    assert float((one - other).abs().max()) > 1e-4


def test_rows_of_a_batch_do_not_meet() -> None:
    denoiser = dit_denoiser()
    x, labels = WIDE, torch.tensor([0, 2, 1, 1, 0])
    together, _ = denoiser.predict(x, 300, labels, cfg_scale=4.0, cfg_channels=3)
    for row in range(5):
        alone, _ = denoiser.predict(x[row : row + 1], 300, labels[row : row + 1], cfg_scale=4.0, cfg_channels=3)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


def test_the_mixture_network_is_asked_for_every_row() -> None:
    mixture = Mixture([X[:2], X[2:]], 0.5)
    network = MixtureNetwork(mixture)
    denoiser = Denoiser(network, mixture.abar, mixture.null_label, (4, 2, 2), CPU)
    denoiser.predict(X, 123, torch.tensor([1, 0, 1]), cfg_scale=2.0, cfg_channels=4)
    assert network.seen == [(123, [1, 0, 1, 2, 2, 2])]


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone")
    dit_denoiser(classes=3).model.save_pretrained(path / "transformer", safe_serialization=True)
    vae = build_vae(FitVAE(channels=(8, 8), latent_channels=4), 16)
    vae.register_to_config(scaling_factor=0.25)
    vae.save_pretrained(path / "vae", safe_serialization=True)
    DDIMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear").save_pretrained(path / "scheduler")
    return path


def test_loading_gives_what_was_saved(saved: Path) -> None:
    denoiser, memory = Denoiser.load(saved, CPU, torch.float32), dit_denoiser(classes=3)
    assert (denoiser.null_label, denoiser.latent_shape) == (3, (4, 8, 8))
    assert not denoiser.model.training
    assert not any(parameter.requires_grad for parameter in denoiser.model.parameters())
    x, labels = WIDE[:2], torch.tensor([0, 2])
    for mine, theirs in zip(
        denoiser.predict(x, 10, labels, cfg_scale=4.0, cfg_channels=3),
        memory.predict(x, 10, labels, cfg_scale=4.0, cfg_channels=3),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_loaded_schedule_is_the_linear_one(saved: Path) -> None:
    denoiser = Denoiser.load(saved, CPU, torch.float32)
    assert denoiser.abar.dtype == np.float64
    np.testing.assert_allclose(denoiser.abar, linear_schedule(), rtol=1e-6)
    # diffusers multiplies in float32, which leaves 1 - abar uncertain by 6e-8: 2e-4 of the first timestep's 1e-4.
    np.testing.assert_allclose(1 - denoiser.abar, 1 - linear_schedule(), rtol=1e-3)


def test_bfloat16_weights(saved: Path) -> None:
    denoiser = Denoiser.load(saved, CPU, torch.bfloat16)
    assert next(denoiser.model.parameters()).dtype == torch.bfloat16
    eps, _ = denoiser.predict(WIDE[:2], 10, torch.tensor([0, 2]), cfg_scale=4.0, cfg_channels=3)
    assert eps.dtype == torch.float32


def test_a_missing_part_is_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="transformer"):
        Denoiser.load(tmp_path, CPU, torch.float32)
    with pytest.raises(BackboneError, match="vae"):
        Autoencoder.load(tmp_path, CPU, torch.float32)


def test_other_predictions_are_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "transformer").symlink_to(saved / "transformer")
    (tmp_path / "scheduler").mkdir()
    config = json.loads((saved / "scheduler" / "scheduler_config.json").read_text())
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(config | {"prediction_type": "v_prediction"})
    )
    with pytest.raises(BackboneError, match="v_prediction"):
        Denoiser.load(tmp_path, CPU, torch.float32)


# ---------------------------------------------------------------- pixels


def test_pixels_to_unit_range() -> None:
    pixels = np.zeros((2, 3, 4, 3), np.uint8)
    pixels[1, 2, 3] = (255, 127, 128)
    unit = to_unit(pixels, CPU)
    assert (unit.shape, unit.dtype) == ((2, 3, 3, 4), torch.float32)
    assert float(unit.min()) == -1
    torch.testing.assert_close(unit[1, :, 2, 3], torch.tensor([1.0, -1 / 255, 1 / 255]))


class Identity(nn.Module):
    """An autoencoder that changes nothing, with diffusers' interface."""

    dtype = torch.float32
    config = SimpleNamespace(scaling_factor=0.5)

    def encode(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=x, logvar=x - 1))

    def decode(self, z: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=z)


def test_decoding_inverts_encoding_for_all_pixel_values() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    pixels[..., 1] = pixels[..., 1].T.reshape(1, 16, 16)
    autoencoder = Autoencoder(Identity(), CPU)
    mean, logvar = autoencoder.encode(pixels)
    assert torch.equal(logvar, mean - 1)
    np.testing.assert_array_equal(autoencoder.decode(mean * autoencoder.scaling_factor), pixels)
    np.testing.assert_array_equal(autoencoder.decode(mean * 0 + 9.0), np.full_like(pixels, 255))
    np.testing.assert_array_equal(autoencoder.decode(mean * 0 - 9.0), np.zeros_like(pixels))


def test_decoding_rounds_to_the_nearest_value() -> None:
    values = torch.tensor([0.4, 0.6, 99.6, 100.4, 254.4, 254.6]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    pixels = Autoencoder(Identity(), CPU).decode((values / 127.5 - 1) * 0.5)
    assert pixels[0, 0, :, 0].tolist() == [0, 1, 100, 100, 254, 255]


def test_encoding_does_not_depend_on_the_batch(saved: Path) -> None:
    autoencoder = Autoencoder.load(saved, CPU, torch.float32)
    assert autoencoder.scaling_factor == 0.25
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    mean, logvar = autoencoder.encode(pixels)
    assert mean.shape == logvar.shape == (5, 4, 8, 8)
    for row in range(5):
        alone, _ = autoencoder.encode(pixels[row : row + 1])
        torch.testing.assert_close(mean[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert autoencoder.decode(mean * autoencoder.scaling_factor).shape == (5, 16, 16, 3)


# ---------------------------------------------------------------- label embeddings


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_labels_embedding_stands_for_the_label(scale: float) -> None:
    """To the bit; a table per block, as in diffusers' DiT, and one table for all, as in converted checkpoints."""
    own = dit_denoiser(3)
    shared = dit_denoiser(3)
    first = shared.model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    for block in shared.model.transformer_blocks:
        block.norm1.emb.class_embedder.embedding_table.weight = first
    shared.label_table = open_label_embeddings(shared.model)
    for denoiser, tables in ((own, len(own.model.transformer_blocks)), (shared, 1)):
        labels = torch.tensor([2, 0, 1])
        assert denoiser.embed(labels).shape[:2] == (3, tables)
        x = WIDE[:3]
        plain, _ = denoiser.predict(x, 400, labels, cfg_scale=scale, cfg_channels=3)
        told, _ = denoiser.predict(x, 400, denoiser.embed(labels), cfg_scale=scale, cfg_channels=3)
        assert torch.equal(plain, told)
        null = denoiser.embed(torch.full_like(labels, denoiser.null_label))
        again, _ = denoiser.predict(x, 400, labels, cfg_scale=scale, cfg_channels=3)
        given, _ = denoiser.predict(x, 400, denoiser.embed(labels), cfg_scale=scale, cfg_channels=3, null=null)
        assert torch.equal(again, given)


def test_another_null_embedding_moves_the_guidance() -> None:
    denoiser = dit_denoiser(3)
    labels = torch.tensor([2, 0, 1])
    table = denoiser.embed(labels)
    eps, _ = denoiser.predict(WIDE[:3], 400, table, cfg_scale=3.0, cfg_channels=3, null=table)
    own, _ = denoiser.predict(WIDE[:3], 400, labels, cfg_scale=1.0, cfg_channels=3)
    torch.testing.assert_close(eps, own)


def test_gradients_reach_the_latents_and_the_embeddings() -> None:
    denoiser = dit_denoiser(3)
    x = WIDE[:3].clone().requires_grad_()
    table = denoiser.embed(torch.tensor([2, 0, 1])).detach().requires_grad_()
    eps, _ = denoiser.predict(x, 400, table, cfg_scale=3.0, cfg_channels=3)
    eps.square().sum().backward()
    for grad in (x.grad, table.grad):
        assert grad is not None
        assert bool((grad.flatten(1).abs().sum(1) > 0).all())
