"""A pre-trained latent diffusion model: class-conditional DiT or U-Net, KL or VQ autoencoder, and training schedule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel, VQModel
from safetensors.torch import load_file
from torch import nn

from workflow_scripts.diffusion import original
from workflow_scripts.diffusion.checkpoint import (
    CLASS_EMBEDDING,
    WEIGHTS,
    autoencoder_of,
    denoiser_of,
    vae_folder,
    weights_of,
)
from workflow_scripts.errors import BackboneError

NO_SPREAD = -30.0
"""Log-variance that is stored for latents without a posterior: a standard deviation of 3e-7."""


@dataclass
class Autoencoder:
    """The autoencoder, between images in [-1, 1] and latents of about unit variance.

    Latents of a VQ model are those before quantisation, which is a part of decoding.
    """

    model: AutoencoderKL | VQModel
    device: torch.device

    @classmethod
    def load(cls, path: Path, device: torch.device, dtype: torch.dtype) -> Autoencoder:
        """Load ``path/vae``, or ``path`` itself: an AutoencoderKL or a VQModel, as its config.json says.

        The autoencoder of a one-file checkpoint is converted.
        """
        if path.is_file():
            model = original.load_autoencoder(path, dtype)
        else:
            model = load_part(VQModel if autoencoder_of(path).quantises else AutoencoderKL, vae_folder(path), dtype)
        return cls(model.to(device).eval().requires_grad_(False), device)

    @property
    def scaling_factor(self) -> float:
        """Return the factor from the posterior mean to a latent."""
        return float(self.model.config.scaling_factor)

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the unscaled posterior's mean and log-variance, float32 (n, c, h, w), of uint8 pixels (n, H, W, 3).

        A VQ model has no posterior: its latents count as the mean, and the log-variance is ``NO_SPREAD``.
        """
        encoded = self.model.encode(to_unit(pixels, self.device).to(self.model.dtype))
        if isinstance(self.model, VQModel):
            latents = encoded.latents.float()
            return latents, torch.full_like(latents, NO_SPREAD)
        return encoded.latent_dist.mean.float(), encoded.latent_dist.logvar.float()

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Return uint8 pixels (n, H, W, 3) of scaled latents (n, c, h, w)."""
        images = (self.decode_images(latents) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        return images.permute(0, 2, 3, 1).cpu().numpy()

    def decode_images(self, latents: torch.Tensor) -> torch.Tensor:
        """Return images (n, 3, H, W) of scaled latents, float32 and about within [-1, 1], keeping the graph."""
        decoded: torch.Tensor = self.model.decode(
            latents.to(self.device, self.model.dtype) / self.scaling_factor
        ).sample
        return decoded.float()

    def quantise(self, latents: torch.Tensor) -> torch.Tensor:
        """Return scaled latents at the nearest codes, their gradient passed straight through; for KL the latents themselves."""
        if not isinstance(self.model, VQModel):
            return latents
        codes: torch.Tensor = self.model.quantize(latents.to(self.model.dtype) / self.scaling_factor)[0]
        return codes.to(latents.dtype) * self.scaling_factor


@dataclass
class Denoiser:
    """The noise prediction network with its training schedule.

    Attributes:
        model: takes (x, timestep, class_labels) and returns an object whose ``sample`` has c or 2c channels.
        abar: (T,) float64, cumulative signal power of the training schedule.
        null_label: the label that stands for no class.
        latent_shape: (c, h, w).
        label_table: (labels, P, E), the embeddings of every label, the null one last. A network with one table for all its
            blocks has P = 1; diffusers' DiT keeps one per block, of which those that are equal count once.
    """

    model: Any
    abar: np.ndarray
    null_label: int
    latent_shape: tuple[int, int, int]
    device: torch.device
    label_table: torch.Tensor | None = None

    @classmethod
    def load(
        cls, path: Path, device: torch.device, dtype: torch.dtype, *, side: int | None = None, compiled: bool = False
    ) -> Denoiser:
        """Load ``path/transformer`` (or ``unet`` and its class embedding) and the constants of ``path/scheduler``.

        A one-file checkpoint is converted.

        Args:
            side: of the latents, if not the one that it was trained with; only a U-Net takes another.
        """
        model: Any
        if path.is_file():
            model, weight, schedule = original.load_denoiser(path, dtype)
            if weight is not None:
                model = LabelledUNet(model, nn.Embedding.from_pretrained(weight))
        else:
            folder = path / denoiser_of(path)
            unet = folder.name == "unet"
            model = LabelledUNet.load(path, dtype) if unet else load_part(DiTTransformer2DModel, folder, dtype)
            schedule = load_part(DDIMScheduler, path / "scheduler")
        if schedule.config.prediction_type != "epsilon":
            raise BackboneError(
                f"{path / 'scheduler'}: predicts {schedule.config.prediction_type}; only epsilon prediction is supported"
            )
        return cls.of(model, schedule, device, side=side, compiled=compiled)

    @classmethod
    def of(
        cls,
        model: Any,
        schedule: DDIMScheduler,
        device: torch.device,
        *,
        side: int | None = None,
        compiled: bool = False,
    ) -> Denoiser:
        """Make a denoiser of a network and the schedule that it was trained with; ``side`` as for :meth:`load`."""
        config = model.config
        side = side or config.sample_size
        shape = (config.in_channels, side, side)
        model = model.to(device).eval().requires_grad_(False)
        table = model.labels.weight[:, None] if isinstance(model, LabelledUNet) else open_label_embeddings(model)
        if compiled:
            model = torch.compile(model, dynamic=False)
        abar = schedule.alphas_cumprod.double().numpy()
        return cls(model, abar, len(table) - 1, shape, device, table)

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (n, P, E), float32, of labels (n,) int64."""
        assert self.label_table is not None, "this network does not show its label embeddings"
        return self.label_table[labels].float()

    def predict(
        self,
        x: torch.Tensor,
        timestep: int,
        labels: torch.Tensor,
        *,
        cfg_scale: float,
        cfg_channels: int,
        null: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predict the noise with classifier-free guidance, eps = eps_null + s (eps_class - eps_null).

        Args:
            x: (n, c, h, w).
            timestep: of the training schedule.
            labels: (n,) int64, or embeddings (n, P, E).
            cfg_scale: s; 1 evaluates the class alone.
            cfg_channels: how many leading channels are guided; the others keep the class's own prediction.
            null: embeddings (n, P, E) in place of the null label's.

        Returns:
            eps (n, c, h, w) in float32, and the raw variance channels (n, c, h, w) of the class's prediction, if there are any.
        """
        channels = x.shape[1]
        time = torch.full((1,), timestep, device=x.device)
        dtype = next(self.model.parameters()).dtype
        x = x.to(dtype)
        if labels.is_floating_point():
            labels = labels.to(dtype)
        if cfg_scale == 1:
            output = self.model(x, time.expand(len(x)), labels).sample.float()
            eps = output[:, :channels]
        else:
            both = torch.cat([labels, self._null_rows(labels) if null is None else null.to(dtype)])
            output, null = self.model(torch.cat([x, x]), time.expand(len(both)), both).sample.float().chunk(2)
            eps, eps_null = output[:, :channels], null[:, :channels]
            guided = eps_null + cfg_scale * (eps - eps_null)
            eps = torch.cat([guided[:, :cfg_channels], eps[:, cfg_channels:]], dim=1)
        return eps, output[:, channels:] if output.shape[1] == 2 * channels else None

    def _null_rows(self, labels: torch.Tensor) -> torch.Tensor:
        null = torch.full((len(labels),), self.null_label, device=labels.device)
        return self.embed(null).to(labels.dtype) if labels.is_floating_point() else null


class LabelledUNet(nn.Module):
    """A U-Net that attends to one token, the embedding of the label, and is called as a DiT is.

    Attributes:
        labels: (classes + 1, E), the null label's embedding last.
    """

    def __init__(self, unet: UNet2DConditionModel, labels: nn.Embedding):
        super().__init__()
        self.unet = unet
        self.labels = labels

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype) -> LabelledUNet:
        """Load ``path/unet`` and the embeddings beside it."""
        unet = load_part(UNet2DConditionModel, path / "unet", dtype)
        try:
            weight = load_file(path / CLASS_EMBEDDING)["weight"].to(dtype)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise BackboneError(f"{path / CLASS_EMBEDDING}: cannot be read ({error})") from error
        if weight.ndim != 2 or weight.shape[1] != unet.config.cross_attention_dim:
            raise BackboneError(
                f"{path / CLASS_EMBEDDING}: weight has shape {tuple(weight.shape)}; the U-Net takes rows of "
                f"{unet.config.cross_attention_dim} (cross_attention_dim), one per class and a last one for no class"
            )
        return cls(unet, nn.Embedding.from_pretrained(weight))

    @property
    def config(self) -> Any:
        """The U-Net's configuration."""
        return self.unet.config

    def forward(self, x: torch.Tensor, time: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        """Return an object whose ``sample`` (n, c, h, w) is the noise, for labels (n,) or embeddings (n, 1, E)."""
        tokens = labels if labels.is_floating_point() else self.labels(labels)[:, None]
        return SimpleNamespace(sample=self.unet(x, time, tokens).sample)


class LabelInput(nn.Module):
    """A DiT block's label embedding: looked up for labels (n,), or taken from embeddings (n, P, E)."""

    def __init__(self, table: nn.Embedding, place: int):
        super().__init__()
        self.embedding_table = table
        self.place = place

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Return (n, E)."""
        if labels.is_floating_point():
            return labels[:, self.place]
        embedded: torch.Tensor = self.embedding_table(labels)
        return embedded


def open_label_embeddings(model: DiTTransformer2DModel) -> torch.Tensor:
    """Let a DiT accept label embeddings in place of labels, and return its table (labels, P, E)."""
    tables: list[torch.Tensor] = []
    for block in model.transformer_blocks:
        embedder = block.norm1.emb.class_embedder
        weight = embedder.embedding_table.weight
        place = next((index for index, known in enumerate(tables) if torch.equal(known, weight)), len(tables))
        if place == len(tables):
            tables.append(weight)
        block.norm1.emb.class_embedder = LabelInput(embedder.embedding_table, place)
    return torch.stack(tables, dim=1)


def to_unit(pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """Map uint8 pixels (n, H, W, 3) to float32 (n, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def load_part(kind: Any, path: Path, dtype: torch.dtype | None = None) -> Any:
    """Load a module of diffusers from its folder in a dtype, or a scheduler without one.

    Raises:
        BackboneError: if it cannot be read, or weights are missing or too many.
    """
    try:
        if dtype is None:
            return kind.from_pretrained(path, local_files_only=True)
        model, found = kind.from_pretrained(
            path,
            local_files_only=True,
            torch_dtype=dtype,
            use_safetensors=weights_of(path) == WEIGHTS,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
        raise BackboneError(f"{path}: cannot be loaded as {kind.__name__} ({error})") from error
    for what in ("missing", "unexpected"):  # of which diffusers only warns, and goes on with random weights
        if keys := found[f"{what}_keys"]:
            raise BackboneError(
                f"{path}: its weights do not fit its configuration ({len(keys)} {what}, such as {keys[0]})"
            )
    return model
