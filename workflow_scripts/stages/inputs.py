"""Reading real images and a class's upstream results in the form that stages take them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from workflow_scripts.data.preprocess import load_labelled, load_squares
from workflow_scripts.data.sources import BadImage, ImageEntry
from workflow_scripts.diffusion.checkpoint import autoencoder_of
from workflow_scripts.recipes import Recipes


def scaled_latents(recipes: Recipes, class_name: str) -> np.ndarray:
    """Return a class's real latents (n, c, h, w) float32: posterior means times the autoencoder's scaling factor."""
    mean = recipes.store.read(recipes.latents(class_name), "mean").arrays["mean"]
    return mean.astype(np.float32) * scaling_factor(recipes)


class CachedLatents:
    """The posteriors of all real images of a run, scaled, read from the store as they are asked for.

    Attributes:
        shape: (c, h, w) of a latent.
    """

    def __init__(self, recipes: Recipes, *, verify: bool = True):
        """Look at every class's latents, and compare their checksums if ``verify``."""
        self._store = recipes.store
        self._results = [recipes.latents(name) for name in recipes.classes]
        self._scale = scaling_factor(recipes)
        if verify:
            for result in self._results:
                self._store.read(result)
        shapes = [self._store.mapped(result, "mean").shape for result in self._results]
        self.shape = shapes[0][1:]
        self._ends = np.cumsum([shape[0] for shape in shapes])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return means and log-variances (n, c, h, w) float32 and labels (n,) int64 of the latents at ``places`` (n,)."""
        labels = np.searchsorted(self._ends, places, side="right")
        mean, logvar = (np.empty((len(places), *self.shape), np.float32) for _ in range(2))
        for label in np.unique(labels):
            rows = labels == label
            result, begin = self._results[label], self._ends[label - 1] if label else 0
            mean[rows] = self._store.mapped(result, "mean")[places[rows] - begin]
            logvar[rows] = self._store.mapped(result, "logvar")[places[rows] - begin]
        mean *= self._scale
        logvar += 2 * math.log(self._scale)
        return mean, logvar, labels


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


def real_batches(
    recipes: Recipes, class_name: str, skipped: list[BadImage]
) -> Iterator[tuple[list[ImageEntry], np.ndarray]]:
    """Read a class's training images as the backbone sees them, a batch at a time: entries and uint8 (n, H, W, 3).

    With ``on_bad_image: skip``, images that cannot be read are left out and added to ``skipped``.
    """
    config = recipes.config
    return load_squares(
        recipes.catalog.source,
        class_name,
        recipes.catalog.entries(class_name, "train"),
        resolution=config.dataset.resolution,
        crop=config.dataset.crop,
        resample=config.dataset.resample,
        workers=config.compute.workers,
        batch=config.compute.encode_batch,
        on_bad=skipped.append if config.dataset.on_bad_image == "skip" else None,
    )


def refuse_skipped(recipes: Recipes, stage: str, shard: str) -> None:
    """Raise for results of an earlier run that left out images which this run must not leave out."""
    if recipes.config.dataset.on_bad_image == "skip":
        return
    for result in recipes.stage_results(stage, shard):
        if recipes.store.exists(result) and (skipped := recipes.store.record(result)["skipped"]):
            raise BadImage(skipped[0]["path"], result.class_name, skipped[0]["reason"])


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
