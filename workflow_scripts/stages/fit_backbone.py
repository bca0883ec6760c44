"""Make the run's backbone: fit a small one on its training images, or fine-tune a pre-trained DiT on their latents.

Fine-tuning shares its batch among the processes that torchrun starts:
``torchrun --standalone --nproc-per-node 4 -m -- workflow_scripts.stages.fit_backbone --run NAME --shard backbone``.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workflow_scripts.diffusion.finetune import finetune
from workflow_scripts.diffusion.fit import fit_backbone
from workflow_scripts.errors import ConfigError
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.inputs import CachedLatents, training_images
from workflow_scripts.stages.worker import pick_device, quiet_libraries
from workflow_scripts.store.files import TEMPORARY, explain_full_disk
from workflow_scripts.team import Team, team


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Make the run's backbone, unless it is there."""
    config = recipes.config
    if not recipes.fits:
        raise ConfigError(
            "backbone.fit and backbone.finetune: not set; this run uses the backbone at backbone.path as it is"
        )
    final = recipes.backbone.path
    place = {"path": str(final.relative_to(config.results))}
    if final.exists():
        return place
    quiet_libraries()
    checkpoints = final.with_name(f"{final.name}.checkpoints")
    temporary = final.with_name(f"{TEMPORARY}{final.name}.{uuid.uuid4().hex}")
    began = time.monotonic()
    with explain_full_disk(final), team(pick_device(config.compute.device)) as processes:
        make = _fit if config.backbone.finetune is None else _finetune
        facts = make(recipes, processes, checkpoints, temporary)
        if processes.leads:
            temporary.rename(final)
            shutil.rmtree(checkpoints)
    return {**place, "seconds": time.monotonic() - began, **facts}


def _fit(recipes: Recipes, processes: Team, checkpoints: Path, into: Path) -> dict[str, Any]:
    fit = recipes.config.backbone.fit
    assert fit is not None
    if processes.size > 1:
        raise ConfigError("backbone.fit: trains in one process; only backbone.finetune is for several")
    pixels, labels, skipped = training_images(recipes)
    fit_backbone(pixels, labels, recipes.classes, fit, processes.device, checkpoints, into)
    return {"images": len(pixels), "skipped": len(skipped)}


def _finetune(recipes: Recipes, processes: Team, checkpoints: Path, into: Path) -> dict[str, Any]:
    config, pretrained = recipes.config, recipes.pretrained
    assert config.backbone.finetune is not None
    latents = CachedLatents(recipes, verify=processes.leads)
    known = [pretrained.labels.get(name) for name in recipes.classes]
    finetune(
        pretrained.path,
        pretrained.autoencoder,
        latents,
        recipes.classes,
        known,
        config.backbone.finetune,
        processes,
        checkpoints,
        into,
        autocast=config.compute.dtype == "bfloat16",
        compiled=config.compute.compile,
    )
    return {
        "latents": len(latents),
        "known_classes": sum(label is not None for label in known),
        "processes": processes.size,
    }


if __name__ == "__main__":
    stage_main("fit_backbone", __doc__, work, "backbone")
