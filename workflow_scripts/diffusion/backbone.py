"""A pre-trained latent diffusion model: class-conditional DiT, KL autoencoder and training schedule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

from workflow_scripts.errors import BackboneError


@dataclass
class Autoencoder:
    """The VAE, between images in [-1, 1] and latents of about unit variance."""

    model: AutoencoderKL
    device: torch.device

    @classmethod
    def load(cls, path: Path, device: torch.device, dtype: torch.dtype) -> Autoencoder:
        """Load ``path/vae`` from safetensors."""
        model = _load(AutoencoderKL, path / "vae", dtype)
        return cls(model.to(device).eval().requires_grad_(False), device)

    @property
    def scaling_factor(self) -> float:
        """Return the factor from the posterior mean to a latent."""
        return float(self.model.config.scaling_factor)

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the unscaled posterior's mean and log-variance, float32 (n, c, h, w), of uint8 pixels (n, H, W, 3)."""
        posterior = self.model.encode(to_unit(pixels, self.device).to(self.model.dtype)).latent_dist
        return posterior.mean.float(), posterior.logvar.float()

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Return uint8 pixels (n, H, W, 3) of scaled latents (n, c, h, w)."""
        images = self.model.decode(latents.to(self.device, self.model.dtype) / self.scaling_factor).sample
        images = (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        return images.permute(0, 2, 3, 1).cpu().numpy()


@dataclass
class Denoiser:
    """The noise prediction network with its training schedule.

    Attributes:
        model: takes (x, timestep, class_labels) and returns an object whose ``sample`` has c or 2c channels.
        abar: (T,) float64, cumulative signal power of the training schedule.
        null_label: the label that stands for no class.
        latent_shape: (c, h, w).
    """

    model: Any
    abar: np.ndarray
    null_label: int
    latent_shape: tuple[int, int, int]
    device: torch.device

    @classmethod
    def load(cls, path: Path, device: torch.device, dtype: torch.dtype, *, compiled: bool = False) -> Denoiser:
        """Load ``path/transformer`` from safetensors and the constants of ``path/scheduler``."""
        model = _load(DiTTransformer2DModel, path / "transformer", dtype)
        schedule = _load(DDIMScheduler, path / "scheduler")
        if schedule.config.prediction_type != "epsilon":
            raise BackboneError(
                f"{path / 'scheduler'}: predicts {schedule.config.prediction_type}; only epsilon prediction is supported"
            )
        config = model.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        model = model.to(device).eval().requires_grad_(False)
        if compiled:
            model = torch.compile(model, dynamic=False)
        return cls(model, schedule.alphas_cumprod.double().numpy(), config.num_embeds_ada_norm, shape, device)

    def predict(
        self, x: torch.Tensor, timestep: int, labels: torch.Tensor, *, cfg_scale: float, cfg_channels: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predict the noise with classifier-free guidance, eps = eps_null + s (eps_class - eps_null).

        Args:
            x: (n, c, h, w).
            timestep: of the training schedule.
            labels: (n,) int64.
            cfg_scale: s; 1 evaluates the class alone.
            cfg_channels: how many leading channels are guided; the others keep the class's own prediction.

        Returns:
            eps (n, c, h, w) in float32, and the raw variance channels (n, c, h, w) of the class's prediction, if there are any.
        """
        channels = x.shape[1]
        time = torch.full((1,), timestep, device=x.device)
        x = x.to(next(self.model.parameters()).dtype)
        if cfg_scale == 1:
            output = self.model(x, time.expand(len(x)), labels).sample.float()
            eps = output[:, :channels]
        else:
            both = torch.cat([labels, torch.full_like(labels, self.null_label)])
            output, null = self.model(torch.cat([x, x]), time.expand(len(both)), both).sample.float().chunk(2)
            eps, eps_null = output[:, :channels], null[:, :channels]
            guided = eps_null + cfg_scale * (eps - eps_null)
            eps = torch.cat([guided[:, :cfg_channels], eps[:, cfg_channels:]], dim=1)
        return eps, output[:, channels:] if output.shape[1] == 2 * channels else None


def to_unit(pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """Map uint8 pixels (n, H, W, 3) to float32 (n, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def _load(kind: Any, path: Path, dtype: torch.dtype | None = None) -> Any:
    weights = {} if dtype is None else {"torch_dtype": dtype, "use_safetensors": True}
    try:
        return kind.from_pretrained(path, local_files_only=True, **weights)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
        raise BackboneError(f"{path}: cannot be loaded as {kind.__name__} ({error})") from error
