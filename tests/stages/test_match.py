"""Matching as a stage: from a configuration to exported images, across kills, shards and other classes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import torch
from support import Site, run_jobs

from workflow_scripts.errors import ConfigError, DataError
from workflow_scripts.operations.gc import garbage
from workflow_scripts.operations.survey import survey
from workflow_scripts.operations.verify import verify
from workflow_scripts.recipes import Recipes, SampleSet
from workflow_scripts.stages import match
from workflow_scripts.store.results import Result

STAGES = ("encode", "experts", "match", "export")
SMALL = {"width": 8, "lr_latents": 0.1, "lr_embeddings": 0.01}
CHAIN = {"steps": 2, "cfg_scale": 1.5}
METHODS: dict[str, dict[str, Any]] = {
    "ld3m-dc": {"objective": {"kind": "dc", "batch_real": 4, **SMALL}},
    "ld3m-dm": {"objective": {"kind": "dm", "batch_real": 4, **SMALL}},
    "ld3m-mtt": {
        "objective": {
            "kind": "mtt",
            "student_steps": 3,
            "lr_student_lr": 1e-4,
            "experts": {"count": 3, "batch_size": 8},
            **SMALL,
        },
        "experts_per_job": 2,
    },
}


def overrides(*names: str, **more: Any) -> dict[str, Any]:
    """The tiny run with some matching methods, one set each."""
    changes: dict[str, Any] = {"compare": list(names), "ipc": [2], "seeds": [0]}
    for name in names:
        changes |= {f"methods.{name}.{key}": value for key, value in METHODS[name].items()}
        changes |= {f"methods.{name}.{key}": v for key, v in (("chain", CHAIN), ("iterations", 4), ("chunk", 4))}
    return changes | {key.replace("__", "."): value for key, value in more.items()}


def results_of(recipes: Recipes, name: str) -> list[Result]:
    return [recipes.samples(cls, SampleSet(name, 2, 0)) for cls in recipes.classes]


def arrays(recipes: Recipes, name: str) -> dict[str, dict[str, np.ndarray]]:
    return {result.class_name: recipes.store.read(result).arrays for result in results_of(recipes, name)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_objective_from_images_to_a_report(site: Site) -> None:
    config = site.config(overrides(*METHODS))
    done = run_jobs(config)
    recipes = Recipes(config)
    assert [job for job in done.jobs if job[0] == "experts"] == [("experts", f"ld3m-mtt-00{n}") for n in (0, 1)]
    assert [job for job in done.jobs if job[0] == "match"] == [("match", f"{name}-ipc2-seed0-000") for name in METHODS]
    assert not any(job[0] == "sample" for job in done.jobs)
    for name in METHODS:
        for result in results_of(recipes, name):
            stored = recipes.store.read(result)
            assert stored.arrays["images"].shape == (2, 16, 16, 3) and stored.arrays["images"].dtype == np.uint8
            assert stored.arrays["latents"].shape == stored.arrays["learned_latents"].shape == (2, 4, 4, 4)
            assert stored.arrays["embeddings"].shape[0] == 2
            assert stored.record["noise_seed"] == 0 and stored.record["iterations"] == 4
            assert len(stored.record["curve"]) == 4
            rate = stored.arrays.get("learning_rate")
            assert (rate is not None and rate != 0.01) if name == "ld3m-mtt" else rate is None
    for expert in recipes.experts("ld3m-mtt"):
        trajectory = recipes.store.read(expert).arrays["trajectory"]
        assert trajectory.shape[0] == 4, "max_start - 1 + M epochs, and the start"
        assert (np.diff(trajectory, axis=0) != 0).any(1).all()
    assert not list((config.results / "store").glob("match.checkpoints/*"))
    assert not any(stage.missing for stage in survey(recipes))
    assert not verify(recipes) and not garbage(config.results, [recipes])


# ---------------------------------------------------------------- kills


class Killed(BaseException):
    """Stands for the end of a process."""


def die_at(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    original = match.step

    def step(state: match.State, *arguments: Any) -> None:
        if state.iteration == iteration:
            raise Killed
        original(state, *arguments)

    monkeypatch.setattr(match, "step", step)


@pytest.mark.parametrize(("name", "noise"), [("ld3m-dm", "fixed"), ("ld3m-dc", "resample"), ("ld3m-mtt", "fixed")])
def test_a_killed_job_ends_as_if_it_had_not_been(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, noise: str
) -> None:
    changes = overrides(name) | {f"methods.{name}.{key}": v for key, v in (("iterations", 7), ("checkpoint_every", 3))}
    changes[f"methods.{name}.chain.noise"] = noise
    run_jobs(site.config(changes), STAGES[:2])
    other = Site(site.train, site.test, site.backbone, tmp_path / "other")
    run_jobs(other.config(changes), STAGES)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 5)
        run_jobs(site.config(changes), STAGES)
    recipes = Recipes(site.config(changes))
    (left,) = (site.results / "store").glob("match.checkpoints/*")
    assert left == recipes.checkpoint(f"{name}-ipc2-seed0-000")
    assert not garbage(site.results, [recipes]), "a run that can still resume keeps its checkpoint"

    seen: list[int] = []
    with monkeypatch.context() as patch:
        original = match.step
        patch.setattr(match, "step", lambda state, *rest: (seen.append(state.iteration), original(state, *rest))[1])
        run_jobs(site.config(changes), STAGES)
    assert seen == [3, 4, 5, 6] and not left.exists()
    places = [place for place in support.stored(site.results) if place.startswith("match.zarr/")]
    assert len(places) == 3
    ours, theirs = (support.checksums(root) for root in (site.results, other.results))
    assert {place: ours[place] for place in places} == {place: theirs[place] for place in places}
    records = [recipes.store.record(result)["curve"] for result in results_of(recipes, name)]
    assert all([iteration for iteration, _ in curve] == list(range(7)) for curve in records)


def test_a_job_killed_between_two_commits_goes_on_with_the_rest(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    config = site.config(overrides("ld3m-dm"))
    run_jobs(config, STAGES[:2])
    recipes = Recipes(config)
    commit, count = type(recipes.store).commit, 0

    def dying(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise Killed
        commit(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(type(recipes.store), "commit", dying)
        run_jobs(config, STAGES)
    before = support.stored(site.results)
    with monkeypatch.context() as patch:
        patch.setattr(match, "step", lambda *_: pytest.fail("all iterations were done"))
        done = run_jobs(config, STAGES)
    assert sorted(place.split("/")[1] for place in done.places) == ["bee", "cat"]
    assert before.items() <= support.stored(site.results).items()


def test_a_torn_checkpoint_counts_as_none(site: Site) -> None:
    config = site.config(overrides("ld3m-dm"))
    run_jobs(config, STAGES[:2])
    file = Recipes(config).checkpoint("ld3m-dm-ipc2-seed0-000")
    file.parent.mkdir(parents=True)
    file.write_bytes(b"torn")
    run_jobs(config, STAGES)
    assert not file.exists()


# ---------------------------------------------------------------- what a result depends on


@pytest.mark.parametrize("name", ["ld3m-dm", "ld3m-dc"])
def test_a_class_does_not_depend_on_the_others_of_its_job(site: Site, tmp_path: Path, name: str) -> None:
    together = site.config(overrides(name))
    run_jobs(together, STAGES)
    apart = Site(site.train, site.test, site.backbone, tmp_path / "apart").config(
        overrides(name, shards=3) | {f"methods.{name}.chunk": 1, f"methods.{name}.checkpointing": False}
    )
    done = run_jobs(apart, STAGES)
    assert [shard for stage, shard in done.jobs if stage == "match"] == [f"{name}-ipc2-seed0-00{n}" for n in range(3)]
    one, two = arrays(Recipes(together), name), arrays(Recipes(apart), name)
    for cls in support.CLASSES:
        for key in ("learned_latents", "embeddings", "latents"):
            np.testing.assert_allclose(one[cls][key], two[cls][key], rtol=1e-3, atol=1e-4, err_msg=f"{cls} {key}")
    assert Recipes(together).set_digest(SampleSet(name, 2, 0)) == Recipes(apart).set_digest(SampleSet(name, 2, 0))


def digests(site: Site, name: str, **changes: Any) -> list[str]:
    return [result.digest for result in results_of(Recipes(site.config(overrides(name, **changes))), name)]


def test_what_is_in_a_digest(site: Site) -> None:
    for name in METHODS:
        plain = digests(site, name)
        assert len(set(plain)) == 3
        for key, value in (("chunk", 1), ("checkpointing", False), ("checkpoint_every", 7), ("experts_per_job", 1)):
            changed = overrides(name) | {f"methods.{name}.{key}": value}
            assert [r.digest for r in results_of(Recipes(site.config(changed)), name)] == plain, key
        for key, value in (("iterations", 5), ("chain.residual.strength", 0.5), ("objective.lr_latents", 0.3)):
            changed = overrides(name) | {f"methods.{name}.{key}": value}
            assert not {r.digest for r in results_of(Recipes(site.config(changed)), name)} & set(plain), key


def test_a_new_image_recomputes_its_class_or_for_trajectories_all(site: Site) -> None:
    before = {name: digests(site, name) for name in METHODS}
    support.draw(1, 77).save(site.train / "bee" / "new.png")
    after = {name: digests(site, name) for name in METHODS}
    changed = {name: [a != b for a, b in zip(before[name], after[name], strict=True)] for name in METHODS}
    assert changed["ld3m-dm"] == changed["ld3m-dc"] == [False, True, False]
    assert changed["ld3m-mtt"] == [True] * 3


def test_methods_with_the_same_experts_share_them(site: Site) -> None:
    changes = overrides("ld3m-mtt") | {"compare": ["ld3m-mtt", "other"], "methods.other.kind": "matching"}
    for key, value in METHODS["ld3m-mtt"].items():
        changes[f"methods.other.{key}"] = value
    changes["methods.other.chain"] = {"residual": {"strength": 0}}
    recipes = Recipes(site.config(changes))
    assert recipes.shards_of("experts") == ["ld3m-mtt-000", "ld3m-mtt-001"]
    assert set(recipes.job("match", "other-ipc2-seed0-000").needs) == {
        ("encode", "000"),
        ("experts", "ld3m-mtt-000"),
        ("experts", "ld3m-mtt-001"),
    }


# ---------------------------------------------------------------- what goes wrong


def test_divergence_is_told(site: Site) -> None:
    config = site.config(overrides("ld3m-dm") | {"methods.ld3m-dm.objective.lr_latents": 1e30})
    with pytest.raises(DataError, match=r"diverged.*lr_latents"):
        run_jobs(config, STAGES)


def test_mistakes_are_told_before_anything_runs(site: Site) -> None:
    with pytest.raises(ConfigError, match=r"methods.ld3m-dm.chain: 501 sampling steps"):
        Recipes(site.config(overrides("ld3m-dm") | {"methods.ld3m-dm.chain.steps": 501})).check()
    with pytest.raises(ConfigError, match=r"objective.batch_reel: unknown key"):
        site.config(overrides("ld3m-dm") | {"methods.ld3m-dm.objective.batch_reel": 1})
    with pytest.raises(DataError, match="ld3m-dm needs at IPC 9"):
        Recipes(site.config(overrides("ld3m-dm", ipc=[9]))).check()


# ---------------------------------------------------------------- U-Net and VQ model


def test_a_fitted_unet_with_a_vq_autoencoder_serves_every_kind_of_method(site: Site) -> None:
    fit = {
        "autoencoder": "vq",
        "denoiser": "unet",
        "vae": {"channels": [4, 8, 8], "latent_channels": 3, "codes": 32, "steps": 30, "batch_size": 8},
        "unet": {"channels": [8, 16], "heads": 2, "embedding": 8, "steps": 30, "batch_size": 8, "warmup": 2},
    }
    changes = overrides("ld3m-dm") | {
        "compare": ["random", "dit", "mgd3", "ld3m-dm"],
        "backbone": {"path": None, "fit": fit},
    }
    config = site.config(changes)
    run_jobs(config, ("fit_backbone", "encode", "cluster", "sample", "match", "export"))
    recipes = Recipes(config)
    folder = recipes.backbone.path
    assert {path.name for path in folder.iterdir()} == {
        "unet",
        "vae",
        "scheduler",
        "labels.json",
        "class_embedding.safetensors",
    }
    latents = recipes.store.read(recipes.latents("bee")).arrays
    assert latents["mean"].shape == (8, 3, 4, 4) and (latents["logvar"] == -30).all()
    for name in ("random", "dit", "mgd3", "ld3m-dm"):
        for cls in recipes.classes:
            stored = recipes.store.read(recipes.samples(cls, SampleSet(name, 2, 0))).arrays
            assert stored["images"].shape == (2, 16, 16, 3) and np.isfinite(stored["latents"]).all()
    learned = recipes.store.read(recipes.samples("bee", SampleSet("ld3m-dm", 2, 0)))
    assert learned.arrays["embeddings"].shape == (2, 1, 8)

    opened = Recipes(site.config(changes | {"backbone": {"path": str(folder)}})).backbone
    assert (opened.latent_side, opened.resolution, opened.timesteps) == (4, 16, 1000)

    other = changes | {"backbone": {"path": str(folder)}, "dataset.resolution": 24, "compare": ["dit", "ld3m-dm"]}
    run_jobs(site.config(other), ("encode", "sample", "match"))
    larger = Recipes(site.config(other))
    assert larger.backbone.denoiser != opened.denoiser, "results of one size are never taken for those of another"
    for name in ("dit", "ld3m-dm"):
        assert larger.store.read(larger.samples("bee", SampleSet(name, 2, 0))).arrays["images"].shape == (2, 24, 24, 3)
    with pytest.raises(ConfigError, match="takes multiples of 8 pixels"):
        Recipes(site.config(other | {"dataset.resolution": 20})).check()

    (folder / "class_embedding.safetensors").write_bytes(b"another")
    again = Recipes(site.config(changes | {"backbone": {"path": str(folder)}})).backbone
    assert again.denoiser != opened.denoiser and again.vae == opened.vae


def test_what_a_fit_does_not_use_is_not_in_its_identity(site: Site) -> None:
    def identity(**fit: Any) -> dict[str, Any]:
        config = site.config({"backbone": {"path": None, "fit": fit}})
        assert config.backbone.fit is not None
        return config.backbone.fit.identity()

    plain = identity()
    assert set(plain) == {"vae", "dit", "seed"} and "codes" not in plain["vae"]
    assert identity(vae={"codes": 3}, unet={"heads": 1}, checkpoint_every=9) == plain
    assert identity(denoiser="unet", dit={"heads": 1}) == identity(denoiser="unet") != plain
    assert identity(autoencoder="vq", vae={"kl_weight": 1}) == identity(autoencoder="vq") != plain
    assert json.dumps(identity(autoencoder="vq", denoiser="unet"))
