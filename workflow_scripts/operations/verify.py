"""``stillhouse verify``: re-read everything a run has stored, and set aside what is damaged."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from workflow_scripts.errors import StoreError
from workflow_scripts.evaluation.soft_labels import RECORD, SoftLabels
from workflow_scripts.recipes import CLASS_STAGES, Recipes
from workflow_scripts.stages.export import CARD, class_checksum
from workflow_scripts.stages.worker import progress
from workflow_scripts.store.digests import digest

QUARANTINE = "quarantine"


def verify(recipes: Recipes) -> list[str]:
    """Check every result, set, score and manifest of a run.

    Damaged results move to ``store/quarantine``; manifests that name something which is not there are deleted, so that
    the next run computes exactly that again.

    Returns:
        one line per thing that was wrong.
    """
    found = [*_results(recipes), *_sets(recipes), *_teachers(recipes), *_labels(recipes), *_scores(recipes)]
    return found + list(_manifests(recipes.config.results))


def _results(recipes: Recipes) -> Iterator[str]:
    wanted = {
        result.place: result
        for job in recipes.jobs()
        if job.stage in CLASS_STAGES
        for result in recipes.stage_results(job.stage, job.shard)
        if recipes.store.path(result).exists()
    }
    for result in progress(wanted.values(), len(wanted), "verify") if wanted else ():
        try:
            recipes.store.read(result)
        except StoreError as error:
            what = str(error).split(" Run `stillhouse", 1)[0]
            yield f"{what} Set aside in {_set_aside(recipes, recipes.store.path(result))}"


def _sets(recipes: Recipes) -> Iterator[str]:
    for method in recipes.config.compare:
        for wanted in recipes.sets(method):
            folder = recipes.set_directory(wanted)
            if not folder.exists():
                continue
            try:
                card = json.loads((folder / CARD).read_text())
                bad = [name for name in recipes.classes if class_checksum(folder / name) != card["checksums"][name]]
                if card["classes"] != recipes.classes or card["digest"] != recipes.set_digest(wanted):
                    bad.append(CARD)
            except (OSError, ValueError, KeyError):
                bad = [CARD]
            if bad:
                yield f"{folder}: {', '.join(bad[:5])} damaged. Set aside in {_set_aside(recipes, folder)}"


def _teachers(recipes: Recipes) -> Iterator[str]:
    for protocol in recipes.soft_protocols:
        record, weights = recipes.teacher_record(protocol), recipes.teacher_weights(protocol)
        fitted = [weights] if recipes.teacher(protocol).fit is not None else []
        for path, whole in ((record, _is_record), *((path, _is_safetensors) for path in fitted)):
            if path.exists() and not whole(path):
                yield f"{path}: damaged. Set aside in {_set_aside(recipes, path)}"


def _is_record(path: Path) -> bool:
    try:
        record = json.loads(path.read_text())
        return bool(record["digest"] == digest(record["recipe"]))
    except (OSError, ValueError, KeyError):
        return False


def _is_safetensors(path: Path) -> bool:
    """Say whether a file is as long as its header says; it has no checksum."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            return True
    except (OSError, SafetensorError):
        return False


def _labels(recipes: Recipes) -> Iterator[str]:
    for labels in recipes.labels.values():
        path = recipes.labels_path(labels)
        if not path.exists() or not (path / RECORD).exists():
            continue
        stored = SoftLabels(path)
        try:
            if stored.record()["digest"] != recipes.labels_digest(labels):
                raise StoreError("it is that of other labels")
            for epoch in range(stored.record()["epochs"]):
                stored.epoch(epoch)
        except (StoreError, OSError, ValueError, KeyError):
            yield f"{path}: damaged. Set aside in {_set_aside(recipes, path)}"


def _scores(recipes: Recipes) -> Iterator[str]:
    """Compare what scores and measurements say that they are of with what this run wants."""
    wanted = {
        recipes.training_path(training): recipes.training_recipe(training)
        for method in recipes.config.compare
        for ipc in recipes.config.ipc
        for training in recipes.trainings(method, ipc)
    }
    for method in recipes.shards_of("measure"):
        wanted |= {recipes.measure_path(s): recipes.measure_recipe(s) for s in recipes.sets(method)}
    for path, recipe in wanted.items():
        if path.exists():
            try:
                record = json.loads(path.read_text())
                good = record["digest"] == digest(record["recipe"]) == digest(recipe)
            except (OSError, ValueError, KeyError):
                good = False
            if not good:
                yield f"{path}: damaged. Set aside in {_set_aside(recipes, path)}"


def _manifests(results: Path) -> Iterator[str]:
    """Delete the manifests that name what does not exist."""
    for path in sorted((results / "manifests").glob("*/*.json")):
        try:
            content = json.loads(path.read_text())
            named = [f"store/{entry['place']}" for entry in content.get("results", ())]
            named += [*content.get("files", ())]
            named += [entry["folder"] for entry in content.get("sets", ())]
            named += [*content.get("scores", ()), *(content[key] for key in ("report", "path") if key in content)]
            lost = [results / place for place in named if not (results / place).exists()]
        except (OSError, ValueError, KeyError):
            lost = [path]
        if lost:
            path.unlink()
            yield f"{path}: {lost[0]} is not there. The manifest was deleted, so that the next run makes it again."


def _set_aside(recipes: Recipes, path: Path) -> Path:
    target = (
        recipes.store.root / QUARANTINE / f"{path.parent.parent.name}-{path.parent.name}-{path.name}-{time.time_ns()}"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    return target
