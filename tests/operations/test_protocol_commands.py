"""``stillhouse protocols`` and ``stillhouse dd-ranking``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import support

from workflow_scripts.config import load
from workflow_scripts.errors import ConfigError, DataError
from workflow_scripts.evaluation.dd_ranking import augmentation_robust_score, label_robust_score
from workflow_scripts.evaluation.protocols import PROTOCOLS
from workflow_scripts.operations.dd_ranking import dd_ranking, ranked
from workflow_scripts.operations.protocols import protocols
from workflow_scripts.recipes import Recipes

CONFIG = load(support.ROOT / "config.yaml", "digits-protocols")


def listing(capsys: pytest.CaptureFixture[str], *names: str, as_json: bool = False) -> str:
    protocols(CONFIG, names, as_json=as_json)
    return capsys.readouterr().out


def test_every_protocol_is_listed_with_every_value_and_its_papers(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(listing(capsys).split())
    told = json.loads(listing(capsys, as_json=True))
    assert [protocol["protocol"] for protocol in told] == list(PROTOCOLS)
    for protocol in told:
        preset = PROTOCOLS[protocol["protocol"]]
        assert protocol["papers"] == list(preset.papers) and protocol["summary"] == preset.summary
        assert all(paper.split(",")[0] in text for paper in preset.papers)
        assert set(protocol["values"]) == {"architectures", *preset.values}
        assert protocol["evaluated"]


def test_what_a_run_changes_is_told_beside_what_was_published(capsys: pytest.CaptureFixture[str]) -> None:
    (told,) = json.loads(listing(capsys, "soft-rded", as_json=True))
    values = told["values"]
    assert values["epochs"] == {"published": 300, "run": 4}
    assert values["temperature"] == {"published": 20.0}
    assert values["published_quirks"]["run"] == ["double-batchnorm"]
    assert "twice that for 100 and 1000 classes" in values["batch_size"]["published"]
    assert "in place of 300" in listing(capsys, "soft-rded")
    (glad,) = json.loads(listing(capsys, "glad", as_json=True))
    assert len(glad["unseen"]) == 4


def test_variants_are_listed_and_unknown_names_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    variant = ["evaluation.settings={quirk: {preset: soft-d3hr, temperature: 4}}"]
    config = load(support.ROOT / "config.yaml", "digits", variant)
    protocols(config, ["quirk"], as_json=True)
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["preset"], told["values"]["temperature"]["run"], told["evaluated"]) == ("soft-d3hr", 4, False)
    with pytest.raises(ConfigError, match=r"no protocol named 'glda'; did you mean 'glad'"):
        listing(capsys, "glda")


# ---------------------------------------------------------------- DD-Ranking

PLAIN = {"preset": "hard-adamw", "cutmix": 0.0, "crop_scale": [1.0, 1.0], "jitter": 0.0, "lighting": 0.0, "flip": False}
RANKED: dict[str, Any] = {
    "compare": ["random", "dit", "mgd3"],
    "ipc": [3],
    "evaluation.protocols": ["hard-sgd", "hard-adamw", "plain"],
    "evaluation.repeats": 2,
    "evaluation.settings": {"plain": PLAIN},
    "evaluation.dd_ranking": {"hard": "hard-sgd", "own": "hard-adamw", "plain": "plain", "real": {"convnet": 90.0}},
}
TOP1 = {
    "random": {"hard-sgd": 40.0, "hard-adamw": 42.0, "plain": 30.0},
    "dit": {"hard-sgd": 45.0, "hard-adamw": 50.0, "plain": 29.0},
    "mgd3": {"hard-sgd": 50.0, "hard-adamw": 56.0, "plain": 40.0},
}


def test_scores_of_a_run(plan_site: Callable[..., support.Site], capsys: pytest.CaptureFixture[str]) -> None:
    recipes = Recipes(plan_site().config(RANKED))
    with pytest.raises(DataError, match="random IPC 3, hard-sgd: not evaluated yet"):
        ranked(recipes)
    for method, by_protocol in TOP1.items():
        for training in recipes.trainings(method, 3):
            best = by_protocol[training.protocol] + (1 if training.repeat else -1)  # whose mean counts
            path = recipes.training_path(training)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"top1_best": best, "top1_last": best - 10}))
    first, second = ranked(recipes)
    assert (first.method, second.method) == ("mgd3", "dit"), "best first, without the random sets"
    lrs = label_robust_score(real_hard=0.9, synthetic_hard=0.5, synthetic=0.56, random=0.42)
    ars = augmentation_robust_score(
        synthetic_augmented=0.56, random_augmented=0.42, synthetic_plain=0.40, random_plain=0.30
    )
    assert (first.lrs, first.ars) == (pytest.approx(lrs), pytest.approx(ars))
    worse = label_robust_score(real_hard=0.9, synthetic_hard=0.4, synthetic=0.46, random=0.32)
    assert ranked(recipes, last=True)[0].lrs == pytest.approx(worse)
    dd_ranking(recipes, last=False, as_json=True)
    assert json.loads(capsys.readouterr().out)[0]["method"] == "mgd3"


def test_mistakes_in_the_ranking_are_named(plan_site: Callable[..., support.Site]) -> None:
    site = plan_site()
    with pytest.raises(ConfigError, match=r"evaluation\.dd_ranking: not set"):
        ranked(Recipes(site.config({"ipc": [3]})))
    with pytest.raises(ConfigError, match="dd_ranking names 'plain', which is none of protocols: hard-sgd, hard-adamw"):
        site.config(RANKED | {"evaluation.protocols": ["hard-sgd", "hard-adamw"]})
    with pytest.raises(ConfigError, match="'random' is none of compare: dit"):
        site.config(RANKED | {"compare": ["dit"]})
