"""Reading a class's upstream results in the form that methods take them."""

from __future__ import annotations

import numpy as np

from workflow_scripts.diffusion.checkpoint import autoencoder_of
from workflow_scripts.recipes import Recipes


def scaled_latents(recipes: Recipes, class_name: str) -> np.ndarray:
    """Return a class's real latents (n, c, h, w) float32: posterior means times the autoencoder's scaling factor."""
    mean = recipes.store.read(recipes.latents(class_name), "mean").arrays["mean"]
    return mean.astype(np.float32) * scaling_factor(recipes)


def scaling_factor(recipes: Recipes) -> float:
    """Return the factor from the autoencoder's posterior mean to a latent."""
    return autoencoder_of(recipes.backbone.autoencoder).scaling_factor
