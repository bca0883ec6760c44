"""What of a run exists and what is missing, and why."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from workflow_scripts.recipes import CLASS_STAGES, Labels, Recipes, SampleSet, Training
from workflow_scripts.stages.publish import report_folder
from workflow_scripts.store.results import RECORD, Result

Neighbours = Callable[[Path], Sequence[Mapping[str, Any]]]
STAGES = ("fit_backbone", *CLASS_STAGES, "export", "teacher", "relabel", "evaluate", "measure", "report")


@dataclass
class Item:
    """One thing that a stage makes: a class's result, a set, a training, a report.

    Attributes:
        of: class, set or training, for people.
        why: what is different from the nearest result that exists; None if the item itself exists.
        thing: the item itself; None for a report and a backbone.
    """

    job: str
    of: str
    exists: bool
    why: str | None = None
    thing: Result | SampleSet | Training | Labels | None = None


@dataclass
class StageSurvey:
    """A stage's items, each once."""

    stage: str
    items: list[Item] = field(default_factory=list)
    jobs: int = 0
    jobs_to_run: int = 0

    @property
    def missing(self) -> list[Item]:
        """The items that do not exist."""
        return [item for item in self.items if not item.exists]

    @property
    def reasons(self) -> Counter[str]:
        """How many missing items have which reason."""
        return Counter(item.why or "" for item in self.missing)


def survey(recipes: Recipes, *, explain: bool = False) -> list[StageSurvey]:
    """Look at everything that a run needs.

    Args:
        explain: also find out why each missing class-level result is missing, which reads the records of its neighbours.
    """
    surveys = {stage: StageSurvey(stage) for stage in STAGES}
    neighbours = lru_cache(maxsize=1)(_neighbours)  # the results of a class come one after another
    seen: set[str] = set()
    for job in recipes.jobs():
        stage = surveys[job.stage]
        stage.jobs += 1
        stage.jobs_to_run += not (recipes.config.results / job.manifest).exists()
        for key, item in _items(recipes, job.stage, job.shard, neighbours if explain else None):
            if key not in seen:
                seen.add(key)
                stage.items.append(item)
    return [stage for stage in surveys.values() if stage.jobs]


def _items(recipes: Recipes, stage: str, shard: str, neighbours: Neighbours | None) -> Iterator[tuple[str, Item]]:
    if stage in CLASS_STAGES:
        for result in recipes.stage_results(stage, shard):
            there = recipes.store.exists(result)
            why = None if there or neighbours is None else reason(result, neighbours(recipes.store.path(result).parent))
            yield result.place, Item(shard, result.name, there, why, result)
    elif stage == "export":
        for wanted in recipes.sets(shard):
            folder = recipes.set_directory(wanted)
            of = f"{wanted.method} IPC {wanted.ipc} seed {wanted.seed}"
            yield str(folder), _item(shard, of, folder.exists(), wanted)
    elif stage == "evaluate":
        for training in recipes.trainings_of(shard):
            path = recipes.training_path(training)
            yield str(path), _item(shard, training.name, path.exists(), training)
    elif stage == "measure":
        for wanted in recipes.sets(shard):
            path = recipes.measure_path(wanted)
            yield str(path), _item(shard, f"{wanted.method} IPC {wanted.ipc} seed {wanted.seed}", path.exists())
    elif stage == "teacher":
        path = recipes.teacher_record(shard)
        yield str(path), _item(shard, shard, path.exists())
    elif stage == "relabel":
        labels = recipes.labels[shard]
        path = recipes.labels_path(labels)
        of = f"{labels.set.method} IPC {labels.set.ipc} seed {labels.set.seed} {labels.protocol}"
        yield str(path), _item(shard, of, (path / RECORD).exists(), labels)
    elif stage == "report":
        folder = report_folder(recipes.config, recipes.job(stage, shard))
        yield str(folder), _item(shard, recipes.config.run, (folder / "index.html").exists())
    else:
        yield "backbone", _item(shard, "backbone", recipes.backbone.path.exists())


def _item(job: str, of: str, exists: bool, thing: SampleSet | Training | Labels | None = None) -> Item:
    return Item(job, of, exists, None if exists else "not made yet", thing)


def reason(result: Result, neighbours: Sequence[Mapping[str, Any]]) -> str:
    """Say what is different from the most similar of the results of the same stage and class that exist."""
    if not neighbours:
        return "never made"
    wanted = dict(_flatten(result.recipe))
    differences = [
        sorted(key for key in wanted.keys() | other.keys() if wanted.get(key) != other.get(key))
        for other in neighbours
        if all(other.get(key) == wanted.get(key) for key in ("ipc", "seed", "method.kind", "method.select"))
    ]
    if not differences:
        return "never made"
    changed = min(differences, key=len)
    words = {"images": "its images changed", "recipe": "the stage's code changed its meaning"}
    upstream = {
        key: f"its {key} changed" for key in ("latents", "prototypes", "targets", "gaussian", "vae", "denoiser")
    }
    return ", ".join(dict.fromkeys((words | upstream).get(key, f"{key} changed") for key in changed))


def _neighbours(folder: Path) -> list[dict[str, Any]]:
    """Return the flattened recipes of the results of a stage and class."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.append(dict(_flatten(json.loads((path / RECORD).read_text())["attributes"]["recipe"])))
    return found


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _flatten(inner, f"{prefix}.{index}")
    else:
        yield prefix, value
