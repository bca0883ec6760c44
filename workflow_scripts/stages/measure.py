"""Measure a method's distilled sets against the real images, without training: one file of metrics per set."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from workflow_scripts.evaluation.measures import SetMeasures, audit_summary, measure
from workflow_scripts.evaluation.set_metrics import Memorisation
from workflow_scripts.recipes import Recipes, SampleSet
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.features import Extract, extractor, real_features
from workflow_scripts.stages.memory import Batch
from workflow_scripts.stages.notice import NOTICE, Unfinished
from workflow_scripts.stages.worker import environment, pick_device, progress
from workflow_scripts.store.digests import digest
from workflow_scripts.store.files import write_atomically

CLOSEST = 24
"""How many pairs of a synthetic image and its nearest real one are named, the most suspicious first."""


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Measure the sets of one method that were not measured yet; those with the same images once."""
    sets = recipes.sets(shard)
    missing = {str(path): wanted for wanted in sets if not (path := recipes.measure_path(wanted)).exists()}
    if missing:
        measure_sets(recipes, shard, list(missing.values()))
    return {"scores": [str(recipes.measure_path(s).relative_to(recipes.config.results)) for s in sets]}


def measure_sets(recipes: Recipes, shard: str, sets: list[SampleSet]) -> None:
    """Measure some sets in one pass over the real images."""
    began = time.monotonic()
    device = pick_device(recipes.config.compute.device)
    space, extract = extractor(recipes, device)
    features = {wanted: set_features(recipes, wanted, extract) for wanted in sets}
    names = progress(recipes.classes, len(recipes.classes), f"measure {shard}", "class")
    measures = {
        str(place): SetMeasures(features[wanted], np.repeat(np.arange(len(recipes.classes)), wanted.ipc), space)
        for place, wanted in enumerate(sets)
    }

    def real(label: int) -> np.ndarray:
        if NOTICE.due(0.0):
            raise Unfinished(
                f"stopped in good order at class {label + 1} of {len(recipes.classes)}, because {NOTICE.reason()}. "
                "The same command begins with the first one again."
            )
        return real_features(recipes, next(names))[0]

    with NOTICE.heard():
        found = measure(measures, len(recipes.classes), real)
    seconds = (time.monotonic() - began) / len(sets)
    for wanted, (values, warnings, audit) in zip(sets, found.values(), strict=True):
        recipe = recipes.measure_recipe(wanted)
        record = {
            "digest": digest(recipe),
            "recipe": recipe,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **environment(str(device)),
            "seconds": seconds,
            "space": space,
            "dimensions": features[wanted].shape[1],
            "values": values,
            "warnings": warnings,
            "audit": audit_summary(audit, np.repeat(np.arange(len(recipes.classes)), wanted.ipc)),
            "closest": closest_pairs(recipes, wanted, audit),
        }
        write_atomically(recipes.measure_path(wanted), json.dumps(record, allow_nan=False))


def set_features(recipes: Recipes, wanted: SampleSet, extract: Extract) -> np.ndarray:
    """Return the features (classes * ipc, d) of a set's images, class by class in label order."""
    batch = Batch(recipes.config.compute.encode_batch)
    parts: list[np.ndarray] = []
    for name in recipes.classes:
        images = recipes.store.read(recipes.samples(name, wanted), "images").arrays["images"]
        parts += batch.over(images, extract)
    return np.concatenate(parts)


def closest_pairs(recipes: Recipes, wanted: SampleSet, audit: Memorisation) -> list[dict[str, Any]]:
    """Name the most suspicious images of a set, each with its nearest real image."""
    pairs = []
    for place in audit.closest()[:CLOSEST].tolist():
        real_class = recipes.classes[audit.labels[place]]
        keys = recipes.store.record(recipes.real_features(real_class))["images"]
        ratio = float(audit.ratios[place])
        pairs.append(
            {
                "class": recipes.classes[place // wanted.ipc],
                "index": place % wanted.ipc,
                "real_class": real_class,
                "real": keys[audit.nearest[place]],
                "distance": float(audit.distances[place]),
                "ratio": ratio if math.isfinite(ratio) else None,
                "percentile": float(audit.percentiles[place]),
            }
        )
    return pairs


if __name__ == "__main__":
    stage_main("measure", __doc__, work, "a method's name")
