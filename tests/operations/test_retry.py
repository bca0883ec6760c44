"""What is set aside: told by plan and status, tried again after ``stillhouse retry``, and collected when nothing needs it."""

import json

import pytest
import support

from workflow_scripts.operations import gc, show
from workflow_scripts.operations.progress import Progress
from workflow_scripts.operations.retry import retry, set_aside
from workflow_scripts.operations.status import status
from workflow_scripts.recipes import Recipes, SampleSet
from workflow_scripts.store.attempts import Attempts


def fail(recipes: Recipes, place: str, times: int = 3) -> None:
    attempts = Attempts(recipes.store.root / "attempts")
    for _ in range(times):
        attempts.add(place, ArithmeticError("no dog"), counted=True)


def tell_status(recipes: Recipes, as_json: bool) -> None:
    status(Progress(recipes, ask=lambda: None), every=None, as_json=as_json, page=None)


@pytest.fixture
def recipes(site: support.Site) -> Recipes:
    recipes = Recipes(site.config())
    fail(recipes, recipes.latents("bee").place)
    fail(recipes, recipes.samples("ant", SampleSet("mgd3", 3, 1)).place)
    fail(recipes, recipes.latents("cat").place, times=2)
    fail(recipes, recipes.training_place(recipes.trainings("dit", 1)[0]))
    return recipes


def test_what_is_set_aside_is_told(recipes: Recipes, capsys: pytest.CaptureFixture[str]) -> None:
    found = {(one.stage, one.of): one for one in set_aside(recipes)}
    assert set(found) == {
        ("encode", "bee"),
        ("sample", "ant IPC 3 seed 1"),
        ("evaluate", "dit IPC 1 seed 0 hard-sgd convnet repeat 0"),
    }
    assert found["encode", "bee"].error == "ArithmeticError: no dog"
    for tell in (tell_status, lambda recipes, as_json: show.plan(recipes, verbose=False, as_json=as_json)):
        tell(recipes, as_json=False)
        printed = capsys.readouterr().out
        assert "stillhouse retry" in printed
        assert "encode 000: bee failed 3 times: ArithmeticError: no dog" in printed
        tell(recipes, as_json=True)
        assert len(json.loads(capsys.readouterr().out)["set_aside"]) == 3


def test_more_attempts_may_be_allowed(site: support.Site, recipes: Recipes) -> None:
    assert set_aside(Recipes(site.config({"compute.attempts": 4}))) == []


def test_retry_forgets_failures_of_some_classes_or_of_all(recipes: Recipes) -> None:
    assert [one.of for one in retry(recipes, ["ant"])] == ["ant IPC 3 seed 1"]
    assert len(set_aside(recipes)) == 2
    assert len(retry(recipes)) == 3, "with the class that has failed twice so far"
    assert set_aside(recipes) == retry(recipes) == []


def test_failures_of_what_no_run_needs_are_collected(site: support.Site, recipes: Recipes) -> None:
    results = recipes.config.results
    assert gc.garbage(results, [recipes]) == []
    without = Recipes(site.config({"compare": ["dit"], "ipc": [1], "evaluation.set_metrics": False}))
    collected = {path.relative_to(results / "store" / "attempts").parts[0] for path in gc.garbage(results, [without])}
    assert collected == {"encode.zarr", "sample.zarr"}, "dit needs no latents"
