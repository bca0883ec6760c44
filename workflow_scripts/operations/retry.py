"""What failed so often that it is set aside, and ``stillhouse retry``, which lets it be tried again."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from workflow_scripts.recipes import CLASS_STAGES, Recipes
from workflow_scripts.store.attempts import Attempts


@dataclass(frozen=True)
class Aside:
    """A result that is set aside.

    Attributes:
        of: class or training, for people.
        error: the last failure in one line.
        file: where all failures are, with their tracebacks.
    """

    stage: str
    job: str
    of: str
    failures: int
    error: str
    file: str
    place: str


def set_aside(recipes: Recipes) -> list[Aside]:
    """Return what a run will not try again."""
    limit = recipes.config.compute.attempts
    return [found for found in _failed(recipes) if found.failures >= limit]


def retry(recipes: Recipes, names: Collection[str] = ()) -> list[Aside]:
    """Forget the failures of a run's results, or of those of some classes; return what had failed."""
    attempts = Attempts(recipes.store.root / "attempts")
    found = [one for one in _failed(recipes) if not names or one.of.split(" ")[0] in names]
    for one in found:
        attempts.clear(one.place)
    return found


def explain(aside: Aside) -> str:
    """Say in one line what is set aside and why."""
    return (
        f"{aside.stage} {aside.job}: {aside.of} failed {aside.failures} times: {aside.error} (traceback: {aside.file})"
    )


def _failed(recipes: Recipes) -> Iterator[Aside]:
    """Yield the results of a run that have failed at least once and do not exist."""
    attempts = Attempts(recipes.store.root / "attempts")
    if not attempts.root.exists():
        return
    seen: set[str] = set()
    for job in recipes.jobs():
        for place, name, exists in _results(recipes, job.stage, job.shard):
            if place not in seen and (failures := attempts.failures(place)) and not exists:
                seen.add(place)
                count = sum(failure.counted for failure in failures)
                yield Aside(job.stage, job.shard, name, count, failures[-1].error, str(attempts.path(place)), place)


def _results(recipes: Recipes, stage: str, shard: str) -> Iterator[tuple[str, str, bool]]:
    if stage in CLASS_STAGES:
        for result in recipes.stage_results(stage, shard):
            yield result.place, result.name, recipes.store.exists(result)
    elif stage == "evaluate":
        for training in recipes.trainings_of(shard):
            yield recipes.training_place(training), training.name, recipes.training_path(training).exists()
