"""Fine-tuning a pre-trained DiT on other classes: all of its weights or DiffFit's small part, in one process or several.

DiffFit (Xie et al., ICCV 2023, arXiv 2304.06648) trains biases, norms, label embeddings, and new factors, here one for each
channel of each block's two branches. The factors are multiplied into the weights at the end, so that what is saved is an
ordinary DiT. Objective, averaging and checkpoints are those of :mod:`workflow_scripts.diffusion.fit`.

Every process draws the whole batch from the step's seed and computes its share of it, so that how many there are changes
results by rounding only.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from workflow_scripts.config import FineTune
from workflow_scripts.diffusion.backbone import load_part
from workflow_scripts.diffusion.checkpoint import LABELS, vae_folder, weights_of
from workflow_scripts.diffusion.fit import Drawn, Process, train
from workflow_scripts.errors import BackboneError, ConfigError
from workflow_scripts.store.files import write_atomically
from workflow_scripts.team import Team


class Latents(Protocol):
    """Posteriors to train on, scaled, with their labels.

    Attributes:
        shape: (c, h, w).
    """

    shape: tuple[int, ...]

    def __len__(self) -> int:
        """Return how many there are."""

    def __getitem__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return means and log-variances (n, c, h, w) float32 and labels (n,) int64."""


def finetune(
    pretrained: Path,
    autoencoder: Path,
    latents: Latents,
    classes: Sequence[str],
    known: Sequence[int | None],
    settings: FineTune,
    team: Team,
    work: Path,
    into: Path,
    *,
    autocast: bool = False,
    compiled: bool = False,
) -> None:
    """Fine-tune the DiT of a backbone in diffusers format; the first process saves a whole backbone, weights in float32.

    Args:
        autoencoder: where the autoencoder is, which is copied.
        classes: in label order.
        known: for each of them its label in the pre-trained backbone, if that knows it.
        work: directory of checkpoints; a fit that finds one there goes on from it.
        into: directory that receives transformer/, vae/, scheduler/ and labels.json.
        autocast: compute in bfloat16, with weights in float32.

    Raises:
        ConfigError, BackboneError: if the batch cannot be shared, or the backbone is of another kind.
    """
    if settings.batch_size % team.size:
        raise ConfigError(
            f"backbone.finetune.batch_size: {settings.batch_size} cannot be shared equally among {team.size} processes"
        )
    schedule = load_part(DDIMScheduler, pretrained / "scheduler")
    if schedule.config.prediction_type != "epsilon":
        raise BackboneError(f"{pretrained / 'scheduler'}: only epsilon prediction is supported")
    model = load_part(DiTTransformer2DModel, pretrained / "transformer", torch.float32)
    relabel(model, known, settings)
    if settings.trainable == "difffit":
        open_difffit(model)
    # The model stays in eval mode: a DiT's own label dropout would draw from the global generator.
    model = model.to(team.device).eval()
    fit(model, latents, schedule, len(classes), settings, team, work / "transformer.safetensors", autocast, compiled)
    if team.leads:
        close_difffit(model)
        into.mkdir(parents=True, exist_ok=True)
        separate(model).save_pretrained(into / "transformer", safe_serialization=True)
        source = vae_folder(autoencoder)
        (into / "vae").mkdir()
        for name in ("config.json", weights_of(source)):
            shutil.copyfile(source / name, into / "vae" / name)
        schedule.save_pretrained(into / "scheduler")
        write_atomically(into / LABELS, json.dumps(list(classes)))


def fit(
    model: DiTTransformer2DModel,
    latents: Latents,
    schedule: DDIMScheduler,
    classes: int,
    settings: FineTune,
    team: Team,
    checkpoint: Path,
    autocast: bool = False,
    compiled: bool = False,
) -> None:
    """Train those parameters of a DiT that require gradients."""
    abar = schedule.alphas_cumprod.double().numpy()
    process = Process(abar, team.device)
    learned = model.config.out_channels == 2 * model.config.in_channels
    objective = process.hybrid_loss if learned else process.simple_loss
    network: Any = torch.compile(model, dynamic=False) if compiled else model
    if team.size > 1:
        ids = [team.device.index] if team.device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)
    share = settings.batch_size // team.size
    parts = [slice(begin, min(begin + settings.micro_batch, share)) for begin in range(0, share, settings.micro_batch)]

    def predict(x: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> SimpleNamespace:
        with torch.autocast(team.device.type, torch.bfloat16) if autocast else nullcontext():
            sample = network(x, time, label).sample
        return SimpleNamespace(sample=sample.float())

    def losses(generator: torch.Generator) -> Iterator[torch.Tensor]:
        """Yield the loss of one part of this process's share after another; gradients are exchanged with the last."""
        drawn = Drawn.at_random(
            generator, len(latents), settings.batch_size, latents.shape, len(abar), settings.label_dropout
        )
        own = drawn.rows(slice(team.rank * share, (team.rank + 1) * share))
        for part in parts:
            rows = own.rows(part)
            mean, logvar, labels = (torch.from_numpy(array) for array in latents[rows.index.numpy()])
            batch = [tensor.to(team.device) for tensor in rows.tensors(mean, logvar, labels, classes)]
            alone = part is not parts[-1] and team.size > 1
            with network.no_sync() if alone else nullcontext():
                yield objective(predict, *batch) * (len(labels) / share)

    train(
        model,
        losses,
        settings,
        settings.steps,
        settings.rate,
        settings.warmup,
        settings.weight_decay,
        settings.ema,
        checkpoint,
        "denoiser",
        leads=team.leads,
    )


# ---------------------------------------------------------------- the parts of a DiT


def relabel(model: DiTTransformer2DModel, known: Sequence[int | None], settings: FineTune) -> None:
    """Give a DiT other classes, and let its blocks share embedders that are equal, of which diffusers keeps one per block.

    A class with a label keeps that label's embedding, as does the null class, which stays the last. The others begin as
    ``settings.new_classes`` says.
    """
    count = model.config.num_embeds_ada_norm
    generator = torch.Generator().manual_seed(settings.seed)
    tables: list[tuple[torch.Tensor, nn.Embedding]] = []
    clocks: list[nn.Module] = []
    for block in model.transformer_blocks:
        embedders = block.norm1.emb
        old = embedders.class_embedder.embedding_table.weight.detach()
        if len(old) != count + 1:
            raise BackboneError(f"the DiT has no embedding for a null class ({len(old)} rows for {count} classes)")
        shared = next((new for weight, new in tables if torch.equal(weight, old)), None)
        if shared is None:
            spread = old[:-1].std(0, correction=0) * torch.randn(len(known), old.shape[1], generator=generator)
            new = old[:-1].mean(0) + (spread if settings.new_classes == "random" else torch.zeros_like(spread))
            for row, label in enumerate(known):
                if label is not None:
                    new[row] = old[label]
            shared = nn.Embedding.from_pretrained(torch.cat([new, old[-1:]]), freeze=False)
            tables.append((old, shared))
        embedders.class_embedder.embedding_table = shared
        embedders.class_embedder.num_classes = len(known)
        clock = next((other for other in clocks if _equal(other, embedders.timestep_embedder)), None)
        if clock is None:
            clocks.append(embedders.timestep_embedder)
        else:
            embedders.timestep_embedder = clock
    model.register_to_config(num_embeds_ada_norm=len(known))


def separate(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Give each block embedders of its own again, as diffusers saves them."""
    for block in model.transformer_blocks:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)
    return model


class Scaled(nn.Module):
    """A linear layer whose outputs are multiplied by learned factors ``gamma``, 1 at the start."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.gamma = nn.Parameter(torch.ones(linear.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return gamma (W x + b)."""
        scaled: torch.Tensor = self.linear(x) * self.gamma
        return scaled

    def folded(self) -> nn.Linear:
        """Return the linear layer with the factors multiplied into its weights."""
        with torch.no_grad():
            self.linear.weight.mul_(self.gamma[:, None])
            if self.linear.bias is not None:
                self.linear.bias.mul_(self.gamma)
        return self.linear


def open_difffit(model: DiTTransformer2DModel) -> None:
    """Freeze all but DiffFit's part: parameters of one dimension (biases, norms, factors), and label embeddings."""
    for block in model.transformer_blocks:
        block.attn1.to_out[0] = Scaled(block.attn1.to_out[0])
        block.ff.net[2] = Scaled(block.ff.net[2])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.ndim == 1 or "embedding_table" in name)


def close_difffit(model: DiTTransformer2DModel) -> None:
    """Multiply the factors into the weights, if there are any."""
    for block in model.transformer_blocks:
        for holder, place in ((block.attn1.to_out, 0), (block.ff.net, 2)):
            if isinstance(holder[place], Scaled):
                holder[place] = holder[place].folded()


def _equal(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)
