"""The yardstick itself: its noise is the gradient of a log density, and it guides as a real Denoiser does."""

import numpy as np
import pytest
import torch
from analytic import CPU, Mixture, MixtureNetwork, exact_flow, gaussian, linear_schedule

from workflow_scripts.diffusion.backbone import Denoiser

SHAPE = (4, 2, 2)


def mixture() -> Mixture:
    generator = torch.Generator().manual_seed(0)
    classes = [torch.randn(k, *SHAPE, generator=generator, dtype=torch.float64) for k in (3, 2)]
    return Mixture(classes, 0.7)


@pytest.mark.parametrize("timestep", [0, 300, 999])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_noise_is_the_score(timestep: int, label: int) -> None:
    model = mixture()
    x = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    (score,) = torch.autograd.grad(model.log_density(x, timestep, label).sum(), x)
    expected = -((1 - model.abar[timestep]) ** 0.5) * score
    torch.testing.assert_close(model.noise(x.detach(), timestep, label), expected, rtol=1e-10, atol=1e-12)


def test_null_is_the_mixture_of_the_classes() -> None:
    model = mixture()
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    both = torch.stack([model.log_density(x, 200, 0), model.log_density(x, 200, 1)]).logsumexp(0)
    torch.testing.assert_close(model.log_density(x, 200, 2), both)


@pytest.mark.parametrize(("scale", "channels"), [(1.0, 4), (4.0, 3), (4.0, 4), (0.0, 4)])
def test_guides_as_denoiser_does(scale: float, channels: int) -> None:
    model = mixture()
    real = Denoiser(MixtureNetwork(model), model.abar, model.null_label, SHAPE, CPU)
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 1, 1, 0])
    mine, _ = model.predict(x, 500, labels, cfg_scale=scale, cfg_channels=channels)
    theirs, _ = real.predict(x, 500, labels, cfg_scale=scale, cfg_channels=channels)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_flow_moves_the_marginal_and_solves_its_equation() -> None:
    """d(x / sqrt(a)) = eps d(sqrt((1 - a) / a)) is the probability flow in DDIM's variables (DDIM, eq. 14)."""
    mean, std = torch.tensor([[[0.8]]], dtype=torch.float64), 1.7
    fine = linear_schedule(200_000)
    model = gaussian(mean, std, abar=fine)
    start, h = 100_000, 1
    z = torch.tensor([[[[1.3]]]], dtype=torch.float64)
    around = [exact_flow(z, mean, std, fine[start], fine[start + k]) / fine[start + k] ** 0.5 for k in (-h, h)]
    clock = [np.sqrt(1 / fine[start + k] - 1) for k in (-h, h)]
    slope = (around[1] - around[0]) / (clock[1] - clock[0])
    torch.testing.assert_close(slope, model.noise(z, start, 0), rtol=1e-8, atol=0)
    torch.testing.assert_close(exact_flow(z, mean, std, 0.3, 0.3), z)
