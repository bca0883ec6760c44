"""What plan says a run will cost, against what its stages do and leave on the disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import torch

from workflow_scripts.config import Compute, DiffusionMethod, load
from workflow_scripts.diffusion.schedule import respace
from workflow_scripts.evaluation import training
from workflow_scripts.methods.registry import start_step
from workflow_scripts.operations import show
from workflow_scripts.operations.cost import MOST_CONFUSED, Cost, Ledger, cost, sampled_rows
from workflow_scripts.operations.flops import ARCHITECTURES, dit_flop
from workflow_scripts.operations.speeds import (
    MATMUL,
    Bench,
    Measurement,
    Speeds,
    Task,
    Tasks,
    choose_speeds,
    read_benches,
)
from workflow_scripts.operations.survey import Item, survey
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.memory import Batch
from workflow_scripts.stages.sample import sample_results
from workflow_scripts.store.results import Result

SHIPPED = load(support.ROOT / "config.yaml", "imagenet1k")
METHODS = {name: method for name, method in SHIPPED.methods.items() if isinstance(method, DiffusionMethod)}


def cost_of(site: support.Site, overrides: dict[str, Any] | None = None) -> Cost:
    """Of the tiny run on an H100."""
    recipes = Recipes(site.config({"compute.device": "auto", **(overrides or {})}))
    return cost(recipes, survey(recipes))


def hours(of: Cost) -> dict[str, float | None]:
    return {stage.stage: stage.missing.hours for stage in of.stages}


# ---------------------------------------------------------------- how much work there is


class Counting:
    """A denoiser that counts the rows it is asked about."""

    abar = np.linspace(0.999, 0.01, 1000)
    latent_shape, device, null_label, label_table = (1, 2, 2), torch.device("cpu"), 3, None

    def __init__(self) -> None:
        self.rows: list[int] = []

    def predict(self, x: torch.Tensor, *_: Any, cfg_scale: float, **__: Any) -> tuple[torch.Tensor, None]:
        self.rows.append(len(x) * (1 if cfg_scale == 1 else 2))
        return torch.zeros_like(x), None


def method(**parts: Any) -> DiffusionMethod:
    return DiffusionMethod(kind="diffusion", sampler={"steps": 10, **parts.pop("sampler", {})}, **parts)


PLAIN = method()
DDIM = method(sampler={"kind": "ddim", "spacing": "leading", "cfg_scale": 1})
GREEDY = method(guidance=[{"term": "transport", "window": (0, 2)}])
JOINT = method(guidance=[{"term": "transport", "window": (0, 2), "matching": "synchronous"}])


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("kind", [PLAIN, DDIM, GREEDY, JOINT], ids=["plain", "ddim", "greedy", "joint"])
@pytest.mark.parametrize("ipcs", [[1, 1, 3, 3], [7, 2], [4] * 5], ids=str)
def test_it_counts_the_rows_that_sampling_evaluates(kind: DiffusionMethod, ipcs: list[int], fixed: bool) -> None:
    results = [Result("sample", f"c{n}", {"ipc": ipc, "seed": 0, "label": 0, "n": n}) for n, ipc in enumerate(ipcs)]
    denoiser = Counting()

    def prepare(result: Result, _: object) -> dict[str, torch.Tensor]:
        ipc = result.recipe["ipc"]
        targets, masses = torch.ones(ipc, 2, 4), torch.full((ipc, 2), 0.5)
        return {"start": torch.randn(ipc, 1, 2, 2), "targets": targets, "masses": masses}

    list(sample_results(denoiser, kind, results, prepare, Batch(4), fixed_shape=fixed))  # type: ignore[arg-type]
    tasks = Tasks(SHIPPED, {}, {}, 1000)
    assert sum(denoiser.rows) == sampled_rows(kind, ipcs, 4, fixed_shape=fixed) * tasks.evaluations(kind)


@pytest.mark.parametrize("name", METHODS)
def test_it_counts_the_steps_of_every_method(name: str) -> None:
    chosen = METHODS[name]
    grid = respace(np.linspace(0.999, 0.01, 1000), chosen.sampler.steps, chosen.sampler.spacing)
    steps = start_step(chosen, grid) + (chosen.sampler.kind == "ddpm")
    assert Tasks(SHIPPED, {}, {}, 1000).evaluations(chosen) == steps * (1 if chosen.sampler.cfg_scale == 1 else 2)


def test_fifty_guided_steps_of_dit_xl_on_an_h100() -> None:
    """IPC 50 x 1000 is 5 M evaluations, 1.19e18 operations: 0.42 h at the best measured matrix product, before the margin."""
    network, coder = ARCHITECTURES["DiT-XL/2-256"]
    tasks = Tasks(SHIPPED, network, coder, 1000)
    speeds = Speeds("H100", True, "", MATMUL["h100"], SHIPPED.compute)
    found = speeds.seconds(tasks.sample(METHODS["dit"]), 50_000)
    assert found is not None and found[1] == "estimated"
    assert 0.42 * 2 < found[0] / 3600 < 0.42 * 4
    task = tasks.sample(METHODS["dit"])
    assert task.flop == 100 * dit_flop(network)  # type: ignore[operator]


# ---------------------------------------------------------------- the whole of a run


def test_a_finished_run_costs_nothing_more(copied: support.Site) -> None:
    found = cost_of(copied)
    assert found.missing.hours == 0 and found.missing.bytes == 0
    assert found.whole.hours and found.whole.bytes


def test_only_what_is_missing_is_counted(copied: support.Site) -> None:
    before = cost_of(copied)
    changed = cost_of(copied, {"methods.mgd3.guidance": [{"term": "mode", "scale": 0.7, "stop": 4}]})
    costs = hours(changed)
    assert {stage for stage, spent in costs.items() if spent} == {"sample", "evaluate"}
    assert changed.whole.hours == pytest.approx(before.whole.hours)
    (sample,) = (stage for stage in changed.stages if stage.stage == "sample")
    assert sample.jobs_to_run == 1 and sample.missing.hours < sample.whole.hours  # type: ignore[operator]


def test_bytes_are_those_on_the_disk(copied: support.Site) -> None:
    """Within a third, of tiny arrays whose records weigh as much as they do."""
    found = {stage.stage: stage.whole.bytes for stage in cost_of(copied).stages}
    for stage in ("encode", "cluster", "invert", "sample"):
        files = (copied.results / "store" / f"{stage}.zarr").rglob("*")
        actual = sum(path.stat().st_size for path in files if path.is_file())
        assert found[stage] == pytest.approx(actual, rel=0.35), stage
    for stage in ("evaluate", "measure"):
        actual = sum(path.stat().st_size for path in (copied.results / "store" / stage).glob("*.json"))
        assert actual / 2 < found[stage] < actual * 2.5, stage  # type: ignore[operator]
    pixels = sum(path.stat().st_size for path in (copied.results / "datasets").rglob("*.png"))
    assert pixels / 2 < found["export"] < pixels * 2  # type: ignore[operator]


@pytest.mark.parametrize("classes", [10, 100, 101])
def test_scores_grow_with_the_square_of_the_classes_that_are_told_apart(
    classes: int, plan_site: Callable[..., support.Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large as the parts of a score at 60 % of 50 test images per class."""
    assert training.MOST_CONFUSED == MOST_CONFUSED
    recipes = Recipes(plan_site().config())
    wanted = recipes.trainings("random", 1)[0]
    bare = json.dumps({"recipe": recipes.training_recipe(wanted)})
    monkeypatch.setattr(Recipes, "classes", property(lambda _: [f"{number}" for number in range(classes)]))
    counts = np.random.default_rng(0).multinomial(20, np.full(classes, 1 / classes), classes) + 30 * np.eye(
        classes, dtype=int
    )
    parts = [
        [2.0 * count for count in counts.diagonal().tolist()],
        counts.tolist() if classes <= MOST_CONFUSED else None,
    ]
    found = Ledger(recipes)._bytes("evaluate", Item("", "", False, None, wanted))
    assert found == pytest.approx(len(bare) + 600 + len(json.dumps(parts)), rel=0.25)


def test_features_are_counted(copied: support.Site) -> None:
    """Those of a teacher, of which there are as many as its last layer takes."""
    teacher = {"architecture": {"name": "convnet_bn", "width": 8}, "fit": {}}
    changes = {"evaluation.protocols": ["soft-rded"], "evaluation.teacher": teacher, "evaluation.batch_size": 4}
    (found,) = (stage for stage in cost_of(copied, changes).stages if stage.stage == "features")
    numbers = 3 * support.COUNT * 8 * 4 * 4
    assert 4 * numbers < found.missing.bytes < 4 * numbers + 3 * 4000 and found.missing.hours  # type: ignore[operator]


def test_twice_as_many_images_take_twice_as_long(plan_site: Callable[..., support.Site]) -> None:
    site = plan_site()
    for name in ("transformer", "vae"):
        config = ARCHITECTURES["DiT-XL/2-256"][name == "vae"]
        (site.backbone / name / "config.json").write_text(json.dumps(config))
    keys = {"dataset.resolution": 256, "compare": ["dit"], "ipc": [64], "seeds": [0, 1], "shards": 1}
    once, twice = (cost_of(site, keys | {"seeds": seeds}) for seeds in ([0, 1], [0, 1, 2, 3]))
    start = 30 / 3600  # seconds to begin the job
    assert hours(twice)["sample"] - start == pytest.approx(2 * (hours(once)["sample"] - start), rel=1e-3)  # type: ignore[operator]
    assert set(twice.missing.basis) == {"estimated"}


def test_a_backbone_of_unknown_shape_has_no_cost_but_a_plan(
    plan_site: Callable[..., support.Site], capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = Recipes(plan_site().config())
    show.plan(recipes, verbose=False, as_json=False)
    lines = {words[0]: words[1:] for line in capsys.readouterr().out.splitlines() if (words := line.split())}
    assert lines["all"][1:3] == ["?", "?"]


def test_price_and_json(copied: support.Site, capsys: pytest.CaptureFixture[str]) -> None:
    changed = {"methods.mgd3.guidance": [{"term": "mode", "scale": 0.7, "stop": 4}], "compute.device": "auto"}
    recipes = Recipes(copied.config(changed | {"compute.price_per_gpu_hour": 2.5, "compute.gpu": "a100"}))
    show.plan(recipes, verbose=False, as_json=True)
    found = json.loads(capsys.readouterr().out)["cost"]
    assert found["device"] == "A100" and found["price_per_gpu_hour"] == 2.5
    assert found["missing"]["price"] == pytest.approx(2.5 * found["missing"]["hours"])
    assert sum(stage["missing"]["hours"] for stage in found["stages"]) == pytest.approx(found["missing"]["hours"])
    show.plan(recipes, verbose=False, as_json=False)
    assert "price" in capsys.readouterr().out


def test_price_and_gpu_change_no_result_and_no_report(copied: support.Site) -> None:
    recipes = Recipes(copied.config({"compute.price_per_gpu_hour": 2.5, "compute.gpu": "a100"}))
    assert all(not stage.missing and not stage.jobs_to_run for stage in survey(recipes))


# ---------------------------------------------------------------- speeds


def speeds(**rows: Measurement) -> Speeds:
    measured = {key.replace("_", " "): row for key, row in rows.items()}
    return Speeds("x", True, "", MATMUL["h100"], Compute(dtype="bfloat16", compile=True), measured)


def test_a_measurement_counts_then_one_alike_then_the_table() -> None:
    task = Task("sample", "new bfloat16 compiled", 1e12)
    slow, fast = Measurement("slow", 10, 1, 1e12), Measurement("fast", 100, 1, 1e12)
    assert speeds(**{"sample new bfloat16 compiled": fast}).seconds(task, 100) == (1.0, "measured")
    found = speeds(**{"sample old bfloat16 compiled": fast, "invert old bfloat16 compiled": slow}).seconds(task, 100)
    assert found == (12.5, "scaled"), "the slower one, with a margin"
    other = speeds(**{"sample old float32": slow, "train resnet18 full": slow}).seconds(task, 100)
    assert other == speeds().seconds(task, 100) == (pytest.approx(100 * 2.5e12 / 794e12), "estimated")
    assert speeds().seconds(Task("sample", "unet-64-8 bfloat16"), 1) is None


def a_bench(device: str, created: str, **keys: Any) -> Bench:
    rows = {f"encode {created}": Measurement("encode", 1.0, 1)}
    return Bench(device, keys.pop("kind", "cuda"), f"net-{created}", created, {"float32": 1e12}, rows, **keys)


def test_the_device_is_the_configured_or_the_last_measured(tmp_path: Path) -> None:
    def chosen(network: str = "net-2026-01-04", **keys: Any) -> Speeds:
        compute = SHIPPED.compute.model_copy(update=keys)
        return choose_speeds(SHIPPED.model_copy(update={"results": tmp_path, "compute": compute}), network)

    assert (chosen().device, chosen().on_gpu, chosen(gpu="a100").device) == ("H100", True, "A100")
    assert not chosen(gpu="abacus").matmul and "abacus" in chosen(gpu="abacus").device
    assert "stillhouse bench" in chosen().source and not chosen(device="cpu").on_gpu
    for name, day in (("NVIDIA A100-SXM4", "2026-01-01"), ("NVIDIA H200", "2026-01-03"), ("NVIDIA H200", "2026-01-02")):
        a_bench(name, day).write(tmp_path)
    a_bench("CPU", "2026-01-04", kind="cpu", quick=True).write(tmp_path)
    assert len(read_benches(tmp_path)) == 4
    assert chosen(device="cuda").device == "NVIDIA H200"
    assert set(chosen(device="cuda").rows) == {"encode 2026-01-03", "encode 2026-01-02"}
    assert chosen(gpu="a100").device == "NVIDIA A100-SXM4"
    assert not chosen().on_gpu and "quickly" in chosen().source
    assert chosen("another").device == "NVIDIA H200", "a small network on a laptop says nothing of a large one"
    (tmp_path / "cache" / "bench" / "torn.json").write_text('{"device": ')
    assert len(read_benches(tmp_path)) == 4
