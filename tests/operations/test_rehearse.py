"""The rehearsal: made in one command, planned without another, and run through every stage and training-free method."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import support
import yaml
from PIL import Image

from workflow_scripts.config import MatchingMethod, RunConfig, load
from workflow_scripts.data.imagenet import wnids
from workflow_scripts.errors import ConfigError
from workflow_scripts.operations.rehearse import FOLDER, OVERLAY, PARTS, RUN, rehearse
from workflow_scripts.recipes import CLASS_STAGES, Recipes, SampleSet

CLASSES, IMAGES, SHARDS = 10, 6, 3
CONFIG = support.ROOT / "config.yaml"


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal")
    assert rehearse(folder, CLASSES, IMAGES) == ["--configfile", str(folder / OVERLAY)]
    return folder


def config_of(rehearsal: Path, *overrides: str) -> RunConfig:
    settings = (f"results={rehearsal / 'results'}", f"shards={SHARDS}", "compute.device=cpu", *overrides)
    return load(CONFIG, None, settings, [rehearsal / OVERLAY])


def test_it_has_imagenets_layout_and_names(rehearsal: Path) -> None:
    assert sorted(path.name for path in rehearsal.iterdir()) == sorted(PARTS)
    for split, count in (("train", IMAGES), ("val", 2)):
        assert sorted(path.name for path in (rehearsal / split).iterdir()) == list(wnids()[:CLASSES])
        for folder in (rehearsal / split).iterdir():
            images = list(folder.glob("*.JPEG"))
            assert len(images) == count and len({path.read_bytes() for path in images}) == count
            assert all(folder.name in path.name for path in images)
            with Image.open(images[0]) as image:
                assert (image.format, image.mode) == ("JPEG", "RGB")
    assert json.loads((rehearsal / "backbone" / "labels.json").read_text()) == list(wnids()[:CLASSES])
    network = json.loads((rehearsal / "backbone" / "transformer" / "config.json").read_text())
    assert network["num_embeds_ada_norm"] == CLASSES


def test_the_run_of_the_shipped_configuration_looks_where_it_is_written_by_default() -> None:
    runs = yaml.safe_load(CONFIG.read_text())["runs"]
    assert runs[RUN]["dataset"]["root"] == str(FOLDER / "train")
    assert runs[RUN]["dataset"]["test_root"] == str(FOLDER / "val")
    assert runs[RUN]["backbone"]["path"] == str(FOLDER / "backbone")
    shipped = load(CONFIG, RUN)
    free = {name for name, method in shipped.methods.items() if not isinstance(method, MatchingMethod)}
    assert set(shipped.compare) == free, "every training-free method is rehearsed"


def test_planning_needs_no_other_command(rehearsal: Path) -> None:
    command = [sys.executable, "-m", "workflow_scripts.cli", "plan", "--json", "--config", str(CONFIG)]
    options = ["--configfile", str(rehearsal / OVERLAY), "--set", f"results={rehearsal / 'planned'}"]
    ended = subprocess.run([*command, *options], cwd=support.ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    stages = {stage["stage"]: stage for stage in json.loads(ended.stdout)["stages"]}
    assert stages["encode"]["missing"] == CLASSES and stages["report"]["jobs_to_run"] == 1


@pytest.mark.parametrize(("classes", "images"), [(1, 6), (1001, 6), (10, 0)])
def test_impossible_numbers_are_refused(classes: int, images: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give 2 to 1000"):
        rehearse(tmp_path, classes, images)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    with pytest.raises(ConfigError, match=r"val: is there already"):
        rehearse(tmp_path, 2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["val"]


def test_every_stage_and_training_free_method_runs_on_it(rehearsal: Path) -> None:
    config = config_of(rehearsal)
    done = support.run_jobs(config)
    assert done.stages() == {"encode", "cluster", "invert", "sample", "export", "evaluate", "measure", "report"}
    assert done.methods() == set(config.compare)
    assert sum(stage == "sample" for stage, _ in done.jobs) == SHARDS * len(config.compare)
    assert len(done.scores) == len(config.compare)
    recipes = Recipes(config)
    for place in done.places:
        assert sum(path.is_file() for path in (config.results / "store" / place).rglob("*")) <= 4
    assert not any(math.isnan(_score(recipes, method)["top1_last"]) for method in config.compare)
    assert not support.run_jobs(config).jobs
    more = support.run_jobs(config_of(rehearsal, "shards=4"), CLASS_STAGES)
    assert more.jobs and not more.places, "another number of shards means other jobs and no other results"


def _score(recipes: Recipes, method: str) -> dict[str, Any]:
    (training,) = recipes.trainings(method, 1)
    return dict(json.loads(recipes.training_path(training).read_text()))


def test_every_artefact_knows_its_class_and_the_order_of_classes(rehearsal: Path) -> None:
    config = config_of(rehearsal)
    support.run_jobs(config)
    recipes = Recipes(config)
    for job in recipes.jobs():
        for result in recipes.stage_results(job.stage, job.shard) if job.stage in CLASS_STAGES else ():
            record = recipes.store.record(result)
            assert (record["class"], record["label"]) == (result.class_name, wnids().index(result.class_name))
    for method in config.compare:
        card = json.loads((recipes.set_directory(SampleSet(method, 1, 0)) / "dataset.json").read_text())
        assert card["classes"] == list(wnids()[:CLASSES])
