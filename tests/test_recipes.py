"""Planning: what determines a result, what does not, and that asking costs nothing."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
from support import Site, class_digests, stage_digests

from workflow_scripts.config import resolve
from workflow_scripts.data.sources import ImageEntry
from workflow_scripts.errors import BackboneError, DataError
from workflow_scripts.recipes import CLASS_STAGES, Recipes, SampleSet

MakeSite = Callable[..., Site]


def plan(site: Site, overrides: dict[str, Any] | None = None) -> Recipes:
    return Recipes(site.config(overrides))


# ---------------------------------------------------------------- a pure function

PROGRAM = """
import json, sys
from pathlib import Path
from workflow_scripts.config import load_resolved
from workflow_scripts.recipes import Recipes
recipes = Recipes(load_resolved(Path(sys.argv[1])))
recipes.check()
jobs = {f"{job.stage}/{job.shard}": job.digest for job in recipes.jobs()}
print(json.dumps({"jobs": jobs, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def test_planning_imports_no_heavy_library_and_is_the_same_in_every_process(plan_site: MakeSite) -> None:
    site = plan_site()
    resolved = site.resolved()
    here = {f"{job.stage}/{job.shard}": job.digest for job in plan(site).jobs()}
    for seed in ("1", "2"):
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(resolved)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=support.ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        there = json.loads(ended.stdout)
        assert there["jobs"] == here
        assert not {"torch", "torchvision", "diffusers", "sklearn", "scipy", "zarr", "matplotlib"} & set(
            there["modules"]
        )
    written = {path.name for path in site.results.iterdir()} if site.results.exists() else set()
    assert written <= {"cache"}, "planning writes nothing but remembered hashes"


def test_digests_do_not_depend_on_the_order_of_keys(plan_site: MakeSite) -> None:
    def reverse(value: Any) -> Any:
        return {key: reverse(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    site = plan_site()
    document = support.document(support.tiny_run(site.train, site.test, site.backbone), site.results)
    assert list(reverse(document)) != list(document)
    assert class_digests(Recipes(resolve(reverse(document)))) == class_digests(plan(site))


def test_every_result_and_job_has_its_own_digest(plan_site: MakeSite) -> None:
    recipes = plan(plan_site())
    jobs = recipes.jobs()
    assert len({job.manifest for job in jobs}) == len(jobs)
    results = [r for job in jobs if job.stage in CLASS_STAGES for r in recipes.stage_results(job.stage, job.shard)]
    assert len({result.place for result in results}) == len({result.digest for result in results}) == len(results)
    counts = {stage: sum(result.stage == stage for result in results) for stage in CLASS_STAGES}
    # one tree and one k-means per IPC; herding ignores the seed: 6 methods x 2 IPC x 2 seeds and 2 sets
    none = {"features": 0, "experts": 0, "match": 0}
    assert counts == {"encode": 3, "cluster": 3 * 3, "invert": 3, "sample": 3 * (6 * 2 * 2 + 2)} | none


def test_jobs_come_after_what_they_need_and_the_report_last(plan_site: MakeSite) -> None:
    recipes = plan(plan_site(), {"shards": 2})
    seen: set[tuple[str, str]] = set()
    for job in recipes.jobs():
        assert set(job.needs) <= seen, f"{job.stage} {job.shard} before {set(job.needs) - seen}"
        seen.add((job.stage, job.shard))
    assert [job.stage for job in recipes.jobs()][-1] == "report"
    shards = {
        stage: sorted(job.shard for job in support.jobs_of(recipes, stage)) for stage in ("encode", "invert", "export")
    }
    assert shards == {"encode": ["000", "001"], "invert": ["000", "001"], "export": sorted(support.METHODS)}


def test_a_job_holds_exactly_the_classes_of_its_shard(plan_site: MakeSite) -> None:
    site = plan_site(support.WIDE)
    for shards in (1, 3, 8, 20):
        recipes = plan(site, {"shards": shards})
        held = [recipes.shard_classes(shard) for shard in recipes.shards]
        assert sorted(name for classes in held for name in classes) == sorted(support.WIDE)
        assert all(held), "no shard without classes"
        assert len(held) == min(shards, len(support.WIDE))


# ---------------------------------------------------------------- what does not matter to a result

INDIFFERENT: dict[str, dict[str, Any]] = {
    "batch sizes": {"compute.encode_batch": 3, "compute.invert_batch": 5, "compute.sample_batch": 7},
    "threads": {"compute.workers": 1},
    "device": {"compute.device": "auto"},
    "compilation": {"compute.compile": True},
    "texts": {"title": "Other", "methods.mgd3.summary": "Other."},
    "the report": {"report.sheet_images": 1},
    "the evaluation": {"evaluation.epochs": 9, "evaluation.repeats": 2, "evaluation.resolution": 32},
    "methods that are not compared": {"methods.d3hr-published.sampler.steps": 7},
    "the results folder": {"results": "elsewhere"},
    "where the images are read from, if they are the same": {},
}


@pytest.mark.parametrize("overrides", INDIFFERENT.values(), ids=INDIFFERENT)
def test_what_does_not_change_a_result_is_in_no_digest(
    overrides: dict[str, Any], plan_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a relative results folder goes
    site = plan_site()
    before = class_digests(plan(site))
    if not overrides:
        shutil.copytree(site.train, tmp_path / "moved")  # with modification times
        overrides = {"dataset.root": str(tmp_path / "moved")}
    assert class_digests(plan(site, overrides)) == before


@pytest.mark.parametrize("shards", [2, 3, 50])
def test_shards_are_in_no_digest_of_a_result(shards: int, plan_site: MakeSite) -> None:
    site = plan_site(support.WIDE)
    alone, split = plan(site), plan(site, {"shards": shards})
    for stage in CLASS_STAGES:
        assert stage_digests(alone, stage) == stage_digests(split, stage)
    assert [recipe_of(alone, t) for t in trainings(alone)] == [recipe_of(split, t) for t in trainings(split)]


def trainings(recipes: Recipes) -> list[Any]:
    return [
        t for method in recipes.config.compare for ipc in recipes.config.ipc for t in recipes.trainings(method, ipc)
    ]


def recipe_of(recipes: Recipes, training: Any) -> str:
    return json.dumps(recipes.training_recipe(training), sort_keys=True)


# ---------------------------------------------------------------- what does matter

ALL = set(CLASS_STAGES)
BY_BACKBONE = ALL - {"experts"}  # which see real images only, as they are and in float32
MATTERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "dtype": ({"compute.dtype": "bfloat16"}, BY_BACKBONE),
    "crop": ({"dataset.crop": "resize"}, ALL),
    "mirror images": ({"encode.flip": "both"}, BY_BACKBONE),
}


@pytest.mark.parametrize(("overrides", "stages"), MATTERS.values(), ids=MATTERS)
def test_what_changes_latents_changes_all(overrides: dict[str, Any], stages: set[str], plan_site: MakeSite) -> None:
    # dit looks at no latents, so it is left out
    site = plan_site()
    compare = {"compare": ["random", "herding", "kmeans", "mgd3", "manifoldgd", "d3hr", "ld3m-dm", "ld3m-mtt"]}
    before, after = plan(site, compare), plan(site, compare | overrides)
    for stage in CLASS_STAGES:
        assert stage_digests(before, stage).isdisjoint(stage_digests(after, stage)) == (stage in stages), stage


WEIGHTS: dict[str, tuple[str, set[str]]] = {
    "the autoencoder": ("vae/diffusion_pytorch_model.safetensors", BY_BACKBONE),
    "its configuration": ("vae/config.json", BY_BACKBONE),
    "the denoiser": ("transformer/diffusion_pytorch_model.safetensors", {"invert", "sample", "match"}),
    "its configuration too": ("transformer/config.json", {"invert", "sample", "match"}),
    "the noise schedule": ("scheduler/scheduler_config.json", {"invert", "sample", "match"}),
}


@pytest.mark.parametrize(("file", "stages"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_count_by_their_bytes(file: str, stages: set[str], plan_site: MakeSite) -> None:
    site = plan_site()
    diffusion = {"compare": ["dit", "mgd3", "manifoldgd", "d3hr", "ld3m-dm", "ld3m-mtt"]}
    before = plan(site, diffusion)
    digests = {stage: stage_digests(before, stage) for stage in CLASS_STAGES}
    coresets = class_digests(plan(site, {"compare": ["random", "herding", "kmeans"]}))

    path = site.backbone / file
    os.utime(path)
    assert class_digests(plan(site, diffusion)) == class_digests(before), "its age does not count"
    path.write_text(path.read_text().replace("file", "life"))  # as long as before
    after = plan(site, diffusion)
    for stage in filter(digests.get, CLASS_STAGES):
        assert digests[stage].isdisjoint(stage_digests(after, stage)) == (stage in stages), stage
    same = class_digests(plan(site, {"compare": ["random", "herding", "kmeans"]})) == coresets
    assert same == ("vae" not in file), "real images know no denoiser"


def test_big_weights_are_hashed_again_when_they_change(plan_site: MakeSite) -> None:
    site = plan_site()
    weights = site.backbone / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    first = class_digests(plan(site))
    assert class_digests(plan(site)) == first
    weights.write_bytes(bytes((3 << 20) - 1) + b"\1")
    assert class_digests(plan(site)) != first


def test_a_label_counts_for_its_class(plan_site: MakeSite) -> None:
    site = plan_site()
    compare = {"compare": ["dit", "d3hr"], "seeds": [0], "ipc": [1]}
    before = class_digests(plan(site, compare))
    (site.backbone / "labels.json").write_text(json.dumps(["bee", "ant", "cat"]))
    changed = {
        key.rpartition("/")[0] for key, digest in class_digests(plan(site, compare)).items() if digest != before[key]
    }
    jobs = ("invert/000", "sample/dit-000", "sample/d3hr-000")
    assert changed == {f"{job}/{name}" for job in jobs for name in ("ant", "bee")}


PARAMETERS: dict[str, tuple[dict[str, Any], set[tuple[str, str]]]] = {
    "guidance": ({"methods.mgd3.guidance": [{"term": "mode", "scale": 0.2, "stop": 4}]}, {("sample", "mgd3")}),
    "its sampler": ({"methods.dit.sampler.cfg_scale": 3.0}, {("sample", "dit")}),
    "which prototypes": ({"methods.manifoldgd.prototypes.start_depth": 0}, {("sample", "manifoldgd")}),
    "k-means": ({"methods.mgd3.prototypes.restarts": 5}, {("sample", "mgd3"), ("cluster", "000")}),
    "the tree": ({"cluster.seed": 1}, {("sample", "manifoldgd"), ("cluster", "000")}),
    "the inversion": (
        {"methods.d3hr.start.inversion.refinements": 1},
        {("sample", "d3hr"), ("invert", "000")},
    ),
    "the group": ({"methods.d3hr.start.construction": "random"}, {("sample", "d3hr")}),
    "the rule": ({"methods.kmeans.select": "random"}, {("sample", "kmeans")}),
    "the shared sampler": (
        {"sampler.cfg_scale": 2.0},
        {("invert", "000"), *(("sample", name) for name in ("dit", "mgd3", "manifoldgd", "d3hr"))},
    ),
}


@pytest.mark.parametrize(("overrides", "expected"), PARAMETERS.values(), ids=PARAMETERS)
def test_a_parameter_changes_what_it_concerns_only(
    overrides: dict[str, Any], expected: set[tuple[str, str]], plan_site: MakeSite
) -> None:
    site = plan_site()
    before, after = class_digests(plan(site)), class_digests(plan(site, overrides))
    assert before.keys() == after.keys()
    changed = {tuple(key.split("/")[:2]) for key in before if before[key] != after[key]}
    assert {(stage, shard.removesuffix("-000")) for stage, shard in changed} == expected
    if any(stage == "cluster" for stage, _ in expected):  # one of the two clusterings stays
        assert stage_digests(plan(site), "cluster") & stage_digests(plan(site, overrides), "cluster")
    assert class_digests(plan(site)) == before


def test_seeds_and_ipcs_add_results_and_change_none(plan_site: MakeSite) -> None:
    site = plan_site()
    few, many = plan(site), plan(site, {"seeds": [0, 1, 2], "ipc": [1, 2, 3]})
    for stage in CLASS_STAGES:
        assert stage_digests(few, stage) <= stage_digests(many, stage)
    seed0, seed1 = (few.samples("ant", SampleSet("dit", 3, seed)).digest for seed in (0, 1))
    assert seed0 != seed1


def test_an_image_counts_for_its_class_only(plan_site: MakeSite) -> None:
    site = plan_site()
    before = class_digests(plan(site))
    support.draw(9, 9).save(site.train / "bee" / "new.png")
    after = class_digests(plan(site))
    changed = {tuple(key.split("/")[:3]) for key in before if before[key] != after[key]}
    others = {("sample", f"{name}-000", "bee") for name in support.METHODS if name != "dit"}  # dit looks at no image
    assert changed == {("encode", "000", "bee"), ("cluster", "000", "bee"), ("invert", "000", "bee")} | others


def test_a_test_image_counts_for_the_evaluations_only(plan_site: MakeSite) -> None:
    site = plan_site()
    before = plan(site)
    results, scores = class_digests(before), [recipe_of(before, training) for training in trainings(before)]
    support.draw(9, 9).save(site.test / "bee" / "new.png")
    after = plan(site)
    assert class_digests(after) == results
    assert not set(scores) & {recipe_of(after, training) for training in trainings(after)}


def test_a_subset_of_the_classes_shares_its_results_with_the_whole(plan_site: MakeSite) -> None:
    """As imagenette reuses what imagenet1k made."""
    site = plan_site(support.WIDE)
    compare = {"compare": [*support.METHODS, "ld3m-dm"]}  # gradients and trajectories belong to a set of classes
    whole, subset = plan(site, compare), plan(site, compare | {"dataset.classes": ["hen", "bee"], "shards": 2})
    assert subset.classes == ["hen", "bee"], "label order is as given"
    for stage in sorted(ALL - {"experts", "features"}):
        assert stage_digests(subset, stage) < stage_digests(whole, stage)
    assert subset.latents("bee").place == whole.latents("bee").place
    wanted = SampleSet("mgd3", 3, 0)
    assert subset.set_digest(wanted) != plan(site, {"dataset.classes": ["bee", "hen"]}).set_digest(wanted), (
        "labels differ"
    )


def test_shard_members_do_not_depend_on_label_order(plan_site: MakeSite) -> None:
    site = plan_site(support.WIDE)
    one, other = (plan(site, {"dataset.classes": list(c), "shards": 3}) for c in (support.WIDE, support.WIDE[::-1]))
    assert [one.shard_classes(shard) for shard in one.shards] == [other.shard_classes(shard) for shard in other.shards]
    assert class_digests(one) == class_digests(other)


# ---------------------------------------------------------------- refusals


def test_a_backbone_without_weights_is_named(plan_site: MakeSite) -> None:
    site = plan_site()
    for name in (*support.BACKBONE_FILES, "labels.json"):
        content = (site.backbone / name).read_bytes()
        (site.backbone / name).unlink()
        with pytest.raises(BackboneError, match="is missing") as caught:
            plan(site).check()
        assert str(site.backbone / name) in str(caught.value)
        (site.backbone / name).write_bytes(content)
    plan(site).check()
    with pytest.raises(BackboneError, match="nowhere"):
        plan(site, {"backbone.path": "nowhere"}).check()


LABELS = {
    "no JSON": "[",
    "no text": b"\xff\xfe",
    "a number": "3",
    "empty": "",
    "a class twice": '["ant", "ant", "bee", "cat"]',
}


@pytest.mark.parametrize("content", LABELS.values(), ids=LABELS)
def test_unusable_labels_are_named(content: str | bytes, plan_site: MakeSite) -> None:
    site = plan_site()
    (site.backbone / "labels.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BackboneError, match=r"labels\.json"):
        plan(site).check()


def test_a_class_that_the_backbone_does_not_know_is_named(plan_site: MakeSite) -> None:
    site = plan_site()
    (site.backbone / "labels.json").write_text('["ant", "cat", "dog"]')
    with pytest.raises(BackboneError, match=r"class bee: .*ant, cat, dog.*dataset\.classes"):
        plan(site).check()


def test_a_class_with_too_few_images_is_named(plan_site: MakeSite) -> None:
    site = plan_site()
    plan(site, {"ipc": [8], "cluster.max_leaves": 8}).check()
    with pytest.raises(
        DataError, match="class ant: has 8 training images, fewer than the 9 that random needs at IPC 9"
    ):
        plan(site, {"ipc": [1, 9], "cluster.max_leaves": 9}).check()
    plan(site, {"ipc": [9], "compare": ["dit"]}).check()


# ---------------------------------------------------------------- size


class Listing:
    """A thousand classes without a file."""

    def classes(self) -> list[str]:
        return [f"n{index:08d}" for index in range(1000)]

    def entries(self, class_name: str, split: str) -> list[ImageEntry]:
        return [ImageEntry(f"{index:04d}.jpg", 1000, 0, f"{split}/{class_name}/{index}.jpg") for index in range(60)]


def test_imagenet_can_be_planned(
    plan_site: MakeSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = Listing()
    monkeypatch.setattr("workflow_scripts.data.catalog.open_source", lambda *_: listing)
    site = plan_site()
    (site.backbone / "labels.json").write_text(json.dumps(listing.classes()))
    config = site.config(
        {
            "compare": ["random", "kmeans", "dit", "mgd3", "manifoldgd", "d3hr"],
            "ipc": [1, 10, 50],
            "seeds": [0, 1, 2],
            "shards": 32,
            "cluster.max_leaves": 64,
        }
    )
    began = time.perf_counter()
    recipes = Recipes(config)
    recipes.check()
    jobs = recipes.jobs()
    seconds = time.perf_counter() - began
    with capsys.disabled():
        print(
            f" [1000 classes, {sum(job.items for job in jobs)} results in {len(jobs)} jobs: {seconds:.1f} s] ", end=""
        )
    counts = {
        stage: len(support.jobs_of(recipes, stage))
        for stage in (*CLASS_STAGES, "export", "evaluate", "measure", "report")
    }
    assert counts == {
        "encode": 32,
        "features": 0,
        "cluster": 32,
        "invert": 32,
        "experts": 0,
        "sample": 6 * 32,
        "match": 0,
        "export": 6,
        "evaluate": 18,
        "measure": 6,
        "report": 1,
    }
    assert sum(job.items for job in support.jobs_of(recipes, "sample")) == 6 * 3 * 3 * 1000
    again = Recipes(config)
    assert again.job("sample", "mgd3-007") == recipes.job("sample", "mgd3-007"), "a worker asks for its own job alone"
