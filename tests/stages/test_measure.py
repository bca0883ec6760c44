"""Measuring sets against the real images: what is written, what it depends on, and Inception in place of latents."""

import json
from pathlib import Path

import pytest
import support
import torch
from support import Done, Site, run_jobs

from workflow_scripts.errors import ConfigError
from workflow_scripts.evaluation import inception
from workflow_scripts.recipes import Recipes, SampleSet
from workflow_scripts.stages.features import real_features
from workflow_scripts.stages.measure import work
from workflow_scripts.stages.notice import NOTICE, Unfinished
from workflow_scripts.store.digests import digest


def measured(recipes: Recipes, method: str, ipc: int, seed: int = 0) -> dict:
    record: dict = json.loads(recipes.measure_path(SampleSet(method, ipc, seed)).read_text())
    return record


def test_every_set_is_measured_once(finished: tuple[Site, Done]) -> None:
    recipes = Recipes(finished[0].config())
    paths = {recipes.measure_path(wanted) for method in support.METHODS for wanted in recipes.sets(method)}
    assert {path.name for path in (finished[0].results / "store" / "measure").iterdir()} == {
        path.name for path in paths
    }
    assert len(paths) == len(support.METHODS) * 4 - 2, "herding's two seeds are one set per IPC"
    for method in support.METHODS:
        record = measured(recipes, method, 3)
        assert (
            record["digest"] == digest(record["recipe"]) and record["space"] == "latents" and record["dimensions"] == 64
        )
        assert {"frechet", "kernel", "precision", "coverage", "vendi", "otdd", "mmd"} <= record["values"].keys()
        assert len(record["closest"]) == 9 and record["audit"]["images"] == 9


def test_chosen_real_images_are_copies_and_are_named(finished: tuple[Site, Done]) -> None:
    recipes = Recipes(finished[0].config())
    record = measured(recipes, "random", 3)
    assert record["audit"]["copies"] == 9 and record["values"]["precision"] == 1
    for pair in record["closest"]:
        chosen = recipes.store.record(recipes.samples(pair["class"], SampleSet("random", 3, 0)))["chosen"]
        assert pair["distance"] == 0 and (pair["real_class"], pair["real"]) == (pair["class"], chosen[pair["index"]])
    assert measured(recipes, "dit", 3)["audit"]["copies"] == 0


def test_mirror_images_do_not_count_as_real_ones(copied: Site) -> None:
    config = copied.config({"encode.flip": "both", "compare": ["random"]})
    run_jobs(config, ("encode",))
    features, keys = real_features(Recipes(config), "ant")
    assert features.shape == (support.COUNT, 64) and len(keys) == support.COUNT


def test_a_measurement_stops_between_classes(copied: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = Recipes(copied.config())
    paths = [recipes.measure_path(wanted) for wanted in recipes.sets("random")]
    for path in paths:
        path.unlink()
    due = iter([False, True])
    monkeypatch.setattr(NOTICE, "due", lambda seconds: next(due))
    with pytest.raises(Unfinished, match="stopped in good order at class 2 of 3, because its time is nearly up"):
        work(recipes, "random")
    assert not any(path.exists() for path in paths)


def test_measurements_can_be_left_out(copied: Site) -> None:
    config = copied.config({"evaluation.set_metrics": False})
    assert run_jobs(config).stages() == {"report"}
    assert "No set was measured" in (copied.results / "tiny" / "report" / "index.html").read_text()


def test_inceptions_features_replace_latents(copied: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "SIDE", 75)  # the least that the network takes
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save({**inception.build(original=True).state_dict(), "fc.weight": torch.zeros(1008, 2048)}, path)
    config = copied.config({"evaluation.inception": str(path), "compare": ["random", "dit"], "ipc": [3], "seeds": [0]})
    done = run_jobs(config)
    assert done.stages() >= {"features", "measure", "report"} and not done.scores
    assert {place.split("/")[0] for place in done.places} == {"features.zarr"}
    recipes = Recipes(config)
    assert measured(recipes, "random", 3)["audit"]["copies"] == 9
    assert measured(recipes, "dit", 3)["dimensions"] == 2048
    page = (copied.results / "tiny" / "report" / "index.html").read_text()
    assert ">FID<" in page and ">KID<" in page and "Inception-v3 with FID's weights" in page
    assert run_jobs(config) == Done()
    path.rename(tmp_path / "moved.pth")
    moved = copied.config(
        {"evaluation.inception": str(tmp_path / "moved.pth"), "compare": ["random", "dit"], "ipc": [3], "seeds": [0]}
    )
    assert run_jobs(moved) == Done(), "weights count by their bytes"
    with pytest.raises(ConfigError, match=r"evaluation\.inception: got .*weights\.pth, which is not a file"):
        Recipes(config).check()
