"""The runs on ImageNet plan as they are, given only where the images and the weights lie."""

import json
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT, fake_backbone
from workflow_scripts.config import load
from workflow_scripts.data.imagenet import subset_classes, wnids
from workflow_scripts.recipes import Recipes

RUNS = {
    name: run
    for name, run in yaml.safe_load((ROOT / "config.yaml").read_text())["runs"].items()
    if run.get("dataset", {}).get("subset")
}


def _member(name: str) -> bytes:
    header = tarfile.TarInfo(f"{name}.JPEG")
    header.size = 1
    return header.tobuf() + b"x".ljust(tarfile.BLOCKSIZE, b"\0")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training tars with as many members as the largest IPC needs, and a test image per class; planning decodes none."""
    folder = tmp_path_factory.mktemp("imagenet")
    (folder / "train").mkdir()
    for wnid in wnids():
        members = b"".join(_member(f"{wnid}_{index}") for index in range(50))
        (folder / "train" / f"{wnid}.tar").write_bytes(members + bytes(2 * tarfile.BLOCKSIZE))
        (folder / "val" / wnid).mkdir(parents=True)
        (folder / "val" / wnid / "image.JPEG").write_bytes(b"x")
    fake_backbone(folder / "dit", wnids())
    for part, config in {
        "transformer": {"sample_size": 32, "in_channels": 4, "num_embeds_ada_norm": 1000},
        "vae": {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]},
    }.items():
        (folder / "dit" / part / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_imagenet_plans_as_it_is(name: str, imagenet: Path, tmp_path: Path) -> None:
    places = [f"dataset.root={imagenet}/train", f"dataset.test_root={imagenet}/val", f"backbone.path={imagenet}/dit"]
    config = load(ROOT / "config.yaml", name, [*places, f"results={tmp_path}"])
    recipes = Recipes(config)
    recipes.check()

    assert recipes.classes == list(subset_classes(RUNS[name]["dataset"]["subset"]))
    stages = {job.stage for job in recipes.jobs()}
    assert stages >= {"encode", "cluster", "invert", "sample", "export", "evaluate", "report"}
