"""Coresets through the stages: which images are chosen, and what collages of them look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
from support import Site, run_jobs

from workflow_scripts.data.preprocess import load_squares
from workflow_scripts.errors import DataError
from workflow_scripts.recipes import Recipes, SampleSet

NEW: dict[str, Any] = {
    "methods.kcenter": {"kind": "coreset", "select": "kcenter"},
    "methods.crops": {"kind": "coreset", "select": "crops"},
}


def test_a_crop_is_a_collage_of_four_images_of_the_class(site: Site) -> None:
    overrides = NEW | {"compare": ["crops"], "ipc": [2], "seeds": [0, 1]}
    run_jobs(site.config(overrides), ["encode", "sample"])
    recipes = Recipes(site.config(overrides))
    config, chosen = recipes.config, []
    for name in recipes.classes:
        for seed in (0, 1):
            result = recipes.samples(name, SampleSet("crops", 2, seed))
            made = recipes.store.read(result).arrays
            keys = recipes.store.record(result)["chosen"]
            chosen.append(tuple(keys))
            entries = {entry.key: entry for entry in recipes.catalog.entries(name, "train")}
            options: dict[str, Any] = {"resolution": config.dataset.resolution, "crop": config.dataset.crop}
            wanted = [entries[key] for key in keys]
            ((_, real),) = load_squares(recipes.catalog.source, name, wanted, workers=1, batch=8, **options)
            side = real.shape[1]
            halves = real.reshape(8, side // 2, 2, side // 2, 2, 3).mean((2, 4))
            laid = (
                halves.reshape(2, 2, 2, side // 2, side // 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, side, side, 3)
            )
            assert made["images"].dtype == np.uint8
            np.testing.assert_allclose(made["images"], laid, atol=0.51)
            assert len(set(keys)) == 8, "no image is used twice"
            latents = recipes.store.read(recipes.latents(name)).arrays["mean"]
            assert made["latents"].shape == (2, *latents.shape[1:])
    assert len(set(chosen)) == len(chosen), "classes and seeds choose differently"


def test_a_class_too_small_for_collages_is_refused_before_anything_runs(site: Site) -> None:
    recipes = Recipes(site.config(NEW | {"compare": ["crops"], "ipc": [1, 3]}))
    with pytest.raises(DataError, match="has 8 training images, fewer than the 12 that crops needs at IPC 3"):
        recipes.check()
    Recipes(site.config(NEW | {"compare": ["crops"], "ipc": [1, 2]})).check()


def test_a_class_with_too_few_readable_images_for_collages_is_named(site: Site) -> None:
    overrides = NEW | {"compare": ["crops"], "ipc": [2], "seeds": [0], "dataset.on_bad_image": "skip"}
    next(Path(site.train / "bee").iterdir()).write_text("no image")
    run_jobs(site.config(overrides), ["encode"])
    with pytest.raises(DataError, match="class bee: 7 readable images, fewer than the 8 that IPC 2 takes"):
        run_jobs(site.config(overrides), ["sample"])


def test_kcenter_is_made_once_for_all_seeds(site: Site) -> None:
    overrides = NEW | {"compare": ["kcenter"], "ipc": [2], "seeds": [0, 1, 2]}
    done = run_jobs(site.config(overrides), ["encode", "sample"])
    assert support.tally(done.places)["sample"] == dict.fromkeys(support.CLASSES, 1)
