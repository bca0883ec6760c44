"""Reading real images and a class's upstream results in the form that stages take them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from workflow_scripts.data.preprocess import load_labelled, load_squares
from workflow_scripts.data.sources import BadImage
from workflow_scripts.diffusion.checkpoint import autoencoder_of
from workflow_scripts.recipes import Recipes


def scaled_latents(recipes: Recipes, class_name: str) -> np.ndarray:
    """Return a class's real latents (n, c, h, w) float32: posterior means times the autoencoder's scaling factor."""
    mean = recipes.store.read(recipes.latents(class_name), "mean").arrays["mean"]
    return mean.astype(np.float32) * scaling_factor(recipes)


def scaling_factor(recipes: Recipes) -> float:
    """Return the factor from the autoencoder's posterior mean to a latent."""
    return autoencoder_of(recipes.backbone.autoencoder).scaling_factor


def real_images(recipes: Recipes, class_name: str, keys: Iterable[str]) -> np.ndarray:
    """Read training images of a class by their keys, as the backbone sees them: uint8 (n, H, W, 3)."""
    config = recipes.config
    by_key = {entry.key: entry for entry in recipes.catalog.entries(class_name, "train")}
    batches = load_squares(
        recipes.catalog.source,
        class_name,
        [by_key[key] for key in keys],
        resolution=config.dataset.resolution,
        crop=config.dataset.crop,
        resample=config.dataset.resample,
        workers=config.compute.workers,
        batch=config.compute.encode_batch,
    )
    return np.concatenate([pixels for _, pixels in batches])


def training_images(recipes: Recipes) -> tuple[np.ndarray, np.ndarray, list[BadImage]]:
    """Read all training images of the run: pixels uint8 (n, H, W, 3), labels int64 (n,), and those that were left out."""
    config = recipes.config
    skipped: list[BadImage] = []
    pixels, labels = load_labelled(
        recipes.catalog.source,
        {name: recipes.catalog.entries(name, "train") for name in recipes.classes},
        resolution=config.dataset.resolution,
        crop=config.dataset.crop,
        resample=config.dataset.resample,
        workers=config.compute.workers,
        on_bad=skipped.append if config.dataset.on_bad_image == "skip" else None,
    )
    return pixels, labels, skipped
