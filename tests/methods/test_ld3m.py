"""LD3M's reverse process: what reaches an image from its latent, and how gradients come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from analytic import CPU, dit_denoiser

from workflow_scripts.config import Chain
from workflow_scripts.diffusion.backbone import open_label_embeddings
from workflow_scripts.diffusion.schedule import offset_timesteps
from workflow_scripts.methods.ld3m import Synthesiser, chain_grid, residual_weights

LDM = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
PLAIN = {"residual": {"strength": 0.0}}
LITERAL = {"residual": {"target": "mean", "source": "noised", "schedule": "literal"}}
CODE: dict[str, Any] = {}


class Scalar:
    """The denoiser of white data of variance v: eps = sqrt(1 - abar) x / (abar v + 1 - abar); 0 if there is no variance."""

    def __init__(self, variance: float | None):
        self.abar, self.variance = LDM, variance
        self.latent_shape, self.device = (1, 1, 1), CPU
        self.calls: list[int] = []

    def predict(self, x: torch.Tensor, timestep: int, labels: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        self.calls.append(timestep)
        abar = float(self.abar[timestep])
        if self.variance is None:
            return torch.zeros_like(x), None
        return (1 - abar) ** 0.5 * x / (abar * self.variance + 1 - abar), None


class Codes:
    """An autoencoder that rounds latents, with the gradient passed straight through, and decodes as it is told."""

    def __init__(self, decode: Any = None):
        self.decode_images = decode

    def quantise(self, latents: torch.Tensor) -> torch.Tensor:
        return latents + (latents.round() - latents).detach()


class Identity(Codes):
    def quantise(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def gains(variance: float | None, steps: int, chain: dict[str, Any]) -> tuple[float, float]:
    """dz0/dZ and dz0/dxi."""
    synthesiser = Synthesiser(Scalar(variance), Identity(), Chain(steps=steps, **chain))  # type: ignore[arg-type]
    latent, noise = (torch.ones(1, 1, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z0 = synthesiser.denoise(latent, torch.zeros(1, 1, 1), noise[:, None])
    one, two = torch.autograd.grad(z0.sum(), (latent, noise))
    return float(one), float(two)


GAINS = [
    (1.0, 10, PLAIN, 0.025, 0.84),
    (1.0, 10, LITERAL, 0.027, 0.93),
    (1.0, 10, CODE, 0.970, 0.38),
    (1.0, 20, PLAIN, 0.017, 0.92),
    (1.0, 20, LITERAL, 0.018, 0.96),
    (1.0, 20, CODE, 1.223, 0.24),
    (1.0, 40, PLAIN, 0.014, 0.96),
    (1.0, 40, LITERAL, 0.015, 0.98),
    (1.0, 40, CODE, 1.337, 0.08),
    (1.0, 90, PLAIN, 0.013, 0.98),
    (1.0, 90, LITERAL, 0.013, 0.99),
    (1.0, 90, CODE, 1.208, 0.005),
    (0.5, 10, PLAIN, 0.017, 0.57),
    (0.5, 10, LITERAL, 0.023, 0.79),
    (0.5, 10, CODE, 0.840, 0.33),
    (None, 10, PLAIN, 0.999, 34.1),
    (None, 10, LITERAL, 0.042, 1.42),
    (None, 10, CODE, 0.999, 0.0),
]


@pytest.mark.parametrize(("variance", "steps", "chain", "latent", "noise"), GAINS)
def test_gains_of_the_toy_are_those_of_the_specification(
    variance: float | None, steps: int, chain: dict[str, Any], latent: float, noise: float
) -> None:
    # The specification's 90 steps are the released code's 91.
    assert gains(variance, steps, chain) == pytest.approx((latent, noise), abs=0.0055)


def test_the_residual_decays_from_one_to_zero() -> None:
    index, literal = (residual_weights(Chain(**chain).residual, 10) for chain in (CODE, LITERAL))
    assert index[-1] == 1 and index[0] == 0 and np.allclose(np.diff(index), 1 / 9)
    assert literal[-1] == 1 and literal[0] == pytest.approx(0.1)
    assert not residual_weights(Chain(**PLAIN).residual, 10).any()


def test_the_grid_has_exactly_the_steps_asked_for() -> None:
    assert chain_grid(LDM, 10).timesteps.tolist() == list(range(1, 1000, 100))
    assert chain_grid(LDM, 10).abar_previous[0] == LDM[0]
    for steps in (2, 3, 7, 15, 60, 90, 500):
        assert len(chain_grid(LDM, steps).timesteps) == steps and chain_grid(LDM, steps).timesteps[-1] < 1000
    for steps in (0, 1, 501):
        with pytest.raises(ValueError, match="choose 2 to 500"):
            offset_timesteps(1000, steps)


@pytest.mark.parametrize("steps", [2, 10])
def test_a_network_that_predicts_zero_leaves_the_quantised_latent(steps: int) -> None:
    denoiser = Scalar(None)
    synthesiser = Synthesiser(denoiser, Codes(), Chain(steps=steps))  # type: ignore[arg-type]
    latents = torch.linspace(-2, 2, 8).view(8, 1, 1, 1)
    noise = torch.randn(8, 1, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    z0 = synthesiser.denoise(latents, torch.zeros(8, 1, 1), noise)
    torch.testing.assert_close(z0, float(LDM[0]) ** 0.5 * latents.round())
    assert denoiser.calls == chain_grid(LDM, steps).timesteps[::-1].tolist()


def test_ddpm_with_the_literal_residual_is_equation_7() -> None:
    chain = Chain(steps=4, update="ddpm", ddpm_noise="variance", **LITERAL)
    synthesiser = Synthesiser(Scalar(1.0), Identity(), chain)  # type: ignore[arg-type]
    noise = torch.randn(1, 4, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latent = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    found = float(synthesiser.denoise(latent, torch.zeros(1, 1, 1), noise))

    abar, below = LDM[[1, 251, 501, 751]], LDM[[0, 1, 251, 501]]
    z = top = float(abar[3] ** 0.5 * 0.7 + (1 - abar[3]) ** 0.5 * noise[0, 0])
    for t in (4, 3, 2, 1):
        a, b = abar[t - 1], below[t - 1]
        beta = 1 - a / b
        x0 = (z - (1 - a) ** 0.5 * (1 - a) ** 0.5 * z) / a**0.5
        mean = b**0.5 * beta / (1 - a) * x0 + (1 - b) * (1 - beta) ** 0.5 / (1 - a) * z
        variance = beta * (1 - b) / (1 - a)
        z = (1 - t / 4) * mean + t / 4 * top + (variance * float(noise[0, t - 1]) if t > 1 else 0)
    assert found == pytest.approx(z, rel=1e-12)


# ---------------------------------------------------------------- gradients


def dit(**chain: Any) -> Synthesiser:
    """A random DiT with label embeddings, and a decoder that keeps three channels and leaves the range at places."""
    denoiser = dit_denoiser()
    denoiser.label_table = open_label_embeddings(denoiser.model)
    autoencoder = Codes(lambda latents: 0.6 * latents[:, :3].float())
    return Synthesiser(denoiser, autoencoder, Chain(**{"steps": 3, "cfg_scale": 2.0, **chain}), chunk=2)  # type: ignore[arg-type]


def rows(synthesiser: Synthesiser, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(count, 4, 8, 8, generator=generator)
    embeddings = synthesiser.denoiser.embed(torch.arange(count) % 3)
    noise = synthesiser.noise([("ant", index) for index in range(count)], seed=3)
    return latents, embeddings, noise, torch.randn(count, 3, 8, 8, generator=generator)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chain", [CODE, LITERAL | {"update": "ddpm"}, {"clamp": "hard"}])
def test_chunks_and_recomputation_give_the_gradient_of_one_backward_pass(
    chain: dict[str, Any], checkpointing: bool
) -> None:
    whole = dit(**chain)
    latents, embeddings, noise, gradient = rows(whole, 5)
    z, c = latents.clone().requires_grad_(), embeddings.clone().requires_grad_()
    images = Synthesiser(whole.denoiser, whole.autoencoder, whole.chain, 5, False).render(z, c, noise)
    expected = torch.autograd.grad(images, (z, c), gradient)
    assert all(part.abs().max() > 1e-4 for part in expected)
    for chunk in (2, 5):
        again = Synthesiser(whole.denoiser, whole.autoencoder, whole.chain, chunk, checkpointing)
        seen, pull_back = again.trace(latents, embeddings, noise)
        assert not seen.requires_grad
        torch.testing.assert_close(seen, images.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pull_back(gradient), expected, rtol=1e-4, atol=1e-5)


def test_gradients_agree_with_finite_differences() -> None:
    synthesiser = Synthesiser(Scalar(0.7), Identity(lambda z: z.tanh()), Chain(steps=4), chunk=1)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, *shape, 1, 1, 1, generator=generator).double() for shape in ((), (1,)))
    _, pull_back = synthesiser.trace(latents, torch.zeros(2, 1, 1).double(), noise)
    slope, nothing = pull_back(torch.ones(2, 1, 1, 1).double())
    assert not nothing.any(), "this network does not look at labels"
    high, low = (synthesiser.synthesise(latents + shift, torch.zeros(2, 1, 1), noise) for shift in (1e-5, -1e-5))
    torch.testing.assert_close(slope, (high - low) / 2e-5, rtol=1e-6, atol=1e-8)


def test_a_straight_through_clamp_moves_pixels_back_into_range() -> None:
    for clamp, slope in (("straight_through", 1.0), ("hard", 0.0)):
        autoencoder = Identity(lambda z: 3 + z)
        synthesiser = Synthesiser(Scalar(1.0), autoencoder, Chain(steps=2, clamp=clamp))  # type: ignore[arg-type]
        noise = torch.zeros(1, 1, 1, 1, 1)
        images, pull_back = synthesiser.trace(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1), noise)
        assert float(images) == 1
        assert (float(pull_back(torch.ones(1, 1, 1, 1))[0]) != 0) == bool(slope)


def test_noise_belongs_to_an_image() -> None:
    ours, theirs = [("ant", 0), ("bee", 1)], [("bee", 1), ("cat", 5)]
    fixed, fresh = dit(), dit(noise="resample")
    assert torch.equal(fixed.noise(ours, 0)[1], fixed.noise(theirs, 0)[0])
    assert torch.equal(fixed.noise(ours, 0), fixed.noise(ours, 0, 7))
    assert torch.equal(fresh.noise(ours, 0), fixed.noise(ours, 0)), "what is saved is the image of the seed's noise"
    assert not torch.equal(fresh.noise(ours, 0, 7), fresh.noise(ours, 0, 8))
    assert fixed.noise(ours, 0).shape == (2, 1, 4, 8, 8) and dit(update="ddpm").noise(ours, 0).shape == (2, 3, 4, 8, 8)


def test_the_embedding_in_use_is_the_one_that_is_learned() -> None:
    """Guidance needs the null embedding, which must not receive a gradient or be moved."""
    synthesiser = dit()
    latents, embeddings, noise, gradient = rows(synthesiser, 2)
    before = synthesiser.denoiser.label_table.clone()  # type: ignore[union-attr]
    _, pull_back = synthesiser.trace(latents, embeddings, noise)
    assert pull_back(gradient)[1].abs().min() > 0
    assert torch.equal(before, synthesiser.denoiser.label_table)  # type: ignore[arg-type]
    labels = torch.arange(2)
    by_label, by_embedding = (
        synthesiser.denoiser.predict(latents, 500, told, cfg_scale=2.0, cfg_channels=4)[0]
        for told in (labels, synthesiser.denoiser.embed(labels))
    )
    torch.testing.assert_close(by_label, by_embedding)
