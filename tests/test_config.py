"""The configuration: what is merged over what, and that each mistake is told in one line before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import support
import yaml

from workflow_scripts.config import DiffusionMethod, RunConfig, load, load_resolved, merge, resolve
from workflow_scripts.errors import ConfigError, StillhouseError
from workflow_scripts.recipes import Recipes

SHIPPED = yaml.safe_load((support.ROOT / "config.yaml").read_text())


def shipped(overrides: dict[str, Any] | None = None, run: str = "digits") -> RunConfig:
    return resolve(merge({**SHIPPED, "run": run}, support.nested(overrides or {})))


def complaint(overrides: dict[str, Any]) -> str:
    """The one line that a mistake in the shipped configuration is told in."""
    with pytest.raises(ConfigError) as caught:
        shipped(overrides)
    message = str(caught.value)
    assert "\n" not in message, f"one mistake, one line:\n{message}"
    return message


# ---------------------------------------------------------------- what is shipped


@pytest.mark.parametrize("run", SHIPPED["runs"])
def test_every_shipped_run_is_valid(run: str) -> None:
    config = shipped(run=run)
    assert config.run == run
    assert set(config.compare) <= set(config.methods)


def test_the_default_run_is_digits() -> None:
    config = load(support.ROOT / "config.yaml")
    assert config.run == "digits"
    assert config.compare == ("random", "herding", "kmeans", "dit", "mgd3", "manifoldgd", "d3hr")
    assert config.ipc == (1, 10)


# ---------------------------------------------------------------- each mistake is told in one line

MISTAKES = {
    "unknown key": ({"shard": 3}, ["shard: unknown key", "did you mean 'shards'", "allowed: backbone, cluster, "]),
    "unknown key in a section": ({"cluster.max_leafs": 8}, ["cluster.max_leafs: unknown key", "'max_leaves'", "seed"]),
    "unknown key in a union": (
        {"methods.mgd3.guidance": [{"term": "mode", "strength": 1}]},
        ["methods.mgd3.guidance.0.strength: unknown key", "allowed: scale, stop, term"],
    ),
    "unknown key of a method": (
        {"methods.random.ipc": 3},
        ["methods.random.ipc: unknown key", "allowed: kind, paper, select, summary"],
    ),
    "unknown key of a method's part": (
        {"methods.d3hr.start.candidate": 3},
        ["methods.d3hr.start.candidate: unknown key", "did you mean 'candidates'"],
    ),
    "wrong type": ({"shards": "many"}, ["shards: got 'many'", "integer"]),
    "a list for a number": ({"compute.workers": [1, 2]}, ["compute.workers: got [1, 2]", "integer"]),
    "a value for a section": ({"dataset": "digits"}, ["dataset: got 'digits'"]),
    "a section for a value": ({"seeds.first": 1}, ["seeds: got {'first': 1}"]),
    "one IPC without a list": ({"ipc": 5}, ["ipc: got 5"]),
    "wrong type in a list": ({"ipc": [1, "ten"]}, ["ipc.1: got 'ten'", "integer"]),
    "zero": ({"shards": 0}, ["shards: got 0", "greater than 0"]),
    "a share beyond 1": ({"evaluation.cutmix": 1.5}, ["evaluation.cutmix: got 1.5", "less than or equal to 1"]),
    "zero as the only entry": ({"ipc": [0]}, ["ipc.0: got 0", "greater than 0"]),
    "no IPC": ({"ipc": []}, ["ipc: got []", "at least 1"]),
    "not one of the choices": (
        {"dataset.on_bad_image": "ignore"},
        ["dataset.on_bad_image: got 'ignore'", "'fail' or 'skip'"],
    ),
    "unknown kind of method": ({"methods.new.kind": "gan"}, ["methods.new", "'gan'", "'coreset', 'diffusion'"]),
    "a method without kind": ({"methods.new.select": "random"}, ["methods.new", "'kind'"]),
    "unknown guidance": (
        {"methods.mgd3.guidance": [{"term": "modes"}]},
        ["methods.mgd3.guidance.0", "'modes'", "'mode', 'tangent'"],
    ),
    "a name that is no name": ({"methods.my method": {"kind": "coreset", "select": "random"}}, ["methods.my method"]),
    "unknown run": ({"run": "digit"}, ["run: there is no run named 'digit'", "did you mean 'digits'", "digits-full"]),
    "unknown base": (
        {"run": "mine", "runs.mine.extends": "digit"},
        ["runs.mine.extends: there is no run named 'digit'", "'digits'"],
    ),
    "extends itself": ({"run": "mine", "runs.mine.extends": "mine"}, ["runs.mine.extends", "circle", "mine -> mine"]),
    "extends in a circle": (
        {"run": "a", "runs.a.extends": "b", "runs.b.extends": "c", "runs.c.extends": "a"},
        ["runs.a.extends", "circle", "a -> b -> c -> a"],
    ),
    "unknown method in compare": (
        {"compare": ["random", "mdg3"]},
        ["compare", "'mdg3'", "did you mean 'mgd3'", "herding"],
    ),
    "a method twice": ({"compare": ["random", "random"]}, ["compare holds a value twice"]),
    "an IPC twice": ({"ipc": [1, 1]}, ["ipc holds a value twice"]),
    "a seed twice": ({"seeds": [3, 3]}, ["seeds holds a value twice"]),
    "epochs miss an IPC": ({"ipc": [1, 7, 10]}, ["evaluation.epochs", "IPC [7]", "[1, 10]"]),
    "guidance without prototypes": ({"methods.mgd3.prototypes": None}, ["methods.mgd3", "prototypes", "kmeans"]),
    "prototypes without guidance": ({"methods.mgd3.guidance": []}, ["methods.mgd3", "prototypes", "guidance"]),
    "too few leaves": ({"cluster.max_leaves": 4}, ["cluster.max_leaves is 4", "10", "manifoldgd"]),
    "a folder source without folders": ({"dataset.source": "imagefolder"}, ["dataset", "root", "test_root"]),
    "two backbones": ({"backbone.fit": {}}, ["backbone", "path", "fit"]),
    "no backbone": ({"backbone.path": None}, ["backbone", "path", "fit"]),
}


@pytest.mark.parametrize(("overrides", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_one_line(overrides: dict[str, Any], expected: list[str]) -> None:
    message = complaint(overrides)
    missing = [part for part in expected if part not in message]
    assert not missing, f"{missing} not in: {message}"


def test_a_missing_key_is_named() -> None:
    document = {"run": "mine", "runs": {"mine": {key: SHIPPED["runs"]["digits"][key] for key in ("compare", "ipc")}}}
    with pytest.raises(ConfigError) as caught:
        resolve(document)
    lines = str(caught.value).splitlines()
    assert "dataset: missing; it must be set" in lines
    assert "backbone: missing; it must be set" in lines


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        shipped({"shards": 0, "cluster.pool": 0, "colour": "red"})
    keys = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert sorted(keys) == ["cluster.pool", "colour", "shards"]


STRUCTURES = {
    "runs is a list": {"runs": ["digits"]},
    "a run is a number": {"run": "mine", "runs": {"mine": 5}},
    "defaults is a list": {"defaults": ["random"]},
    "methods is a list": {"methods": ["random"]},
    "a method is a word": {"methods": {"mine": "random"}},
    "run is a list": {"run": ["digits"]},
    "extends is a list": {"run": "mine", "runs": {"mine": {"extends": ["digits"]}}},
}


@pytest.mark.parametrize("overlay", STRUCTURES.values(), ids=STRUCTURES)
def test_a_wrong_structure_is_a_configuration_error(overlay: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        resolve(merge(SHIPPED, overlay))


IMPOSSIBLE = {
    "infinite": {"sampler.cfg_scale": float("inf")},
    "not a number": {"evaluation.learning_rate": float("nan")},
    "an empty range": {"evaluation.crop_scale": [0.9, 0.5]},
    "a range from nothing": {"evaluation.crop_scale": [0.0, 1.0]},
    "a grid of one step": {"sampler.steps": 1},
    "more steps than timesteps": {"sampler.steps": 1001},
    "a start that is not on the grid": {"methods.d3hr.start.timestep": 605},
    "images of another size than the backbone's": {"dataset.resolution": 32},
    "pooling that does not divide the latents": {"cluster.pool": 3},
}


@pytest.mark.parametrize("overrides", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_value_is_refused_before_anything_runs(
    overrides: dict[str, Any], tmp_path: Path, tiny_images: Path, tiny_backbone: Path
) -> None:
    site = support.Site(tiny_images / "train", tiny_images / "test", tiny_backbone, tmp_path / "results")
    with pytest.raises(StillhouseError) as caught:
        recipes = Recipes(site.config(overrides))
        recipes.check()
        recipes.jobs()
    assert next(iter(overrides)).rpartition(".")[2] in str(caught.value), "the message names the key"


# ---------------------------------------------------------------- files and --set


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


FILES = {
    "not YAML": ("run: [digits\nipc: 3", "not valid YAML"),
    "a list": ("- digits\n", "expected a mapping"),
    "empty": ("", "expected a mapping"),
    "not text": (b"run: \xff\xfe\x00digits", ""),
    "binary": (bytes(range(256)), ""),
}


@pytest.mark.parametrize(("content", "expected"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("read", [load, load_resolved])
def test_an_unusable_file_is_named(read: Any, content: str | bytes, expected: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", content)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read \(No such file or directory\)"):
        load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("shards", "--set shards: write key=value"),
        ("=3", "--set =3: write key=value"),
        ("ipc=[1, 2", "--set ipc=[1, 2: the value is not YAML"),
        ("shards=many", "shards: got 'many'"),
        ("shards.of.mine=3", "shards: got {'of': {'mine': 3}}"),
        ("compute.batch=3", "compute.batch: unknown key"),
    ],
)
def test_a_bad_override_is_told_in_one_line(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(support.ROOT / "config.yaml", overrides=[override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_win_over_the_run_and_the_last_one_over_the_others() -> None:
    overrides = ["ipc=[1]", "evaluation.epochs={1: 7}", "evaluation.flip=true", "shards=3", "shards=4", "title=x=y"]
    config = load(support.ROOT / "config.yaml", "digits-full", overrides)
    assert config.run == "digits-full"
    assert config.ipc == (1,)
    before = shipped(run="digits-full").evaluation.epochs
    assert isinstance(before, dict) and len(before) > 1
    assert config.evaluation.epochs == {**before, 1: 7}
    assert config.evaluation.flip is True
    assert config.shards == 4
    assert config.title == "x=y"


def test_an_override_can_choose_the_run() -> None:
    assert load(support.ROOT / "config.yaml", overrides=["run=digits-full"]).ipc == (1, 2, 5, 10, 20)


# ---------------------------------------------------------------- round trip


@pytest.mark.parametrize("run", SHIPPED["runs"])
def test_canonical_reads_back_equal(run: str, tmp_path: Path) -> None:
    config = shipped(run=run)
    again = load_resolved(write(tmp_path / "resolved.json", config.canonical()))
    assert again == config
    assert again.canonical() == config.canonical()


AWKWARD = {
    "small numbers": {"evaluation.weight_decay": 1e-7, "evaluation.learning_rate": 3e10},
    "words that YAML takes for others": {"dataset.classes": ["0", "1", "no", "null", "1e3", "~", "2020-01-01", "0x10"]},
    "accents": {"title": "Käfer, 犬 и мыши"},
    "beyond the basic plane": {"title": "Digits \N{PARTY POPPER}", "dataset.classes": ["\N{DOG FACE}"]},
    "control characters and quotes": {"title": "a\tb\n'c' \"d\" \\ # e: f \x07 \x7f \u2028 \x85"},
    "optional values set": {
        "methods.d3hr.start.inversion.cfg_scale": 0.0,
        "methods.manifoldgd.guidance": [{"term": "tangent", "tangent_dim": 2}],
        "evaluation.epochs": {1: 3, 10: 4},
    },
}


@pytest.mark.parametrize("overrides", AWKWARD.values(), ids=AWKWARD)
def test_canonical_reads_back_awkward_values(overrides: dict[str, Any], tmp_path: Path) -> None:
    config = shipped(overrides)
    assert load_resolved(write(tmp_path / "resolved.json", config.canonical())) == config


# ---------------------------------------------------------------- merging


def test_mappings_merge_and_all_else_is_replaced() -> None:
    base = {"a": {"x": 1, "y": {"p": 1, "q": 2}}, "b": [1, 2], "c": 3}
    overlay = {"a": {"y": {"q": 5}, "z": 9}, "b": [7], "d": None}
    assert merge(base, overlay) == {"a": {"x": 1, "y": {"p": 1, "q": 5}, "z": 9}, "b": [7], "c": 3, "d": None}
    assert base == {"a": {"x": 1, "y": {"p": 1, "q": 2}}, "b": [1, 2], "c": 3}, "the inputs stay as they were"


def test_another_kind_replaces_the_whole_mapping() -> None:
    config = shipped({"methods.mgd3": {"kind": "coreset", "select": "random"}, "methods.d3hr.start": {"kind": "noise"}})
    assert config.methods["mgd3"].model_dump() == {"kind": "coreset", "select": "random", "summary": "", "paper": ""}
    assert diffusion(config, "d3hr").start.model_dump() == {"kind": "noise"}


def test_the_same_kind_is_merged() -> None:
    start = diffusion(shipped({"methods.d3hr.start": {"kind": "gaussian", "timestep": 400}}), "d3hr").start.model_dump()
    assert (start["timestep"], start["construction"]) == (400, "moment_matched")


def diffusion(config: RunConfig, name: str) -> DiffusionMethod:
    method = config.methods[name]
    assert isinstance(method, DiffusionMethod)
    return method


def test_sampler_defaults_flow_into_methods_and_their_own_keys_win() -> None:
    config = shipped({"sampler.cfg_scale": 2.5, "methods.mgd3.sampler.steps": 20})
    assert diffusion(config, "dit").sampler == config.sampler
    assert diffusion(config, "dit").sampler.cfg_scale == 2.5
    assert (diffusion(config, "mgd3").sampler.steps, diffusion(config, "mgd3").sampler.cfg_scale) == (20, 2.5)
    d3hr = diffusion(config, "d3hr").sampler
    assert (d3hr.kind, d3hr.spacing, d3hr.cfg_channels) == ("ddim", "leading", 4), "its own"
    assert (d3hr.steps, d3hr.cfg_scale) == (50, 2.5), "shared"


def test_sampler_defaults_flow_into_methods_of_another_kind_even_if_they_name_no_steps() -> None:
    shared = {"kind": "ddpm", "cfg_scale": 2.5}
    document = merge(SHIPPED, {"defaults": {"sampler": None}, "run": "digits"})
    config = resolve(merge(document, {"sampler": shared}))
    assert diffusion(config, "d3hr").sampler.cfg_scale == 2.5


def test_an_overlay_of_a_methods_sampler_keeps_its_other_keys() -> None:
    d3hr = diffusion(shipped({"methods.d3hr.sampler.kind": "ddpm"}), "d3hr").sampler
    assert (d3hr.kind, d3hr.spacing, d3hr.cfg_channels) == ("ddpm", "leading", 4)


def test_a_run_extends_another() -> None:
    full, digits = shipped(run="digits-full"), shipped(run="digits")
    assert full.ipc == (1, 2, 5, 10, 20)
    assert (full.dataset, full.backbone, full.compare) == (digits.dataset, digits.backbone, digits.compare)
    assert len(full.evaluation.architectures) == 3
    assert full.evaluation.resample == "bicubic", "from the run that it extends"


def test_top_level_keys_win_over_every_run() -> None:
    assert resolve({**SHIPPED, "run": "digits-full", "ipc": [2], "seeds": [7]}).seeds == (7,)


def test_the_configuration_cannot_be_changed() -> None:
    config = shipped()
    with pytest.raises(ValueError, match="frozen"):
        config.shards = 3  # type: ignore[misc]
