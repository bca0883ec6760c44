"""A working copy from which runs are sent to a cluster, and what its tests ask about it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import yaml
from lab import Lab, LabUnavailable

from workflow_scripts.config import RunConfig, resolve
from workflow_scripts.recipes import Recipes

CLASSES = support.WIDE[:6]
ONCE = dict.fromkeys(CLASSES, 1)
STAGES = ("encode", "cluster", "invert", "sample")
IN_HAND = "cat"  # third of six
HOOKS = Path(__file__).parent / "hooks"
# One method that needs every stage, its batches one class each so that its images are the same to the last bit.
METHOD = {
    "kind": "diffusion",
    "start": {"kind": "gaussian", "timestep": 600},
    "prototypes": {"kind": "kmeans"},
    "guidance": [{"term": "mode", "scale": 0.1, "stop": 4}],
    "sampler": {"kind": "ddim", "spacing": "leading", "cfg_channels": 4},
}


@dataclass
class Controller:
    """A running ``snakemake`` that sends jobs to the cluster."""

    process: subprocess.Popen[bytes]
    out: Path

    def wait(self, seconds: float = 900) -> int:
        """Wait for its end; return its exit status."""
        return self.process.wait(seconds)

    @property
    def said(self) -> str:
        """What it said so far."""
        return self.out.read_text()

    def submitted(self) -> list[str]:
        """The numbers of the SLURM jobs that it has submitted."""
        return [line.split("SLURM jobid ")[1].split()[0] for line in self.said.splitlines() if "SLURM jobid " in line]


@dataclass
class Place:
    """A working copy of the workflow, its images, and the results that it sends jobs to make."""

    folder: Path
    backbone: Path
    lab: Lab
    undisturbed: Path
    shards: int = 1
    controllers: list[Controller] = field(default_factory=list)

    @property
    def results(self) -> Path:
        """Where results are."""
        return self.folder / "results"

    def recipes(self) -> Recipes:
        """What the run makes."""
        run = configuration(self.folder / "train", self.folder / "test", self.backbone)
        return Recipes(run_config(run | {"shards": self.shards}, self.results))

    def write(self, overrides: Mapping[str, Any]) -> None:
        """Write the configuration, with keys such as ``"compute.device"`` overridden."""
        run = configuration(Path("train"), Path("test"), self.backbone)
        run = support.merge(run, support.nested(overrides))
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump({"run": "tiny", "runs": {"tiny": run}}))

    # ---- running

    def environment(self) -> dict[str, str]:
        """The environment of everything that is started here."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {
            "PATH": path,
            "PYTHONPATH": str(HOOKS),
            "STILLHOUSE_LAB": str(self.folder / "lab"),
            "OMP_NUM_THREADS": "1",
        }
        return os.environ | own | {"HOME": str(self.folder)}

    def start(self, *arguments: str, folder: Path | None = None) -> Controller:
        """Start ``snakemake --workflow-profile slurm_profile``."""
        command = [
            sys.executable,
            "-m",
            "snakemake",
            "--workflow-profile",
            "slurm_profile",
            "--configfile",
            "tiny.yaml",
        ]
        command += ["--slurm-no-account", "--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "5"]
        out = self.folder / f"controller-{len(self.controllers)}.out"
        with out.open("wb") as file:
            process = subprocess.Popen(
                [*command, *arguments],
                cwd=folder or self.folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.controllers.append(Controller(process, out))
        return self.controllers[-1]

    def run(self, *arguments: str) -> Controller:
        """The same to its end."""
        controller = self.start(*arguments)
        controller.wait()
        return controller

    def stillhouse(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the console command."""
        command = [sys.executable, "-m", "workflow_scripts.cli", *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.environment(), capture_output=True, text=True)

    # ---- what the hooks do

    def hold(self, *names: str) -> None:
        """Let classes wait in the worker's hand."""
        for name in names:
            (self.folder / "lab" / "hold" / name).touch()

    def release(self) -> None:
        """Let them go on."""
        for path in (self.folder / "lab" / "hold").iterdir():
            path.unlink()

    def seconds(self, seconds: float) -> None:
        """Let a class take so long."""
        (self.folder / "lab" / "seconds").write_text(str(seconds))

    def began(self, name: str) -> list[Path]:
        """Where workers began with a class."""
        return sorted((self.folder / "lab" / "began").glob(f"{name}.*"))

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 600) -> None:
        """Wait, but not longer than the controllers live.

        Raises:
            AssertionError, TimeoutError: with what the controllers said.
        """

        def met() -> bool:
            alive = any(controller.process.poll() is None for controller in self.controllers)
            if condition():
                return True
            assert alive, self.controllers[-1].said
            return False

        try:
            self.lab.wait(met, what, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.controllers[-1].said}") from None

    # ---- what came of it

    def events(self, event: str, stage: str = "encode") -> list[dict[str, Any]]:
        """What the workers of a stage told."""
        paths = sorted((self.results / "events" / stage).glob("*.jsonl"))
        found = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
        return sorted((one for one in found if one["event"] == event), key=lambda one: float(one["time"]))

    def computed(self, stage: str = "encode") -> Counter[str]:
        """How often each class was computed to its end, over all workers."""
        names = (event["name"].removeprefix("class ") for event in self.events("done", stage))
        return Counter(name.split()[0] for name in names)  # as of "ant IPC 2 seed 0"

    def expect_undisturbed(self, *stages: str) -> None:
        """Expect that results are there, and are the same as in a run on one machine that nothing disturbed."""
        for stage in stages:
            places = {place for place in support.stored(self.undisturbed) if place.startswith(f"{stage}.zarr/")}
            made = {place for place in support.stored(self.results) if place.startswith(f"{stage}.zarr/")}
            assert made == places, stage
            for name in places:
                same_to_the_last_bit(self.results, self.undisturbed, name)
        recipes = self.recipes()
        for stage in stages:
            for shard in recipes.shards_of(stage):
                for result in recipes.stage_results(stage, shard):
                    recipes.store.read(result)
        assert not list((self.results / "store" / "claims").rglob("*.json"))


def same_to_the_last_bit(results: Path, other: Path, place: str) -> None:
    """Expect equal recipes and arrays; the last bit of half precision, or a pixel's grey level, may differ between batches."""
    left, right = (
        json.loads((root / "store" / place / "zarr.json").read_text())["attributes"] for root in (results, other)
    )
    assert left["digest"] == right["digest"]
    assert left["checksums"].keys() == right["checksums"].keys()
    for name, checksum in left["checksums"].items():
        if right["checksums"][name] != checksum:
            arrays = [support.stored_array(root, place, name).astype(np.float64) for root in (results, other)]
            least = 1.0 if name == "images" else 2**-20
            np.testing.assert_allclose(*arrays, rtol=2**-10, atol=least, err_msg=f"{place}/{name}")


def prepare(folder: Path, pictures: Path, backbone: Path, lab: Lab, undisturbed: Path) -> Place:
    """Make a place in an empty folder, in one shard."""
    for name in ("Snakefile", "config.yaml", "rules", "envs", "workflow_scripts", "slurm_profile"):
        (folder / name).symlink_to(support.ROOT / name)
    shutil.copytree(pictures, folder, dirs_exist_ok=True)
    for name in ("hold", "poison", "began"):
        (folder / "lab" / name).mkdir(parents=True)
    made = Place(folder, backbone, lab, undisturbed)
    made.write({})
    made.seconds(0.2)
    return made


def configuration(train: Path, test: Path, backbone: Path) -> dict[str, Any]:
    """The run ``tiny`` of every place."""
    run = support.tiny_run(train, test, backbone)
    compute = {"device": "auto", "workers": 1, "sample_batch": 2}
    return run | {"methods": {"mine": METHOD}, "compare": ["mine"], "ipc": [2], "seeds": [0], "compute": compute}


def run_config(run: dict[str, Any], results: Path) -> RunConfig:
    """The run, laid over the shipped defaults."""
    return resolve(support.document(run, results))


def started(*, accounting: bool) -> Iterator[Lab]:
    """Run a cluster as long as a fixture lives."""
    cluster = Lab(accounting=accounting)
    try:
        cluster.start()
    except LabUnavailable as error:
        if os.environ.get("STILLHOUSE_SLURM") == "required":
            pytest.fail(f"no SLURM here: {error}")
        pytest.skip(f"no SLURM here: {error} (STILLHOUSE_SLURM=required makes this a failure)")
    yield cluster
    cluster.stop()


def begin(place: Place, *arguments: str) -> None:
    """Start a run of ``encode`` and wait until a worker has its third class in hand."""
    place.hold(IN_HAND)
    place.start("--until", "encode", *arguments)
    place.wait_for(lambda: bool(place.began(IN_HAND)), f"{IN_HAND} is in hand")


def resumes(place: Place) -> None:
    """Expect that a disturbed run of ``encode`` ends as if nothing had been."""
    controller = place.controllers[-1]
    place.wait_for(lambda: hurried(place) or controller.process.poll() is not None, "the controller ends", 900)
    assert controller.wait() == 0, controller.said
    place.expect_undisturbed("encode")
    assert place.computed() == ONCE


def hurried(place: Place) -> bool:
    """Let requeued jobs start at once."""
    place.lab.hurry()
    return False
