"""Export a method's synthetic images as data sets: ``CLASS/0000.png`` in one folder per IPC and seed, and a dataset.json."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from workflow_scripts.recipes import Recipes, SampleSet
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.worker import progress
from workflow_scripts.store.files import TEMPORARY, explain_full_disk, sync_directory, write_atomically

CARD = "dataset.json"


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Export one method."""
    sets = recipes.sets(shard)
    missing = [wanted for wanted in sets if not (recipes.set_directory(wanted) / CARD).exists()]
    for wanted in progress(missing, len(missing), f"export {shard}") if missing else ():
        export_set(recipes, wanted)
    return {
        "sets": [
            {
                "ipc": s.ipc,
                "seed": s.seed,
                "folder": f"datasets/{recipes.set_directory(s).name}",
                "digest": recipes.set_digest(s),
            }
            for s in sets
        ]
    }


def export_set(recipes: Recipes, wanted: SampleSet) -> None:
    """Write a set beside its place and rename it into place when whole."""
    final = recipes.set_directory(wanted)
    temporary = final.parent / f"{TEMPORARY}{final.name}.{uuid.uuid4().hex}"
    card = {
        "method": wanted.method,
        "ipc": wanted.ipc,
        "seed": wanted.seed,
        "digest": recipes.set_digest(wanted),
        "classes": recipes.classes,
        "results": {name: recipes.samples(name, wanted).digest for name in recipes.classes},
    }
    with explain_full_disk(final), ThreadPoolExecutor(recipes.config.compute.workers) as pool:
        try:
            for name in recipes.classes:
                images = recipes.store.read(recipes.samples(name, wanted), "images").arrays["images"]
                folder = temporary / name
                folder.mkdir(parents=True)
                list(pool.map(_write_png, images, [folder / f"{index:04d}.png" for index in range(len(images))]))
                sync_directory(folder)
            card["checksums"] = {name: class_checksum(temporary / name) for name in recipes.classes}
            write_atomically(temporary / CARD, json.dumps(card, indent=1))
            _replace(temporary, final)
            sync_directory(final.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def class_checksum(folder: Path) -> str:
    """Return the SHA-256 over the names and bytes of a class's images."""
    sha256 = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        sha256.update(path.name.encode())
        sha256.update(path.read_bytes())
    return sha256.hexdigest()


def _write_png(pixels: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        file.flush()
        os.fsync(file.fileno())


def _replace(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError:
        if not (final / CARD).exists():
            raise
        shutil.rmtree(temporary)


if __name__ == "__main__":
    stage_main("export", __doc__, work, "a method's name")
