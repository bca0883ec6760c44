"""What a run will cost before it is started: hours of a GPU and bytes on disk per stage. Needs no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

from workflow_scripts.config import CoresetMethod, DiffusionMethod, MatchingMethod, MTTObjective, TransportTerm
from workflow_scripts.evaluation.protocols import MOST_CONFUSED, Recipe
from workflow_scripts.operations.flops import (
    INCEPTION_WIDTH,
    convnet_parameters,
    fitted_coder,
    fitted_dit,
    parameters,
    penultimate_width,
)
from workflow_scripts.operations.speeds import (
    Basis,
    Speeds,
    Task,
    Tasks,
    choose_speeds,
    evaluation_flop,
    read_benches,
)
from workflow_scripts.operations.survey import Item, StageSurvey
from workflow_scripts.recipes import GPU_STAGES, Labels, Recipes, SampleSet, Training
from workflow_scripts.store.results import Result

Work = tuple[Task, float]
"""A task and how many units of it."""

RECORD_BYTES = 2500
"""A result's record: its recipe, versions and checksums."""
KEY_BYTES = 40
"""The name of an image in the record of its class's latents."""
SCORE_BYTES = 1500
"""A score without what follows: its recipe and versions."""
CURVE_BYTES, CLASS_BYTES, CONFUSION_BYTES = 24, 8, 3.3
"""Of a score: a point of the curve, a class's accuracy, and a number of the confusion matrix, most of which are 0."""
MEASURE_BYTES = 5000
"""The metrics of a set, with two dozen closest pairs."""
LABEL_BYTES = 25
"""What is stored of a view besides its logits: order, crop, flip and partner."""
PNG_SHARE = 0.65
"""Size of a natural image as PNG, of its pixels."""
ESTIMATED = tuple(stage for stage in GPU_STAGES if stage != "measure")  # for which there are speeds


@dataclass
class Bill:
    """What an amount of work costs.

    Attributes:
        hours: of one device; None if its speed is not known.
        bytes: that are written to disk; None if a shape is not known.
        basis: how the hours are known, the part of them that each basis gives.
    """

    hours: float | None = 0.0
    bytes: float | None = 0.0
    basis: dict[Basis, float] = field(default_factory=lambda: defaultdict(float))

    def __add__(self, other: Bill) -> Bill:
        total = Bill(_sum(self.hours, other.hours), _sum(self.bytes, other.bytes))
        for one in (self, other):
            for basis, hours in one.basis.items():
                total.basis[basis] += hours
        return total


@dataclass(frozen=True)
class StageCost:
    """What a stage costs.

    Attributes:
        missing: what has to be done.
        whole: that, and what was done before.
    """

    stage: str
    jobs: int
    jobs_to_run: int
    missing: Bill
    whole: Bill


@dataclass(frozen=True)
class Cost:
    """What a run costs.

    Attributes:
        price: of a GPU-hour, if it is set and hours are those of a GPU.
    """

    speeds: Speeds
    stages: list[StageCost]
    price: float | None

    @property
    def missing(self) -> Bill:
        """What all that is missing costs."""
        return sum((stage.missing for stage in self.stages), Bill())

    @property
    def whole(self) -> Bill:
        """What the run costs from nothing."""
        return sum((stage.whole for stage in self.stages), Bill())


def cost(recipes: Recipes, surveys: Iterable[StageSurvey]) -> Cost:
    """Return what a surveyed run costs on the device that it is planned for."""
    ledger = Ledger(recipes)
    stages = [
        StageCost(
            stage.stage,
            stage.jobs,
            stage.jobs_to_run,
            ledger.bill(stage.stage, stage.missing),
            ledger.bill(stage.stage, stage.items),
        )
        for stage in surveys
    ]
    price = recipes.config.compute.price_per_gpu_hour if ledger.speeds.on_gpu else None
    return Cost(ledger.speeds, stages, price)


@dataclass
class Ledger:
    """Adds up a run's work."""

    recipes: Recipes

    @cached_property
    def speeds(self) -> Speeds:
        """Those of the device that the run is planned for."""
        return choose_speeds(self.recipes.config, self.tasks.network)

    @cached_property
    def tasks(self) -> Tasks:
        """The run's kinds of work."""
        config, backbone = self.recipes.config, self.recipes.backbone
        denoiser, vae = backbone.denoiser_config, backbone.vae_config
        if backbone.latent_side is not None:  # which may not be the one that a U-Net was trained with
            denoiser = {**denoiser, "sample_size": backbone.latent_side}
        fit = config.backbone.fit
        if fit is not None:
            vae = fitted_coder(fit.vae, fit.autoencoder == "vq")
            side = backbone.latent_side or 1
            if fit.denoiser == "dit":
                denoiser = fitted_dit(fit.dit, side, fit.vae.latent_channels, len(self.recipes.classes))
            else:
                denoiser = {"block_out_channels": fit.unet.channels, "sample_size": side}
        tasks = Tasks(config, denoiser, vae, backbone.timesteps)
        counted = evaluation_flop(read_benches(config.results), tasks.network)
        return Tasks(config, denoiser, vae, backbone.timesteps, counted)

    def bill(self, stage: str, items: list[Item]) -> Bill:
        """Return what items of a stage cost."""
        total = Bill(bytes=_sum(0.0, *(self._bytes(stage, item) for item in items)))
        if stage not in ESTIMATED:
            return total
        work: defaultdict[Task, float] = defaultdict(float)
        for job, of_job in groupby(sorted(items, key=lambda item: item.job), lambda item: item.job):
            for task, amount in self._work(stage, job, list(of_job)):
                work[task] += amount
        for task, amount in work.items():
            known = self.speeds.seconds(task, amount)
            if known is None:
                total.hours = None
                continue
            seconds, basis = known
            total.hours = _sum(total.hours, seconds / 3600)
            total.basis[basis] += seconds / 3600
        return total

    # ---------------------------------------------------------------- work

    def _work(self, stage: str, job: str, items: list[Item]) -> Iterator[Work]:
        """Yield the work of a job that makes these items."""
        config, tasks = self.recipes.config, self.tasks
        results = [item.thing for item in items if isinstance(item.thing, Result)]
        samples = stage == "sample" and isinstance(config.methods[job.rpartition("-")[0]], DiffusionMethod)
        yield tasks.start(denoises=samples or stage in ("invert", "match")), 1
        if stage == "fit_backbone":
            yield from self._fit()
        elif stage == "encode":
            images = sum(self._images(result.class_name) for result in results)
            images *= 2 if config.encode.flip == "both" else 1
            yield from ((tasks.read(config.dataset.resolution), images), (tasks.encode(), images))
        elif stage == "features":
            images = sum(self._images(result.class_name) for result in results)
            yield tasks.read(config.dataset.resolution), images
            yield self._featuring, images
        elif stage == "invert":
            for result in results:
                yield tasks.invert(result.recipe), self._latents(result.class_name)
        elif stage == "experts":
            yield from self._experts(job.rpartition("-")[0], len(items))
        elif stage == "sample":
            method = config.methods[job.rpartition("-")[0]]
            ipcs = [int(result.recipe["ipc"]) for result in results]
            if isinstance(method, CoresetMethod):
                yield tasks.read(config.dataset.resolution), sum(ipcs) * method.parts
            elif isinstance(method, DiffusionMethod):
                fixed = self.speeds.on_gpu or config.compute.compile
                yield tasks.sample(method), sampled_rows(method, ipcs, config.compute.sample_batch, fixed_shape=fixed)
                yield tasks.decode(), sum(ipcs)
        elif stage == "match":
            yield from self._match(job, results)
        elif stage == "teacher":
            yield from self._teacher(job)
        elif stage == "relabel":
            for item in items:
                assert isinstance(item.thing, Labels)
                recipe = self.recipes.label_recipe(item.thing)
                images = item.thing.set.ipc * len(self.recipes.classes)
                yield tasks.test(self._asked(item.thing.protocol, recipe)), recipe.epochs * images
        else:
            trainings = [item.thing for item in items if isinstance(item.thing, Training)]
            for side in {self.recipes.student(training).resolution for training in trainings}:
                yield tasks.read(side), self._test_images
            for training in trainings:
                yield from self._training(training)

    def _training(self, training: Training) -> Iterator[Work]:
        student = self.recipes.student(training)
        images = training.set.ipc * len(self.recipes.classes)
        yield self.tasks.read(student.resolution), images
        # A step of a smaller batch is taken to last as long as one of a whole batch.
        whole = -(-images // student.batch_size) * student.batch_size
        yield self.tasks.train(student), student.epochs * whole
        yield self.tasks.test(student), len(student.evaluation_epochs()) * self._test_images
        if student.target == "teacher":
            yield self.tasks.test(self._asked(training.protocol, student)), student.epochs * whole

    def _asked(self, protocol: str, recipe: Recipe) -> Recipe:
        """Return a protocol's teacher as if it were a student."""
        network = self.recipes.teacher(protocol).architecture
        return replace(recipe, architecture=network.name, width=network.width)

    def _teaching(self, protocol: str) -> Recipe:
        """Return a protocol's teacher as if it were a student, at the resolution at which it is trained and tested."""
        side, classes = self.recipes.teacher_check(protocol)["resolution"], len(self.recipes.classes)
        return self._asked(protocol, Recipe(architecture="convnet", resolution=side, classes=classes, epochs=1))

    @property
    def _featuring(self) -> Task:
        """What computes the features of an image in which sets are measured."""
        if self.recipes.feature_teacher is None:
            return self.tasks.inception()
        return self.tasks.test(self._teaching(self.recipes.soft_protocols[0]))

    def _teacher(self, protocol: str) -> Iterator[Work]:
        """Yield the training of a teacher, if it is trained here, and its test."""
        network, fit = self._teaching(protocol), self.recipes.teacher(protocol).fit
        side = network.resolution
        yield self.tasks.read(side), self._test_images
        yield self.tasks.test(network), self._test_images
        if fit is not None:
            images = sum(self._images(name) for name in self.recipes.classes)
            yield self.tasks.read(side), images
            yield self.tasks.train(replace(network, batch_size=fit.batch_size)), fit.epochs * images

    def _experts(self, name: str, count: int) -> Iterator[Work]:
        method = self.recipes.config.methods[name]
        assert isinstance(method, MatchingMethod) and isinstance(method.objective, MTTObjective)
        images = sum(self._images(name) for name in self.recipes.classes)
        yield self.tasks.read(self.recipes.config.dataset.resolution), images
        student = self._convnet(method.objective.width, method.objective.experts.batch_size)
        yield self.tasks.train(student).learning(), count * method.objective.epochs_read * images

    def _match(self, job: str, results: list[Result]) -> Iterator[Work]:
        """Yield what an iteration takes, so many times: images without a graph if they are many, with one, and back."""
        wanted, classes = self.recipes.match_set(job)
        method = self.recipes.config.methods[wanted.method]
        assert isinstance(method, MatchingMethod)
        objective = method.objective
        together = isinstance(objective, MTTObjective)
        rows = wanted.ipc * (len(classes) if together else len(results))
        passes = 2 + (rows > method.chunk)
        guided = 1 if method.chain.cfg_scale == 1 else 2
        evaluations = rows * method.chain.steps * guided * (passes + method.checkpointing)
        yield self.tasks.denoise(), method.iterations * evaluations
        yield self.tasks.decode(), method.iterations * rows * passes + rows
        seen = rows
        if isinstance(objective, MTTObjective):
            seen = 2 * objective.student_steps * min(objective.batch_synthetic or rows, rows)
        else:
            seen += objective.batch_real * len(results)
            images = sum(self._images(result.class_name) for result in results)
            yield self.tasks.read(self.recipes.config.dataset.resolution), images
        yield self.tasks.train(self._convnet(objective.width, 64)), method.iterations * seen

    def _fit(self) -> Iterator[Work]:
        """Yield the training of the autoencoder and the denoiser, a step of which counts as three forward passes."""
        config, tasks = self.recipes.config, self.tasks
        fit, tune = config.backbone.fit, config.backbone.finetune
        if tune is not None:
            passes = 3 if tune.trainable == "all" else 2  # most weights need no gradient
            yield tasks.denoise().learning(), passes * tune.steps * tune.batch_size
            return
        assert fit is not None
        side = config.dataset.resolution
        yield tasks.read(side), sum(self._images(name) for name in self.recipes.classes)
        yield tasks.encode().learning(), 3 * fit.vae.steps * fit.vae.batch_size
        yield tasks.decode().learning(), 3 * fit.vae.steps * fit.vae.batch_size
        denoiser = fit.dit if fit.denoiser == "dit" else fit.unet
        yield tasks.denoise().learning(), 3 * denoiser.steps * denoiser.batch_size

    def _convnet(self, width: int, batch: int) -> Recipe:
        side, classes = self.recipes.config.dataset.resolution, len(self.recipes.classes)
        return Recipe(architecture="convnet", width=width, resolution=side, classes=classes, epochs=1, batch_size=batch)

    def _images(self, class_name: str) -> int:
        return self.recipes.catalog.count(class_name, "train")

    def _latents(self, class_name: str) -> int:
        return self._images(class_name) * (2 if self.recipes.config.encode.flip == "both" else 1)

    @cached_property
    def _test_images(self) -> int:
        return sum(self.recipes.catalog.count(name, "test") for name in self.recipes.classes)

    # ---------------------------------------------------------------- bytes

    @cached_property
    def _latent(self) -> int | None:
        """How many numbers a latent has."""
        backbone = self.recipes.backbone
        channels = self.tasks.vae.get("latent_channels")
        return channels * backbone.latent_side**2 if channels and backbone.latent_side else None

    def _bytes(self, stage: str, item: Item) -> float | None:
        """Return the size of an item."""
        pixels = 3 * self.recipes.config.dataset.resolution**2
        thing = item.thing
        if isinstance(thing, SampleSet):
            return thing.ipc * len(self.recipes.classes) * pixels * PNG_SHARE
        if isinstance(thing, Training):
            return self._score(thing)
        if isinstance(thing, Labels):
            images, classes = thing.set.ipc * len(self.recipes.classes), len(self.recipes.classes)
            return float(self.recipes.label_recipe(thing).epochs * images * (2 * classes + LABEL_BYTES))
        if stage in ("teacher", "measure"):
            return SCORE_BYTES if stage == "teacher" else MEASURE_BYTES
        if stage == "fit_backbone":
            weights = parameters(self.tasks.denoiser)
            return None if weights is None else weights * (2 if self.recipes.config.backbone.fit is not None else 4)
        if not isinstance(thing, Result):
            return 0.0  # a report: a few megabytes
        latent, recipe = self._latent, thing.recipe
        if stage == "experts":
            side, classes = self.recipes.config.dataset.resolution, len(self.recipes.classes)
            return RECORD_BYTES + 4 * (recipe["epochs"] + 1) * convnet_parameters(recipe["width"], side, classes)
        if stage == "features":
            return RECORD_BYTES + self._images(thing.class_name) * (KEY_BYTES + 4 * self._feature_width)
        if latent is None:
            return None
        if stage == "encode":
            return (
                RECORD_BYTES
                + self._latents(thing.class_name) * 2 * 2 * latent
                + self._images(thing.class_name) * KEY_BYTES
            )
        if stage == "cluster":
            nodes = 2 * recipe["tree"]["max_leaves"] - 1 if "tree" in recipe else recipe["k"]
            return RECORD_BYTES + nodes * (4 * latent + 32) + 8 * self._latents(thing.class_name) * ("tree" in recipe)
        if stage == "invert":
            return RECORD_BYTES + 2 * 4 * latent
        arrays = 2 if stage == "match" else 1
        return RECORD_BYTES + recipe["ipc"] * (pixels + 4 * latent * arrays)

    def _score(self, training: Training) -> float:
        """Return the size of a score."""
        classes, tests = len(self.recipes.classes), len(self.recipes.student(training).evaluation_epochs())
        cells = classes**2 if classes <= MOST_CONFUSED else 0
        return SCORE_BYTES + tests * CURVE_BYTES + classes * CLASS_BYTES + cells * CONFUSION_BYTES

    @cached_property
    def _feature_width(self) -> int:
        """How many features an image has, if they are not latents."""
        if self.recipes.feature_teacher is None:
            return INCEPTION_WIDTH
        network = self._teaching(self.recipes.soft_protocols[0])
        return penultimate_width(network.architecture, network.width, network.resolution)


def sampled_rows(method: DiffusionMethod, ipcs: list[int], batch: int, *, fixed_shape: bool) -> int:
    """Return how many rows a job of ``sample`` evaluates for results of these IPCs, those included that only fill a batch.

    Images that a method makes one after another go in lockstep, so that a batch holds one of each result; those that it
    makes together stay in one batch.
    """
    matching = {term.matching for term in method.guidance if isinstance(term, TransportTerm)}

    def filled(rows: int) -> int:
        return max(rows, batch) if fixed_shape else rows

    if "greedy" in matching:
        counts = {ipc: ipcs.count(ipc) for ipc in set(ipcs)}
        return sum(ipc * filled(min(batch, n - start)) for ipc, n in counts.items() for start in range(0, n, batch))
    if "synchronous" not in matching:
        return -(-sum(ipcs) // batch) * batch if fixed_shape else sum(ipcs)
    total = held = 0
    for ipc in ipcs:
        if held and held + ipc > batch:
            total, held = total + filled(held), 0
        held += ipc
        if held >= batch:
            total, held = total + held, 0
    return total + (filled(held) if held else 0)


def _sum(*terms: float | None) -> float | None:
    """Add up, unless a term is unknown."""
    return None if any(term is None for term in terms) else float(sum(term for term in terms if term is not None))
