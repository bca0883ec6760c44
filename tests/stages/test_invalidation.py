"""What is computed again after a change: exactly what the change concerns, counted by what appears in the store."""

import csv
import json
import shutil
from typing import Any

import numpy as np
import pytest
import support
from support import Done, Site, run_jobs, tally

from workflow_scripts.errors import StillhouseError
from workflow_scripts.recipes import CLASS_STAGES, Recipes, SampleSet
from workflow_scripts.stages.publish import publish
from workflow_scripts.store.files import TEMPORARY

SEEDED = ("random", "kmeans", "dit", "mgd3", "manifoldgd", "d3hr")  # herding ignores the seed
SEES_IMAGES = tuple(name for name in support.METHODS if name != "dit")  # the backbone alone determines dit's images


def samples(*methods: str) -> int:
    """How many sample results a class has for these methods, at two IPCs and two seeds."""
    return sum(4 if name in SEEDED else 2 for name in methods)


def methods_of(site: Site, places: set[str], overrides: dict[str, Any] | None = None) -> set[str]:
    """The methods that sample results belong to."""
    recipes = Recipes(site.config(overrides))
    owners = {
        recipes.samples(name, wanted).place: method
        for method in recipes.config.compare
        for wanted in recipes.sets(method)
        for name in recipes.classes
    }
    return {owners[place] for place in places if place.startswith("sample.zarr/")}


# ---------------------------------------------------------------- the whole run


def test_a_run_makes_every_result_once(finished: tuple[Site, Done]) -> None:
    site, done = finished
    per_class = {"encode": 1, "cluster": 3, "invert": 1, "sample": samples(*support.METHODS)}
    assert tally(done.places) == {stage: dict.fromkeys(support.CLASSES, count) for stage, count in per_class.items()}
    assert len(done.scores) == len(support.METHODS) * 2 * 2
    assert len(done.jobs) == len(set(done.jobs)) == len(list((site.results / "manifests").glob("*/*.json")))


def test_a_second_run_does_nothing(finished: tuple[Site, Done]) -> None:
    site, _ = finished
    before = support.stored(site.results)
    assert run_jobs(site.config()) == Done()
    assert support.stored(site.results) == before


def test_every_result_can_be_read_and_is_made_of_few_files(finished: tuple[Site, Done]) -> None:
    site, _ = finished
    recipes = Recipes(site.config())
    for job in recipes.jobs():
        for result in recipes.stage_results(job.stage, job.shard) if job.stage in CLASS_STAGES else ():
            stored = recipes.store.read(result)
            assert stored.record["recipe"] == result.recipe
            assert {"device", "host", "seconds", "versions", "created"} <= stored.record.keys()
            assert all(np.isfinite(array).all() for array in stored.arrays.values())
            count = sum(file.is_file() for file in recipes.store.path(result).rglob("*"))
            assert count <= (8 if job.stage == "sample" else 14), f"{result.place}: {count} files"
    mean = recipes.store.read(recipes.latents("ant")).arrays["mean"]
    assert (mean.dtype, mean.shape) == (np.float16, (support.COUNT, 4, 4, 4))
    images = recipes.store.read(recipes.samples("ant", SampleSet("mgd3", 3, 1))).arrays["images"]
    assert (images.dtype, images.shape) == (np.uint8, (3, 16, 16, 3))


def test_manifests_name_the_results(finished: tuple[Site, Done]) -> None:
    site, done = finished
    named = set()
    for path in (site.results / "manifests").glob("*/*.json"):
        manifest = json.loads(path.read_text())
        assert path.name == f"{manifest['shard']}.{manifest['digest'][:16]}.json"
        named |= {result["place"] for result in manifest.get("results", ())}
    assert named == done.places


def test_scores_have_one_row_per_training(finished: tuple[Site, Done]) -> None:
    site, done = finished
    report = site.results / "tiny" / "report"
    with (report / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "run", "method", "ipc", "seed", "protocol", "architecture", "repeat", "top1_best", "top1_last", "top5_last",
        "epochs", "images_seen", "seconds", "set_digest",
    ]  # fmt: skip
    cells = [(row["method"], int(row["ipc"]), int(row["seed"]), row["architecture"], row["repeat"]) for row in rows]
    expected = {(name, ipc, seed) for name in support.METHODS for ipc in (1, 3) for seed in (0, 1)}
    assert len(cells) == len(set(cells)) == len(done.scores)
    assert {cell[:3] for cell in cells} == expected
    for row in rows:
        assert row["run"] == "tiny"
        assert row["protocol"] == "hard-sgd"
        assert 0 <= float(row["top1_last"]) <= float(row["top1_best"]) <= 100
        assert float(row["top1_last"]) <= float(row["top5_last"]) <= 100
        assert int(row["epochs"]) == 2
        assert int(row["images_seen"]) == 2 * 3 * int(row["ipc"])
        assert float(row["seconds"]) > 0
        assert len(row["set_digest"]) == 64
    sets = {(row["method"], row["ipc"], row["seed"]): row["set_digest"] for row in rows}
    assert len(set(sets.values())) == len(support.METHODS) * 4 - 2, "herding's two seeds are one set per IPC"
    assert sets["herding", "1", "0"] == sets["herding", "1", "1"]
    with (report / "leaderboard.csv").open(newline="") as file:
        board = {(row["method"], row["ipc"]): int(row["sets"]) for row in csv.DictReader(file)}
    alone = {("herding", "1"), ("herding", "3"), ("kmeans", "1")}  # the one centroid is the mean whatever the seed
    assert {cell for cell, count in board.items() if count == 1} == alone
    listed = json.loads((report / "scores.json").read_text())
    assert [(row["method"], row["ipc"], row["seed"]) for row in listed] == [cell[:3] for cell in cells]
    assert (report / "index.html").is_file()


def test_exported_sets_hold_the_stored_images(finished: tuple[Site, Done]) -> None:
    from PIL import Image

    site, _ = finished
    recipes = Recipes(site.config())
    wanted = SampleSet("d3hr", 3, 1)
    folder = recipes.set_directory(wanted)
    assert sorted(path.name for path in folder.iterdir()) == [*support.CLASSES, "dataset.json"]
    images = recipes.store.read(recipes.samples("cat", wanted)).arrays["images"]
    for index, file in enumerate(sorted((folder / "cat").iterdir())):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), images[index])
    assert json.loads((folder / "dataset.json").read_text())["classes"] == list(support.CLASSES)


# ---------------------------------------------------------------- changes


def test_an_image_more_recomputes_its_class_and_what_follows(copied: Site) -> None:
    before = support.stored(copied.results)
    support.draw(1, 77).save(copied.train / "bee" / "new.png")
    done = run_jobs(copied.config())
    assert tally(done.places) == {
        "encode": {"bee": 1},
        "cluster": {"bee": 3},
        "invert": {"bee": 1},
        "sample": {"bee": samples(*SEES_IMAGES)},
    }
    assert methods_of(copied, done.places) == set(SEES_IMAGES)
    assert len(done.scores) == len(SEES_IMAGES) * 4
    assert {shard for stage, shard in done.jobs if stage == "export"} == set(SEES_IMAGES)
    assert done.stages() == {"encode", "cluster", "invert", "sample", "export", "evaluate", "measure", "report"}
    assert support.stored(copied.results).items() >= before.items(), "what was there stays as it was"

    (copied.train / "bee" / "new.png").unlink()
    again = run_jobs(copied.config())
    assert not again.places and not again.scores
    assert again.stages() <= {"report"}


def test_a_test_image_more_repeats_the_evaluations_only(copied: Site) -> None:
    support.draw(1, 77).save(copied.test / "bee" / "new.png")
    done = run_jobs(copied.config())
    assert not done.places
    assert len(done.scores) == len(support.METHODS) * 4
    assert done.stages() == {"evaluate", "report"}


def test_a_methods_parameter_recomputes_that_method_and_nothing_when_it_is_changed_back(copied: Site) -> None:
    run_jobs(copied.config())
    changed = {"methods.mgd3.guidance": [{"term": "mode", "scale": 0.3, "stop": 4}]}
    done = run_jobs(copied.config(changed))
    assert tally(done.places) == {"sample": dict.fromkeys(support.CLASSES, samples("mgd3"))}
    assert methods_of(copied, done.places, changed) == {"mgd3"}
    assert done.methods() == {"mgd3"}
    assert {shard.split("-")[0] for stage, shard in done.jobs if stage in ("export", "evaluate")} == {"mgd3"}
    assert len(done.scores) == 4
    assert run_jobs(copied.config()) == Done()
    assert run_jobs(copied.config(changed)) == Done()


def test_a_clusterings_parameter_recomputes_the_methods_that_use_it(copied: Site) -> None:
    changed = {"cluster.max_leaves": 5}
    done = run_jobs(copied.config(changed))
    assert tally(done.places) == {
        "cluster": dict.fromkeys(support.CLASSES, 1),
        "sample": dict.fromkeys(support.CLASSES, samples("manifoldgd")),
    }
    assert methods_of(copied, done.places, changed) == {"manifoldgd"}
    assert not run_jobs(copied.config()).places


def test_other_shards_recompute_no_class(copied: Site) -> None:
    before = support.stored(copied.results)
    for shards in (2, 3, 7, 1):
        done = run_jobs(copied.config({"shards": shards}))
        assert not done.places and not done.scores
        assert not done.stages() & {"export", "evaluate"}
    assert support.stored(copied.results) == before


def test_batches_threads_and_texts_recompute_nothing(copied: Site) -> None:
    overrides = {"compute.sample_batch": 2, "compute.encode_batch": 1, "compute.workers": 1, "title": "Other"}
    done = run_jobs(copied.config(overrides))
    assert not done.places and not done.scores
    assert done.stages() == {"report"}


def test_one_more_seed_adds_its_images_only(copied: Site) -> None:
    done = run_jobs(copied.config({"seeds": [0, 1, 2], "compare": ["mgd3", "herding"]}))
    assert tally(done.places) == {"sample": dict.fromkeys(support.CLASSES, 2)}
    assert len(done.scores) == 4


def test_fewer_classes_reuse_all_that_was_made(copied: Site) -> None:
    done = run_jobs(copied.config({"dataset.classes": ["cat", "ant"]}))
    assert not done.places
    assert len(done.scores) == len(support.METHODS) * 4, "classifiers of two classes are others"


def test_a_class_more_adds_that_class(copied: Site) -> None:
    support.make_folder(copied.train, ["elk"], support.COUNT)
    support.make_folder(copied.test, ["elk"], 4, offset=100)
    done = run_jobs(copied.config())
    assert {name for classes in tally(done.places).values() for name in classes} == {"elk"}
    made = {place.split("/")[0].removesuffix(".zarr") for place in done.places}
    assert made == set(CLASS_STAGES) - {"features", "experts", "match"}  # which nothing in this run needs


def forget(site: Site, place: str) -> None:
    """Delete a result and every manifest that names it."""
    shutil.rmtree(site.results / "store" / place)
    for manifest in (site.results / "manifests").glob("*/*.json"):
        if place in manifest.read_text():
            manifest.unlink()


def test_a_deleted_result_is_made_again_alone_and_the_same(copied: Site) -> None:
    run_jobs(copied.config())
    checksums, before = support.checksums(copied.results), support.stored(copied.results)
    recipes = Recipes(copied.config())
    modes = recipes.clusterings("bee", "mgd3", 3)["prototypes"]
    gaussian = recipes.gaussian("cat", "d3hr")
    assert gaussian is not None
    wanted = [recipes.samples("cat", SampleSet(name, 3, 1)) for name in ("mgd3", "random", "d3hr")]
    for result in (recipes.latents("bee"), modes, gaussian, *wanted):
        forget(copied, result.place)
        done = run_jobs(copied.config())
        assert done.places == {result.place}
        assert [stage for stage, _ in done.jobs] == [result.stage]
        assert not done.scores
    assert support.checksums(copied.results) == checksums
    kept = support.stored(copied.results).items() & before.items()
    assert len(kept) == len(before) - 6


def test_leftovers_of_a_killed_commit_are_no_results(copied: Site) -> None:
    run_jobs(copied.config())
    recipes = Recipes(copied.config())
    path = recipes.store.path(recipes.latents("bee"))
    stray = path.with_name(f"{TEMPORARY}{path.name}.0123")
    shutil.copytree(path, stray)
    forget(copied, recipes.latents("bee").place)
    assert not recipes.store.exists(recipes.latents("bee"))
    work = support.workers()["encode"]
    work(recipes, "000")
    assert recipes.store.exists(recipes.latents("bee"))
    shutil.rmtree(stray)


def test_a_copy_that_followed_links_is_told_of(copied: Site) -> None:
    config = copied.config()
    link = copied.results / "tiny" / "report"
    page = (link / "index.html").read_text()
    link.unlink()
    link.mkdir()
    job = Recipes(config).job("report", "report")
    with pytest.raises(StillhouseError, match="report is a directory"):
        publish(config, job)
    link.rmdir()
    assert publish(config, job) == link / "index.html"
    assert link.is_symlink() and (link / "index.html").read_text() == page


def test_reports_of_several_configurations_stand_beside_each_other(copied: Site) -> None:
    report = copied.results / "tiny" / "report"
    run_jobs(copied.config())
    first = report.resolve()
    run_jobs(copied.config({"title": "Other title"}))
    assert report.resolve() != first
    assert "Other title" in (report / "index.html").read_text()
    assert (first / "index.html").is_file()


def test_the_same_work_elsewhere_gives_the_same_store(finished: tuple[Site, Done], site: Site) -> None:
    """Other shards, other batches, another place: the same digests, and the same content to rounding."""
    overrides = {
        "shards": 2,
        "compare": ["mgd3", "d3hr", "random"],
        "compute.sample_batch": 5,
        "compute.encode_batch": 3,
    }
    done = run_jobs(site.config(overrides), CLASS_STAGES)
    assert done.places < finished[1].places
    ours, theirs = Recipes(site.config()), Recipes(finished[0].config())
    for wanted in (SampleSet("mgd3", 3, 1), SampleSet("d3hr", 1, 0)):
        for name in support.CLASSES:
            left, right = (
                recipes.store.read(recipes.samples(name, wanted)).arrays["latents"] for recipes in (ours, theirs)
            )
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
