"""Fit a small backbone (KL autoencoder and DiT) on the run's training images, for runs that have ``backbone.fit``."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Mapping
from typing import Any

from workflow_scripts.diffusion.fit import fit_backbone
from workflow_scripts.errors import ConfigError
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.inputs import training_images
from workflow_scripts.stages.worker import pick_device, quiet_libraries
from workflow_scripts.store.files import TEMPORARY, explain_full_disk


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Fit the run's backbone, unless it is there."""
    config = recipes.config
    if config.backbone.fit is None:
        raise ConfigError("backbone.fit: not set; this run uses the backbone at backbone.path")
    final = recipes.backbone.path
    place = str(final.relative_to(config.results))
    if not final.exists():
        quiet_libraries()
        pixels, labels, skipped = training_images(recipes)
        checkpoints = final.with_name(f"{final.name}.checkpoints")
        temporary = final.with_name(f"{TEMPORARY}{final.name}.{uuid.uuid4().hex}")
        with explain_full_disk(final):
            began = time.monotonic()
            device = pick_device(config.compute.device)
            fit_backbone(pixels, labels, recipes.classes, config.backbone.fit, device, checkpoints, temporary)
            temporary.rename(final)
        shutil.rmtree(checkpoints)
        return {"path": place, "seconds": time.monotonic() - began, "images": len(pixels), "skipped": len(skipped)}
    return {"path": place}


if __name__ == "__main__":
    stage_main("fit_backbone", __doc__, work, "backbone")
