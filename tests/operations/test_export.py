"""``stillhouse export``: which sets are written where, and what they say of the run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
from PIL import Image
from safetensors.numpy import load_file

from workflow_scripts import cli
from workflow_scripts.config import Backbone
from workflow_scripts.errors import ConfigError, DataError
from workflow_scripts.operations.export import describe, export, name_of
from workflow_scripts.recipes import Recipes, SampleSet

Sampled = Callable[..., Recipes]


def test_a_set_is_what_the_run_made(sampled: Sampled, tmp_path: Path) -> None:
    recipes = sampled()
    wanted = SampleSet("d3hr", 3, 1)
    places = export(recipes, tmp_path / "set", "imagefolder", method="d3hr", ipc=3, seed=1)
    assert places == [tmp_path / "set"]
    for name in recipes.classes:
        stored = recipes.store.read(recipes.samples(name, wanted)).arrays["images"]
        written = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "set" / name).iterdir())]
        assert np.array_equal(written, stored)
    facts = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert facts["digest"] == recipes.set_digest(wanted)
    assert [(row["label"], row["class"], row["sorted"]) for row in facts["classes"]] == [
        (0, "7", 2),
        (1, "1", 0),
        (2, "4", 1),
    ]


def test_what_is_left_open_is_all_that_the_run_has(sampled: Sampled, tmp_path: Path) -> None:
    recipes = sampled()
    places = export(recipes, tmp_path / "sets", "safetensors", method="d3hr", seed=0)
    assert [place.name for place in places] == ["d3hr-ipc1-seed0.safetensors", "d3hr-ipc3-seed0.safetensors"]
    assert load_file(places[1])["images"].shape == (9, 3, 32, 32)
    assert load_file(places[1])["labels"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(export(recipes, tmp_path / "all", "huggingface")) == 8


def test_sets_that_are_not_there_are_refused_before_anything_is_written(sampled: Sampled, tmp_path: Path) -> None:
    recipes = sampled({"ipc": [1, 2], "compare": ["d3hr", "dit"]})
    with pytest.raises(
        DataError, match=r"d3hr, IPC 2, seed 0: 3 of 3 classes are not made yet \(7, 1, 4\).*run=digits"
    ):
        export(recipes, tmp_path / "sets", "imagefolder")
    assert not (tmp_path / "sets").exists()
    unknown: tuple[dict[str, Any], ...] = ({"method": "d3rh"}, {"ipc": 50}, {"seed": 7})
    for options in unknown:
        with pytest.raises(ConfigError, match=rf"--{next(iter(options))} .*run digits has none.*allowed"):
            export(recipes, tmp_path / "sets", "imagefolder", **options)


def test_a_description_tells_no_path_of_this_machine(sampled: Sampled) -> None:
    recipes = sampled({"backbone.path": str(support.ROOT / "workflow_scripts" / "backbones" / "digits")})
    said = describe(recipes, SampleSet("d3hr", 1, 0))
    assert str(support.ROOT) not in repr(said)
    assert said.backbone["name"] == "digits" and said.licences["denoiser"] == "trained with Stillhouse"
    assert said.real_images["images"] == sum(recipes.catalog.count(name, "train") for name in recipes.classes)
    assert any(software.startswith("torch ") for software in said.software)


@pytest.mark.parametrize(
    ("backbone", "name"),
    [
        ({"path": "facebook/DiT-XL-2-256"}, "facebook/DiT-XL-2-256"),
        ({"path": "/data/me/DiT.pt", "vae": "stabilityai/sd-vae-ft-mse"}, "DiT.pt with stabilityai/sd-vae-ft-mse"),
        ({"fit": {}}, "fitted on the real images"),
    ],
)
def test_backbones_are_called_by_their_public_name(backbone: dict[str, Any], name: str) -> None:
    assert name_of(Backbone(**backbone)) == name


def test_the_command(
    sampled: Sampled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "resolved.json").write_text(sampled().config.canonical())
    arguments = f"export --resolved {tmp_path / 'resolved.json'} --method d3hr --ipc 1 --to {tmp_path / 'out'}"
    options = "--format imagefolder --size 16 --resample box --folders label"
    monkeypatch.setattr(sys, "argv", ["stillhouse", *arguments.split(), *options.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / f"d3hr-ipc1-seed{seed}") for seed in (0, 1)]
    assert Image.open(tmp_path / "out" / "d3hr-ipc1-seed1" / "0-7" / "0000.png").size == (16, 16)
