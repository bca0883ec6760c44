"""Compute the features of the real images of a shard's classes, in which distilled sets are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from workflow_scripts.data.sources import BadImage
from workflow_scripts.diffusion.backbone import Autoencoder
from workflow_scripts.errors import DataError
from workflow_scripts.evaluation.inception import Inception
from workflow_scripts.evaluation.teacher import TeacherFeatures
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.classifiers import read_teacher
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.inputs import real_batches, refuse_skipped, scaling_factor
from workflow_scripts.stages.memory import Batch
from workflow_scripts.stages.worker import Computed, pick_device, quiet_libraries, run_shard
from workflow_scripts.store.results import Result

Extract = Callable[[np.ndarray], np.ndarray]


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Compute the features of one shard."""
    refuse_skipped(recipes, "features", shard)
    device = pick_device(recipes.config.compute.device)
    batch = Batch(recipes.config.compute.encode_batch)

    @cache
    def loaded() -> tuple[str, Extract]:
        return extractor(recipes, device)

    def compute(missing: Iterator[Result]) -> Iterator[Computed]:
        name, extract = loaded()
        for result in missing:
            skipped: list[BadImage] = []
            keys: list[str] = []
            features: list[np.ndarray] = []
            for kept, pixels in real_batches(recipes, result.class_name, skipped):
                features += batch.over(pixels, extract)
                keys += [entry.key for entry in kept]
            if not keys:
                raise DataError(
                    f"class {result.class_name}: none of its images can be read (first: {skipped[0].path})."
                )
            record = {"space": name, "images": keys, "skipped": [{"path": b.path, "reason": b.reason} for b in skipped]}
            yield result, {"features": np.concatenate(features)}, record

    return run_shard(recipes, "features", shard, compute, str(device))


def extractor(recipes: Recipes, device: torch.device) -> tuple[str, Extract]:
    """Return the name of the run's features, and what gives them: uint8 images (n, H, W, 3) to float32 (n, d).

    On latents, those are the scaled posterior means in the half precision in which encoding stores them.
    """
    evaluation, teacher = recipes.config.evaluation, recipes.feature_teacher
    if teacher is not None:
        resolution: int = recipes.feature_space["resolution"]
        network = read_teacher(recipes, recipes.soft_protocols[0], resolution, device)
        return teacher, TeacherFeatures(network, resolution, evaluation.resample)
    if evaluation.feature_space == "inception":
        assert evaluation.inception is not None
        inception = Inception(evaluation.inception, device)
        return inception.name, inception
    quiet_libraries()
    autoencoder = Autoencoder.load(recipes.backbone.autoencoder, device, getattr(torch, recipes.config.compute.dtype))

    def latents(pixels: np.ndarray) -> np.ndarray:
        mean = autoencoder.encode(pixels)[0].half().float().flatten(1)
        return (mean * autoencoder.scaling_factor).cpu().numpy()

    return "latents", latents


def real_features(recipes: Recipes, class_name: str) -> tuple[np.ndarray, list[str]]:
    """Return the features (n, d) of a class's real images, and the images' keys; mirror images are left out."""
    wanted = recipes.real_features(class_name)
    array = "mean" if wanted.stage == "encode" else "features"
    stored = recipes.store.read(wanted, array)
    keys: list[str] = stored.record["images"]
    features = stored.arrays[array][: len(keys)].reshape(len(keys), -1).astype(np.float32)
    return features * scaling_factor(recipes) if wanted.stage == "encode" else features, keys


if __name__ == "__main__":
    stage_main("features", __doc__, work, "a shard number such as 000")
