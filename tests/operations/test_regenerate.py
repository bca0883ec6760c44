"""Images from class Gaussians and the backbone alone are those of the run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
from PIL import Image
from safetensors.numpy import load_file, save_file

from workflow_scripts import cli
from workflow_scripts.config import Compute
from workflow_scripts.errors import BackboneError, ConfigError, DataError, StoreError
from workflow_scripts.methods import d3hr
from workflow_scripts.operations import regenerate
from workflow_scripts.recipes import Recipes, SampleSet
from workflow_scripts.stages import sample

Sampled = Callable[..., Recipes]
CPU = Compute(device="cpu", sample_batch=1)


def own_images(recipes: Recipes, wanted: SampleSet) -> np.ndarray:
    """What the run made: (classes, ipc, H, W, 3)."""
    return np.stack([recipes.store.read(recipes.samples(n, wanted)).arrays["images"] for n in recipes.classes])


def read_set(folder: Path) -> np.ndarray:
    facts = json.loads((folder / "dataset.json").read_text())
    folders = [folder / row["folder"] for row in facts["classes"]]
    return np.array([[np.asarray(Image.open(path)) for path in sorted(own.iterdir())] for own in folders])


def packed_alone(recipes: Recipes, method: str, **options: Any) -> regenerate.Packed:
    """Pack, and take everything else away."""
    path = recipes.config.results.parent / f"{method}.safetensors"
    regenerate.pack(recipes, path, method, **options)
    shutil.rmtree(recipes.config.results)
    return regenerate.read(path)


@pytest.mark.parametrize("ipc", [1, 3])
@pytest.mark.parametrize("method", ["d3hr", "d3hr-published"])
def test_images_of_the_file_are_those_of_the_run(sampled: Sampled, tmp_path: Path, method: str, ipc: int) -> None:
    recipes = sampled()
    wanted = SampleSet(method, ipc, 1)
    expected, digest = own_images(recipes, wanted), recipes.set_digest(wanted)
    results = {name: recipes.samples(name, wanted).digest for name in recipes.classes}
    packed = packed_alone(recipes, method)

    place = regenerate.images(packed, tmp_path / "set", "imagefolder", ipc=ipc, seed=1, compute=CPU)

    assert place == tmp_path / "set"
    assert np.array_equal(read_set(place), expected), "to the last byte, batches being the same"
    facts = json.loads((place / "dataset.json").read_text())
    assert (facts["digest"], facts["results"]) == (digest, results)
    assert [row["class"] for row in facts["classes"]] == ["7", "1", "4"]
    assert not (tmp_path / "set.incomplete").exists()
    other = regenerate.images(packed, tmp_path / "other", "imagefolder", ipc=ipc, seed=1, compute=Compute(device="cpu"))
    assert other is not None
    assert np.abs(read_set(other).astype(int) - expected).max() <= 1, "to rounding in other batches"


def test_an_ipc_that_the_run_has_not_is_what_it_would_have_made(sampled: Sampled, tmp_path: Path) -> None:
    recipes = sampled({"ipc": [2], "seeds": [5]})
    sample.work(recipes, "d3hr-published-000")
    expected = own_images(recipes, SampleSet("d3hr-published", 2, 5))
    packed = packed_alone(sampled(), "d3hr-published")
    place = regenerate.images(packed, tmp_path / "set", "imagefolder", ipc=2, seed=5, compute=CPU)
    assert place is not None and np.array_equal(read_set(place), expected)


def test_groups_that_won_are_not_searched_again(
    sampled: Sampled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = sampled()
    expected = own_images(recipes, SampleSet("d3hr-published", 3, 0))
    packed = packed_alone(recipes, "d3hr-published")
    assert [(known.ipc, known.seed, known.device) for known in packed.header.candidates] == [
        (3, 0, "cpu"),
        (3, 1, "cpu"),
    ]
    won = packed.arrays["candidate.ipc3.seed0"]
    assert won.shape == (3,) and won.min() >= 0 and won.max() < 40 and len(set(won.tolist())) > 1

    def search(*arguments: object) -> int:
        raise AssertionError("searched")

    monkeypatch.setattr(d3hr, "_search", search)
    place = regenerate.images(packed, tmp_path / "set", "imagefolder", ipc=3, seed=0, compute=CPU)
    assert place is not None and np.array_equal(read_set(place), expected)
    with pytest.raises(AssertionError, match="searched"):
        regenerate.images(packed, tmp_path / "more", "imagefolder", ipc=2, seed=0, compute=CPU)
    assert packed.candidates(3, 0, "cuda") is None, "another device's random numbers are others"


def test_half_takes_half_and_changes_little(
    sampled: Sampled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = sampled()
    wanted = SampleSet("d3hr", 3, 0)
    expected, results = own_images(recipes, wanted), recipes.samples("7", wanted).digest
    packed = packed_alone(recipes, "d3hr", half=True)
    assert packed.arrays["mean"].dtype == packed.arrays["variance"].dtype == np.float16
    place = regenerate.images(packed, tmp_path / "set", "imagefolder", ipc=3, compute=CPU)
    assert place is not None
    difference = np.abs(read_set(place).astype(int) - expected)
    assert 0 < difference.mean() < 0.5
    assert "rounded to 16 bits" in capsys.readouterr().err
    assert json.loads((place / "dataset.json").read_text())["results"]["7"] != results, "it is not the run's result"


def test_imagenet_takes_16_megabytes(sampled: Sampled, tmp_path: Path) -> None:
    recipes = sampled()
    packed = regenerate.pack(recipes, tmp_path / "small.safetensors", "d3hr", half=True)
    many = tuple(f"n{number:08d}" for number in range(1000))
    header = packed.header.model_copy(
        update={
            "origin": {**packed.header.origin, "classes": many},
            "labels": tuple(range(1000)),
            "gaussians": packed.header.gaussians[:1] * 1000,
        }
    )
    for dtype, megabytes in ((np.float16, 16.4), (np.float32, 32.8)):
        arrays = {key: np.ones((1000, 4, 32, 32), dtype) for key in ("mean", "variance")}
        path = tmp_path / f"{dtype.__name__}.safetensors"
        regenerate.save(replace(packed, path=path, header=header, arrays=arrays))
        assert megabytes <= path.stat().st_size / 1e6 < megabytes + 0.2
        assert "1000 (n00000000" in regenerate.show(regenerate.read(path))


def test_some_classes_of_the_file(sampled: Sampled, tmp_path: Path) -> None:
    recipes = sampled()
    expected = own_images(recipes, SampleSet("d3hr", 1, 0))
    packed = packed_alone(recipes, "d3hr")
    options: Any = {"ipc": 1, "compute": CPU}
    place = regenerate.images(packed, tmp_path / "set", "imagefolder", classes=["4", "7"], **options)
    assert place is not None and np.array_equal(read_set(place), expected[[0, 2]])
    with pytest.raises(DataError, match=r"class 9.*allowed: 1, 4, 7"):
        regenerate.images(packed, tmp_path / "none", "imagefolder", classes=["9"], **options)


# ---------------------------------------------------------------- interruptions


def test_parts_and_killed_calls_go_on_where_they_were(
    sampled: Sampled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = sampled()
    expected = own_images(recipes, SampleSet("d3hr", 1, 0))
    packed = packed_alone(recipes, "d3hr")
    made: list[str] = []
    generate = sample.generate

    def watched(*arguments: Any, **options: Any) -> Any:
        def generated(results: Any) -> Any:
            for number, result in enumerate(generate(*arguments, **options)(results)):
                if number == 1:
                    raise KeyboardInterrupt
                made.append(result[0].class_name)
                yield result

        return generated

    monkeypatch.setattr(sample, "generate", watched)
    options: Any = {"ipc": 1, "compute": CPU}
    assert regenerate.images(packed, tmp_path / "set", "imagefolder", part=(2, 3), **options) is None
    with pytest.raises(KeyboardInterrupt):
        regenerate.images(packed, tmp_path / "set", "imagefolder", **options)
    assert made == ["1", "7"] and not (tmp_path / "set").exists()
    place = regenerate.images(packed, tmp_path / "set", "imagefolder", **options)
    assert made == ["1", "7", "4"]
    assert place is not None and np.array_equal(read_set(place), expected)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(("set", "."))) == ["set"]


# ---------------------------------------------------------------- what is refused


def test_another_backbone_is_refused(sampled: Sampled, tmp_path: Path) -> None:
    packed = packed_alone(sampled(), "d3hr")
    shipped = support.ROOT / "workflow_scripts" / "backbones"
    options: Any = {"ipc": 1, "compute": CPU}
    with pytest.raises(BackboneError, match=r"digits-photo: is another denoiser .*--backbone.*digits"):
        regenerate.images(packed, tmp_path / "set", "imagefolder", backbone=str(shipped / "digits-photo"), **options)
    with pytest.raises(BackboneError, match=r"(?s)nowhere.*is missing"):
        regenerate.images(packed, tmp_path / "set", "imagefolder", backbone=str(tmp_path / "nowhere"), **options)
    shutil.copytree(shipped / "digits", tmp_path / "moved")
    moved = regenerate.images(packed, tmp_path / "set", "imagefolder", backbone=str(tmp_path / "moved"), **options)
    assert moved == tmp_path / "set"


def test_only_methods_that_need_the_gaussian_alone_are_packed(sampled: Sampled, tmp_path: Path) -> None:
    to = tmp_path / "file"
    with pytest.raises(ConfigError, match=r"2 methods .*d3hr, d3hr-published.*name one"):
        regenerate.pack(sampled(), to)
    guided = {
        "compare": ["dit", "d3hr"],
        "methods.d3hr.guidance": "[{term: mode}]",
        "methods.d3hr.prototypes": "{kind: kmeans}",
    }
    with pytest.raises(ConfigError, match=r"0 methods .*--method d3hr is none"):
        regenerate.pack(sampled(guided), to, "d3hr")
    with pytest.raises(DataError, match=r"3 of 3 classes have no Gaussian yet \(7, 1, 4\).*--until invert"):
        regenerate.pack(sampled({"sampler.cfg_scale": 2.5, "compare": ["d3hr"]}), to)
    to.touch()
    with pytest.raises(StoreError, match="is there already"):
        regenerate.pack(sampled(), to, "d3hr")


def test_a_file_that_is_none_is_refused(sampled: Sampled, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        regenerate.read(path)
    path.write_bytes(b"no tensors at all")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        regenerate.read(path)
    save_file({"mean": np.zeros(3)}, path)
    with pytest.raises(DataError, match="is not a file of `stillhouse regenerate pack`"):
        regenerate.read(path)
    path.unlink()
    packed = regenerate.pack(sampled(), path, "d3hr")
    arrays = {key: array[:2] for key, array in load_file(path).items()}
    regenerate.save(replace(packed, arrays=arrays))
    with pytest.raises(DataError, match=r"is damaged .*2"):
        regenerate.read(path)
    for change in (
        {"classes": ["7", "1", "../4"]},
        {"title": None, "surprise": 1},
        {"parameters": {"kind": "coreset"}},
    ):
        origin = {**packed.header.origin, **change}
        regenerate.save(replace(packed, header=packed.header.model_copy(update={"origin": origin})))
        with pytest.raises(DataError, match="is damaged"):
            regenerate.read(path)


# ---------------------------------------------------------------- the command


def test_the_command(
    sampled: Sampled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = sampled({"compare": ["d3hr"]})
    (tmp_path / "resolved.json").write_text(recipes.config.canonical())

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["stillhouse", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), "".join(capsys.readouterr())

    file = tmp_path / "d3hr.safetensors"
    code, said = run("regenerate", "pack", "--resolved", tmp_path / "resolved.json", "--to", file)
    assert code == 0 and "3 (7, 1, 4)" in said and "timestep 600, 32 bits" in said
    assert run("regenerate", "show", file) == (0, said)
    to = ("--to", tmp_path / "set", "--format", "huggingface", "--size", 24, "--device", "cpu")
    code, said = run("regenerate", "images", file, "--ipc", 1, "--part", "1/3", *to)
    assert code == 0 and "Part 1 of 3 is made" in said
    code, said = run("regenerate", "images", file, "--ipc", 1, *to)
    assert code == 0 and f"{tmp_path / 'set'}\n" in said
    assert Image.open(tmp_path / "set" / "train" / "7" / "0000.png").size == (24, 24)
    for wrong in (("--part", "4/3"), ("--part", "x"), ("--size", "0")):
        assert run("regenerate", "images", file, "--ipc", 1, "--to", tmp_path / "other", *wrong)[0] == 2
