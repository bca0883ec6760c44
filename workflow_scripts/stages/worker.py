"""The loop over a job's results: skip what exists, compute the rest, commit each as it is done, and stop in good order.

A stage is handed its results one by one, as it asks for them. So the loop can claim each for this process alone, stop before
the time is up, and know what was in hand when something failed.
"""

from __future__ import annotations

import logging
import platform
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from tqdm import tqdm

from workflow_scripts.errors import ConfigError, StillhouseError
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.notice import NOTICE, Unfinished
from workflow_scripts.store.attempts import Attempts
from workflow_scripts.store.claims import Claims, Left
from workflow_scripts.store.digests import PREFIX
from workflow_scripts.store.events import Events
from workflow_scripts.store.results import Result

if TYPE_CHECKING:
    import torch

Arrays = Mapping[str, np.ndarray]
Computed = tuple[Result, Arrays, Mapping[str, Any]]
T = TypeVar("T")
USE_WEIGHTS = ("encode", "invert", "sample", "match")
PACKAGES = ("stillhouse", "torch", "diffusers", "numpy", "scikit-learn", "zarr")
POLL = 2.0
# So many failures before the first success are the fault of the job, not of its results.
HOPELESS = 3
TOLD = 10  # failures that a message lists


def run_shard(
    recipes: Recipes,
    stage: str,
    shard: str,
    compute: Callable[[Iterator[Result]], Iterable[Computed]],
    device: str = "cpu",
    *,
    order: Callable[[Result], Any] | None = None,
    together: bool = False,
) -> dict[str, Any]:
    """Make a job's results exist.

    Args:
        compute: given the results that are missing, yields each with its arrays and extra facts for its record, in any order.
            Whatever it takes from its argument it has to yield; after a failure it is called again with those that are left.
        order: key by which the results are handed out.
        together: the results are made in one piece, so that a failure is one of the whole job.

    Returns:
        the manifest's content: each class with the place of its result.

    Raises:
        Unfinished: if it had to stop before all was done.
        StillhouseError: if results failed; all others have been made.
    """
    results = recipes.stage_results(stage, shard)
    missing = sorted((result for result in results if not recipes.store.exists(result)), key=order or _as_they_are)
    if missing:
        info = environment(device)
        if stage in USE_WEIGHTS:
            info["licences"] = dict(recipes.backbone.licences)
            if note := recipes.backbone.licence_note():
                tqdm.write(note, file=sys.stderr)

        def commit(made: Computed, seconds: float) -> None:
            result, arrays, extra = made
            recipes.store.commit(result, arrays, {**info, **_identity(recipes, result), "seconds": seconds, **extra})

        loop = Loop(recipes, stage, shard, _place, _name, recipes.store.exists, commit, together=together)
        loop.run(missing, len(results), compute)
    return {
        "results": [{"class": result.class_name, "place": result.place, "digest": result.digest} for result in results]
    }


def _as_they_are(_: Result) -> int:
    return 0


def _place(result: Result) -> str:
    return result.place


def _name(result: Result) -> str:
    return f"class {result.name}"


class Loop(Generic[T]):
    """Works through the missing results of one job.

    Args:
        place: where a result will be below the store; it identifies the result.
        name: what a result is called for people.
        exists: whether a result is there.
        commit: stores what the computation yields, a tuple that begins with the result; the seconds it took come second.
        together: see :func:`run_shard`.
        brittle: this process cannot go on after a failure, because others wait in vain for its part of the work. It is told
            and counted, and new processes go on.
    """

    def __init__(
        self,
        recipes: Recipes,
        stage: str,
        shard: str,
        place: Callable[[T], str],
        name: Callable[[T], str],
        exists: Callable[[T], bool],
        commit: Callable[[Any, float], None],
        *,
        together: bool = False,
        brittle: bool = False,
    ):
        self._title = f"{stage} {shard}"
        self._place, self._name, self._exists, self._commit = place, name, exists, commit
        self._together, self._brittle = together, brittle
        self._limit = recipes.config.compute.attempts
        self._attempts = Attempts(recipes.store.root / "attempts")
        self._claims = Claims(recipes.store.root / "claims", told=lambda: NOTICE.told)
        self._events = Events(recipes.config.results, stage, shard, recipes.job(stage, shard).digest[:PREFIX])
        self._longest = 0.0  # seconds that a result was in hand
        self._done = 0
        self._suspects: deque[list[T]] = deque()  # tried last, in ever smaller groups
        self._elsewhere: list[T] = []
        self._failed: dict[str, StillhouseError] = {}  # what to tell of those that cannot be made, by place
        self._before_success: list[str] = []  # places that failed before anything succeeded

    def run(self, missing: list[T], total: int, compute: Callable[[Iterator[T]], Iterable[Any]]) -> None:
        """Make every result exist.

        Args:
            total: how many results the job has, with those that exist already.

        Raises:
            Unfinished: if this process had to stop before.
            StillhouseError: naming the results that failed, after all others were made.
        """
        self._events.tell("missing", missing=len(missing), total=total)
        with NOTICE.heard(), self._claims, _bar(len(missing), self._title) as bar:
            usable = [item for item in missing if not self._set_aside(item)]
            self._suspects.append([item for item in usable if not self._is_suspect(item)])
            self._suspects.extend([item] for item in usable if self._is_suspect(item))
            while (self._suspects or self._elsewhere) and not NOTICE.due(self._longest):
                if self._suspects:
                    group = self._suspects.popleft()
                    waiting = iter(group)
                    alone = len(group) == 1 and self._is_suspect(group[0])
                    while self._round(waiting, compute, bar, alone=alone):
                        pass
                else:
                    self._wait(bar)
        left = [item for item in missing if self._place(item) not in self._failed and not self._exists(item)]
        if left:
            raise Unfinished(
                f"stopped in good order, because {NOTICE.reason()}: {len(left)} of {total} results are left. "
                "The same command goes on there."
            )
        errors = list(self._failed.values())
        if errors:
            more = [f"... and {len(errors) - TOLD} more"] if len(errors) > TOLD else []
            raise errors[0] if len(errors) == 1 else StillhouseError("\n".join([*map(str, errors[:TOLD]), *more]))

    def _round(
        self,
        items: Iterator[T],
        compute: Callable[[Iterator[T]], Iterable[Any]],
        bar: tqdm[Any],
        *,
        alone: bool = False,
    ) -> bool:
        """Hand results out and commit what comes back, until something fails; say whether some may be left."""
        hand: dict[str, tuple[T, float]] = {}  # what the computation has taken and not yet given back, and since when
        claimed = self._claimed(items, bar, alone)
        first = next(claimed, None)
        if first is None:
            return False

        def handed() -> Iterator[T]:
            for item in chain([first], claimed):
                hand[self._place(item)] = (item, time.monotonic())
                yield item

        try:
            began = time.monotonic()
            made = iter(compute(handed()))
            while True:
                try:
                    result = next(made, None)
                except Unfinished:
                    raise
                except Exception as error:
                    self._blame([item for item, _ in hand.values()], error)
                    return True
                if result is None:
                    if hand:
                        raise RuntimeError(f"{self._title}: {', '.join(hand)} taken and not computed")
                    return False
                now = time.monotonic()
                self._commit(result, now - began)
                item, since = hand.pop(self._place(result[0]))
                self._longest = max(self._longest, now - since)
                self._finish(item, now - began, bar)
                began = time.monotonic()
        finally:
            for item in [first, *(item for item, _ in hand.values())]:
                self._claims.release(self._place(item))

    def _claimed(self, items: Iterator[T], bar: tqdm[Any], alone: bool) -> Iterator[T]:
        """Yield what this process is to make, as long as there is time."""
        while not NOTICE.due(self._longest):
            item = next(items, None)
            if item is None:
                return
            place = self._place(item)
            taken = self._exists(item) or self._claims.take(place, alone=alone)
            if taken is False:
                self._elsewhere.append(item)
            elif self._exists(item):  # another worker has made it
                self._claims.release(place)
                bar.update()
            elif (
                isinstance(taken, Left)
                and not taken.told
                and not self._together
                and self._note_death(item, taken, alone)
            ):
                self._claims.release(place)
            else:
                yield item

    def _finish(self, item: T, seconds: float, bar: tqdm[Any]) -> None:
        place = self._place(item)
        self._claims.release(place)
        self._attempts.clear(place)
        self._events.tell("done", name=self._name(item), place=place, seconds=round(seconds, 3))
        self._done += 1
        bar.update()

    def _wait(self, bar: tqdm[Any]) -> None:
        """Give other workers some time with what they have in hand, then look at it again."""
        place = self._place(self._elsewhere[0])
        bar.set_postfix_str(f"waiting for {self._name(self._elsewhere[0])}: {self._claims.owner(place)}")
        time.sleep(POLL)
        self._suspects.append([item for item in self._elsewhere if not self._set_aside(item)])
        self._elsewhere = []

    # ---------------------------------------------------------------- failures

    def _blame(self, items: list[T], error: Exception) -> None:
        """Keep a failure of what was in hand, and decide what becomes of it.

        Raises:
            the error itself, if it is not the fault of what was in hand.
        """
        if not items or self._together:
            raise error
        counted = len(items) == 1
        # What the user can mend is to be tried again without further ado.
        mendable = error if isinstance(error, StillhouseError) else None
        if mendable is None:
            traceback.print_exception(error)
        for item in items:
            place = self._place(item)
            if mendable is not None:
                self._tell_failure(item, str(error), counted)
            else:
                self._tell_failure(item, self._attempts.add(place, error, counted=counted)[-1].error, counted)
            if mendable is not None and counted:
                if str(mendable) in map(str, self._failed.values()):
                    raise mendable  # the same of two results is the fault of neither
                self._failed[place] = mendable
            elif counted:
                self._give_up_if_hopeless(place, error)
        again = [item for item in items if self._place(item) not in self._failed and not self._set_aside(item)]
        half = (len(again) + 1) // 2
        self._suspects.extend(group for group in (again[:half], again[half:]) if group)
        if _process_is_spoilt(error):
            raise Unfinished(f"the GPU does no more work for this process ({error}); a new one goes on") from error
        if self._brittle:
            if mendable is not None:
                raise mendable
            raise Unfinished(f"this process failed, and the others need it ({error}); new ones go on") from error

    def _give_up_if_hopeless(self, place: str, error: Exception) -> None:
        if self._done == 0 and place not in self._before_success:
            self._before_success.append(place)
            if len(self._before_success) == HOPELESS:
                for spoilt in self._before_success:
                    self._attempts.withdraw(spoilt)
                raise error

    def _note_death(self, item: T, left: Left, alone: bool) -> bool:
        """Keep that a worker ended with a result in hand; say whether the result has to wait until others are done."""
        reason = f"the worker on {left.owner} ended without a word, with this in hand"
        self._attempts.add(self._place(item), reason, counted=left.alone)
        self._tell_failure(item, reason, left.alone)
        if self._set_aside(item):
            return True
        waits = not alone and self._is_suspect(item)
        if waits:
            self._suspects.append([item])
        return waits

    def _is_suspect(self, item: T) -> bool:
        """Say whether a result is to be tried alone: once a worker may end with it in hand, as nodes fail."""
        failures = self._attempts.failures(self._place(item))
        return len(failures) > 1 or any(failure.counted for failure in failures)

    def _set_aside(self, item: T) -> bool:
        """Say whether a result has failed too often to be tried again."""
        failures = self._attempts.failures(self._place(item))
        count = sum(failure.counted for failure in failures)
        if count < self._limit:
            return False
        path = self._attempts.path(self._place(item))
        self._failed[self._place(item)] = StillhouseError(
            f"{self._name(item)} is set aside after {count} failed attempts: {failures[-1].error} (traceback: {path}). "
            "`stillhouse retry` lets it be tried again."
        )
        return True

    def _tell_failure(self, item: T, error: str, counted: bool) -> None:
        place = self._place(item)
        self._events.tell("failed", name=self._name(item), place=place, error=error, counted=counted)


def _process_is_spoilt(error: BaseException) -> bool:
    """Say whether an error leaves CUDA unusable for the rest of the process, as an illegal access or an assertion does."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def _identity(recipes: Recipes, result: Result) -> dict[str, Any]:
    """Return which class a result is of, and its label in the backbone; experts are of no class."""
    name = result.class_name
    return {"class": name, "label": recipes.backbone.label_of(name)} if name in recipes.classes else {}


def environment(device: str) -> dict[str, Any]:
    """Return what a record says of where it was computed."""
    return {"device": device, "host": platform.node(), "versions": {package: version(package) for package in PACKAGES}}


def pick_device(wanted: str) -> torch.device:
    """Turn the configured device into one that is there; ``auto`` prefers a GPU."""
    import torch  # here, because stages that only cluster or export start faster without it

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("compute.device: cuda, but this machine has no usable GPU. Set compute.device: auto or cpu.")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def progress(items: Iterable[Any], total: int, name: str, unit: str = "result") -> Iterator[Any]:
    """Show progress: a bar on a terminal, a line a minute in a log."""
    with _bar(total, name, unit) as bar:
        for item in items:
            yield item
            bar.update()


def _bar(total: int, name: str, unit: str = "result") -> tqdm[Any]:
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total, desc=name, unit=unit, mininterval=0.2 if terminal else 60, maxinterval=60, ascii=not terminal
    )


def quiet_libraries() -> None:
    """Keep the libraries' advice out of the logs."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
