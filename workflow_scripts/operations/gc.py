"""``stillhouse gc``: what the results directory holds that no configured run refers to."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from workflow_scripts.diffusion.checkpoint import notes_of
from workflow_scripts.operations.verify import QUARANTINE
from workflow_scripts.recipes import CLASS_STAGES, Recipes
from workflow_scripts.stages.common import resolved_path
from workflow_scripts.stages.publish import report_folder
from workflow_scripts.store.attempts import Attempts
from workflow_scripts.store.files import TEMPORARY
from workflow_scripts.store.results import RECORD

LEFTOVER_AGE = 24 * 3600
CACHE = "cache"
CONFIG_AGE = 30 * LEFTOVER_AGE


def referenced(recipes: Recipes) -> Iterator[Path]:
    """Yield every path below the results directory that a run needs."""
    results, attempts = recipes.config.results, Attempts(recipes.store.root / "attempts")
    yield resolved_path(recipes.config)
    yield from recipes.catalog.notes()
    yield from notes_of(recipes.backbone, results / CACHE)
    for job in recipes.jobs():
        yield results / job.manifest
        if job.stage == "match":
            yield recipes.checkpoint(job.shard)
        if job.stage in CLASS_STAGES:
            for result in recipes.stage_results(job.stage, job.shard):
                yield recipes.store.path(result)
                yield attempts.path(result.place)
        elif job.stage == "export":
            yield from map(recipes.set_directory, recipes.sets(job.shard))
        elif job.stage == "evaluate":
            for training in recipes.trainings_of(job.shard):
                yield recipes.training_path(training)
                yield attempts.path(recipes.training_place(training))
        elif job.stage == "measure":
            yield from map(recipes.measure_path, recipes.sets(job.shard))
        elif job.stage == "teacher":
            weights = recipes.teacher_weights(job.shard)
            yield from (recipes.teacher_record(job.shard), weights, weights.with_name(f"{weights.stem}.checkpoints"))
        elif job.stage == "relabel":
            yield recipes.labels_path(recipes.labels[job.shard])
        elif job.stage == "report":
            yield report_folder(recipes.config, job)
        else:
            yield recipes.backbone.path
            yield recipes.backbone.path.with_name(f"{recipes.backbone.path.name}.checkpoints")


def garbage(results: Path, runs: Iterable[Recipes]) -> list[Path]:
    """Return what no run refers to: results, sets, scores, manifests, reports, notes, set-aside results and old leftovers.

    Work in progress of an interrupted or running job and notes (listings, hashes) count only when they have not been touched
    for a day. A complete configuration counts after a month, because jobs that wait in a queue read it when they start.
    """
    needed = {path.resolve() for recipes in runs for path in referenced(recipes)}
    return [path for path in _collectable(results) if path.resolve() not in needed and _settled(results, path)]


def delete(paths: Iterable[Path]) -> None:
    """Remove files and directories."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def size(path: Path) -> int:
    """Return the bytes below a path."""
    if not path.is_dir():
        return path.lstat().st_size
    return sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)


def _collectable(results: Path) -> Iterator[Path]:
    store = results / "store"
    own = (
        "evaluate/*",
        "measure/*",
        "evaluate.checkpoints/*",
        "backbones/*",
        "match.checkpoints/*",
        "teachers/*",
        "labels/*",
    )
    for pattern in ("*.zarr/*/*", *own, f"{QUARANTINE}/*", "attempts/**/*.json", "claims/**/*.json"):
        yield from sorted(store.glob(pattern))
    for pattern in ("datasets/*", "manifests/*/*", "*/reports/*"):
        yield from sorted(results.glob(pattern))
    yield from (path for path in sorted((results / CACHE).rglob("*")) if path.is_file())


def _settled(results: Path, path: Path) -> bool:
    place = path.relative_to(results).parts
    working = path.name.startswith(TEMPORARY) or ".checkpoints" in (path.suffix, path.parent.suffix)
    if place[:2] == (CACHE, "configs"):
        age = CONFIG_AGE
    elif (
        place[0] == CACHE
        or working
        or "claims" in place
        or (path.parent.name == "labels" and not (path / RECORD).exists())
    ):
        age = LEFTOVER_AGE
    else:
        return True
    return time.time() - path.stat().st_mtime > age
