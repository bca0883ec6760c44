"""Bad images, backbones and disks: one clear error that names the file or class and the remedy, and nothing is spoilt."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import support
from support import Ended, Programs, Site, run_jobs, stored, tally

from workflow_scripts.config import resolve
from workflow_scripts.errors import BackboneError, DataError, StillhouseError
from workflow_scripts.recipes import Recipes

FEW = {"compare": ["random", "mgd3"], "ipc": [1], "seeds": [0]}


def images(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def one_line(ended: Ended, *parts: str) -> str:
    """The message of a program that failed, of one line that holds all parts."""
    assert ended.code == 1, ended.stderr
    lines = [
        line for line in ended.stderr.splitlines() if line.strip() and not line.endswith(("result/s]", "s/result]"))
    ]
    assert len(lines) == 1, ended.stderr
    missing = [part for part in parts if part not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"
    return lines[0]


def spoil(path: Path) -> Path:
    """Cut an image in half."""
    os.truncate(path, path.stat().st_size // 2)
    return path


# ---------------------------------------------------------------- images edited in place


@pytest.mark.parametrize("fingerprint", ["stat", "content"])
def test_an_image_edited_in_place_is_refused_once_and_the_same_command_then_works(
    fingerprint: str, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflow_scripts.data.notes.SETTLED_NS", -(10**12))
    config = site.config({**FEW, "compare": ["random"], "dataset.fingerprint": fingerprint})
    planned = Recipes(config)
    old = {name: planned.latents(name).place for name in planned.classes}
    support.draw(5, 5).save(images(site.train / "bee")[4])
    with pytest.raises(DataError, match=r"bee/004\.png: changed since it was listed\. Run the same command again"):
        run_jobs(config, ["encode"])
    done = run_jobs(config)
    assert "report" in done.stages()
    assert not Recipes(config).store.exists(planned.latents("bee")), "nothing is filed under what it was"
    assert {old["ant"], old["cat"]} <= set(stored(site.results))


# ---------------------------------------------------------------- unreadable images


def test_an_unreadable_image_is_named_and_all_other_classes_are_made(site: Site, programs: Programs) -> None:
    broken = spoil(images(site.train / "bee")[3])
    resolved = site.resolved(FEW)
    ended = programs.stage("encode", "--resolved", resolved, "--shard", "000").wait()
    one_line(
        ended, "encode 000: ", str(broken), "class bee", "cannot be decoded", "Replace or remove", "on_bad_image: skip"
    )
    before = stored(site.results)
    assert tally(before) == {"encode": {"ant": 1, "cat": 1}}
    assert not list(site.results.rglob("manifests/**/*.json"))

    broken.unlink()  # an image edited in place is noticed by ``plan --rescan`` alone
    support.draw(1, 3).save(broken)
    assert programs.stage("encode", "--resolved", resolved, "--shard", "000").wait().code == 0
    assert stored(site.results).items() > before.items()
    assert tally(stored(site.results)) == {"encode": dict.fromkeys(support.CLASSES, 1)}


def test_the_message_reaches_the_terminal_and_the_log(site: Site, programs: Programs) -> None:
    broken = spoil(images(site.train / "ant")[0])
    log = site.results / "logs" / "encode.log"
    ended = programs.stage("encode", "--resolved", site.resolved(FEW), "--shard", "000", "--log", log).wait()
    message = one_line(ended, str(broken), "class ant")
    assert message in log.read_text()


def test_skipped_images_are_left_out_counted_and_listed(site: Site) -> None:
    half, empty, text = images(site.train / "bee")[2:5]
    spoil(half)
    os.truncate(empty, 0)
    text.write_text("no image")
    config = site.config({**FEW, "dataset.on_bad_image": "skip"})
    run_jobs(config)
    recipes = Recipes(config)
    record = recipes.store.record(recipes.latents("bee"))
    assert [skipped["path"] for skipped in record["skipped"]] == [str(half), str(empty), str(text)]
    assert record["skipped"][1]["reason"] == "zero bytes"
    assert len(record["images"]) == support.COUNT - 3
    assert recipes.store.read(recipes.latents("bee")).arrays["mean"].shape[0] == support.COUNT - 3
    assert not {half.name, empty.name, text.name} & set(record["images"])
    assert recipes.store.record(recipes.latents("ant"))["skipped"] == []
    page = (site.results / "tiny" / "report" / "index.html").read_text()
    for path in (half, empty, text):
        assert path.name in page


def test_skipped_test_images_are_listed_too(site: Site) -> None:
    broken = spoil(images(site.test / "bee")[1])
    config = site.config({**FEW, "compare": ["random"], "dataset.on_bad_image": "skip"})
    run_jobs(config)
    assert f"bee/{broken.name}" in (site.results / "tiny" / "report" / "index.html").read_text()


def test_an_unreadable_test_image_stops_the_evaluation_alone(site: Site, programs: Programs) -> None:
    broken = spoil(images(site.test / "cat")[1])
    config = site.config({**FEW, "compare": ["random"]})
    run_jobs(config, ("encode", "sample", "export"))
    before = stored(site.results)
    arguments = ["--resolved", site.resolved({**FEW, "compare": ["random"]}), "--shard", "random-ipc1-000"]
    ended = programs.stage("evaluate", *arguments).wait()
    one_line(ended, str(broken), "class cat", "cannot be decoded")
    assert stored(site.results) == before
    support.draw(2, 101).save(broken)
    run_jobs(config)
    assert (site.results / "tiny" / "report" / "scores.csv").exists()


def test_a_class_without_one_readable_image_is_named(site: Site, programs: Programs) -> None:
    for path in images(site.train / "cat"):
        path.write_text("no image")
    resolved = site.resolved({**FEW, "dataset.on_bad_image": "skip"})
    ended = programs.stage("encode", "--resolved", resolved, "--shard", "000").wait()
    one_line(ended, "class cat: none of its 8 images can be read", str(images(site.train / "cat")[0]))
    assert tally(stored(site.results)) == {"encode": {"ant": 1, "bee": 1}}


@pytest.mark.parametrize(
    ("stage", "shard", "method"),
    [("sample", "random-000", "random"), ("cluster", "000", "mgd3"), ("sample", "kmeans-000", "kmeans")],
)
def test_a_class_with_too_few_readable_images_is_named(
    stage: str, shard: str, method: str, site: Site, programs: Programs
) -> None:
    for path in images(site.train / "bee")[:6]:
        path.write_text("no image")
    overrides: dict[str, Any] = {"compare": [method], "ipc": [3], "seeds": [0], "dataset.on_bad_image": "skip"}
    run_jobs(site.config(overrides), ["encode"])
    ended = programs.stage(stage, "--resolved", site.resolved(overrides), "--shard", shard).wait()
    one_line(ended, "class bee", "2 ", "3")


def test_a_bad_image_does_not_cost_the_classes_that_are_done(site: Site) -> None:
    """The message says to set on_bad_image: skip; who does so must not pay for the other classes again."""
    run_jobs(site.config(FEW), ["encode"])
    done = run_jobs(site.config({**FEW, "dataset.on_bad_image": "skip"}), ["encode"])
    assert not done.places


# ---------------------------------------------------------------- refused while planning


def refusal(site: Site, error: type[StillhouseError], overrides: dict[str, Any] | None = None) -> str:
    """What a plan of the run is refused with."""
    with pytest.raises(error) as caught:
        recipes = Recipes(site.config({**FEW, **(overrides or {})}))
        recipes.check()
        recipes.jobs()
    assert not (site.results / "store").exists() and not (site.results / "manifests").exists(), "nothing was started"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_image_of_zero_bytes_stops_the_plan(site: Site) -> None:
    empty = images(site.train / "cat")[5]
    os.truncate(empty, 0)
    message = refusal(site, DataError)
    assert message.startswith(f"{empty} (class cat): zero bytes")
    os.remove(empty)
    os.truncate(images(site.test / "ant")[0], 0)
    assert "class ant" in refusal(site, DataError)


def test_an_empty_class_stops_the_plan(site: Site) -> None:
    for path in images(site.train / "bee"):
        path.unlink()
    assert "class bee: has no train image" in refusal(site, DataError)


def test_a_missing_folder_stops_the_plan(site: Site) -> None:
    shutil.rmtree(site.test / "bee")
    assert f"class bee: {site.test / 'bee'} cannot be listed" in refusal(site, DataError)
    shutil.rmtree(site.test)
    assert f"dataset.test_root: {site.test} is not a folder" in refusal(site, DataError)
    shutil.rmtree(site.train)
    assert f"dataset.root: {site.train} is not a folder" in refusal(site, DataError)


def test_a_backbone_without_weights_stops_the_plan(site: Site, tmp_path: Path) -> None:
    backbone = shutil.copytree(site.backbone, tmp_path / "backbone")
    weights = backbone / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    message = refusal(site, BackboneError, {"backbone.path": str(backbone)})
    assert str(weights) in message
    assert "safetensors" in message
    assert "backbone.path" in refusal(site, BackboneError, {"backbone.path": str(tmp_path / "nowhere")})


# ---------------------------------------------------------------- damaged backbones

DAMAGED = {
    "truncated weights": ("vae/diffusion_pytorch_model.safetensors", lambda path: os.truncate(path, 5000)),
    "empty weights": ("vae/diffusion_pytorch_model.safetensors", lambda path: os.truncate(path, 0)),
    "weights that are none": (
        "vae/diffusion_pytorch_model.safetensors",
        lambda path: path.write_text("git-lfs pointer"),
    ),
    "a configuration that is none": ("vae/config.json", lambda path: path.write_text("{")),
    "a configuration of other weights": (
        "vae/config.json",
        lambda path: path.write_text(path.read_text().replace('"layers_per_block": 1', '"layers_per_block": 2')),
    ),
    "a denoiser of more layers than there are weights for": (
        "transformer/config.json",
        lambda path: path.write_text(path.read_text().replace('"num_layers": 1', '"num_layers": 2')),
    ),
    "truncated denoiser": ("transformer/diffusion_pytorch_model.safetensors", lambda path: os.truncate(path, 5000)),
    "a schedule that is none": ("scheduler/scheduler_config.json", lambda path: path.write_text("{")),
}


@pytest.mark.parametrize(("file", "damage"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_backbone_is_named(file: str, damage: Any, site: Site, programs: Programs, tmp_path: Path) -> None:
    backbone = shutil.copytree(site.backbone, tmp_path / "backbone")
    damage(backbone / file)
    overrides = {**FEW, "compare": ["dit"], "backbone.path": str(backbone)}
    stage, shard = ("encode", "000") if file.startswith("vae") else ("sample", "dit-000")
    ended = programs.stage(stage, "--resolved", site.resolved(overrides), "--shard", shard).wait()
    assert ended.code == 1
    assert "Traceback" not in ended.stderr, ended.stderr.splitlines()[-1]
    assert f"{stage} {shard}: {backbone / file.split('/')[0]}" in ended.stderr
    assert not stored(site.results)


# ---------------------------------------------------------------- a full disk


def test_a_file_size_limit_stops_a_stage_cleanly(site: Site, programs: Programs) -> None:
    config = site.config(FEW)
    run_jobs(config, ["encode"])
    before = stored(site.results)
    resolved = site.resolved(FEW)
    ended = programs.stage("sample", "--resolved", resolved, "--shard", "mgd3-000", biggest_file=600).wait()
    assert ended.code == 1
    assert "class ant cannot be read" in ended.stderr  # its modes are not there yet; the limit cuts what follows
    assert "stillhouse verify" in ended.stderr
    ended = programs.stage("cluster", "--resolved", resolved, "--shard", "000", biggest_file=600).wait()
    one_line(ended, "cluster 000: ", "cannot be written (File too large)", "free some space", "same command again")
    assert stored(site.results) == before
    assert not support.leftovers(site.results)
    run_jobs(config, ["cluster", "sample"])
    assert tally(stored(site.results))["cluster"] == dict.fromkeys(support.CLASSES, 1)


@pytest.mark.parametrize("log", [False, True], ids=["", "log on the full disk"])
def test_a_full_disk_stops_a_stage_cleanly(log: bool, wide_site: Site, programs: Programs, tmp_path: Path) -> None:
    wide_site.results.mkdir()
    listing = tmp_path / "listing.json"
    arguments = ["--resolved", wide_site.resolved(FEW), "--shard", "000"]
    arguments += ["--log", wide_site.results / "logs" / "encode.log"] if log else []
    disk = (str(wide_site.results), 80_000)
    ended = programs.stage("encode", *arguments, disk=disk, listing=str(listing)).wait()
    if ended.code == support.NO_MOUNT:
        pytest.skip("this machine does not let a process mount a file system of its own")
    one_line(
        ended, "encode 000: ", str(wide_site.results), "cannot be written (No space left on device)", "free some space"
    )
    found = json.loads(listing.read_text())
    assert 1 <= len(found["stored"]) < 8, "what was stored before stays"
    assert not found["leftovers"]


def test_a_results_folder_that_is_a_file_is_named(site: Site, programs: Programs) -> None:
    resolved = site.resolved(FEW)
    site.results.write_text("in the way")
    ended = programs.stage("encode", "--resolved", resolved, "--shard", "000").wait()
    one_line(ended, str(site.results))


def test_results_that_vanished_are_named(site: Site, programs: Programs) -> None:
    config = site.config(FEW)
    run_jobs(config, ["encode"])
    recipes = Recipes(config)
    shutil.rmtree(recipes.store.path(recipes.latents("bee")))
    for stage, shard in (("cluster", "000"), ("sample", "random-000")):
        ended = programs.stage(stage, "--resolved", site.resolved(FEW), "--shard", shard).wait()
        one_line(ended, "class bee", "stillhouse verify")


def test_every_refusal_is_a_stillhouse_error() -> None:
    with pytest.raises(StillhouseError):
        resolve({})
