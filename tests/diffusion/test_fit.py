from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from analytic import CPU, linear_schedule
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from workflow_scripts.config import Fit, FitDiT, FitVAE
from workflow_scripts.diffusion import fit as module
from workflow_scripts.diffusion.backbone import Autoencoder, Denoiser
from workflow_scripts.diffusion.checkpoint import read_labels
from workflow_scripts.diffusion.fit import Process, build_dit, build_vae, fit_backbone

CLASSES = ["eight", "nine"]
TINY = Fit(
    vae=FitVAE(channels=(8, 8), latent_channels=2, steps=5, batch_size=4),
    dit=FitDiT(layers=1, heads=2, head_dim=8, steps=7, batch_size=6, warmup=2, ema=0.9, weight_decay=0.01),
    checkpoint_every=2,
)
WEIGHTS = ("transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors")


def images() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), random.integers(0, 2, 20)


def fit_into(directory: Path, fit: Fit = TINY) -> Path:
    pixels, labels = images()
    fit_backbone(pixels, labels, CLASSES, fit, CPU, directory / "work", directory / "out")
    return directory / "out"


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Return the weights that a fit saved, in fp16."""
    return {f"{name}:{key}": value for name in WEIGHTS for key, value in load_file(out / name).items()}


def states(out: Path) -> dict[str, torch.Tensor]:
    """Return what a fit's last checkpoints hold, in float32: weights, their averages and the optimizer's moments."""
    files = sorted((out.parent / "work").glob("*.safetensors"))
    return {f"{file.stem}:{key}": value for file in files for key, value in load_file(file).items()}


def assert_same_fit(out: Path, reference: Path) -> None:
    mine, theirs = states(out) | weights(out), states(reference) | weights(reference)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_into(tmp_path_factory.mktemp("fit"))


# ---------------------------------------------------------------- a whole fit


def test_a_fit_is_what_the_loaders_read(fitted: Path) -> None:
    denoiser = Denoiser.load(fitted, CPU, torch.float32)
    autoencoder = Autoencoder.load(fitted, CPU, torch.float32)
    assert (denoiser.null_label, denoiser.latent_shape) == (2, (2, 4, 4))
    assert read_labels(fitted) == {"eight": 0, "nine": 1}
    np.testing.assert_allclose(denoiser.abar, linear_schedule(), rtol=1e-6)
    mean, _ = autoencoder.encode(images()[0])
    eps, raw = denoiser.predict(
        mean * autoencoder.scaling_factor, 500, torch.from_numpy(images()[1]), cfg_scale=4.0, cfg_channels=3
    )
    assert torch.isfinite(eps).all()
    assert raw is not None and raw.shape == eps.shape == mean.shape
    assert all(value.dtype == torch.float16 for value in weights(fitted).values() if value.is_floating_point())


def test_scaling_factor_gives_latents_of_unit_spread(fitted: Path) -> None:
    autoencoder = Autoencoder.load(fitted, CPU, torch.float32)
    mean, logvar = autoencoder.encode(images()[0])
    spread = (mean.var(unbiased=False) + logvar.exp().mean()).sqrt() * autoencoder.scaling_factor
    assert float(spread) == pytest.approx(
        1, rel=0.1
    )  # of a sample of 640 values, from weights that were rounded to fp16


def test_both_networks_moved(fitted: Path) -> None:
    """The denoiser's output layer starts at zero, and the autoencoder's weights at the seed's."""
    assert all(float(value.abs().max()) > 0 for key, value in weights(fitted).items() if "proj_out_2" in key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY.seed)
        untrained = build_vae(TINY.vae, 8).half().state_dict()
    trained = load_file(fitted / WEIGHTS[1])
    assert untrained.keys() == trained.keys()
    assert not any(torch.equal(untrained[key], trained[key]) for key in trained if key.endswith("conv_in.weight"))


def test_the_averaged_weights_are_kept(fitted: Path) -> None:
    last, saved = states(fitted), weights(fitted)
    for part, file in (("transformer", WEIGHTS[0]), ("vae", WEIGHTS[1])):
        keys = [key.removeprefix(f"{file}:") for key in saved if key.startswith(file)]
        assert keys
        for key in keys:
            assert torch.equal(saved[f"{file}:{key}"], last[f"{part}:average.{key}"].to(saved[f"{file}:{key}"].dtype))
        assert any(not torch.equal(last[f"{part}:model.{key}"], last[f"{part}:average.{key}"]) for key in keys)


def test_the_average_leaves_the_start_behind_quickly(tmp_path: Path) -> None:
    """Update k decays by min(ema, (k + 1) / (k + 10)): after the first, 0.9 of a weight is new; this one began at 0."""
    one = TINY.model_copy(update={"dit": TINY.dit.model_copy(update={"steps": 1})})
    last = states(fit_into(tmp_path, one))
    moved = last["transformer:model.proj_out_2.weight"]
    assert float(moved.abs().max()) > 0
    torch.testing.assert_close(last["transformer:average.proj_out_2.weight"], 0.9 * moved)


def test_a_fit_depends_on_its_seed_alone(fitted: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = fit_into(tmp_path / "again")
    assert torch.equal(before, torch.get_rng_state())
    assert_same_fit(again, fitted)
    other = fit_into(tmp_path / "other", TINY.model_copy(update={"seed": 1}))
    with pytest.raises(AssertionError):
        assert_same_fit(other, fitted)


class Killed(BaseException):
    """A signal, as far as the fit can tell."""


@pytest.mark.parametrize("call", [1, 3, 4, 6, 8, 10, 12], ids=lambda call: f"update {call}")
def test_a_killed_fit_resumes_to_the_same_weights(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The autoencoder makes updates 1 to 5, the denoiser 6 to 12; both save every second one and the last."""
    made, clip = 0, torch.nn.utils.clip_grad_norm_

    def clip_or_die(*arguments: object) -> torch.Tensor:
        nonlocal made
        made += 1
        if made == call:
            raise Killed
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_or_die)
    with pytest.raises(Killed):
        fit_into(tmp_path)
    assert not (tmp_path / "out" / "labels.json").exists()
    resumed = fit_into(tmp_path)
    lost = {1: 1, 3: 1, 4: 2, 6: 1, 8: 1, 10: 1, 12: 1}[call]
    assert made == 12 + lost, "the second fit repeats only what came after the last checkpoint"
    assert_same_fit(resumed, fitted)


def test_a_kill_while_saving_keeps_the_checkpoint_before(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves, save = 0, module.save_file

    def save_half(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        nonlocal saves
        saves += 1
        if saves == 5:
            Path(path).write_bytes(b"half a file")
            raise Killed
        save(tensors, path, metadata)

    monkeypatch.setattr(module, "save_file", save_half)
    with pytest.raises(Killed):
        fit_into(tmp_path)
    assert_same_fit(fit_into(tmp_path), fitted)


def test_a_diverging_fit_says_so(tmp_path: Path) -> None:
    wild = TINY.model_copy(update={"vae": TINY.vae.model_copy(update={"learning_rate": 1e30, "steps": 51})})
    with pytest.raises(RuntimeError, match=r"autoencoder's loss is (nan|inf).*learning_rate"):
        fit_into(tmp_path, wild)


def test_training_reduces_the_denoisers_loss(tmp_path: Path) -> None:
    """On one point in latent space, eps = (x - sqrt(abar) x0) / sqrt(1 - abar) is learnt within a few hundred steps."""
    config = FitDiT(layers=1, heads=2, head_dim=8, steps=250, batch_size=16, warmup=10, ema=0.9, learning_rate=3e-3)
    fit = Fit(dit=config, checkpoint_every=1000)
    mean, logvar = torch.full((4, 1, 4, 4), 0.5), torch.full((4, 1, 4, 4), -30.0)
    schedule = module.DDIMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")
    model = module.fit_denoiser(
        mean, logvar, torch.zeros(4, dtype=torch.int64), 1, schedule, fit, CPU, tmp_path / "x.safetensors"
    )
    process, generator = Process(linear_schedule(), CPU), torch.Generator().manual_seed(0)
    noise = torch.randn(256, 1, 4, 4, generator=generator)
    time, label = torch.randint(1000, (256,), generator=generator), torch.zeros(256, dtype=torch.int64)
    with torch.inference_mode():
        loss = float(process.hybrid_loss(model, mean[:1].expand(256, -1, -1, -1), noise, time, label))
        x = process.signal[time] * 0.5 + process.sigma[time] * noise
        error = (model(x, time, label).sample[:, :1] - noise).square().mean()
    assert float(error) < 0.35  # an untrained network's error is 1
    assert math.isfinite(loss)


# ---------------------------------------------------------------- networks


def test_a_new_dit_predicts_nothing() -> None:
    """adaLN-zero: blocks are identities and the output layer is zero (DiT, section 3.2)."""
    model = build_dit(TINY.dit, (2, 4, 4), 2).eval()
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    output = model(x, torch.tensor([0, 5, 999]), torch.tensor([0, 1, 2])).sample
    assert output.shape == (3, 4, 4, 4)
    assert float(output.detach().abs().max()) == 0
    hidden = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))
    block = model.transformer_blocks[0](hidden, timestep=torch.tensor([0, 5, 9]), class_labels=torch.tensor([0, 1, 2]))
    torch.testing.assert_close(block, hidden)


@pytest.mark.parametrize(("channels", "side"), [((8,), 16), ((8, 16), 8), ((8, 8, 24), 4)])
def test_each_level_but_the_last_halves_the_latents(channels: tuple[int, ...], side: int) -> None:
    model = build_vae(FitVAE(channels=channels, latent_channels=3), 16).eval()
    with torch.inference_mode():
        posterior = model.encode(torch.zeros(1, 3, 16, 16)).latent_dist
        assert posterior.mean.shape == (1, 3, side, side)
        assert model.decode(posterior.mean).sample.shape == (1, 3, 16, 16)


# ---------------------------------------------------------------- the hybrid loss


class Answers:
    """A network whose answer is a leaf tensor, so that its gradient is the loss's."""

    def __init__(self, eps: torch.Tensor, raw: torch.Tensor):
        self.eps, self.raw = eps.requires_grad_(), raw.requires_grad_()
        self.asked: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> SimpleNamespace:
        self.asked.append(x)
        return SimpleNamespace(sample=torch.cat([self.eps, self.raw], dim=1))


TIME = torch.tensor([1, 2, 10, 400, 999])


def hybrid() -> tuple[Answers, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise, eps, raw = (torch.randn(len(TIME), 3, 2, 2, generator=generator) for _ in range(4))
    network = Answers(noise + 0.3 * eps, 0.5 * raw)
    loss = Process(linear_schedule(), CPU).hybrid_loss(network, x0, noise, TIME, torch.zeros_like(TIME))
    return network, x0, noise, loss


def divergence(network: Answers, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) per element in nats, in float64, from the betas alone."""
    beta = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    abar = (1 - beta).cumprod(0)
    b, a, below = (values[:, None, None, None] for values in (beta[TIME], abar[TIME], abar[TIME - 1]))
    x = a.sqrt() * x0.double() + (1 - a).sqrt() * noise.double()
    x0_hat = (x - (1 - a).sqrt() * network.eps.detach().double()) / a.sqrt()
    posterior = b * (1 - below) / (1 - a)
    means = [below.sqrt() * b / (1 - a) * s + (1 - b).sqrt() * (1 - below) / (1 - a) * x for s in (x0.double(), x0_hat)]
    share = (network.raw.double() + 1) / 2
    spread = (b.log() * share + posterior.log() * (1 - share)).exp().sqrt()
    return kl_divergence(Normal(means[0], posterior.sqrt().expand_as(x)), Normal(means[1], spread))


def test_hybrid_loss_is_squared_error_plus_divergence_in_bits() -> None:
    network, x0, noise, loss = hybrid()
    expected = (network.eps - noise).square().mean() + divergence(network, x0, noise).mean() / math.log(2)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_the_network_sees_the_noised_latents() -> None:
    network, x0, noise, _ = hybrid()
    abar = torch.from_numpy(linear_schedule())[TIME].float()[:, None, None, None]
    torch.testing.assert_close(network.asked[0], abar.sqrt() * x0 + (1 - abar).sqrt() * noise, rtol=1e-5, atol=1e-6)


def test_the_bound_reaches_the_variance_alone() -> None:
    network, x0, noise, loss = hybrid()
    loss.backward()
    torch.testing.assert_close(network.eps.grad, 2 * (network.eps.detach() - noise) / noise.numel())
    assert network.raw.grad is not None
    mine, network.raw.grad = network.raw.grad, None
    (divergence(network, x0, noise).mean() / math.log(2)).backward()
    torch.testing.assert_close(mine, network.raw.grad, rtol=2e-3, atol=1e-7)
    assert float(mine.abs().min()) > 0


def test_the_right_answer_costs_only_its_variance() -> None:
    """With eps right and the posterior's variance the loss is 0; with sqrt(beta)'s it is the divergence of the two."""
    noise = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    process, time = Process(linear_schedule(), CPU), torch.tensor([2])
    abar = linear_schedule()
    for raw, ratio in ((-1.0, 1.0), (1.0, (1 - abar[1]) / (1 - abar[2]))):
        network = Answers(noise.clone(), torch.full_like(noise, raw))
        loss = process.hybrid_loss(network, torch.zeros_like(noise), noise, time, torch.zeros(1, dtype=torch.int64))
        assert float(loss.detach()) == pytest.approx((ratio - 1 - math.log(ratio)) / 2 / math.log(2), abs=1e-6)


def test_labels_json_is_the_label_order(fitted: Path) -> None:
    assert json.loads((fitted / "labels.json").read_text()) == CLASSES
