"""plan, status, verify, gc, the recipe lock and the console command."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import support
import yaml

from workflow_scripts.operations import gc, recipe_lock, show, status, verify
from workflow_scripts.operations.progress import Progress
from workflow_scripts.operations.survey import survey
from workflow_scripts.recipes import CLASS_STAGES, Recipes, SampleSet
from workflow_scripts.stages.common import resolved_path, write_resolved
from workflow_scripts.stages.publish import publish


def recipes_of(site: support.Site, overrides: dict[str, object] | None = None) -> Recipes:
    return Recipes(site.config(overrides))


def reasons(recipes: Recipes) -> dict[str, dict[str, int]]:
    return {stage.stage: dict(stage.reasons) for stage in survey(recipes, explain=True) if stage.missing}


def test_a_finished_run_has_nothing_missing(copied: support.Site, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = recipes_of(copied)
    assert all(not stage.missing and not stage.jobs_to_run for stage in survey(recipes))
    show.plan(recipes, verbose=True, as_json=False)
    assert "Nothing to run." in capsys.readouterr().out
    status.status(Progress(recipes), every=None, as_json=True, page=None)
    stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert stages["encode"]["done"] == 3 and stages["encode"]["missing"] == 0


def test_plan_says_which_classes_are_missing_and_why(copied: support.Site, capsys: pytest.CaptureFixture[str]) -> None:
    guidance = [{"term": "mode", "scale": 0.7, "stop": 4}]
    changed = recipes_of(copied, {"methods.mgd3.guidance": guidance})
    assert reasons(changed)["sample"] == {"method.guidance.0.scale changed": 3 * 2 * 2}
    assert set(reasons(changed)) == {"sample", "export", "evaluate", "measure", "report"}

    support.draw(1, 99).save(copied.train / "bee" / "new.png")
    added = reasons(recipes_of(copied))
    assert added["encode"] == {"its images changed": 1}
    assert added["cluster"] == {"its latents changed": 3}  # the tree, and k-means for two IPCs
    show.plan(recipes_of(copied), verbose=True, as_json=True)
    stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert [item["of"] for item in stages["encode"]["missing_items"]] == ["bee"]
    assert {item["of"].split()[0] for item in stages["sample"]["missing_items"]} == {"bee"}


def test_verify_finds_a_flipped_byte_and_only_that_result_is_made_again(copied: support.Site) -> None:
    recipes = recipes_of(copied)
    assert verify.verify(recipes) == []
    victim = recipes.samples("bee", SampleSet("mgd3", 3, 1))
    before = support.stored(copied.results)
    arrays = recipes.store.path(victim) / "arrays.zip"
    content = bytearray(arrays.read_bytes())
    content[content.index(recipes.store.read(victim).arrays["latents"].tobytes())] ^= 1
    arrays.write_bytes(content)

    found = verify.verify(recipes)

    assert any("bee" in line and victim.place in line and "Set aside" in line for line in found)
    assert not recipes.store.exists(victim)
    assert len(list((copied.results / "store" / verify.QUARANTINE).iterdir())) == 1
    done = support.run_jobs(copied.config())
    assert done.places == {victim.place} and done.jobs == [("sample", "mgd3-000")]
    after = support.stored(copied.results)
    assert {place: after[place] for place in before if place != victim.place} == {
        place: stat for place, stat in before.items() if place != victim.place
    }
    assert verify.verify(recipes) == []


@pytest.mark.parametrize("damage", ["image", "card", "lost", "order"])
def test_verify_finds_a_damaged_set(copied: support.Site, damage: str) -> None:
    recipes = recipes_of(copied)
    folder = recipes.set_directory(SampleSet("dit", 3, 0))
    if damage == "image":
        (folder / "cat" / "0001.png").write_bytes(b"")
    elif damage == "card":
        (folder / "dataset.json").unlink()
    elif damage == "order":
        card = json.loads((folder / "dataset.json").read_text())
        card["classes"].reverse()
        (folder / "dataset.json").write_text(json.dumps(card))
    else:
        shutil.rmtree(folder)
    found = verify.verify(recipes)
    assert any(str(folder) in line for line in found)
    done = support.run_jobs(copied.config())
    assert done.jobs == [("export", "dit")] and not done.places
    assert (folder / "cat" / "0001.png").stat().st_size > 0 and verify.verify(recipes) == []


def test_verify_finds_a_damaged_score(copied: support.Site) -> None:
    recipes = recipes_of(copied)
    path = recipes.training_path(recipes.trainings("dit", 3)[0])
    path.write_text(path.read_text()[:-20])
    assert any(path.name in line for line in verify.verify(recipes))
    done = support.run_jobs(copied.config())
    assert done.scores == {path.name} and done.jobs == [("evaluate", "dit-ipc3-000")]


def test_verify_drops_the_manifest_of_what_vanished(copied: support.Site) -> None:
    recipes = recipes_of(copied)
    latents = recipes.latents("ant")
    shutil.rmtree(recipes.store.path(latents))
    found = verify.verify(recipes)
    assert len(found) == 1 and "manifest was deleted" in found[0]
    assert support.run_jobs(copied.config()).places == {latents.place}


def test_gc_lists_and_deletes_what_no_run_refers_to(copied: support.Site) -> None:
    current = recipes_of(copied)
    assert gc.garbage(copied.results, [current]) == []
    changed = {"methods.mgd3.guidance": [{"term": "mode", "scale": 0.7, "stop": 4}], "ipc": [1]}
    support.run_jobs(copied.config(changed))
    before = support.stored(copied.results)

    both = gc.garbage(copied.results, [current, recipes_of(copied, changed)])
    stale = gc.garbage(copied.results, [current])

    assert both == []
    results = {str(path.relative_to(copied.results / "store")) for path in stale if ".zarr" in str(path)}
    assert len(results) == 3 * 2 and all("sample.zarr" in place for place in results)
    assert {path.parent.name for path in stale if "manifests" in path.parts} == {
        "cluster",  # its manifest: no class-level result is stale
        "sample",
        "export",
        "evaluate",
        "measure",
        "report",
    }
    gc.delete(stale)
    assert set(support.stored(copied.results)) == set(before) - results
    assert support.run_jobs(copied.config()).jobs == []


def test_gc_spares_work_in_progress_for_a_day(copied: support.Site) -> None:
    recipes = recipes_of(copied)
    leftover = recipes.store.path(recipes.latents("ant")).parent / ".tmp-interrupted"
    leftover.mkdir()
    assert gc.garbage(copied.results, [recipes]) == []
    os.utime(leftover, (0, 0))
    assert gc.garbage(copied.results, [recipes]) == [leftover]


def test_gc_collects_notes_that_no_run_refers_to_when_they_are_old(
    copied: support.Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflow_scripts.data.notes.SETTLED_NS", -(10**12))
    cache, day = copied.results / "cache", gc.LEFTOVER_AGE
    shutil.rmtree(cache)

    def remember(overrides: dict[str, object]) -> set[os.PathLike[str]]:
        """Plan, and return the notes that this left behind."""
        before = set(cache.rglob("*.json"))
        recipes = recipes_of(copied, overrides)
        recipes.check()
        recipes.jobs()
        write_resolved(recipes.config, resolved_path(recipes.config))
        return set(cache.rglob("*.json")) - before

    used = remember({"dataset.fingerprint": "content"})
    moved = copied.results.parent / "moved"
    shutil.copytree(copied.train, moved)
    shutil.copytree(copied.backbone, moved.with_name("backbone"))
    stale = remember(
        {
            "dataset.root": str(moved),
            "backbone.path": str(moved.with_name("backbone")),
            "dataset.fingerprint": "content",
        }
    )
    kinds = {
        kind: sum(path.parent.name == kind for path in stale) for kind in ("listings", "hashes", "configs", "cache")
    }
    assert kinds == {"listings": 3, "hashes": 3, "configs": 1, "cache": 3}

    def collected(age: float) -> set[os.PathLike[str]]:
        for path in used | stale:
            os.utime(path, (time.time() - age,) * 2)
        run = recipes_of(copied, {"dataset.fingerprint": "content"})
        return {path for path in gc.garbage(copied.results, [run]) if "cache" in path.parts}

    assert collected(day / 2) == set()
    assert collected(2 * day) == {path for path in stale if path.parent.name != "configs"}, "a queued job may need it"
    assert collected(40 * day) == stale
    gc.delete(sorted(stale))
    assert remember({"dataset.fingerprint": "content"}) == set(), "what the run needs was kept"


def test_the_report_link_follows_the_configuration(copied: support.Site) -> None:
    first = recipes_of(copied)
    link = copied.results / "tiny" / "report"
    original = link.resolve()
    support.run_jobs(copied.config({"title": "Another"}))
    assert link.resolve() != original
    page = publish(first.config, first.job("report", "report"))
    assert page == link / "index.html" and link.resolve() == original


def test_every_stage_of_the_code_is_acknowledged() -> None:
    stale = [stage for stage, entry in recipe_lock.current().items() if recipe_lock.locked().get(stage) != entry]
    assert not stale, (
        f"the code behind {stale} changed. If its results mean something else now, raise the stage's number in "
        "workflow_scripts/recipes.py; either way acknowledge it: uv run stillhouse lock-recipes"
    )


def test_the_recipe_lock_ignores_comments_and_docstrings_only(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_lock, "PACKAGE", tmp_path)
    source = tmp_path / "stage.py"
    hashes = []
    for text in (
        'def f(x):\n    """Say."""\n    return x + 1\n',
        "# why\ndef f(x):\n    return (x + 1)\n",
        "def f(x):\n    return x + 2\n",
    ):
        source.write_text(text)
        hashes.append(recipe_lock._hash(("stage.py",)))
    assert hashes[0] == hashes[1] != hashes[2]
    assert set(recipe_lock.MEANING) == {
        *("fit_backbone", *CLASS_STAGES, "export"),
        *("teacher", "relabel", "evaluate", "measure", "report"),
    }


def run_cli(site: support.Site, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    overlay = site.results.parent / "overlay.yaml"
    overlay.write_text(
        yaml.safe_dump(support.document(support.tiny_run(site.train, site.test, site.backbone), site.results))
    )
    done = subprocess.run(
        [sys.executable, "-m", "workflow_scripts.cli", *arguments, "--config", str(overlay)],
        cwd=support.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


def test_the_console_command(copied: support.Site) -> None:
    assert "Nothing to run." in run_cli(copied, "plan").stdout
    assert "1 missing" not in run_cli(copied, "status").stdout
    assert "whole" in run_cli(copied, "verify").stdout
    assert "Nothing to collect" in run_cli(copied, "gc", "--keep", "tiny").stdout
    failed = run_cli(copied, "plan", "--set", "evaluation.epoch=3", code=1)
    assert failed.stderr.startswith("stillhouse: evaluation.epoch: unknown key; did you mean 'epochs'?")
    assert "Traceback" not in failed.stderr


def test_the_console_command_looks_and_submits_without_torch(copied: support.Site) -> None:
    script = (
        "import sys, runpy\n"
        "for command in (['plan'], ['status'], ['submit', '--cluster', 'local', '--compact']):\n"
        f"    sys.argv = ['stillhouse', *command, '--config', {str(copied.results.parent / 'overlay.yaml')!r}]\n"
        "    try: runpy.run_module('workflow_scripts.cli', run_name='__main__')\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'diffusers', 'sklearn', 'zarr', 'torchvision', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run_cli(copied, "status")  # writes the overlay
    done = subprocess.run([sys.executable, "-c", script], cwd=support.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
