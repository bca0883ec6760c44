"""How fast a device does each kind of work: what ``stillhouse bench`` measured there, or else an estimate with a margin.

Measurements lie in ``results/cache/bench``, one file per device, denoiser and dtype; what is measured of one shape of network
holds for every run with that shape. Needs no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from workflow_scripts.config import Compute, DiffusionMethod, GaussianStart, NoiseStart, PrototypeStart, RunConfig
from workflow_scripts.diffusion.schedule import spaced_timesteps
from workflow_scripts.evaluation.protocols import Recipe
from workflow_scripts.operations.flops import (
    INCEPTION_GMACS,
    Config,
    coder_name,
    decoder_flop,
    dit_flop,
    encoder_flop,
    network_name,
    student_flop,
)
from workflow_scripts.store.digests import digest
from workflow_scripts.store.files import write_atomically

Basis = Literal["measured", "scaled", "estimated"]
FAMILY = {
    "read": "read",
    "encode": "vae",
    "decode": "vae",
    "denoise": "denoise",
    "invert": "denoise",
    "sample": "denoise",
    "train": "student",
    "test": "student",
    "start": "start",
    "learn-encode": "vae",
    "learn-decode": "vae",
    "learn-denoise": "denoise",
    "learn-train": "student",
}
"""Kinds of work that reach about the same FLOP/s; those that begin with ``learn`` are not measured, but scaled from others."""

MATMUL: Mapping[str, Mapping[str, float]] = {
    "h100": {"bfloat16": 794e12, "float32": 60e12},
    "h200": {"bfloat16": 794e12, "float32": 60e12},
    "a100": {"bfloat16": 271e12, "float32": 18e12},
}
"""FLOP/s of large matrix products on SXM cards: bfloat16 as others measured it, float32 nine tenths of the data sheet."""

SCALED_MARGIN = 1.25
"""Times longer than another measurement of the same family says."""
READ_PER_THREAD = 200.0
"""Photographs of 500 x 375 pixels decoded and cropped per second and thread; small files take half as long."""


PYTHON = "python"
"""What a job without a denoiser starts."""


@dataclass(frozen=True)
class Task:
    """A kind of work that can be measured.

    Attributes:
        kind: a key of ``FAMILY``.
        what: what of the configuration its speed depends on, as in the store of measurements.
        flop: operations per unit, None if nobody knows; the unit is an image, of ``start`` a job.
    """

    kind: str
    what: str
    flop: float | None = None

    @property
    def key(self) -> str:
        """Its name in the store of measurements."""
        return f"{self.kind} {self.what}"

    def learning(self) -> Task:
        """Return the same work as a part of training, where passes backwards are counted as so many forwards."""
        return replace(self, kind=f"learn-{self.kind}")


@dataclass(frozen=True)
class Tasks:
    """The kinds of work of a run.

    Attributes:
        denoiser, vae: arguments of the networks in diffusers.
        timesteps: of the training schedule.
        evaluation_flop: operations of one network evaluation where its arguments do not tell.
    """

    config: RunConfig
    denoiser: Config
    vae: Config
    timesteps: int
    evaluation_flop: float | None = None

    @property
    def network(self) -> str:
        """The denoiser and how it computes."""
        compute = self.config.compute
        return f"{network_name(self.denoiser)} {compute.dtype}{' compiled' if compute.compile else ''}"

    @property
    def per_evaluation(self) -> float | None:
        """Operations of one forward pass of the denoiser for one latent."""
        return dit_flop(self.denoiser) or self.evaluation_flop

    def start(self, *, denoises: bool) -> Task:
        """Begin a job: start Python, and if it denoises load the denoiser and compile it."""
        return Task("start", self.network if denoises else PYTHON)

    def read(self, resolution: int) -> Task:
        """Read and crop a real image."""
        dataset = self.config.dataset
        kind = "files" if dataset.on_disk else dataset.source
        return Task("read", f"{kind} {resolution} px {self.config.compute.workers} threads")

    def encode(self) -> Task:
        """Encode an image."""
        side = self.config.dataset.resolution
        return Task("encode", self._coder(side), encoder_flop(self.vae, side))

    def decode(self) -> Task:
        """Decode an image."""
        side = self.config.dataset.resolution
        return Task("decode", self._coder(side), decoder_flop(self.vae, side))

    def _coder(self, side: int) -> str:
        return f"{coder_name(self.vae)} {side} px {self.config.compute.dtype}"

    def denoise(self) -> Task:
        """Evaluate the network once for a latent."""
        return Task("denoise", self.network, self.per_evaluation)

    def invert(self, recipe: Mapping[str, Any]) -> Task:
        """Invert a latent, as the recipe of an ``invert`` result says."""
        settings = {key: recipe[key] for key in ("steps", "spacing", "cfg_scale", "timestep", "inversion")}
        steps = _step_of(self.timesteps, recipe["steps"], recipe["spacing"], recipe["timestep"])
        inversion = recipe["inversion"]
        evaluations = steps * (1 if recipe["cfg_scale"] == 1 else 2) * (1 + inversion["refinements"])
        return self._denoising("invert", settings, 0 if inversion["map"] == "noise" else evaluations)

    def sample(self, method: DiffusionMethod) -> Task:
        """Sample an image without decoding it."""
        settings = method.model_dump(mode="json", exclude={"summary", "paper"})
        return self._denoising("sample", settings, self.evaluations(method))

    def _denoising(self, kind: str, settings: Mapping[str, Any], evaluations: int) -> Task:
        flop = self.per_evaluation
        return Task(kind, f"{digest(settings)[:8]} {self.network}", None if flop is None else flop * evaluations)

    def evaluations(self, method: DiffusionMethod) -> int:
        """Return how often a method evaluates the network for an image, once more each time for guidance."""
        sampler, start = method.sampler, method.start
        first = sampler.steps - 1
        if isinstance(start, GaussianStart | PrototypeStart):
            first = _step_of(self.timesteps, sampler.steps, sampler.spacing, start.timestep)
            first += isinstance(start, GaussianStart) and start.legacy_offset
        else:
            assert isinstance(start, NoiseStart)
        return (first + (sampler.kind == "ddpm")) * (1 if sampler.cfg_scale == 1 else 2)

    def train(self, student: Recipe) -> Task:
        """Train a student on an image once, in a full batch, augmentation included."""
        what, flop = self._student(student)
        return Task("train", f"{what} batch {student.batch_size}", 3 * flop)

    def test(self, student: Recipe) -> Task:
        """Score a student on an image."""
        what, flop = self._student(student)
        return Task("test", what, flop)

    def inception(self) -> Task:
        """Compute Inception's features of an image."""
        return Task("test", "inception 299 px", 2e9 * INCEPTION_GMACS)

    def _student(self, student: Recipe) -> tuple[str, float]:
        name, width, side = student.architecture, student.width, student.resolution
        return f"{name} {width or 'full'} {side} px", student_flop(name, width, side, student.classes)


def _step_of(timesteps: int, steps: int, spacing: Any, timestep: int) -> int:
    return int(np.abs(spaced_timesteps(timesteps, steps, spacing) - timestep).argmin())


# ---------------------------------------------------------------- what was measured


@dataclass(frozen=True)
class Measurement:
    """The speed of one task.

    Attributes:
        title: for people.
        per_second: units per second.
        batch: units at once.
        flop: operations per unit, as counted while it ran.
        memory: peak of the device's memory in bytes.
    """

    title: str
    per_second: float
    batch: int
    flop: float | None = None
    memory: int | None = None

    @property
    def flop_per_second(self) -> float | None:
        """Operations per second that were reached."""
        return None if not self.flop else self.flop * self.per_second


@dataclass(frozen=True)
class Bench:
    """What ``stillhouse bench`` found.

    Attributes:
        device: its name.
        kind: ``cpu`` or ``cuda``.
        network: the denoiser and how it computed.
        matmul: FLOP/s of a large matrix product, by dtype.
        rows: measurements by the key of their task.
        quick: it was a short one.
    """

    device: str
    kind: str
    network: str
    created: str
    matmul: dict[str, float]
    rows: dict[str, Measurement] = field(default_factory=dict)
    quick: bool = False

    def write(self, results: Path) -> Path:
        """Store it for ``plan``, in place of an earlier one of this device and network; return where."""
        path = _folder(results) / f"{_slug(self.device)}.{_slug(self.network)}.json"
        write_atomically(path, json.dumps(asdict(self), indent=1))
        return path


def read_benches(results: Path) -> list[Bench]:
    """Return everything that was measured, the oldest first; what cannot be read counts as not measured."""
    found = []
    for path in _folder(results).glob("*.json"):
        try:
            content = json.loads(path.read_text())
            rows = {key: Measurement(**row) for key, row in content.pop("rows").items()}
            found.append(Bench(**content, rows=rows))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
    return sorted(found, key=lambda bench: bench.created)


def _folder(results: Path) -> Path:
    return results / "cache" / "bench"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# ---------------------------------------------------------------- how long something takes


@dataclass(frozen=True)
class Speeds:
    """How fast one device is.

    Attributes:
        device: its name.
        on_gpu: it is one.
        source: where the figures are from, for people.
        matmul: FLOP/s of a large matrix product by dtype; empty if nothing is known of the device.
        compute: how the run computes.
        rows: what was measured, by the key of its task.
    """

    device: str
    on_gpu: bool
    source: str
    matmul: Mapping[str, float]
    compute: Compute
    rows: Mapping[str, Measurement] = field(default_factory=dict)

    def seconds(self, task: Task, amount: float) -> tuple[float, Basis] | None:
        """Return how long an amount of a task takes, and how that is known; None if it is not."""
        if amount == 0 or task.flop == 0:
            return 0.0, "measured"
        if task.key in self.rows:
            return amount / self.rows[task.key].per_second, "measured"
        if task.kind == "read":
            return amount / (READ_PER_THREAD * self.compute.workers), "estimated"
        if task.kind == "start":
            loads = task.what != PYTHON and self.on_gpu
            return amount * (15.0 + loads * (15.0 + 90.0 * self.compute.compile)), "estimated"
        if task.flop is None:
            return None
        alike = [rate for key, row in self.rows.items() if _alike(key, task) and (rate := row.flop_per_second)]
        if alike:
            return amount * task.flop * SCALED_MARGIN / min(alike), "scaled"
        rate = self.matmul.get("bfloat16" if FAMILY[task.kind] == "student" and self.on_gpu else self.compute.dtype)
        return None if rate is None else (amount * task.flop * self._margin(task.kind) / rate, "estimated")

    def _margin(self, kind: str) -> float:
        """Return how many times longer than its matrix products alone a task takes, cautiously.

        A compiled DiT in bfloat16 is taken to reach 32 % of an H100's peak, a student 3 %: in float32 with instance norms and
        batches of 64 to 128 images it is bound by memory and launches.
        """
        if not self.on_gpu:
            return 3.0
        family = FAMILY[kind]
        if family == "student":
            return 25.0
        if self.compute.dtype == "float32":
            return 1.5
        return {"vae": 3.0, "denoise": 2.5 if self.compute.compile else 5.0}[family]


def _alike(key: str, task: Task) -> bool:
    """Say whether a measurement says something about a task: the same family, and of what has a dtype the same."""
    kind, _, what = key.partition(" ")
    dtypes = {word for word in what.split() if word in ("float32", "bfloat16", "compiled")}
    return FAMILY.get(kind) == FAMILY[task.kind] and dtypes == {
        word for word in task.what.split() if word in ("float32", "bfloat16", "compiled")
    }


def choose_speeds(config: RunConfig, network: str) -> Speeds:
    """Return the speeds of the device that a run is planned for.

    That is ``compute.gpu``, or the device measured last, or an H100. What was measured on it counts, the newest first. Of a CPU
    nothing counts for a run of another ``network`` than was measured there, unless the run is to use a CPU.
    """
    compute, wanted = config.compute, config.compute.gpu
    benches = [b for b in read_benches(config.results) if compute.device in ("auto", b.kind)]
    if compute.device == "auto":
        benches = [bench for bench in benches if bench.kind == "cuda" or bench.network == network]
    if wanted is not None:
        benches = [bench for bench in benches if _slug(wanted) in _slug(bench.device)]
    if benches:
        last = benches[-1]
        own = [bench for bench in benches if bench.device == last.device]
        rows = {key: row for bench in own for key, row in bench.rows.items()}
        matmul = {dtype: rate for bench in own for dtype, rate in bench.matmul.items()}
        quick = ", quickly" if any(bench.quick for bench in own) else ""
        source = f"measured by stillhouse bench{quick}, last on {last.created[:10]}"
        return Speeds(last.device, last.kind == "cuda", source, matmul, compute, rows)
    if compute.device == "cpu":
        return Speeds("this CPU", False, "nothing is known of it: stillhouse bench measures it", {}, compute)
    name = wanted or "h100"
    known = next((rates for gpu, rates in MATMUL.items() if gpu in _slug(name)), {})
    source = "estimated with a margin, nothing measured; stillhouse bench on one measures it"
    if not known:
        source = f"nothing is known of it: run stillhouse bench on one, or name {', '.join(MATMUL)}"
    return Speeds(name.upper() if known else name, True, source, known, compute)


def evaluation_flop(benches: list[Bench], network: str) -> float | None:
    """Return the operations per evaluation that were counted for a denoiser whose arguments do not tell them."""
    rows = [bench.rows[key] for bench in benches if (key := f"denoise {network}") in bench.rows]
    return rows[-1].flop if rows else None
