"""A run on a fine-tuned backbone: what it shares, what it makes anew, and in which order."""

import os
import subprocess

import numpy as np
import pytest
import support
from torch.distributed.run import get_args_parser

from workflow_scripts.errors import ConfigError
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import launcher
from workflow_scripts.stages.inputs import CachedLatents, scaled_latents

TUNE = {
    "backbone.finetune": {"steps": 3, "batch_size": 4, "warmup": 0},
    "compare": ["random", "mgd3", "d3hr"],
    "ipc": [1],
    "seeds": [0],
}


def test_a_run_on_a_fine_tuned_backbone(site: support.Site) -> None:
    plain = site.config({**TUNE, "backbone.finetune": None})
    support.run_jobs(plain, ["encode"])
    config = site.config(TUNE)
    done = support.run_jobs(config)
    assert "encode" not in done.stages(), "encoded once for both"
    order = [stage for stage, _ in done.jobs]
    assert order.count("fit_backbone") == 1
    assert order.index("fit_backbone") < order.index("invert") and done.methods() == {"random", "mgd3", "d3hr"}
    assert done.jobs.index(("fit_backbone", "backbone")) < done.jobs.index(("sample", "mgd3-000"))
    recipes = Recipes(config)
    assert recipes.backbone.path.is_relative_to(config.results) and recipes.backbone.labels == {
        "ant": 0,
        "bee": 1,
        "cat": 2,
    }
    assert Recipes(plain).latents("ant").digest == recipes.latents("ant").digest
    assert not support.run_jobs(config).jobs
    assert not list(recipes.backbone.path.parent.glob("*.checkpoints"))


def test_what_tells_fine_tuned_backbones_apart(site: support.Site) -> None:
    def identity(**keys: object) -> str:
        return Recipes(site.config(TUNE | {key.replace("__", "."): value for key, value in keys.items()})).fit_digest

    assert identity() == identity(backbone__finetune__gpus=2) == identity(backbone__finetune__micro_batch=1)
    assert len({identity(), identity(backbone__finetune__steps=4), identity(compute__dtype="bfloat16")}) == 3
    before = identity()
    support.draw(0, 99).save(site.train / "ant" / "new.png")
    assert identity() != before


def test_cached_latents_are_those_of_the_store(copied: support.Site) -> None:
    recipes = Recipes(copied.config())
    latents = CachedLatents(recipes)
    everything = np.concatenate([scaled_latents(recipes, name) for name in recipes.classes])
    assert len(latents) == len(everything) and latents.shape == everything.shape[1:]
    places = np.array([23, 0, 8, 7, 15, 0])
    mean, logvar, labels = latents[places]
    np.testing.assert_allclose(mean, everything[places], rtol=1e-6)
    assert labels.tolist() == [2, 0, 1, 0, 1, 0]
    factor = mean.std() / everything[places].std()
    stored = recipes.store.read(recipes.latents("cat"), "logvar").arrays["logvar"][7].astype(np.float32)
    scale = float(everything[23].ravel()[0]) / float(
        recipes.store.read(recipes.latents("cat"), "mean").arrays["mean"][7].ravel()[0]
    )
    np.testing.assert_allclose(logvar[0], stored + 2 * np.log(scale), atol=2e-3)
    assert factor == pytest.approx(1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"backbone": {"path": None, "fit": {}, "finetune": {}}}, "finetune belongs to path"),
        ({"backbone.finetune": {"batch_size": 5, "gpus": 2}}, "cannot be shared equally among 2 gpus"),
        ({"backbone.finetune": {"trainable": "lora"}}, "backbone.finetune.trainable"),
    ],
)
def test_bad_settings(site: support.Site, keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        site.config(keys)


@pytest.mark.parametrize(("nodes", "before"), [(1, 0), (2, 8)])
def test_the_launcher_keeps_the_programs_options_from_torchrun(nodes: int, before: int) -> None:
    """``--log`` alone would be ambiguous to it, and ``--run`` too."""
    assert launcher(1) == "python -m"
    in_job = {**os.environ, "SLURM_JOB_ID": "123456"}
    said = subprocess.run(["bash", "-c", f"echo {launcher(2, nodes)}"], env=in_job, capture_output=True, text=True)
    words = said.stdout.split()[before:]
    assert words[:3] == ["python", "-m", "torch.distributed.run"]
    parsed = get_args_parser().parse_args([*words[3:], "stage", "--log", "a.log", "--run", "digits"])
    assert (parsed.module, parsed.nproc_per_node, parsed.training_script) == (True, "2", "stage")
    assert parsed.training_script_args == ["--log", "a.log", "--run", "digits"]
    assert parsed.nnodes == str(nodes) if nodes > 1 else parsed.standalone
    assert nodes == 1 or (parsed.rdzv_id, parsed.rdzv_endpoint.rpartition(":")[2]) == ("123456", "23456")
