"""LD3M: latents and class embeddings learned through a frozen denoiser (Moser et al., arXiv 2403.03881).

Each synthetic image is a start latent Z and a class embedding c. Z is noised, denoised in a few steps, and in every step
pulled back to Z with a weight that decays linearly: the residual by which gradients reach Z past the denoiser. The paper
(eq. 7) blends the posterior mean with the noised latent, the released code the predicted clean latent with the quantised
one. Only the latter carries a gradient of order one to Z, and it is the default here.

``w_j`` is the residual's weight at step j, counted from 0 (nearly clean) to S-1 (noise).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from workflow_scripts.config import Chain, Residual
from workflow_scripts.diffusion.backbone import Autoencoder, Denoiser
from workflow_scripts.diffusion.noise import batch_noise, stream
from workflow_scripts.diffusion.schedule import Grid, offset_timesteps

Owner = tuple[str, int]  # class and index of an image
PullBack = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class ChainGrid(Grid):
    """A sampling grid whose last step ends at signal power ``end`` instead of 1."""

    end: float

    @property
    def abar_previous(self) -> np.ndarray:
        """Return abar of the step below, ``end`` below the first."""
        return np.append(self.end, self.abar[:-1])


def chain_grid(abar: np.ndarray, steps: int) -> ChainGrid:
    """Return LDM's DDIM grid 1, 1 + k, 1 + 2k, ... with k = T // S, ending at abar_0; it has exactly S steps.

    Args:
        abar: (T,) cumulative signal power of the training schedule.

    Raises:
        ValueError: if that does not fit into the schedule.
    """
    timesteps = offset_timesteps(len(abar), steps)
    return ChainGrid(timesteps, np.asarray(abar, dtype=np.float64)[timesteps], float(abar[0]))


def residual_weights(residual: Residual, steps: int) -> np.ndarray:
    """Return w (S,): j / (S - 1), from 1 at the first reverse step to 0 at the last, or the paper's (j + 1) / S."""
    places = np.arange(steps)
    return residual.strength * (places / (steps - 1) if residual.schedule == "index" else (places + 1) / steps)


@dataclass(frozen=True)
class Synthesiser:
    """The modified reverse process, from what is learned to images, and gradients back.

    Attributes:
        chunk: images that are denoised at once.
        checkpointing: recompute the denoiser's activations in the backward pass instead of keeping them.
    """

    denoiser: Denoiser
    autoencoder: Autoencoder
    chain: Chain
    chunk: int = 10
    checkpointing: bool = True

    def noise(self, owners: list[Owner], seed: int, iteration: int | None = None) -> torch.Tensor:
        """Return the normals (n, 1 or S, c, h, w) of images: xi first, then DDPM's, which step j takes at place j.

        Args:
            iteration: with it, what ``noise: resample`` draws for that iteration.
        """
        purpose = "ld3m" if iteration is None or self.chain.noise == "fixed" else f"ld3m/{iteration}"
        streams = [stream(seed, name, index, purpose) for name, index in owners]
        count = self.chain.steps if self.chain.update == "ddpm" else 1
        return batch_noise(streams, count, *self.denoiser.latent_shape).to(self.denoiser.device)

    def denoise(self, latents: torch.Tensor, embeddings: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the clean latents z0 (n, c, h, w) of start latents Z (n, c, h, w) and embeddings c (n, P, E).

        DDIM with eta 0, or DDPM (``chain.update``); the residual replaces x0 by (1 - w) x0 + w q(Z), as released, or the mean
        of the reverse step by (1 - w) mean + w z_T (eq. 7).
        """
        grid, residual = chain_grid(self.denoiser.abar, self.chain.steps), self.chain.residual
        weights = residual_weights(residual, self.chain.steps)
        top = float(grid.abar[-1])
        z = noised = top**0.5 * latents + (1 - top) ** 0.5 * noise[:, 0]
        source = {"quantised": self.autoencoder.quantise, "latent": lambda x: x, "noised": lambda _: noised}
        anchor = source[residual.source](latents)
        for j in range(self.chain.steps - 1, -1, -1):
            w, abar, below = float(weights[j]), float(grid.abar[j]), float(grid.abar_previous[j])
            eps = self._predict(z, int(grid.timesteps[j]), embeddings)
            x0 = (z - (1 - abar) ** 0.5 * eps) / abar**0.5
            if residual.target == "x0":
                x0 = (1 - w) * x0 + w * anchor
            if self.chain.update == "ddim":
                z = below**0.5 * x0 + (1 - below) ** 0.5 * eps
            else:
                z = float(grid.posterior_x0[j]) * x0 + float(grid.posterior_xt[j]) * z
            if residual.target == "mean":
                z = (1 - w) * z + w * anchor
            if self.chain.update == "ddpm" and j > 0:
                power = 1.0 if self.chain.ddpm_noise == "variance" else 0.5
                z = z + float(grid.posterior_variance[j]) ** power * noise[:, j]
        return z

    def render(self, latents: torch.Tensor, embeddings: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return images (n, 3, H, W) in [-1, 1], with a graph if gradients are enabled."""
        images = self.autoencoder.decode_images(self.denoise(latents, embeddings, noise))
        clipped = images.clamp(-1, 1)
        return clipped if self.chain.clamp == "hard" else images + (clipped - images).detach()

    def synthesise(self, latents: torch.Tensor, embeddings: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the images (n, 3, H, W) of any number of rows, without a graph."""
        with torch.no_grad():
            return torch.cat(
                [self.render(latents[rows], embeddings[rows], noise[rows]) for rows in self._chunks(latents)]
            )

    def pull_back(
        self, gradient: torch.Tensor, latents: torch.Tensor, embeddings: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients for Z and c, given that for the images (n, 3, H, W), re-running one chunk at a time."""
        found = []
        for rows in self._chunks(latents):
            z, c = latents[rows].detach().requires_grad_(), embeddings[rows].detach().requires_grad_()
            with torch.enable_grad():
                images = self.render(z, c, noise[rows])
            found.append(_gradients(images, gradient[rows], z, c))
        one, two = zip(*found, strict=True)
        return torch.cat(one), torch.cat(two)

    def trace(
        self, latents: torch.Tensor, embeddings: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, PullBack]:
        """Return images without a graph, and the function from their gradient to those of Z and c.

        That re-runs the process with the same noise, one chunk at a time; a single chunk keeps its graph instead.
        """
        if len(latents) > self.chunk:
            images = self.synthesise(latents, embeddings, noise)
            return images, lambda gradient: self.pull_back(gradient, latents, embeddings, noise)
        z, c = latents.detach().requires_grad_(), embeddings.detach().requires_grad_()
        with torch.enable_grad():
            kept = self.render(z, c, noise)
        return kept.detach(), lambda gradient: _gradients(kept, gradient, z, c)

    def _predict(self, z: torch.Tensor, timestep: int, embeddings: torch.Tensor) -> torch.Tensor:
        def predict(z: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
            settings = {"cfg_scale": self.chain.cfg_scale, "cfg_channels": z.shape[1]}
            return self.denoiser.predict(z, timestep, embeddings, **settings)[0]  # type: ignore[arg-type]

        if not (self.checkpointing and torch.is_grad_enabled()):
            return predict(z, embeddings)
        again: torch.Tensor = checkpoint(predict, z, embeddings, use_reentrant=False, preserve_rng_state=False)
        return again

    def _chunks(self, rows: torch.Tensor) -> Iterator[slice]:
        return (slice(start, start + self.chunk) for start in range(0, len(rows), self.chunk))


def _gradients(
    images: torch.Tensor, gradient: torch.Tensor, latents: torch.Tensor, embeddings: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Back-propagate a gradient of images; what they do not depend on gets zeros."""
    one, two = torch.autograd.grad(images, (latents, embeddings), gradient, allow_unused=True)
    return (
        torch.zeros_like(latents) if one is None else one,
        torch.zeros_like(embeddings) if two is None else two,
    )
