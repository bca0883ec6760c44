"""Train classifiers on exported sets and measure their accuracy on the real test images, one score file per training.

Trainings share their batches among the processes that torchrun starts, here for two nodes of eight GPUs, on each of them:
``torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m -- workflow_scripts.stages.evaluate
--run NAME --shard METHOD-ipcN-NNN``. The first process says which training is next, and alone claims and writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from workflow_scripts.data.sources import BadImage
from workflow_scripts.errors import DataError
from workflow_scripts.evaluation.protocols import Recipe
from workflow_scripts.evaluation.soft_labels import SoftLabels
from workflow_scripts.evaluation.training import Stopped, can_stack, train_students
from workflow_scripts.recipes import Labels, Recipes, Training
from workflow_scripts.stages.classifiers import Labelled, load_real, load_set, read_teacher, teacher_top1, train_side
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.notice import NOTICE
from workflow_scripts.stages.worker import Loop, environment, pick_device
from workflow_scripts.store.digests import PREFIX, digest
from workflow_scripts.store.files import write_atomically
from workflow_scripts.team import Team, team

STUDENTS_AT_ONCE = 8
SMALL = 64 * 64 * 64
"""Most pixels per batch with which a student leaves much of a GPU idle."""
DONE = -1
"""What the first process says when no training is left."""


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Run one job's trainings that have no score yet."""
    trainings = recipes.trainings_of(shard)
    with team(pick_device(recipes.config.compute.device)) as processes:
        inputs = Inputs(recipes, processes)
        if processes.leads:
            lead(recipes, shard, trainings, inputs)
        else:
            follow(recipes, trainings, inputs)
    return {"scores": [str(recipes.training_path(t).relative_to(recipes.config.results)) for t in trainings]}


def lead(recipes: Recipes, shard: str, trainings: list[Training], inputs: Inputs) -> None:
    """Run the trainings that have no score yet, with the other processes if there are any."""
    missing = [training for training in trainings if not recipes.training_path(training).exists()]
    together = False  # the others are at work on a training, where they do not listen

    def compute(waiting: Iterator[Training]) -> Iterator[tuple[Training, dict[str, Any]]]:
        nonlocal together
        for group in _groups(recipes, waiting, inputs.team):
            inputs.team.word(trainings.index(group[0]))
            together = True
            yield from evaluate(recipes, group, inputs)
            together = False

    def commit(made: tuple[Training, dict[str, Any]], _: float) -> None:
        write_atomically(recipes.training_path(made[0]), json.dumps(made[1]))

    try:
        if missing:
            loop = Loop(
                recipes,
                "evaluate",
                shard,
                place=recipes.training_place,
                name=lambda training: training.name,
                exists=lambda training: recipes.training_path(training).exists(),
                commit=commit,
                brittle=inputs.team.size > 1,
            )
            loop.run(missing, len(trainings), compute)
    finally:
        if not together:
            inputs.team.word(DONE)


def follow(recipes: Recipes, trainings: list[Training], inputs: Inputs) -> None:
    """Share the batches of the trainings that the first process names, until it names none; SIGTERM is for it to obey."""
    with NOTICE.heard():
        while (place := inputs.team.word()) != DONE:
            for _ in evaluate(recipes, [trainings[place]], inputs):
                pass


class Inputs:
    """What trainings read, each once as long as it stays the same.

    Attributes:
        team: the processes that train together; each of them reads for itself.
    """

    def __init__(self, recipes: Recipes, processes: Team):
        self.recipes = recipes
        self.team = processes
        self.skipped: list[BadImage] = []
        self._kept: dict[str, tuple[Any, Any]] = {}

    def test(self, recipe: Recipe) -> Labelled:
        """Read the real test images."""

        def read() -> Labelled:
            self.skipped = []
            return load_real(self.recipes, "test", recipe.resolution, self.skipped, recipe.test_resize)

        return self._keep("test", (recipe.resolution, recipe.test_resize), read)

    def set(self, training: Training, recipe: Recipe) -> Labelled:
        """Read an exported set; students of one set share it."""
        key = (training.set, train_side(self.recipes, recipe))
        return self._keep(f"set {training.set.seed}", key, lambda: load_set(self.recipes, *key))

    def teacher(self, protocol: str, recipe: Recipe) -> torch.nn.Module:
        """Load a protocol's teacher."""
        return self._keep(
            "teacher", protocol, lambda: read_teacher(self.recipes, protocol, recipe.resolution, self.team.device)
        )

    def _keep(self, place: str, key: Any, read: Callable[[], Any]) -> Any:
        if place not in self._kept or self._kept[place][0] != key:
            self._kept.pop(place, None)  # make room before the next is read
            self._kept[place] = (key, read())
        return self._kept[place][1]


def _groups(recipes: Recipes, trainings: Iterable[Training], processes: Team) -> Iterator[list[Training]]:
    """Part trainings, in order, into those that share their steps: of one recipe but for the seed, small, on one GPU."""
    configured = recipes.config.compute.students_at_once
    group: list[Training] = []
    for training in trainings:
        recipe = recipes.student(training)
        small = processes.device.type == "cuda" and recipe.batch_size * recipe.resolution**2 <= SMALL
        most = 1 if processes.size > 1 else configured or (STUDENTS_AT_ONCE if small else 1)
        first = recipes.student(group[0]) if group else recipe
        if group and (
            training.protocol != group[0].protocol
            or replace(recipe, seed=first.seed) != first
            or not can_stack(recipe)
            or (recipe.target == "stored" and training.set != group[0].set)
        ):
            yield group
            group = []
        group.append(training)
        if len(group) >= most:  # without a look at the next, which another worker may take meanwhile
            yield group
            group = []
    if group:
        yield group


def evaluate(recipes: Recipes, group: Sequence[Training], inputs: Inputs) -> Iterator[tuple[Training, dict[str, Any]]]:
    """Train classifiers at once and yield their scores, each with everything that determines it."""
    students = [recipes.student(training) for training in group]
    first, recipe, device = group[0], students[0], inputs.team.device
    soft: dict[str, Any] = {}
    if recipe.target == "teacher":
        soft["teacher"] = inputs.teacher(first.protocol, recipe)
    elif recipe.target == "stored":
        soft["soft"] = SoftLabels(recipes.labels_path(Labels(first.set, first.protocol)))
    test = inputs.test(recipe)
    name = digest([recipes.training_recipe(training) for training in group])[:PREFIX]
    checkpoint = recipes.store.root / "evaluate.checkpoints" / f"{name}.safetensors"
    try:
        scores = train_students(
            students,
            [inputs.set(training, recipe) for training in group],
            test,
            device=device,
            compiled=recipes.config.compute.compile and device.type == "cuda",
            checkpoint=checkpoint,
            stop=NOTICE.due,
            team=inputs.team,
            **soft,
        )
    except Stopped as stopped:
        raise NOTICE.stopped(f"{stopped} of {first.name}") from None
    except ValueError as error:
        made = first.set
        raise DataError(
            f"{made.method} IPC {made.ipc} seed {made.seed}, {first.architecture.name} by {first.protocol}: {error}"
        ) from error
    for training, score in zip(group, scores, strict=True):
        determined = recipes.training_recipe(training)
        record = {
            "digest": digest(determined),
            "recipe": determined,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **environment(str(device)),
            "protocol": training.protocol,
            "teacher_top1": teacher_top1(recipes, training.protocol) if recipe.target != "hard" else None,
            "top1_best": score.top1_best,
            "top1_last": score.top1_last,
            "top5_last": score.top5_last,
            "best_epoch": score.best_epoch,
            "epochs": score.epochs,
            "images_seen": score.images_seen,
            "seconds": score.seconds,
            "processes": inputs.team.size,
            "students_at_once": len(group),
            "curve": score.curve,
            "class_top1": score.class_top1,
            "confusion": score.confusion,
            "skipped": [{"class": bad.class_name, "path": bad.path, "reason": bad.reason} for bad in inputs.skipped],
        }
        yield training, record
    if inputs.team.leads:
        checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    stage_main("evaluate", __doc__, work, "METHOD-ipcN-NNN, for instance mgd3-ipc10-000")
