"""``stillhouse export``: finished sets of a run in the formats that others read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from workflow_scripts.config import Backbone, LeafPrototypes, MultiscalePrototypes, one_of
from workflow_scripts.data.preprocess import Resample
from workflow_scripts.diffusion.checkpoint import OWN
from workflow_scripts.errors import ConfigError, DataError
from workflow_scripts.formats import Format
from workflow_scripts.formats.card import Description
from workflow_scripts.formats.writers import ImageSet, write
from workflow_scripts.recipes import Recipes, SampleSet
from workflow_scripts.stages.worker import progress


def export(
    recipes: Recipes,
    to: Path,
    format: Format,
    *,
    method: str | None = None,
    ipc: int | None = None,
    seed: int | None = None,
    size: int | None = None,
    resample: Resample = "lanczos",
    label_folders: bool = False,
) -> list[Path]:
    """Write one set to ``to``, or, where method, IPC or seed are left open, every set that fits to a place below ``to``.

    Returns:
        where the sets are.

    Raises:
        ConfigError: if the run has no such set.
        DataError: if one is not finished; nothing is written then.
        StoreError: if a place is taken.
    """
    sets = choose(recipes, method, ipc, seed)
    one = None not in (method, ipc, seed)
    unfinished = {wanted: [n for n in recipes.classes if not _there(recipes, wanted, n)] for wanted in sets}
    for wanted, missing in unfinished.items():
        if missing:
            raise DataError(
                f"{wanted.method}, IPC {wanted.ipc}, seed {wanted.seed}: {len(missing)} of {len(recipes.classes)} classes are "
                f"not made yet ({', '.join(missing[:3])}{', ...' if missing[3:] else ''}). Finish the run first: "
                f"snakemake --cores all --config run={recipes.config.run}"
            )
    places = []
    for wanted in sets:
        description = describe(recipes, wanted)
        suffix = ".safetensors" if format == "safetensors" else ""
        place = to if one else to / f"{description.name}{suffix}"

        def read(name: str, wanted: SampleSet = wanted) -> np.ndarray:
            return recipes.store.read(recipes.samples(name, wanted), "images").arrays["images"]

        workers = recipes.config.compute.workers
        write(ImageSet(description, read, size, resample, label_folders, workers, progress), format, place)
        places.append(place)
    return places


def choose(recipes: Recipes, method: str | None, ipc: int | None, seed: int | None) -> list[SampleSet]:
    """Return the run's sets that fit; None fits all."""
    config = recipes.config
    wanted: tuple[tuple[str, Any, Iterable[Any]], ...] = (
        ("method", method, config.compare),
        ("ipc", ipc, config.ipc),
        ("seed", seed, config.seeds),
    )
    for option, value, known in wanted:
        if value is not None and value not in known:
            raise ConfigError(f"--{option} {value}: run {config.run} has none; {one_of(str(value), map(str, known))}")
    return [
        s
        for name in config.compare
        for s in recipes.sets(name)
        if method in (None, s.method) and ipc in (None, s.ipc) and seed in (None, s.seed)
    ]


def describe(recipes: Recipes, wanted: SampleSet) -> Description:
    """Describe a finished set."""
    results = {name: recipes.samples(name, wanted) for name in recipes.classes}
    records = [recipes.store.record(result) for result in results.values()]
    return Description(
        ipc=wanted.ipc,
        seed=wanted.seed,
        digest=recipes.set_digest(wanted),
        results={name: result.digest for name, result in results.items()},
        software=tuple(sorted({f"{name} {v}" for record in records for name, v in record["versions"].items()})),
        **origin(recipes, wanted.method),
    )


def origin(recipes: Recipes, method: str) -> dict[str, Any]:
    """Return what a description says of everything but one set's own images."""
    config, backbone = recipes.config, recipes.backbone
    dataset, chosen = config.dataset, config.methods[method]
    tree = isinstance(getattr(chosen, "prototypes", None), LeafPrototypes | MultiscalePrototypes)
    return {
        "title": config.title or config.run,
        "method": method,
        "summary": chosen.summary,
        "paper": chosen.paper,
        "parameters": chosen.model_dump(mode="json", exclude={"summary", "paper"}),
        "classes": tuple(recipes.classes),
        "resolution": dataset.resolution,
        "backbone": {
            "name": name_of(config.backbone),
            "denoiser": backbone.denoiser,
            "vae": backbone.vae,
            "dtype": config.compute.dtype,
        },
        "licences": {part: TRAINED_HERE if name == OWN else name for part, name in backbone.licences.items()},
        "real_images": {
            "source": f"ImageNet ({dataset.subset})"
            if dataset.subset
            else SOURCES.get(dataset.source, "a folder of images"),
            "images": sum(recipes.catalog.count(name, "train") for name in recipes.classes),
            "resolution": dataset.resolution,
            "crop": dataset.crop,
            "resample": dataset.resample,
            "flip": config.encode.flip,
        },
        "clustering": config.cluster.model_dump(mode="json") if tree else {},
    }


TRAINED_HERE = "trained with Stillhouse"
SOURCES: Mapping[str, str] = {
    "digits": "the digits of scikit-learn",
    "digits-photo": "the digits of scikit-learn over photographs",
    "imagenet": "ImageNet-1K",
}


def name_of(backbone: Backbone) -> str:
    """Return what to call a backbone in public: a repository's id, or the last part of a path."""
    names = []
    for path in filter(None, (backbone.path, backbone.vae)):
        repository = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).exists()
        names.append(path if repository else Path(path).name)
    return " with ".join(names) or "fitted on the real images"


def _there(recipes: Recipes, wanted: SampleSet, name: str) -> bool:
    return recipes.store.exists(recipes.samples(name, wanted))
