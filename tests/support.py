"""What the tests of the spine share: made-up images, a tiny backbone, configurations, and ways to run stages.

Fixtures that wrap these are in ``conftest.py``.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from workflow_scripts.config import RunConfig, merge, resolve
from workflow_scripts.recipes import CLASS_STAGES, Job, Recipes
from workflow_scripts.store.files import TEMPORARY

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("ant", "bee", "cat")
WIDE = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")
COUNT = 8
METHODS = ("random", "herding", "kmeans", "dit", "mgd3", "manifoldgd", "d3hr")
BACKBONE_FILES = (
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
)


# ---------------------------------------------------------------- images


def draw(label: int, index: int, side: int = 20) -> Image.Image:
    """A picture with a class's colour and slant, and an image's own noise."""
    random = np.random.default_rng([label, index])
    y, x = np.mgrid[:side, : side + index % 3] / side
    wave = np.sin(6 * (np.cos(label) * x + np.sin(label) * y) + index)[..., None]
    colour = 128 + 90 * np.sin(label + np.arange(3) * 2.1)
    return Image.fromarray(np.clip(colour + 40 * wave + random.normal(0, 12, (*x.shape, 3)), 0, 255).astype(np.uint8))


def make_folder(root: Path, classes: Iterable[str], count: int, offset: int = 0) -> Path:
    """``root/class/*``: PNG and JPEG files, their suffixes in varied case."""
    suffixes = (".png", ".jpg", ".PNG", ".JPEG")
    for name in classes:
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(count):
            picture = draw(WIDE.index(name), index + offset)
            picture.save(folder / f"{index:03d}{suffixes[index % 4]}", quality=95)
    return root


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- backbones


def make_backbone(path: Path, classes: Iterable[str] = WIDE) -> Path:
    """A DiT of one layer and an autoencoder to 4x4 latents of 16 pixels, with random weights, in diffusers format."""
    from workflow_scripts.operations.rehearse import random_backbone

    pictures = np.stack([np.asarray(draw(label, 0).resize((16, 16))) for label in range(len(WIDE))])
    random_backbone(path, list(classes), pictures)
    return path


def fake_backbone(path: Path, classes: Iterable[str] = WIDE) -> Path:
    """Files that a planner takes for a backbone."""
    for name in BACKBONE_FILES:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps({"file": name}))
    (path / "labels.json").write_text(json.dumps(list(classes)))
    return path


# ---------------------------------------------------------------- configurations


def nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    document: dict[str, Any] = {}
    for key, value in overrides.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        document = merge(document, value)
    return document


def tiny_run(train: Path, test: Path, backbone: Path) -> dict[str, Any]:
    """The run ``tiny``, to be laid over the shipped defaults: every method, in seconds."""
    mode = {"scale": 0.1, "stop": 4}
    return {
        "title": "Tiny",
        "shards": 1,
        "seeds": [0, 1],
        "ipc": [1, 3],
        "compare": list(METHODS),
        "dataset": {"source": "imagefolder", "root": str(train), "test_root": str(test), "resolution": 16},
        "backbone": {"path": str(backbone)},
        "cluster": {"max_leaves": 4, "split_restarts": 2},
        "sampler": {"steps": 10, "cfg_scale": 1.5},
        "methods": {
            "mgd3": {"guidance": [{"term": "mode", **mode}]},
            "manifoldgd": {
                "prototypes": {"kind": "multiscale", "start_depth": 1},
                "guidance": [{"term": "tangent", **mode, "neighbours": 4}],
            },
        },
        "evaluation": {
            "architectures": [{"name": "convnet", "width": 4}],
            "resolution": 16,
            "epochs": 2,
            "evaluations": 2,
            "trainings_per_job": 100,
        },
        "compute": {"device": "cpu", "workers": 2},
        "report": {"sheet_images": 2, "figure_files": False},
    }


def document(run: Mapping[str, Any], results: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The shipped configuration with the run ``tiny`` added and chosen."""
    shipped = yaml.safe_load((ROOT / "config.yaml").read_text())
    chosen = {"run": "tiny", "results": str(results), "runs": {"tiny": dict(run)}}
    return merge(merge(shipped, chosen), nested(overrides or {}))


@dataclass(frozen=True)
class Site:
    """A place with images, a backbone and results, and the configurations of runs there."""

    train: Path
    test: Path
    backbone: Path
    results: Path

    def config(self, overrides: Mapping[str, Any] | None = None) -> RunConfig:
        """The tiny run, with keys such as ``"methods.mgd3.sampler.steps"`` overridden."""
        return resolve(document(tiny_run(self.train, self.test, self.backbone), self.results, overrides))

    def resolved(self, overrides: Mapping[str, Any] | None = None) -> Path:
        """The same as a file for ``--resolved``."""
        config = self.config(overrides)
        path = self.results.parent / f"resolved-{abs(hash(config.canonical()))}.json"
        path.write_text(config.canonical())
        return path


# ---------------------------------------------------------------- what is in a store


def stored(results: Path) -> dict[str, tuple[int, int]]:
    """Every class-level result by its place, with what identifies its files on disk (inode and mtime of the record)."""
    found = {}
    for record in (results / "store").glob("*.zarr/*/*/zarr.json"):
        if not record.parent.name.startswith(TEMPORARY):
            stat = record.stat()
            found[str(record.parent.relative_to(results / "store"))] = (stat.st_ino, stat.st_mtime_ns)
    return found


def checksums(results: Path) -> dict[str, dict[str, str]]:
    """The checksums in the record of every result, by its place."""
    records = {place: results / "store" / place / "zarr.json" for place in stored(results)}
    return {place: json.loads(path.read_text())["attributes"]["checksums"] for place, path in records.items()}


def same_content(results: Path, other: Path, places: Iterable[str]) -> None:
    """Compare results in two stores: bit by bit, but sampled images to rounding, as their batches may have differed."""
    for place in places:
        left, right = (
            json.loads((root / "store" / place / "zarr.json").read_text())["attributes"] for root in (results, other)
        )
        assert left["digest"] == right["digest"]
        assert left["checksums"].keys() == right["checksums"].keys()
        for name, checksum in left["checksums"].items():
            if right["checksums"][name] != checksum:
                assert place.startswith("sample.zarr/"), f"{place}/{name} differs"
                one, two = (stored_array(root, place, name).astype(np.float64) for root in (results, other))
                np.testing.assert_allclose(
                    one, two, rtol=1e-5, atol=1 if name == "images" else 1e-5, err_msg=f"{place}/{name}"
                )


def stored_array(results: Path, place: str, name: str) -> np.ndarray:
    """One array of a result, read by Zarr itself."""
    import zarr
    from zarr.storage import ZipStore

    with ZipStore(results / "store" / place / "arrays.zip", read_only=True) as packed:
        return np.asarray(zarr.open_array(packed, path=name, mode="r")[...])


def leftovers(results: Path) -> list[Path]:
    """Temporary files and folders anywhere below a directory."""
    return sorted(path for path in results.rglob(f"{TEMPORARY}*"))


def tally(places: Iterable[str]) -> dict[str, dict[str, int]]:
    """Count results by stage and class."""
    counts: dict[str, dict[str, int]] = {}
    for place in places:
        stage, name, _ = place.split("/")
        classes = counts.setdefault(stage.removesuffix(".zarr"), {})
        classes[name] = classes.get(name, 0) + 1
    return counts


# ---------------------------------------------------------------- running stages in this process


@dataclass
class Done:
    """What a run did: the jobs that started, and the class-level results and scores that appeared."""

    jobs: list[tuple[str, str]] = field(default_factory=list)
    places: set[str] = field(default_factory=set)
    scores: set[str] = field(default_factory=set)

    def stages(self) -> set[str]:
        """The stages that had a job."""
        return {stage for stage, _ in self.jobs}

    def methods(self) -> set[str]:
        """The methods that were sampled."""
        return {shard.rpartition("-")[0] for stage, shard in self.jobs if stage == "sample"}


def workers() -> dict[str, Callable[[Recipes, str], Mapping[str, Any]]]:
    """The function that does each stage's work."""
    from workflow_scripts import stages

    names = ("fit_backbone", *CLASS_STAGES, "export", "teacher", "relabel", "evaluate", "measure", "report")
    return {name: importlib.import_module(f"{stages.__name__}.{name}").work for name in names}


def run_jobs(config: RunConfig, stages: Iterable[str] | None = None) -> Done:
    """Do every job whose manifest is missing, in order, as Snakemake and ``stage_main`` would."""
    import torch

    from workflow_scripts.stages.common import write_manifest

    torch.set_num_threads(1)
    work = workers()
    before, scores_before = stored(config.results), _scores(config.results)
    done = Done()
    recipes = Recipes(config)
    recipes.check()
    for job in recipes.jobs():
        if (stages is None or job.stage in stages) and not (config.results / job.manifest).exists():
            write_manifest(config.results, job, work[job.stage](recipes, job.shard))
            done.jobs.append((job.stage, job.shard))
    done.places = set(stored(config.results)) - set(before)
    done.scores = _scores(config.results) - scores_before
    assert not leftovers(config.results)
    return done


def class_digests(recipes: Recipes) -> dict[str, str]:
    """The digest of every class-level result of a run, by stage, shard and order."""
    return {
        f"{job.stage}/{job.shard}/{result.class_name}/{number}": result.digest
        for job in recipes.jobs()
        if job.stage in CLASS_STAGES
        for number, result in enumerate(recipes.stage_results(job.stage, job.shard))
    }


def stage_digests(recipes: Recipes, *stages: str) -> set[str]:
    """The digests of a run's results of some stages."""
    return {digest for key, digest in class_digests(recipes).items() if key.split("/")[0] in stages}


def jobs_of(recipes: Recipes, stage: str) -> list[Job]:
    """The jobs of one stage."""
    return [job for job in recipes.jobs() if job.stage == stage]


def _scores(results: Path) -> set[str]:
    return {path.name for path in (results / "store" / "evaluate").glob("*.json")}


# ---------------------------------------------------------------- running stages as programs


@dataclass(frozen=True)
class Ended:
    """How a program ended, and what it said."""

    code: int | None
    stdout: str
    stderr: str


class Programs:
    """Starts ``python -m workflow_scripts.stages.NAME`` from a process that has imported the libraries already.

    Each program is its own process, with its own file descriptors and signals, and starts in a fraction of a second.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._count = 0
        self.context = multiprocessing.get_context("forkserver")
        stages = ("encode", "cluster", "invert", "sample", "export", "evaluate")
        self.context.set_forkserver_preload(
            ["support", "zarr", *(f"workflow_scripts.stages.{name}" for name in stages)]
        )

    def start(self, target: Callable[..., None], *arguments: Any) -> Started:
        """Start a function of a test module in a fresh process."""
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        out.touch()
        err.touch()
        process = self.context.Process(target=_with_output, args=(out, err, target, arguments))
        process.start()
        return Started(process, out, err)

    def call(self, target: Callable[..., None], *arguments: Any) -> Ended:
        """Run a function of a test module in a fresh process to its end."""
        return self.start(target, *arguments).wait()

    def stage(self, name: str, *arguments: Any, **options: Any) -> Started:
        """Start a stage's program; for ``options`` see ``program``."""
        return self.start(program, name, [str(argument) for argument in arguments], options)


@dataclass
class Started:
    """A program on its way."""

    process: Any
    out: Path
    err: Path

    def wait(self, seconds: float = 120) -> Ended:
        """Wait for its end."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.err.read_text()}")
        return Ended(self.process.exitcode, self.out.read_text(), self.err.read_text())

    def kill(self) -> Ended:
        """Kill it as ``kill -9`` does."""
        self.process.kill()
        return self.wait()


def program(name: str, arguments: list[str], options: Mapping[str, Any]) -> None:
    """Be ``python -m workflow_scripts.stages.NAME``.

    Options:
        die_at: number of the file system call (see ``count_writes``) at which to be killed as by ``kill -9``.
        biggest_file: RLIMIT_FSIZE in bytes.
        disk: (path, bytes) of a file system of that size to be mounted there, and seen by this process only.
        listing: where to write what is in that file system at the end.
    """
    import resource

    import torch

    torch.set_num_threads(1)
    if "die_at" in options:
        die_at = options["die_at"]
        count_writes(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == die_at else None)
    if "biggest_file" in options:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["biggest_file"],) * 2)
    if "disk" in options:
        mount_small_disk(*options["disk"])
    sys.argv = [f"{name}.py", *arguments]
    sys.modules.pop(f"workflow_scripts.stages.{name}", None)
    try:
        runpy.run_module(f"workflow_scripts.stages.{name}", run_name="__main__")
    finally:
        if "listing" in options:
            results = Path(options["disk"][0])
            found = {"stored": list(stored(results)), "leftovers": [str(path) for path in leftovers(results)]}
            Path(options["listing"]).write_text(json.dumps(found))


def count_writes(notice: Callable[[int], None]) -> Callable[[], None]:
    """Call ``notice`` with a running number before every step of a commit that touches the disk; return how to stop that."""
    import zarr

    places: list[tuple[Any, str]] = [
        (os, "fsync"),
        (os, "mkdir"),
        (os, "rename"),
        (os, "replace"),
        (zarr, "create_array"),
    ]
    places += [(Path, name) for name in ("write_text", "rename", "replace", "mkdir")]
    number = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal number
            number += 1
            notice(number)
            return original(*arguments, **options)

        return call

    originals = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, original in originals:
        setattr(owner, name, counted(original))

    def stop() -> None:
        for owner, name, original in originals:
            setattr(owner, name, original)

    return stop


NO_MOUNT = 77


def mount_small_disk(path: str, size: int) -> None:
    """Mount a memory file system of ``size`` bytes that this process alone sees; exit with NO_MOUNT where that is forbidden."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, new_user, private = 0x00020000, 0x10000000, 0x00040000 | 0x4000
    if libc.unshare(new_namespace) and libc.unshare(new_namespace | new_user):
        sys.exit(NO_MOUNT)
    libc.mount(b"none", b"/", None, ctypes.c_ulong(private), None)
    if libc.mount(b"tmpfs", path.encode(), b"tmpfs", ctypes.c_ulong(0), f"size={size}".encode()):
        sys.exit(NO_MOUNT)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something to happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.002)


def _with_output(out: Path, err: Path, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno() if stream is not None else -1)
    target(*arguments)
