"""Fitting a small backbone: an autoencoder, KL or VQ, then a class-conditional denoiser, DiT or U-Net, on its latents.

The DiT trains on the hybrid objective of Improved DDPM (section 3.1): the squared error of epsilon, plus the variational
bound as a gradient for the variance channels alone. The U-Net has no variance channels and trains on the error alone, on
latent diffusion's schedule. The averaged weights are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel, VQModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from workflow_scripts.config import FineTune, Fit, FitDiT, FitUNet, FitVAE
from workflow_scripts.diffusion.backbone import NO_SPREAD, LabelledUNet, to_unit
from workflow_scripts.diffusion.checkpoint import CLASS_EMBEDDING, LABELS, TIMESTEPS
from workflow_scripts.diffusion.schedule import Grid
from workflow_scripts.store.files import write_atomically

BETAS: dict[str, dict[str, Any]] = {
    "dit": {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"},
    "unet": {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"},
}


def fit_backbone(
    pixels: np.ndarray, labels: np.ndarray, classes: list[str], fit: Fit, device: torch.device, work: Path, into: Path
) -> None:
    """Train a backbone and save it in diffusers format.

    Args:
        pixels: uint8 (n, H, W, 3).
        labels: int64 (n,), indices into ``classes``.
        work: directory of checkpoints; a fit that finds one there goes on from it.
        into: directory that receives transformer/ (or unet/ and its class embedding), vae/, scheduler/ and labels.json, with
            weights in fp16.
    """
    vae = (fit_vae if fit.autoencoder == "kl" else fit_vq)(pixels, fit, device, work / "vae.safetensors")
    mean, logvar = _encode(vae, pixels, device)
    scale = 1 / float(
        (mean + torch.exp(logvar / 2) * torch.randn(mean.shape, generator=_generator(fit.seed, -1))).std()
    )
    vae.register_to_config(scaling_factor=scale)
    schedule = DDIMScheduler(num_train_timesteps=TIMESTEPS, clip_sample=False, **BETAS[fit.denoiser])
    latents = (mean * scale, logvar + 2 * math.log(scale), torch.from_numpy(labels))
    into.mkdir(parents=True, exist_ok=True)
    folder = "transformer" if fit.denoiser == "dit" else "unet"
    model = fit_denoiser(*latents, len(classes), schedule, fit, device, work / f"{folder}.safetensors").half()
    if isinstance(model, LabelledUNet):
        save_file({"weight": model.labels.weight.detach().cpu().contiguous()}, into / CLASS_EMBEDDING)
        model = model.unet
    model.save_pretrained(into / folder, safe_serialization=True)
    vae.half().save_pretrained(into / "vae", safe_serialization=True)
    schedule.save_pretrained(into / "scheduler")
    write_atomically(into / LABELS, json.dumps(classes))


def build_vae(config: FitVAE, resolution: int) -> AutoencoderKL:
    """Return an untrained KL autoencoder whose latents are smaller by 2^(levels - 1)."""
    return AutoencoderKL(**_autoencoder_shape(config, resolution))


def build_vq(config: FitVAE, resolution: int) -> VQModel:
    """Return an untrained VQ autoencoder of the same shape."""
    return VQModel(**_autoencoder_shape(config, resolution), num_vq_embeddings=config.codes, scaling_factor=1.0)


def _autoencoder_shape(config: FitVAE, resolution: int) -> dict[str, Any]:
    levels = len(config.channels)
    return {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.channels,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": math.gcd(*config.channels, 32) // 2 or 1,
        "sample_size": resolution,
    }


def build_unet(config: FitUNet, latent_shape: Sequence[int], classes: int) -> LabelledUNet:
    """Return an untrained U-Net with cross-attention to the label's embedding on every level, and the embeddings."""
    channels, side, _ = latent_shape
    levels = len(config.channels)
    unet = UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.heads,  # diffusers' name for the number of heads
        cross_attention_dim=config.embedding,
        norm_num_groups=math.gcd(*config.channels, 32),
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return LabelledUNet(unet, nn.Embedding(classes + 1, config.embedding))


def build_dit(config: FitDiT, latent_shape: Sequence[int], classes: int) -> DiTTransformer2DModel:
    """Return an untrained DiT with adaLN-zero initialisation (DiT, section 3.2)."""
    channels, side, _ = latent_shape
    model = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=channels,
        out_channels=2 * channels,
        num_layers=config.layers,
        sample_size=side,
        patch_size=config.patch_size,
        num_embeds_ada_norm=classes,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
    for last in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return model


def fit_vae(pixels: np.ndarray, fit: Fit, device: torch.device, checkpoint: Path) -> AutoencoderKL:
    """Train the autoencoder on the mean absolute and squared errors of its reconstruction and a light KL term."""
    config = fit.vae
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        model = build_vae(config, pixels.shape[1]).to(device)

    def loss(generator: torch.Generator) -> Iterator[torch.Tensor]:
        index = torch.randint(len(pixels), (config.batch_size,), generator=generator)
        images = to_unit(pixels[index.numpy()], device)
        posterior = model.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        error = model.decode(posterior.mean + posterior.std * noise).sample - images
        yield error.abs().mean() + error.square().mean() + config.kl_weight * posterior.kl().mean()

    train(model, loss, fit, config.steps, config.learning_rate, 100, 0.0, 0.995, checkpoint, "autoencoder")
    return model.eval()


def fit_vq(pixels: np.ndarray, fit: Fit, device: torch.device, checkpoint: Path) -> VQModel:
    """Train the autoencoder on the same errors and VQ-VAE's codebook and commitment losses.

    The codes start as latents of the untrained encoder, so that they lie where they are needed.
    """
    config = fit.vae
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        model = build_vq(config, pixels.shape[1]).to(device)
    generator = _generator(fit.seed, -2)
    few = torch.randint(len(pixels), (min(len(pixels), 256),), generator=generator)
    with torch.inference_mode():
        latents = model.encode(to_unit(pixels[few.numpy()], device)).latents.permute(0, 2, 3, 1).flatten(0, 2)
    chosen = torch.randint(len(latents), (config.codes,), generator=generator)
    jitter = 0.01 * float(latents.std()) * torch.randn(config.codes, latents.shape[1], generator=generator)
    model.quantize.embedding.weight.data.copy_(latents[chosen.to(device)].clone() + jitter.to(device))

    def loss(generator: torch.Generator) -> Iterator[torch.Tensor]:
        index = torch.randint(len(pixels), (config.batch_size,), generator=generator)
        images = to_unit(pixels[index.numpy()], device)
        decoded = model.decode(model.encode(images).latents)
        error = decoded.sample - images
        yield error.abs().mean() + error.square().mean() + config.commitment * decoded.commit_loss.mean()

    train(model, loss, fit, config.steps, config.learning_rate, 100, 0.0, 0.995, checkpoint, "autoencoder")
    return model.eval()


def fit_denoiser(
    mean: torch.Tensor,
    logvar: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    schedule: DDIMScheduler,
    fit: Fit,
    device: torch.device,
    checkpoint: Path,
) -> DiTTransformer2DModel | LabelledUNet:
    """Train the denoiser on latents drawn from the posteriors ``N(mean, exp(logvar))``, scaled, (n, c, h, w)."""
    config = fit.dit if fit.denoiser == "dit" else fit.unet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed + 1)
        shape = mean.shape[1:]
        model = build_dit(config, shape, classes) if isinstance(config, FitDiT) else build_unet(config, shape, classes)
    model = model.to(device)
    # The model stays in eval mode: a DiT's own label dropout would draw from the global generator.
    model.eval()
    process = Process(schedule.alphas_cumprod.double().numpy(), device)
    objective = process.hybrid_loss if fit.denoiser == "dit" else process.simple_loss

    def loss(generator: torch.Generator) -> Iterator[torch.Tensor]:
        drawn = Drawn.at_random(generator, len(mean), config.batch_size, shape, TIMESTEPS, config.label_dropout)
        x0, noise, time, label = drawn.tensors(mean[drawn.index], logvar[drawn.index], labels[drawn.index], classes)
        yield objective(model, x0.to(device), noise.to(device), time.to(device), label.to(device))

    train(
        model,
        loss,
        fit,
        config.steps,
        config.learning_rate,
        config.warmup,
        config.weight_decay,
        config.ema,
        checkpoint,
        "denoiser",
    )
    return model


@dataclass(frozen=True)
class Drawn:
    """What one step draws for each row of its batch.

    Attributes:
        index: (n,) int64, which latents.
        spread, noise: (n, c, h, w), standard normals: of the posterior, and of the diffusion process.
        time: (n,) int64.
        dropped: (n,) bool, rows that are not told their label.
    """

    index: torch.Tensor
    spread: torch.Tensor
    noise: torch.Tensor
    time: torch.Tensor
    dropped: torch.Tensor

    @classmethod
    def at_random(
        cls, generator: torch.Generator, count: int, batch: int, shape: Sequence[int], timesteps: int, dropout: float
    ) -> Drawn:
        """Draw a batch among ``count`` latents."""
        return cls(
            torch.randint(count, (batch,), generator=generator),
            torch.randn((batch, *shape), generator=generator),
            torch.randn((batch, *shape), generator=generator),
            torch.randint(timesteps, (batch,), generator=generator),
            torch.rand(batch, generator=generator) < dropout,
        )

    def rows(self, part: slice) -> Drawn:
        """Return some of the rows."""
        return Drawn(*(getattr(self, name.name)[part] for name in fields(self)))

    def tensors(
        self, mean: torch.Tensor, logvar: torch.Tensor, labels: torch.Tensor, null: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return x0, noise, time and label of the posteriors and labels at ``index``."""
        x0 = mean + torch.exp(logvar / 2) * self.spread
        return x0, self.noise, self.time, torch.where(self.dropped, null, labels)


Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]
"""From noisy latents, timesteps and labels to an object whose ``sample`` is the prediction."""


class Process:
    """The constants of the training schedule as float32 tensors, and the loss on them."""

    def __init__(self, abar: np.ndarray, device: torch.device):
        grid = Grid(np.arange(len(abar)), abar)

        def constant(values: np.ndarray) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None, None]

        self.signal, self.sigma = constant(np.sqrt(abar)), constant(np.sqrt(1 - abar))
        self.c0, self.ct = constant(grid.posterior_x0), constant(grid.posterior_xt)
        self.log_beta, self.log_posterior = constant(np.log(grid.betas)), constant(grid.posterior_log_variance)

    def simple_loss(
        self, model: Network, x0: torch.Tensor, noise: torch.Tensor, time: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        """Return L_simple, the squared error of epsilon (DDPM, eq. 14)."""
        eps = model(self.signal[time] * x0 + self.sigma[time] * noise, time, label).sample
        return F.mse_loss(eps, noise)

    def hybrid_loss(
        self, model: Network, x0: torch.Tensor, noise: torch.Tensor, time: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        """Return L_simple + L_vlb; L_vlb, per thousand steps, reaches the variance channels only (Improved DDPM, eq. 15-16)."""
        signal, sigma = self.signal[time], self.sigma[time]
        x = signal * x0 + sigma * noise
        eps, raw = model(x, time, label).sample.chunk(2, dim=1)
        x0_hat = (x - sigma * eps.detach()) / signal
        true_mean, mean = (self.c0[time] * start + self.ct[time] * x for start in (x0, x0_hat))
        share = (raw + 1) / 2
        log_variance = share * self.log_beta[time] + (1 - share) * self.log_posterior[time]
        gap = (true_mean - mean).square()
        kl = 0.5 * (
            log_variance
            - self.log_posterior[time]
            - 1
            + (torch.exp(self.log_posterior[time]) + gap) * torch.exp(-log_variance)
        )
        return F.mse_loss(eps, noise) + kl.mean() / math.log(2) * len(self.signal) / 1000


def train(
    model: nn.Module,
    losses: Callable[[torch.Generator], Iterable[torch.Tensor]],
    fit: Fit | FineTune,
    steps: int,
    rate: float,
    warmup: int,
    weight_decay: float,
    ema: float,
    checkpoint: Path,
    name: str,
    *,
    leads: bool = True,
) -> None:
    """Minimise a loss, resuming from ``checkpoint`` if it is there, and leave the averaged weights in the model.

    Step k draws from a generator seeded with (seed, k), so a resumed fit goes on exactly where it was. Parameters that require
    no gradient are neither changed nor kept in the checkpoint.

    Args:
        losses: the parts of a step's loss, each of which is back-propagated before the next is asked for.
        leads: show progress and write checkpoints; one of several processes does.
    """
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    values = [value.detach() for value in trained.values()]
    optimizer = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)
    average = {key: value.detach().clone() for key, value in trained.items()}
    start = _resume(checkpoint, trained, optimizer, average)
    progress = tqdm(
        range(start, steps), initial=start, total=steps, desc=name, mininterval=1, maxinterval=60, disable=not leads
    )
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / (warmup or 1), 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        optimizer.zero_grad(set_to_none=True)
        parts = []
        for part in losses(_generator(fit.seed, step)):
            part.backward()
            parts.append(part.detach())
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        decay = min(ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), values, 1 - decay)
        if step % 50 == 0:
            shown = float(sum(parts))
            if not math.isfinite(shown):
                raise RuntimeError(f"the {name}'s loss is {shown} at step {step}: lower its learning_rate")
            progress.set_postfix(loss=f"{shown:.4f}", refresh=False)
        if leads and ((step + 1) % fit.checkpoint_every == 0 or step + 1 == steps):
            _save(checkpoint, step + 1, trained, optimizer, average)
    for value, averaged in zip(values, average.values(), strict=True):
        value.copy_(averaged)


Tensors = Mapping[str, torch.Tensor]


def _save(path: Path, step: int, trained: Tensors, optimizer: torch.optim.Optimizer, average: Tensors) -> None:
    tensors = {f"model.{key}": value.detach() for key, value in trained.items()}
    tensors |= {f"average.{key}": value for key, value in average.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata={"step": str(step)})
    temporary.replace(path)


def _resume(path: Path, trained: Tensors, optimizer: torch.optim.Optimizer, average: Tensors) -> int:
    if not path.exists():
        return 0
    state: dict[int, dict[str, Any]] = {}
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        for key, value in trained.items():
            value.detach().copy_(file.get_tensor(f"model.{key}"))
            average[key].copy_(file.get_tensor(f"average.{key}"))
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = file.get_tensor(key)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


@torch.inference_mode()
def _encode(
    vae: AutoencoderKL | VQModel, pixels: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(pixels), 256):
            encoded = vae.encode(to_unit(pixels[start : start + 256], device))
            if isinstance(vae, VQModel):
                yield encoded.latents.cpu(), torch.full_like(encoded.latents, NO_SPREAD).cpu()
            else:
                yield encoded.latent_dist.mean.cpu(), encoded.latent_dist.logvar.cpu()

    mean, logvar = zip(*batches(), strict=True)
    return torch.cat(mean), torch.cat(logvar)


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 24) + step + 1)
