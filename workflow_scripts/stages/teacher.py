"""Get a teacher of soft labels ready: train it if that is wanted, and measure it on the real test images before its use."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from workflow_scripts.data.sources import BadImage
from workflow_scripts.errors import DataError
from workflow_scripts.evaluation.protocols import Recipe
from workflow_scripts.evaluation.teacher import check_teacher
from workflow_scripts.evaluation.training import Stopped, train_student
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.classifiers import Labelled, load_real, read_teacher
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.notice import NOTICE
from workflow_scripts.stages.worker import environment, pick_device
from workflow_scripts.store.digests import digest
from workflow_scripts.store.files import TEMPORARY, explain_full_disk, write_atomically


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Train and measure the teacher of the protocol that the job is called after."""
    record = recipes.teacher_record(shard)
    weights = recipes.teacher_weights(shard)
    fitted = recipes.teacher(shard).fit is not None
    if not record.exists() or not weights.exists():
        check = recipes.teacher_check(shard)
        device = pick_device(recipes.config.compute.device)
        skipped: list[BadImage] = []
        test = load_real(recipes, "test", check["resolution"], skipped, check["test_resize"])
        began = time.monotonic()
        if fitted and not weights.exists():
            fit_teacher(recipes, shard, test, device)
        network = read_teacher(recipes, shard, check["resolution"], device)
        images, labels = (tensor.to(device) for tensor in test)
        found = check_teacher(network, images, labels, len(recipes.classes))
        if found.fault:
            raise DataError(f"The teacher of {shard}, {weights}, {found.fault}")
        content = {
            "digest": digest(check),
            "recipe": check,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **environment(str(device)),
            "top1": found.top1,
            "images": found.images,
            "seconds": time.monotonic() - began,
        }
        write_atomically(record, json.dumps(content))
    made = [record, weights] if fitted else [record]
    return {"files": [str(path.relative_to(recipes.config.results)) for path in made]}


def fit_teacher(recipes: Recipes, protocol: str, test: Labelled, device: torch.device) -> None:
    """Train a teacher on the real training images; an interrupted training goes on from its last checkpoint.

    Raises:
        Unfinished: if this process had to stop before it was trained.
    """
    teacher, example = recipes.teacher(protocol), recipes.teacher_check(protocol)
    fit = teacher.fit
    assert fit is not None
    skipped: list[BadImage] = []
    train = load_real(recipes, "train", example["resolution"], skipped)
    recipe = Recipe(
        architecture=teacher.architecture.name,
        width=teacher.architecture.width,
        resolution=example["resolution"],
        classes=len(recipes.classes),
        schedule="cosine",
        crop_scale=fit.crop_scale,
        jitter=0.0,
        lighting=0.0,
        cutmix=0.0,
        evaluations=1,
        **fit.model_dump(exclude={"crop_scale"}),
    )
    path = recipes.teacher_weights(protocol)
    checkpoint = path.with_name(f"{path.stem}.checkpoints") / path.name
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{uuid.uuid4().hex}")  # two jobs may make the same teacher

    def keep(network: nn.Module) -> None:
        save_file({name: value.cpu().contiguous() for name, value in network.state_dict().items()}, temporary)

    path.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(path), NOTICE.heard():
        try:
            train_student(
                recipe,
                train,
                test,
                device=device,
                compiled=recipes.config.compute.compile and device.type == "cuda",
                checkpoint=checkpoint,
                stop=NOTICE.due,
                keep=keep,
            )
        except Stopped as stopped:
            raise NOTICE.stopped(f"{stopped} of the teacher of {protocol}") from None
        except ValueError as error:
            raise DataError(f"teacher of {protocol}: {error} (evaluation: teacher.fit)") from error
        temporary.replace(path)
    shutil.rmtree(checkpoint.parent, ignore_errors=True)


if __name__ == "__main__":
    stage_main("teacher", __doc__, work, "a protocol's name, for instance soft-rded")
