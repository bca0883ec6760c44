"""The loop over a shard's results, and the programs around it."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import support
from support import Programs, Site

from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import write_resolved
from workflow_scripts.stages.worker import Computed, run_shard
from workflow_scripts.store.results import Result


def constant(result: Result) -> Computed:
    return result, {"mean": np.full(3, len(result.class_name), np.float16)}, {"note": result.class_name}


class Compute:
    """A stage's computation that counts what it is asked for, and may fail at a class."""

    def __init__(self, fail_at: str | None = None, backwards: bool = False):
        self.asked: list[list[str]] = []
        self.fail_at, self.backwards = fail_at, backwards

    def __call__(self, missing: list[Result]) -> Iterable[Computed]:
        self.asked.append([result.class_name for result in missing])
        return self._results(missing)

    def _results(self, missing: list[Result]) -> Iterator[Computed]:
        for result in reversed(missing) if self.backwards else missing:
            if result.class_name == self.fail_at:
                raise ArithmeticError(result.class_name)
            yield constant(result)


@pytest.fixture
def recipes(wide_site: Site) -> Recipes:
    return Recipes(wide_site.config())


def existing(recipes: Recipes) -> list[str]:
    return [name for name in recipes.classes if recipes.store.exists(recipes.latents(name))]


def test_a_shard_computes_what_is_missing_only(recipes: Recipes) -> None:
    for name in ("bee", "gnu"):
        recipes.store.commit(*constant(recipes.latents(name)))
    compute = Compute()
    manifest = run_shard(recipes, "encode", "000", compute)
    assert compute.asked == [[name for name in support.WIDE if name not in ("bee", "gnu")]]
    assert manifest == {
        "results": [
            {"class": name, "place": recipes.latents(name).place, "digest": recipes.latents(name).digest}
            for name in support.WIDE
        ]
    }
    assert run_shard(recipes, "encode", "000", compute) == manifest
    assert len(compute.asked) == 1, "nothing is missing, so nothing is loaded"


def test_results_may_come_in_any_order(recipes: Recipes) -> None:
    forwards = run_shard(Recipes(recipes.config), "encode", "000", Compute(backwards=True))
    assert forwards == run_shard(recipes, "encode", "000", Compute())
    for name in support.WIDE:
        stored = recipes.store.read(recipes.latents(name))
        assert stored.arrays["mean"][0] == len(name)
        assert stored.record["note"] == name


def test_a_failure_keeps_what_was_done_before_it(recipes: Recipes) -> None:
    with pytest.raises(ArithmeticError, match="dog"):
        run_shard(recipes, "encode", "000", Compute(fail_at="dog"))
    assert existing(recipes) == ["ant", "bee", "cat"]
    compute = Compute()
    run_shard(recipes, "encode", "000", compute)
    assert compute.asked == [["dog", "elk", "fox", "gnu", "hen"]]


def test_each_result_is_committed_before_the_next_is_computed(recipes: Recipes) -> None:
    seen = []

    def compute(missing: list[Result]) -> Iterator[Computed]:
        for result in missing:
            seen.append(len(existing(recipes)))
            yield constant(result)

    run_shard(recipes, "encode", "000", compute)
    assert seen == list(range(8))


def test_the_record_says_what_computed_a_result_and_how_long_that_took(recipes: Recipes) -> None:
    run_shard(recipes, "encode", "000", Compute(), device="cuda")
    record = recipes.store.record(recipes.latents("fox"))
    assert record["device"] == "cuda"
    assert record["host"]
    assert 0 <= record["seconds"] < 60
    assert {"stillhouse", "torch", "zarr", "numpy"} <= record["versions"].keys()


def test_shards_share_the_classes_out(wide_site: Site) -> None:
    recipes = Recipes(wide_site.config({"shards": 3}))
    asked = []
    for shard in recipes.shards:
        compute = Compute()
        run_shard(recipes, "encode", shard, compute)
        asked += compute.asked[0]
    assert sorted(asked) == sorted(support.WIDE)


# ---------------------------------------------------------------- programs


def manifest_of(site: Site, stage: str, shard: str) -> Path:
    return site.results / Recipes(site.config()).job(stage, shard).manifest


def test_a_program_makes_its_results_and_its_manifest(site: Site, programs: Programs) -> None:
    log = site.results / "logs" / "encode.log"
    arguments = [
        "--resolved",
        site.resolved(),
        "--shard",
        "000",
        "--log",
        log,
        "--manifest",
        manifest_of(site, "encode", "000"),
    ]
    ended = programs.stage("encode", *arguments).wait()
    assert (ended.code, ended.stdout, ended.stderr) == (0, "", "")
    assert support.tally(support.stored(site.results)) == {"encode": dict.fromkeys(support.CLASSES, 1)}
    manifest = json.loads(manifest_of(site, "encode", "000").read_text())
    assert (manifest["stage"], manifest["shard"]) == ("encode", "000")
    assert {result["place"] for result in manifest["results"]} == set(support.stored(site.results))
    assert "encode 000" in log.read_text(), "progress goes to the log"
    assert "accelerate" not in log.read_text(), "the libraries' advice does not"

    before = support.stored(site.results)
    assert programs.stage("encode", *arguments).wait().code == 0
    assert support.stored(site.results) == before


def test_a_program_refuses_a_plan_that_is_out_of_date(site: Site, programs: Programs) -> None:
    planned, resolved = manifest_of(site, "encode", "000"), site.resolved()
    support.draw(1, 50).save(site.train / "cat" / "new.png")
    ended = programs.stage("encode", "--resolved", resolved, "--shard", "000", "--manifest", planned).wait()
    assert ended.code == 1
    (message,) = ended.stderr.splitlines()
    assert message.startswith("encode 000: the images")
    assert "same snakemake command again" in message
    assert not support.stored(site.results)
    assert not planned.exists()


def test_images_that_change_meanwhile_are_noticed(site: Site, programs: Programs) -> None:
    """No manifest may say that a class is done if its images are others by now."""
    resolved = site.resolved()
    started = programs.start(encode_while_images_change, str(resolved), str(site.train / "cat" / "new.png"))
    ended = started.wait()
    assert ended.code == 1
    assert "changed since this job was planned" in ended.stderr
    assert not list((site.results / "manifests").rglob("*.json"))


def encode_while_images_change(resolved: str, added: str) -> None:
    from workflow_scripts.stages import common, encode

    def work(recipes: Recipes, shard: str) -> Mapping[str, object]:
        done = encode.work(recipes, shard)
        support.draw(1, 50).save(added)
        return done

    import sys

    sys.argv = ["encode", "--resolved", resolved, "--shard", "000"]
    common.stage_main("encode", "", work, "")


def test_a_program_reads_the_configuration_like_every_other(site: Site, programs: Programs, tmp_path: Path) -> None:
    import yaml

    run = support.tiny_run(site.train, site.test, site.backbone)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(support.document(run, site.results)))
    arguments = [
        "--config",
        tmp_path / "mine.yaml",
        "--run",
        "tiny",
        "--set",
        "compute.encode_batch=3",
        "--shard",
        "000",
    ]
    ended = programs.stage("encode", *arguments).wait()
    assert ended.code == 0, ended.stderr
    assert manifest_of(site, "encode", "000").exists()

    ended = programs.stage("encode", *arguments, "--set", "compute.encode_batch=none").wait()
    assert ended.code == 1
    assert ended.stderr.count("\n") == 1
    assert "compute.encode_batch: got 'none'" in ended.stderr


@pytest.mark.parametrize(
    "stage",
    ["encode", "cluster", "invert", "features", "sample", "export", "evaluate", "measure", "report", "fit_backbone"],
)
def test_every_program_says_how_it_is_used(stage: str, programs: Programs) -> None:
    ended = programs.stage(stage, "--help").wait()
    assert ended.code == 0
    assert f"python -m workflow_scripts.stages.{stage}" in ended.stdout
    for option in ("--resolved", "--config", "--run", "--set", "--shard", "--manifest", "--log"):
        assert option in ended.stdout


@pytest.mark.parametrize(
    ("stage", "shard"),
    [
        ("encode", "first"),
        ("encode", "999"),
        ("encode", "-1"),
        ("sample", "000"),
        ("sample", "nomethod-000"),
        ("sample", "mgd3-x"),
        ("export", "nomethod"),
        ("evaluate", "mgd3"),
        ("evaluate", "mgd3-ipc99-000"),
        ("evaluate", "mgd3-ipc1-999"),
    ],
)
def test_a_shard_that_does_not_exist_is_refused(stage: str, shard: str, site: Site, programs: Programs) -> None:
    ended = programs.stage(stage, "--resolved", site.resolved(), f"--shard={shard}").wait()
    assert ended.code in (1, 2)
    assert "Traceback" not in ended.stderr, ended.stderr.splitlines()[-1]
    assert shard in ended.stderr
    assert not list(site.results.rglob("*.json")), "no manifest, no result"


def test_the_resolved_configuration_is_written_once(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "resolved.json"
    write_resolved(site.config(), path)
    os.utime(path, ns=(5, 5))
    write_resolved(site.config(), path)
    assert path.stat().st_mtime_ns == 5
    path.write_text("damaged")
    write_resolved(site.config(), path)
    assert path.read_text() == site.config().canonical()


def test_records_have_the_licences_of_the_weights(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    own = shutil.copytree(site.backbone / "vae", site.results.parent / "vae")
    (own / "README.md").write_text("---\nlicense: mit\n---\n")
    config = site.config({"backbone.vae": str(own)})
    support.run_jobs(config, ("encode",))
    recipes = Recipes(config)
    record = recipes.store.record(recipes.latents("ant"))
    assert record["licences"] == {"denoiser": "unknown", "vae": "MIT"}
    assert capfd.readouterr().err.count("Licence of the backbone's weights: denoiser unknown, vae MIT.") == 1
    assert recipes.latents("ant") == Recipes(site.config()).latents("ant"), "the same bytes are the same autoencoder"
