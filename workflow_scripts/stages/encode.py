"""Encode the real images of a shard's classes: the VAE posterior's mean and log-variance of each image."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from workflow_scripts.data.sources import BadImage
from workflow_scripts.diffusion.backbone import Autoencoder
from workflow_scripts.errors import DataError
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.inputs import real_batches, refuse_skipped
from workflow_scripts.stages.memory import Batch
from workflow_scripts.stages.worker import Computed, pick_device, quiet_libraries, run_shard
from workflow_scripts.store.results import Result


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Encode one shard."""
    config = recipes.config
    refuse_skipped(recipes, "encode", shard)
    if config.dataset.source != "imagefolder":  # which says all there is to say
        for split, found in recipes.catalog.describe().items():
            tqdm.write(f"{split}: {found}", file=sys.stderr)
    quiet_libraries()
    device = pick_device(config.compute.device)

    batch = Batch(config.compute.encode_batch)

    @cache
    def autoencoder() -> Autoencoder:
        return Autoencoder.load(recipes.backbone.autoencoder, device, getattr(torch, config.compute.dtype))

    def compute(missing: Iterator[Result]) -> Iterator[Computed]:
        autoencoder()
        for result in missing:
            yield result, *encode_class(recipes, autoencoder(), result.class_name, batch)

    return run_shard(recipes, "encode", shard, compute, str(device))


def encode_class(
    recipes: Recipes, autoencoder: Autoencoder, class_name: str, batch: Batch
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and record of one class: mean and logvar (n, c, h, w) fp16, and which images they belong to.

    With ``encode.flip: both`` the mirror images follow the images, in the same order.
    """
    config = recipes.config
    skipped: list[BadImage] = []
    keys: list[str] = []
    means, logvars = [], []
    flips = (False, True) if config.encode.flip == "both" else (False,)
    for flip in flips:
        keys, skipped = [], []
        for kept, pixels in real_batches(recipes, class_name, skipped):
            for mean, logvar in batch.over(
                np.ascontiguousarray(pixels[:, :, ::-1]) if flip else pixels, autoencoder.encode
            ):
                means.append(mean.cpu().numpy())
                logvars.append(logvar.cpu().numpy())
            keys += [entry.key for entry in kept]
    if not keys:
        raise DataError(
            f"class {class_name}: none of its {len(skipped)} images can be read (first: {skipped[0].path}). Replace them."
        )
    arrays = {"mean": np.concatenate(means).astype(np.float16), "logvar": np.concatenate(logvars).astype(np.float16)}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise DataError(
            f"class {class_name}: the autoencoder gave values beyond half precision. Is {recipes.backbone.autoencoder} right?"
        )
    return arrays, {"images": keys, "skipped": [{"path": bad.path, "reason": bad.reason} for bad in skipped]}


if __name__ == "__main__":
    stage_main("encode", __doc__, work, "a shard number such as 000")
