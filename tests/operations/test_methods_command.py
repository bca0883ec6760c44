"""``stillhouse methods`` shows each method of the configuration, and every option that could be written there."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import support
from pydantic import BaseModel

from workflow_scripts.config import RunConfig, load
from workflow_scripts.errors import ConfigError
from workflow_scripts.operations.methods import methods, parts_of

CONFIG = load(support.ROOT / "config.yaml")


def told(name: str, config: RunConfig = CONFIG) -> dict[str, Any]:
    """Every option of a method by its path."""
    return {
        f"{part.path}.{option.key}".strip("."): option
        for part in parts_of(config.methods[name])
        for option in part.options
    }


def listing(capsys: pytest.CaptureFixture[str], *names: str, **options: bool) -> str:
    methods(CONFIG, names, **({"options": False, "as_json": False} | options))
    return capsys.readouterr().out


@pytest.mark.parametrize("name", CONFIG.methods)
def test_every_key_of_a_method_is_told(name: str) -> None:
    def leaves(value: Any) -> int:
        if isinstance(value, BaseModel):
            own = {key: getattr(value, key) for key in type(value).model_fields if key not in ("summary", "paper")}
            return sum(leaves(inner) for key, inner in own.items() if key not in ("kind", "term"))
        if isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value):
            return sum(leaves(item) for item in value)
        return 1

    method = CONFIG.methods[name]
    absent = getattr(method, "prototypes", 0) is None, getattr(method, "guidance", None) == ()
    options = [option for part in parts_of(method) for option in part.options]
    assert len(options) == leaves(method) - sum(absent)
    assert all(option.required or option.default is not ... for option in options)


def test_types_defaults_and_values() -> None:
    options = told("manifoldgd")
    scale, dimension, around = (options[f"guidance.{key}"] for key in ("scale", "tangent_dim", "around"))
    assert (scale.type, scale.default, scale.value) == ("number >= 0", 0.1, 0.3)  # the run digits sets it
    assert (dimension.type, dimension.default) == ("integer > 0 or null", None)
    assert around.type == "prototype | x0"
    assert "nearest" in around.description
    assert options["sampler.cfg_scale"].value == 1.5
    assert options["guidance.kappa"].type == "number >= 0, <= 1"
    assert told("d3hr")["start.inversion.map"].type == "ddim | noise"
    assert told("d3hr")["start.weights"].type == "list of 3: number >= 0"
    assert told("random")["select"].required


def test_choices_are_named_whether_taken_or_not() -> None:
    parts = {part.path: part for part in parts_of(CONFIG.methods["d3hr"])}
    assert (parts["start"].choice, set(parts["start"].choices)) == ("gaussian", {"noise", "gaussian", "prototype"})
    assert parts["prototypes"].choice == "none"
    assert {"kmeans", "leaves", "multiscale"} == set(parts["prototypes"].choices)
    assert {"mode", "tangent"} < set(parts["guidance"].choices)
    assert "inverted domain" in parts["start"].about


def test_each_published_method_names_its_paper() -> None:
    papers = {name: method.paper for name, method in CONFIG.methods.items()}
    for name, number in (
        ("mgd3", "2505.18963"), ("manifoldgd", "2602.23295"), ("manifoldgd-released", "2602.23295"), ("d3hr", "2505.18399"),
        ("dit", "2212.09748"), ("dmgd", "2605.03877"), ("d4m", "2407.15138"), ("kcenter", "1708.00489"),
        ("crops", "2205.14959"),
    ):  # fmt: skip
        assert f"arXiv {number}" in papers[name]
    assert all(papers[name] for name in papers if name not in ("random", "kmeans"))


def test_the_overview_lists_every_method_and_what_the_run_compares(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = listing(capsys)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    for name in CONFIG.methods:
        mark = "*" if name in CONFIG.compare else " "
        assert sum(line.startswith(f"{mark} {name} ") for line in lines) == 1


@pytest.mark.parametrize("columns", ["80", "100"])
def test_details_fit_the_terminal(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = listing(capsys, options=True)
    assert max(map(len, text.splitlines())) <= int(columns)
    for name in CONFIG.methods:
        for option in told(name):
            assert option.rpartition(".")[2] in text


def test_details_of_one_method(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = " ".join(listing(capsys, "d3hr").split())
    assert "arXiv 2505.18399" in text
    assert "start: gaussian or noise, prototype" in text
    assert "candidates 100000 integer > 0; default groups compared by best_of_m" in text
    assert "neighbours" not in text
    assert "``" not in text


def test_json_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    everything = json.loads(listing(capsys, as_json=True))
    assert [entry["method"] for entry in everything] == list(CONFIG.methods)
    (one,) = json.loads(listing(capsys, "mgd3", as_json=True))
    assert one["compared"] and one["kind"] == "diffusion" and one["paper"].startswith("MGD3")
    options = {f"{part['path']}.{option['key']}": option for part in one["parts"] for option in part["options"]}
    assert options["guidance.stop"]["value"] == 10 and options["guidance.stop"]["default"] == 25


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ConfigError, match="no method named 'mdg3'; did you mean 'mgd3'"):
        methods(CONFIG, ["mdg3"], options=False, as_json=False)


def test_the_command_runs_without_torch() -> None:
    script = (
        "import sys, runpy\n"
        "sys.argv = ['stillhouse', 'methods', 'd3hr']\n"
        "try: runpy.run_module('workflow_scripts.cli', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'diffusers', 'sklearn', 'zarr', 'torchvision', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=support.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2505.18399" in done.stdout
