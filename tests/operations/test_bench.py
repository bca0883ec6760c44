"""A quick bench on the tiny backbone, and the plan that reckons with it."""

import json

import numpy as np
import pytest
import support
import torch

from workflow_scripts.config import DiffusionMethod
from workflow_scripts.diffusion.schedule import respace
from workflow_scripts.errors import BackboneError, ConfigError
from workflow_scripts.operations import bench, flops, show
from workflow_scripts.operations.cost import cost
from workflow_scripts.operations.speeds import read_benches
from workflow_scripts.operations.survey import survey
from workflow_scripts.recipes import Recipes

CPU = torch.device("cpu")
KEYS = {"compare": ["random", "mgd3", "manifoldgd", "d3hr", "dmgd"], "evaluation.batch_size": 4}


@pytest.fixture
def measured(site: support.Site, capsys: pytest.CaptureFixture[str]) -> support.Site:
    bench.bench(site.config(KEYS), architecture=None, quick=True, as_json=True)
    capsys.readouterr()
    return site


def test_everything_that_plan_asks_for_is_measured(measured: support.Site, capsys: pytest.CaptureFixture[str]) -> None:
    """But for starting Python, and reading at resolutions of its own."""
    recipes = Recipes(measured.config(KEYS))
    found = cost(recipes, survey(recipes))
    (stored,) = read_benches(measured.results)
    assert found.speeds.device == stored.device and not found.speeds.on_gpu and stored.quick
    assert {stage.stage: set(stage.missing.basis) for stage in found.stages if stage.missing.hours} == {
        "encode": {"measured", "estimated"},
        "invert": {"measured"},
        "sample": {"measured", "estimated"},
        "evaluate": {"measured", "estimated"},
    }
    estimated = sum(stage.missing.basis["estimated"] for stage in found.stages)
    begun_without_network = 1 + 1 + len(KEYS["compare"]) * 2  # encode, the coreset, and trainings by method and IPC
    assert estimated == pytest.approx(begun_without_network * 15 / 3600)
    bench.show(stored, measured.results)
    assert "sample dmgd" in capsys.readouterr().out
    show.plan(recipes, verbose=False, as_json=False)
    assert "measured by stillhouse bench, quickly" in capsys.readouterr().out


def test_operations_are_counted_as_reckoned(measured: support.Site) -> None:
    recipes, (stored,) = Recipes(measured.config(KEYS)), read_benches(measured.results)
    (row,) = (row for key, row in stored.rows.items() if key.startswith("denoise"))
    assert row.flop == flops.dit_flop(recipes.backbone.denoiser_config) and row.per_second > 0


def test_another_bench_takes_the_place_of_the_first(measured: support.Site) -> None:
    bench.bench(measured.config(KEYS | {"compare": ["dit"]}), architecture=None, quick=True, as_json=True)
    (stored,) = read_benches(measured.results)
    assert [key.split()[0] for key in stored.rows].count("sample") == 1


def test_weights_may_be_absent(site: support.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**flops.ARCHITECTURES["DiT-XL/2-256"][0], "num_layers": 1, "num_attention_heads": 1, "sample_size": 4}
    coder = {**flops.ARCHITECTURES["DiT-XL/2-256"][1], "block_out_channels": (32, 32, 32, 32)}
    monkeypatch.setattr(bench, "ARCHITECTURES", {"DiT-XL/2-256": (small, coder)})
    config = site.config({"backbone.path": "facebook/DiT-XL-2-256", "compare": ["dit"], "compute.dtype": "bfloat16"})
    found = bench.measure(config, CPU, None, quick=True)
    assert found.network == "dit-1x72-p2-4 bfloat16"
    assert {key for key in found.rows if key.startswith("encode")} == {"encode kl-32-32-32-32x2 32 px bfloat16"}
    with pytest.raises(ConfigError, match=r"--architecture: there is none named 'DiT'.*DiT-XL/2-256"):
        bench.measure(config, CPU, "DiT", quick=True)


def test_a_missing_backbone_says_how_to_do_without(site: support.Site) -> None:
    with pytest.raises(BackboneError, match=r"models/none is missing.*--architecture NAME"):
        bench.measure(site.config({"backbone.path": "models/none"}), CPU, None, quick=True)


def test_every_shipped_method_can_be_prepared_for_made_up_classes(site: support.Site) -> None:
    config = site.config()
    subject = bench.Subject.load(config, CPU, None, True)
    for method_name, method in config.methods.items():
        if isinstance(method, DiffusionMethod):
            inputs = bench.made_up_inputs(method, 3, 8, subject.denoiser)
            grid = respace(subject.denoiser.abar, method.sampler.steps, method.sampler.spacing)
            rows = bench.prepare_rows(method, inputs, grid, 3, 0, CPU)
            assert all(len(value) == 3 and np.isfinite(value.numpy()).all() for value in rows.values()), method_name


def test_json_is_json(site: support.Site, capsys: pytest.CaptureFixture[str]) -> None:
    bench.bench(site.config({"compare": ["random"]}), architecture=None, quick=True, as_json=True)
    assert json.loads(capsys.readouterr().out)["rows"]
