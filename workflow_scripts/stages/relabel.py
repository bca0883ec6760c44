"""Ask a teacher once about every augmented and mixed view of an exported set, and store its logits for replay (FKD)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from workflow_scripts.evaluation.augment import draw_epoch, epoch_generator
from workflow_scripts.evaluation.soft_labels import SoftLabels
from workflow_scripts.evaluation.training import batches
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.classifiers import load_set, read_teacher, teacher_top1, train_side
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.notice import NOTICE
from workflow_scripts.stages.worker import environment, pick_device, progress


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Store one set's soft labels; epochs that are there already are kept.

    Raises:
        Unfinished: if this process had to stop before the last epoch.
    """
    labels = recipes.labels[shard]
    stored = SoftLabels(recipes.labels_path(labels))
    if not stored.whole:
        recipe = recipes.label_recipe(labels)
        device = pick_device(recipes.config.compute.device)
        top1 = teacher_top1(recipes, labels.protocol)
        teacher = read_teacher(recipes, labels.protocol, recipe.resolution, device)
        side = train_side(recipes, recipe)
        images, truth = (tensor.to(device) for tensor in load_set(recipes, labels.set, side))
        half = recipe.dtype == "bfloat16"
        missing = [epoch for epoch in range(recipe.epochs) if not stored.has(epoch)]
        began = before = time.monotonic()
        longest = 0.0
        with NOTICE.heard():
            for epoch in progress(missing, len(missing), f"relabel {shard}", "epoch"):
                draws = draw_epoch(recipe, len(images), images.shape[-1], epoch_generator(recipe.seed, epoch))
                with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
                    logits = [teacher(batch.images[0]) for batch in batches([recipe], [(images, truth)], epoch)]
                stored.write(epoch, recipe.epochs, draws, torch.cat(logits).float())
                now = time.monotonic()
                longest, before = max(longest, now - before), now
                if epoch != missing[-1] and NOTICE.due(longest):
                    raise NOTICE.stopped(f"after epoch {epoch + 1} of {recipe.epochs}")
        stored.finish(
            {
                "digest": recipes.labels_digest(labels),
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                **environment(str(device)),
                "teacher_top1": top1,
                "epochs": recipe.epochs,
                "seconds": time.monotonic() - began,
            }
        )
    return {"files": [str(stored.path.relative_to(recipes.config.results))]}


if __name__ == "__main__":
    stage_main("relabel", __doc__, work, "METHOD-ipcN-seedS-PROTOCOL, for instance mgd3-ipc10-seed0-soft-fkd")
