"""``stillhouse bench``: how fast this machine encodes, inverts, samples, decodes and trains students for a run.

Each stage's own code is measured, on made-up classes; the weights may be random, as speed hardly depends on them.
"""

from __future__ import annotations

import io
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from workflow_scripts.config import (
    DiffusionMethod,
    FitDiT,
    GaussianStart,
    KMeansPrototypes,
    RunConfig,
    TransportTerm,
    one_of,
)
from workflow_scripts.data.catalog import Catalog
from workflow_scripts.data.preprocess import load_squares, square
from workflow_scripts.diffusion.backbone import Autoencoder, Denoiser
from workflow_scripts.diffusion.checkpoint import Checkpoint, open_checkpoint
from workflow_scripts.diffusion.fit import BETAS, build_dit, build_unet, build_vae, build_vq
from workflow_scripts.diffusion.inversion import invert
from workflow_scripts.diffusion.schedule import Grid, respace
from workflow_scripts.errors import BackboneError, ConfigError, StillhouseError
from workflow_scripts.evaluation.architectures import display_name
from workflow_scripts.evaluation.protocols import Recipe
from workflow_scripts.evaluation.training import train_student
from workflow_scripts.methods.registry import ClassInputs, is_greedy, needs_latents, needs_pool, prepare_rows
from workflow_scripts.operations.cost import sampled_rows
from workflow_scripts.operations.flops import ARCHITECTURES
from workflow_scripts.operations.speeds import Bench, Measurement, Task, Tasks
from workflow_scripts.recipes import Recipes, student_recipe, students_of
from workflow_scripts.stages.memory import Batch
from workflow_scripts.stages.sample import Rows, sample_results
from workflow_scripts.stages.worker import pick_device, progress, quiet_libraries
from workflow_scripts.store.results import Result

REAL = 1300
"""Real images of a made-up class, as ImageNet's have."""
PYTHON_SECONDS = 15.0
"""To start Python and import the libraries, which is not measured."""
PHOTOGRAPH = (500, 375)
TRAINED = 20
"""Batches of an epoch of a measured training."""


def bench(config: RunConfig, *, architecture: str | None, quick: bool, as_json: bool) -> None:
    """Measure, store for ``plan``, and print.

    Args:
        architecture: a name of ``flops.ARCHITECTURES``: measure it with random weights in place of the run's backbone.
        quick: small batches, each measured once.

    Raises:
        StillhouseError: if a batch does not fit into memory, or there is neither a backbone nor an architecture.
    """
    quiet_libraries()
    device = pick_device(config.compute.device)
    found = measure(config, device, architecture, quick)
    path = found.write(config.results)
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        show(found, path)


def show(found: Bench, path: Path) -> None:
    """Print measurements as a table."""
    console = Console(highlight=False)
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in found.matmul.items())
    console.print(f"{found.device}; {found.network}\nLarge matrix product: {rates}")
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("what", "batch", "images/s", "TFLOP/s", "of matrix product", "memory"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for key, row in found.rows.items():
        rate = row.flop_per_second
        reference = found.matmul["float32" if key.startswith(("train", "test")) else found.network.split()[1]]
        table.add_row(
            row.title,
            str(row.batch),
            f"{row.per_second:.3g}" if row.per_second < 100 else f"{row.per_second:,.0f}",
            f"{rate / 1e12:.3g}" if rate else "",
            f"{rate / reference:.0%}" if rate else "",
            f"{row.memory / 2**30:.1f} GiB" if row.memory else "",
        )
    console.print(table)
    console.print(f"Stored for stillhouse plan in {path}.", soft_wrap=True)


def measure(config: RunConfig, device: torch.device, architecture: str | None, quick: bool) -> Bench:
    """Measure everything that a run does on a device."""
    subject = Subject.load(config, device, architecture, quick)
    dtypes: dict[str, None] = dict.fromkeys((subject.config.compute.dtype, "float32"))
    matmul = {dtype: matmul_rate(device, getattr(torch, dtype)) for dtype in dtypes}
    parts = list(subject.parts())
    rows: dict[str, Measurement] = {}
    for part in progress(parts, len(parts), "bench", "measurement"):
        for task, row in part():
            rows[task.key] = row
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Bench(device_name(device), device.type, subject.tasks.network, created, matmul, rows, quick)


def device_name(device: torch.device) -> str:
    """Return what a device is called: a GPU's name, or a CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = min(Clock(device, 10).times(lambda: left @ right))
    return 2 * side**3 / seconds


@dataclass
class Clock:
    """Measures wall time on a device, after one call that warms up."""

    device: torch.device
    repeats: int

    def now(self) -> float:
        """Wait for the device, and return the time in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def times(self, call: Callable[[], object]) -> list[float]:
        """Return how long each repeat of a call takes."""
        call()
        return [self.once(call) for _ in range(self.repeats)]

    def once(self, call: Callable[[], object]) -> float:
        """Return how long a call takes."""
        began = self.now()
        call()
        return self.now() - began


Measured = Iterator[tuple[Task, Measurement]]


@dataclass
class Subject:
    """What is measured: a run's networks on a device.

    Attributes:
        batch: images that are sampled at once.
        began: seconds that loading took.
    """

    config: RunConfig
    device: torch.device
    denoiser: Denoiser
    autoencoder: Autoencoder
    tasks: Tasks
    quick: bool
    began: float

    @classmethod
    def load(cls, config: RunConfig, device: torch.device, architecture: str | None, quick: bool) -> Subject:
        """Load the run's backbone, or build one with random weights, and count the operations of an evaluation."""
        dtype = getattr(torch, config.compute.dtype)
        began = time.perf_counter()
        checkpoint, name = (None, architecture) if architecture else _checkpoint(config)
        if checkpoint is not None:
            denoiser = Denoiser.load(checkpoint.path, device, dtype, side=checkpoint.latent_side)
            autoencoder = Autoencoder.load(checkpoint.autoencoder, device, dtype)
        elif name is not None:
            denoiser, autoencoder = _published(name, device, dtype)
            side = denoiser.latent_shape[1] * 2 ** (len(autoencoder.model.config.block_out_channels) - 1)
            dataset = config.dataset.model_copy(update={"resolution": side})
            config = config.model_copy(update={"dataset": dataset})
        else:
            denoiser, autoencoder = _unfitted(config, device, dtype)
        seconds = time.perf_counter() - began
        x, label = (
            torch.zeros(1, *denoiser.latent_shape, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            denoiser.predict(x, 500, label, cfg_scale=1, cfg_channels=1)
        tasks = Tasks(
            config,
            {**denoiser.model.config, "sample_size": denoiser.latent_shape[1]},
            dict(autoencoder.model.config),
            len(denoiser.abar),
            float(counter.get_total_flops()),
        )
        if config.compute.compile:
            denoiser.model = torch.compile(denoiser.model, dynamic=False)
        return cls(config, device, denoiser, autoencoder, tasks, quick, seconds)

    @property
    def clock(self) -> Clock:
        """What times are taken with."""
        return Clock(self.device, 1 if self.quick else 3)

    def parts(self) -> Iterator[Callable[[], Measured]]:
        """Yield what is to be measured, one kind of work after another."""
        recipes = list(self.recipes())
        for side in dict.fromkeys((self.config.dataset.resolution, *(recipe.resolution for recipe in recipes))):
            yield lambda side=side: self.reading(side)  # type: ignore[misc]
        yield from (self.coding, self.denoising)
        methods = {n: m for n, m in self.config.compared().items() if isinstance(m, DiffusionMethod)}
        seen: set[str] = set()
        for name, method in methods.items():
            if (
                isinstance(method.start, GaussianStart)
                and (task := self.tasks.invert(_inversion(method))).key not in seen
            ):
                seen.add(task.key)
                yield lambda name=name, method=method: self.inverting(name, method)  # type: ignore[misc]
        for name, method in methods.items():
            yield lambda name=name, method=method: self.sampling(name, method)  # type: ignore[misc]
        for recipe in recipes:
            yield lambda recipe=recipe: self.training(recipe)  # type: ignore[misc]

    def recipes(self) -> Iterator[Recipe]:
        """Yield a training of each student, in each size of batch and image that the run's protocols have at the largest IPC.

        A teacher is asked in a forward pass as of a student, so that students learn from hard labels here.
        """
        epochs = 4 if self.quick else 8
        classes = len(self.config.dataset.chosen_classes or range(10))
        seen: set[str] = set()
        for protocol in self.config.evaluation.protocols:
            for architecture in students_of(self.config, protocol):
                recipe = student_recipe(self.config, protocol, architecture, classes, max(self.config.ipc), 0)
                if (task := self.tasks.train(recipe).key) not in seen:
                    seen.add(task)
                    yield replace(
                        recipe,
                        target="hard",
                        epochs=epochs,
                        evaluations=epochs // 2,
                        test_from=0.0,
                        train_size="resolution",
                    )

    def row(
        self, title: str, call: Callable[[], object], units: float, batch: int, flop: float | None, setting: str
    ) -> Measurement:
        """Measure a call that does so many units.

        Args:
            setting: the configuration key that makes it smaller, for the error.
        """
        with self._within_memory(title, batch, setting):
            seconds = statistics.median(self.clock.times(call))
        return Measurement(title, units / seconds, batch, flop, self._memory())

    @contextmanager
    def _within_memory(self, title: str, batch: int, setting: str) -> Iterator[None]:
        """Begin to look at the peak of the device's memory, and say what to do if there is too little."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        except torch.OutOfMemoryError:
            raise StillhouseError(
                f"bench: {title}: a batch of {batch} does not fit into the memory of {device_name(self.device)}. "
                f"Lower {setting}."
            ) from None

    def _memory(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def _batch(self, configured: int) -> int:
        """Return a batch as configured, or smaller on a CPU that shall be quick."""
        return min(configured, 16) if self.quick and self.device.type == "cpu" else configured

    def reading(self, side: int) -> Measured:
        """Decode and crop photographs, or read the images of a source that makes its own."""
        config, count = self.config, 64 if self.quick else 512
        if config.dataset.on_disk:
            photograph = _photograph()

            def decode(_: int) -> np.ndarray:
                return square(Image.open(io.BytesIO(photograph)).convert("RGB"), side, config.dataset.crop)

            def call() -> None:
                with ThreadPoolExecutor(config.compute.workers) as pool:
                    list(pool.map(decode, range(count)))
        else:
            catalog = Catalog(config.dataset, config.results / "cache")
            entries = catalog.entries(catalog.classes[0], "train")[:count]
            count = len(entries)

            def call() -> None:
                options = {"resolution": side, "crop": config.dataset.crop, "resample": config.dataset.resample}
                batches = load_squares(
                    catalog.source,
                    catalog.classes[0],
                    entries,
                    workers=config.compute.workers,
                    batch=config.compute.encode_batch,
                    **options,  # type: ignore[arg-type]
                )
                for _ in batches:
                    pass

        title = f"read at {side} px, {config.compute.workers} threads"
        row = self.row(title, call, count, count, None, "compute.workers")
        yield self.tasks.read(side), Measurement(row.title, row.per_second, row.batch)

    def coding(self) -> Measured:
        """Encode and decode images."""
        side, batch = self.config.dataset.resolution, self._batch(self.config.compute.encode_batch)
        pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
        latents = torch.randn(batch, *self.denoiser.latent_shape, device=self.device)
        for task, title, call in (
            (self.tasks.encode(), "encode", lambda: self.autoencoder.encode(pixels)),
            (self.tasks.decode(), "decode", lambda: self.autoencoder.decode(latents)),
        ):
            yield task, self.row(title, call, batch, batch, task.flop, "compute.encode_batch")

    def denoising(self) -> Measured:
        """Evaluate the network for a batch with guidance; the first call compiles."""
        batch, task = self._batch(self.config.compute.sample_batch), self.tasks.denoise()
        x = torch.randn(batch, *self.denoiser.latent_shape, device=self.device)
        labels = torch.zeros(batch, dtype=torch.int64, device=self.device)

        def call() -> None:
            with torch.inference_mode():
                self.denoiser.predict(x, 500, labels, cfg_scale=2.0, cfg_channels=1)

        first = self.clock.once(call)
        row = self.row("one evaluation", call, 2 * batch, 2 * batch, task.flop, "compute.sample_batch")
        yield task, row
        start = PYTHON_SECONDS + self.began + max(0.0, first - 2 * batch / row.per_second)
        title = f"jobs begun per second ({start:.0f} s to load and compile)"
        yield self.tasks.start(denoises=True), Measurement(title, 1 / start, 1)

    def inverting(self, name: str, method: DiffusionMethod) -> Measured:
        """Invert a batch of latents as a method does."""
        assert isinstance(method.start, GaussianStart)
        recipe, batch = _inversion(method), self._batch(self.config.compute.invert_batch)
        grid, task = self._grid(method), self.tasks.invert(recipe)
        until, settings = grid.step_of(method.start.timestep), method.start.inversion
        if settings.map == "noise":
            return
        latents = torch.randn(batch, *self.denoiser.latent_shape, device=self.device)
        labels = torch.zeros(batch, dtype=torch.int64, device=self.device)
        guidance = {"cfg_scale": recipe["cfg_scale"], "cfg_channels": method.sampler.cfg_channels}

        def call() -> None:
            invert(self.denoiser, grid, latents, labels, until, settings, **guidance)  # type: ignore[arg-type]

        yield task, self.row(f"invert for {name}", call, batch, batch, task.flop, "compute.invert_batch")

    def sampling(self, name: str, method: DiffusionMethod) -> Measured:
        """Sample one batch as ``stages/sample`` does, everything that is prepared for it included."""
        batch, task, grid = self._batch(self.config.compute.sample_batch), self.tasks.sample(method), self._grid(method)
        ipc = min(max(self.config.ipc), 2 if is_greedy(method) else batch)
        count = batch if is_greedy(method) else max(1, batch // ipc)
        labels = self.denoiser.null_label
        results = [
            Result("sample", f"class-{number}", {"ipc": ipc, "seed": 0, "label": number % labels})
            for number in range(count)
        ]
        inputs = made_up_inputs(method, ipc, self.config.cluster.max_leaves, self.denoiser)

        def prepare(result: Result, _: Grid) -> Rows:
            return prepare_rows(method, inputs, grid, ipc, 0, self.device)

        pool = torch.randn(REAL, int(np.prod(self.denoiser.latent_shape)), device=self.device)
        latents_of = (lambda _: pool) if needs_pool(method) else None
        fixed = self.device.type == "cuda" or self.config.compute.compile
        rows = sampled_rows(method, [ipc] * count, batch, fixed_shape=fixed)

        def call() -> None:
            size = Batch(batch)
            for _ in sample_results(
                self.denoiser, method, results, prepare, size, fixed_shape=fixed, latents_of=latents_of
            ):
                pass
            if size.size < batch:
                raise torch.OutOfMemoryError

        yield task, self.row(f"sample {name}", call, rows, batch, task.flop, "compute.sample_batch")

    def _grid(self, method: DiffusionMethod) -> Grid:
        return respace(self.denoiser.abar, method.sampler.steps, method.sampler.spacing)

    def training(self, recipe: Recipe) -> Measured:
        """Train a student for a few epochs, scoring it after every second one."""
        classes = recipe.classes
        count = recipe.batch_size * (5 if self.quick else TRAINED)
        side, random = recipe.resolution, torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (count, 3, side, side), generator=random, dtype=torch.uint8)
        labels = torch.randint(0, classes, (count,), generator=random)
        title = display_name(recipe.architecture, resolution=side, width=recipe.width)
        times: list[float] = []
        with self._within_memory(title, recipe.batch_size, "evaluation.batch_size"):
            train_student(
                recipe,
                *((images, labels), (images, labels)),
                device=self.device,
                compiled=self.config.compute.compile and self.device.type == "cuda",
                progress=lambda *_: times.append(self.clock.now()),
            )
        seconds = np.diff(times)  # of epochs 2, 3, ...: scored, not scored, ...
        trained = statistics.median(seconds[1::2])
        # A difference of two times is uncertain; scoring, a third of training's operations, is not six times as fast.
        scored = max(statistics.median(seconds[::2]) - trained, trained / 6)
        memory = self._memory()
        for task, verb, spent in (
            (self.tasks.train(recipe), "train", trained),
            (self.tasks.test(recipe), "score", scored),
        ):
            yield task, Measurement(f"{verb} {title}", count / spent, recipe.batch_size, task.flop, memory)


def _inversion(method: DiffusionMethod) -> dict[str, object]:
    """Return what of an ``invert`` result's recipe its speed depends on."""
    assert isinstance(method.start, GaussianStart)
    return {
        "steps": method.sampler.steps,
        "spacing": method.sampler.spacing,
        "cfg_scale": Recipes.inversion_cfg(method),
        "timestep": method.start.timestep,
        "inversion": method.start.inversion.model_dump(mode="json", exclude={"cfg_scale"}),
    }


def made_up_inputs(method: DiffusionMethod, ipc: int, leaves: int, denoiser: Denoiser) -> ClassInputs:
    """Return what a method reads of a class of ``REAL`` random latents."""
    random = np.random.default_rng(0)
    shape, size = denoiser.latent_shape, int(np.prod(denoiser.latent_shape))

    def modes(count: int) -> dict[str, np.ndarray]:
        means = random.standard_normal((count, size), dtype=np.float32)
        return {"means": means, "sizes": np.full(count, max(1, REAL // count))}

    def tree() -> dict[str, np.ndarray]:
        """Halve, and halve again."""
        place = np.arange(2 * leaves - 1)
        depth = np.log2(place + 1).astype(int)
        members = np.maximum(REAL >> depth, 1)
        means = random.standard_normal((len(place), size), dtype=np.float32)
        member = np.zeros(REAL, dtype=int)
        parent = (place - 1) // 2
        return {
            "parent": parent,
            "depth": depth,
            "size": members,
            "sse": 1.0 * members,
            "mean": means,
            "member": member,
        }

    prototypes, table = method.prototypes, denoiser.label_table
    targets = [term.targets for term in method.guidance if isinstance(term, TransportTerm)]
    return ClassInputs(
        "made-up",
        shape,
        latents=random.standard_normal((REAL, *shape), dtype=np.float32) if needs_latents(method) else None,
        modes=None if prototypes is None else modes(ipc) if isinstance(prototypes, KMeansPrototypes) else tree(),
        targets=modes(targets[0]) if targets else None,
        gaussian={"mean": np.zeros(shape, np.float32), "variance": np.ones(shape, np.float32)},
        label=0,
        others=[1],
        embedding_shape=None if table is None else (table.shape[1], table.shape[2]),
    )


def _photograph() -> bytes:
    """Return a JPEG as large as a photograph of ImageNet, about 100 kB."""
    random = np.random.default_rng(0)
    image = np.zeros((*PHOTOGRAPH[::-1], 3))
    for scale in (4, 16, 64):
        small = random.normal(0, 12 * scale**0.4, (PHOTOGRAPH[1] // scale + 1, PHOTOGRAPH[0] // scale + 1, 3))
        image += small.repeat(scale, 0).repeat(scale, 1)[: PHOTOGRAPH[1], : PHOTOGRAPH[0]]
    buffer = io.BytesIO()
    Image.fromarray(np.clip(image + 128, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


# ---------------------------------------------------------------- networks


def _checkpoint(config: RunConfig) -> tuple[Checkpoint | None, str | None]:
    """Return the run's backbone if it is there, or else the published architecture that its name speaks of."""
    if config.backbone.path is None:
        return None, None
    try:
        found = open_checkpoint(config.backbone.path, config.results / "cache", config.backbone.vae)
        return found.at(config.dataset.resolution), None
    except BackboneError as error:
        named = re.search(r"DiT-XL-2-(256|512)", config.backbone.path)
        if named is None:
            raise BackboneError(f"{error} Or measure random weights: --architecture NAME.") from None
        return None, f"DiT-XL/2-{named[1]}"


def _published(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Denoiser, Autoencoder]:
    if name not in ARCHITECTURES:
        raise ConfigError(f"--architecture: there is none named {name!r}; {one_of(name, ARCHITECTURES)}")
    network, coder = ARCHITECTURES[name]
    shape = FitDiT(
        layers=network["num_layers"],
        heads=network["num_attention_heads"],
        head_dim=network["attention_head_dim"],
        patch_size=network["patch_size"],
    )
    side = network["sample_size"]
    model = build_dit(shape, (network["in_channels"], side, side), network["num_embeds_ada_norm"])
    return _assemble(model, AutoencoderKL(**coder), "dit", device, dtype)


def _unfitted(config: RunConfig, device: torch.device, dtype: torch.dtype) -> tuple[Denoiser, Autoencoder]:
    """Build the networks that a run will fit."""
    fit, side = config.backbone.fit, config.dataset.resolution
    assert fit is not None
    coder = (build_vae if fit.autoencoder == "kl" else build_vq)(fit.vae, side)
    small = side // 2 ** (len(fit.vae.channels) - 1)
    shape = (fit.vae.latent_channels, small, small)
    classes = len(config.dataset.chosen_classes or range(10))
    model = build_dit(fit.dit, shape, classes) if fit.denoiser == "dit" else build_unet(fit.unet, shape, classes)
    return _assemble(model, coder, fit.denoiser, device, dtype)


def _assemble(model, coder, kind: str, device: torch.device, dtype: torch.dtype) -> tuple[Denoiser, Autoencoder]:  # type: ignore[no-untyped-def]
    schedule = DDIMScheduler(clip_sample=False, **BETAS[kind])
    denoiser = Denoiser.of(model.to(dtype), schedule, device)
    return denoiser, Autoencoder(coder.to(device, dtype).eval().requires_grad_(False), device)
