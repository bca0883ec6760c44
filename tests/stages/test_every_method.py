"""Methods beyond those of the tiny run go from images to a report by configuration alone, combinations included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import support
from support import Site, run_jobs

from workflow_scripts.errors import ConfigError, DataError
from workflow_scripts.recipes import Recipes, SampleSet

TRANSPORT = {"term": "transport", "window": [3, 8], "targets": 4, "scale": 5.0}
OVERRIDES: dict[str, Any] = {
    "compare": ["dmgd", "dmgd-paper", "dmgd-norm", "d4m", "blend"],
    "ipc": [1, 3],
    "seeds": [0],
    "methods.dmgd.guidance": [TRANSPORT],
    "methods.dmgd-paper.guidance": [TRANSPORT | {"differentiate_plan": True}],
    "methods.dmgd-norm.guidance": [TRANSPORT | {"unit_gradient": True, "log_domain": True, "matching": "synchronous"}],
    "methods.blend": {
        "kind": "diffusion",
        "start": {"kind": "gaussian", "timestep": 600},
        "prototypes": {"kind": "kmeans"},
        "labels": {"kind": "soft", "noise": 0.2, "other": 0.2},
        "guidance": [{"term": "tangent", "scale": 0.2, "stop": 2, "neighbours": 4}, TRANSPORT],
        "sampler": {"kind": "ddim", "spacing": "leading", "cfg_channels": 4},
    },
}


def test_methods_and_a_combination_run_from_configuration_alone(site: Site) -> None:
    config = site.config(OVERRIDES)
    done = run_jobs(config)
    recipes = Recipes(config)
    pictures = {}
    for method in config.compare:
        for name in recipes.classes:
            for ipc in config.ipc:
                images = recipes.store.read(recipes.samples(name, SampleSet(method, ipc, 0)), "images").arrays["images"]
                assert images.shape == (ipc, 16, 16, 3)
                pictures[method, name, ipc] = images
    for method in ("dmgd", "dmgd-norm", "blend"):
        assert not np.array_equal(pictures[method, "bee", 3], pictures["dmgd-paper", "bee", 3])
    assert len(done.scores) == len(config.compare) * len(config.ipc)
    assert not run_jobs(config).places


def test_targets_are_shared_and_prototypes_are_not(plan_site: Any) -> None:
    """One k-means serves every IPC as targets of transport, while prototypes are as many as images."""
    recipes = Recipes(plan_site().config(OVERRIDES))
    one, three = (recipes.clusterings("bee", "blend", ipc) for ipc in (1, 3))
    assert one["targets"].digest == three["targets"].digest == recipes.clusterings("bee", "dmgd", 1)["targets"].digest
    assert one["prototypes"].digest != three["prototypes"].digest
    assert set(recipes.clusterings("bee", "d4m", 3)) == {"prototypes"}
    assert recipes.clusterings("bee", "dit", 3) == {}


def test_other_classes_count_only_where_they_are_mixed_in(plan_site: Any) -> None:
    """Leaving a class out changes the results that draw from the run's labels, and no others."""

    fewer = {"dataset.classes": list(support.CLASSES[:2])}
    whole, part = (Recipes(plan_site(name=name).config(OVERRIDES | more)) for name, more in (("w", {}), ("p", fewer)))
    for method, changes in (("blend", True), ("dmgd", True), ("d4m", False)):
        wanted = SampleSet(method, 3, 0)
        recipes = [plan.samples("bee", wanted).recipe for plan in (whole, part)]
        assert (recipes[0].get("label_pool") != recipes[1].get("label_pool")) == changes
    assert (len(whole.label_pool("dmgd")), len(part.label_pool("dmgd")), whole.label_pool("d4m")) == (3, 2, [])
    pool = {"methods.dmgd.labels": {"kind": "soft", "pool": "backbone"}}
    known = Recipes(plan_site(name="pool").config(OVERRIDES | fewer | pool))
    assert known.label_pool("dmgd") == sorted(known.backbone.labels.values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"methods.d4m.start.timestep": 701}, "nearest is 700"),
        ({"methods.dmgd.guidance": [TRANSPORT | {"targets": 9}]}, "fewer than the 9 that dmgd needs"),
        ({"methods.dmgd.guidance": [TRANSPORT | {"window": [9, 3]}]}, "the lower step comes first"),
        ({"methods.dmgd.guidance": [TRANSPORT, TRANSPORT]}, "one transport term at most"),
        ({"methods.d4m.prototypes": None}, "start noises prototypes: name them"),
        ({"methods.dmgd.prototypes": {"kind": "kmeans"}}, "neither start nor a guidance term uses them"),
        ({"methods.dmgd.labels": {"kind": "soft", "explore_above": 400}}, "must be above refine_below"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    overrides: dict[str, Any], message: str, plan_site: Any
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        Recipes(plan_site().config(OVERRIDES | overrides)).check()
