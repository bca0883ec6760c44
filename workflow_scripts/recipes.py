"""From configuration and catalog to what must exist: the digest of every result, and the manifests that gather them.

Everything here is a pure function of the configuration, the images and the backbone's identity. It imports no torch, so
that the Snakefile, ``stillhouse plan`` and every worker can ask in well under a second. A class is invalid exactly when
the result that its recipe names does not exist.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar

from workflow_scripts.config import (
    Architecture,
    CoresetMethod,
    DiffusionMethod,
    GaussianStart,
    KMeansPrototypes,
    MatchingMethod,
    MTTObjective,
    PrototypeStart,
    RunConfig,
    SoftLabelSchedule,
    Student,
    Teacher,
    TransportTerm,
)
from workflow_scripts.data.catalog import Catalog, Look
from workflow_scripts.diffusion.checkpoint import TIMESTEPS, Checkpoint, open_checkpoint
from workflow_scripts.diffusion.schedule import offset_timesteps, spaced_timesteps
from workflow_scripts.errors import ConfigError, DataError
from workflow_scripts.evaluation.protocols import RECIPE_FIELDS, STUDENTS, Case, Recipe
from workflow_scripts.store.digests import PREFIX, digest, file_digests
from workflow_scripts.store.results import Result, Store

# Raised when the meaning of a stage's results changes; recipes.lock.json keeps a hash of the code each number stands for.
RECIPES = {
    "fit_backbone": 1,
    "encode": 1,
    "features": 1,
    "cluster": 1,
    "invert": 1,
    "experts": 1,
    "sample": 1,
    "match": 1,
    "export": 1,
    "teacher": 1,
    "relabel": 1,
    "evaluate": 2,
    "measure": 1,
    "report": 3,
}
CLASS_STAGES = ("encode", "features", "cluster", "invert", "experts", "sample", "match")
GPU_STAGES = (
    "fit_backbone",
    "encode",
    "features",
    "invert",
    "experts",
    "sample",
    "match",
    "teacher",
    "relabel",
    "evaluate",
    "measure",
)  # those that use a GPU
# Of a training, what stored soft labels depend on.
_LABELLED = (
    *("resolution", "classes", "epochs", "batch_size", "train_size", "patches", "crop_scale", "flip", "jitter"),
    *("lighting", "dsa", "cutmix", "mixup", "mix_alpha", "dtype"),
)
LABEL_SEED = 42
# What of a matching method changes how long it takes, or is in the digests of its experts.
_MATTERS_OF_SPEED: dict[str, Any] = {
    **dict.fromkeys(("summary", "paper", "chunk", "checkpointing", "checkpoint_every", "experts_per_job"), True),
    "objective": {"experts"},
}


@dataclass(frozen=True)
class SampleSet:
    """The synthetic images of all classes for one method, IPC and seed."""

    method: str
    ipc: int
    seed: int


@dataclass(frozen=True)
class Training:
    """One classifier to be trained on one exported set."""

    set: SampleSet
    architecture: Student
    repeat: int
    protocol: str

    @property
    def name(self) -> str:
        """What it is called for people."""
        made = self.set
        cell = f"{made.method} IPC {made.ipc} seed {made.seed}"
        return f"{cell} {self.protocol} {self.architecture.name} repeat {self.repeat}"


@dataclass(frozen=True)
class Labels:
    """The soft labels of one exported set that a protocol stores."""

    set: SampleSet
    protocol: str

    @property
    def job(self) -> str:
        """Name of the job that makes them."""
        return f"{self.set.method}-ipc{self.set.ipc}-seed{self.set.seed}-{self.protocol}"


@dataclass(frozen=True)
class Job:
    """One job of a stage: its name, and what it has to make.

    Attributes:
        stage: name of the rule and of the program.
        shard: what distinguishes it from the stage's other jobs, as it appears in the manifest's name.
        digest: of everything it makes.
        items: how many results, sets or trainings that is.
        needs: stage and shard of the jobs whose results it reads.
        gpus: how many share its batches.
        nodes: over how many nodes those are spread.
    """

    stage: str
    shard: str
    digest: str
    items: int
    needs: tuple[tuple[str, str], ...] = ()
    gpus: int = 1
    nodes: int = 1

    @property
    def manifest(self) -> str:
        """Path of the manifest below the results directory."""
        return f"manifests/{self.stage}/{self.shard}.{self.digest[:PREFIX]}.json"


def protocol_values(config: RunConfig, protocol: str, architecture: str, ipc: int, classes: int) -> dict[str, Any]:
    """Return a protocol's values for a student at an IPC: the published ones, overlaid by what is configured."""
    evaluation = config.evaluation
    values = evaluation.preset(protocol).at(Case(architecture, ipc, classes))
    for key in values:
        configured = evaluation.value(protocol, key) if key != "target" else None
        if isinstance(configured, dict):
            configured = configured[ipc]
        values[key] = values[key] if configured is None else configured
    return values


def student_recipe(
    config: RunConfig, protocol: str, architecture: Architecture, classes: int, ipc: int, seed: int
) -> Recipe:
    """Return the recipe of a run's trainings of an architecture by a protocol."""
    values = protocol_values(config, protocol, architecture.name, ipc, classes)
    return Recipe(
        architecture=architecture.name,
        width=architecture.width,
        classes=classes,
        seed=seed,
        **{key: value for key, value in values.items() if key in RECIPE_FIELDS},
    )


def students_of(config: RunConfig, protocol: str) -> tuple[Student, ...]:
    """Return a protocol's students: configured, or the published ones."""
    chosen: tuple[Student, ...] | None = config.evaluation.value(protocol, "architectures")
    return chosen or tuple(Student(name=name) for name in config.evaluation.preset(protocol).architectures)


def digest_of_set(images: Mapping[str, str]) -> str:
    """Return the digest of a set, given the digest of each class's images in label order."""
    return digest({"stage": "export", "recipe": RECIPES["export"], "classes": [list(item) for item in images.items()]})


T = TypeVar("T")


def remembered(method: Callable[..., T]) -> Callable[..., T]:
    """Compute a method of Recipes once for the same arguments."""

    @wraps(method)
    def call(self: Recipes, *arguments: Any) -> T:
        key = (method.__name__, *arguments)
        if key not in self._known:
            self._known[key] = method(self, *arguments)
        answer: T = self._known[key]
        return answer

    return call


class Recipes:
    """The results and jobs of one run.

    Attributes:
        config: the run's configuration.
        catalog: its images.
        store: where results are.
    """

    def __init__(self, config: RunConfig, look: Look = "noted"):
        self.config = config
        self.store = Store(config.results / "store")
        self.catalog = Catalog(config.dataset, config.results / "cache", look)
        self._known: dict[tuple[Any, ...], Any] = {}

    @property
    def classes(self) -> list[str]:
        """The run's classes in label order."""
        return self.catalog.classes

    # ---------------------------------------------------------------- the backbone

    @cached_property
    def backbone(self) -> Checkpoint:
        """The backbone: on disk, or one that fit_backbone will make."""
        if self.config.backbone.path is None:
            return self._fitted
        return self.pretrained if self.config.backbone.finetune is None else self._finetuned

    @cached_property
    def pretrained(self) -> Checkpoint:
        """The backbone at ``backbone.path``."""
        assert self.config.backbone.path is not None
        found = open_checkpoint(self.config.backbone.path, self.config.results / "cache", self.config.backbone.vae)
        return found.at(self.config.dataset.resolution)

    @cached_property
    def _fitted(self) -> Checkpoint:
        fit, identity = self.config.backbone.fit, self.fit_digest
        assert fit is not None
        side = self.config.dataset.resolution // 2 ** (len(fit.vae.channels) - 1)
        return Checkpoint(
            self._fit_place,
            digest([identity, "vae"]),
            digest([identity, "transformer"]),
            TIMESTEPS,
            self._own_labels,
            latent_side=side,
        )

    @cached_property
    def _finetuned(self) -> Checkpoint:
        """The pre-trained backbone with another denoiser; what its autoencoder encodes is encoded once for both."""
        network = {**self.pretrained.denoiser_config, "num_embeds_ada_norm": len(self.classes)}
        return replace(
            self.pretrained,
            path=self._fit_place,
            denoiser=digest([self.fit_digest, "transformer"]),
            labels=self._own_labels,
            vae_path=self.pretrained.autoencoder,
            denoiser_config=network,
        )

    @property
    def _fit_place(self) -> Path:
        return self.config.results / "store" / "backbones" / self.fit_digest[:PREFIX]

    @property
    def _own_labels(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.classes)}

    @property
    def fits(self) -> bool:
        """Say whether fit_backbone makes this run's denoiser."""
        return self.config.backbone.fit is not None or self.config.backbone.finetune is not None

    @cached_property
    def fit_digest(self) -> str:
        """Digest of the backbone that this run fits or fine-tunes, on the training images of all its classes."""
        shared = {"stage": "fit_backbone", "recipe": RECIPES["fit_backbone"]}
        tune = self.config.backbone.finetune
        if tune is not None:
            known = {name: self.pretrained.labels.get(name) for name in self.classes}
            content = {"denoiser": self.pretrained.denoiser, "labels": list(known.items()), "finetune": tune.identity()}
            return digest({**shared, **content, "latents": self._latents_of(self.pretrained.vae)})
        assert self.config.backbone.fit is not None
        return digest(
            {
                **shared,
                "images": [[name, self.catalog.fingerprint(name, "train")] for name in self.classes],
                "preprocessing": self._preprocessing,
                "fit": self.config.backbone.fit.identity(),
            }
        )

    def _latents_of(self, vae: str) -> str:
        return digest([[name, self._encoded(name, vae).digest] for name in self.classes])

    # ---------------------------------------------------------------- class-level results

    @remembered
    def latents(self, class_name: str) -> Result:
        """The VAE posterior of a class's real images: ``mean`` and ``logvar`` (n, c, h, w) fp16, unscaled."""
        return self._encoded(class_name, self.backbone.vae)

    def _encoded(self, class_name: str, vae: str) -> Result:
        return self._result(
            "encode",
            class_name,
            images=self.catalog.fingerprint(class_name, "train"),
            preprocessing=self._preprocessing,
            flip=self.config.encode.flip,
            vae=vae,
            dtype=self.config.compute.dtype,
        )

    @cached_property
    def feature_space(self) -> dict[str, Any]:
        """In which features sets are measured: their ``name``, and the identity of the ``weights`` that give them.

        A teacher's have its ``resolution`` too, and by which filter images are scaled to it (``resample``).

        Raises:
            ConfigError: the weights are not there.
        """
        evaluation = self.config.evaluation
        if evaluation.feature_space == "latents":
            return {"name": "latents", "weights": self.backbone.vae}
        if evaluation.feature_space == "teacher":
            protocol = self.soft_protocols[0]
            given = self.teacher(protocol).weights is not None  # such features are the same in runs with other classes
            return {
                "name": "teacher",
                "weights": digest(self._teacher_network(protocol)) if given else self.teacher_digest(protocol),
                "resolution": self.teacher_check(protocol)["resolution"],
                "resample": evaluation.resample,
            }
        path = evaluation.inception
        assert path is not None
        if not path.is_file():
            raise ConfigError(
                f"evaluation.inception: got {path}, which is not a file; leave it out to measure on other features"
            )
        return {"name": "inception", "weights": file_digests([path], self.config.results / "cache")[0]}

    @property
    def feature_teacher(self) -> str | None:
        """What the teacher whose features sets are measured on is called for people, if that is what they are measured on."""
        if self.config.evaluation.feature_space != "teacher":
            return None
        protocol = self.soft_protocols[0]
        return f"teacher {self.teacher(protocol).architecture.name} of {protocol}"

    @property
    def _stores_features(self) -> bool:
        return self.config.evaluation.feature_space != "latents"

    @remembered
    def real_features(self, class_name: str) -> Result:
        """The features (n, d) float32 of a class's real images; on latents, what encoding made of them."""
        if not self._stores_features:
            return self.latents(class_name)
        return self._result(
            "features",
            class_name,
            images=self.catalog.fingerprint(class_name, "train"),
            preprocessing=self._preprocessing,
            space=self.feature_space,
        )

    @remembered
    def clusterings(self, class_name: str, method: str, ipc: int) -> dict[str, Result]:
        """What a method needs of a class's clusters at an IPC: ``prototypes``, ``targets`` of transport, both or neither."""
        chosen = self.config.methods[method]
        if not isinstance(chosen, DiffusionMethod):
            return {}
        needed: dict[str, dict[str, Any]] = {}
        if isinstance(chosen.prototypes, KMeansPrototypes):
            needed["prototypes"] = {"kmeans": chosen.prototypes.model_dump(mode="json"), "k": ipc}
        elif chosen.prototypes is not None:
            needed["prototypes"] = {"tree": self.config.cluster.model_dump(mode="json")}
        for term in chosen.guidance:
            if isinstance(term, TransportTerm):
                like = KMeansPrototypes(kind="kmeans", restarts=term.restarts, seed=term.seed)
                needed["targets"] = {"kmeans": like.model_dump(mode="json"), "k": term.targets}
        return {
            use: self._result("cluster", class_name, latents=self.latents(class_name).digest, **what)
            for use, what in needed.items()
        }

    @remembered
    def gaussian(self, class_name: str, method: str) -> Result | None:
        """The class Gaussian in the inverted domain: ``mean`` and ``variance`` (c, h, w) at the start timestep."""
        chosen = self.config.methods[method]
        if not (isinstance(chosen, DiffusionMethod) and isinstance(chosen.start, GaussianStart)):
            return None
        return self._result(
            "invert",
            class_name,
            latents=self.latents(class_name).digest,
            label=self.backbone.label_of(class_name),
            denoiser=self.backbone.denoiser,
            vae=self.backbone.vae,
            steps=chosen.sampler.steps,
            spacing=chosen.sampler.spacing,
            cfg_scale=self.inversion_cfg(chosen),
            cfg_channels=chosen.sampler.cfg_channels,
            inversion=chosen.start.inversion.model_dump(mode="json", exclude={"cfg_scale"}),
            timestep=chosen.start.timestep,
            dtype=self.config.compute.dtype,
        )

    @staticmethod
    def inversion_cfg(method: DiffusionMethod) -> float:
        """Return the guidance scale of a method's inversion."""
        assert isinstance(method.start, GaussianStart)
        own = method.start.inversion.cfg_scale
        return method.sampler.cfg_scale if own is None else own

    @remembered
    def samples(self, class_name: str, wanted: SampleSet) -> Result:
        """The synthetic images of a class: ``images`` (ipc, H, W, 3) uint8 and ``latents`` (ipc, c, h, w) float32."""
        method = self.config.methods[wanted.method]
        if isinstance(method, MatchingMethod):
            return self._matched(class_name, wanted, method)
        deterministic = isinstance(method, CoresetMethod) and not method.seeded
        inputs = {
            "method": self._method(wanted.method),
            "ipc": wanted.ipc,
            "seed": 0 if deterministic else wanted.seed,
            "vae": self.backbone.vae,
            "dtype": self.config.compute.dtype,
        }
        if isinstance(method, CoresetMethod):
            inputs |= {"latents": self.latents(class_name).digest}
        else:
            inputs |= {"label": self.backbone.label_of(class_name), "denoiser": self.backbone.denoiser}
            clusterings = self.clusterings(class_name, wanted.method, wanted.ipc)
            inputs |= {use: result.digest for use, result in clusterings.items()}
            gaussian = self.gaussian(class_name, wanted.method)
            inputs |= {"gaussian": gaussian.digest} if gaussian else {}
            inputs |= {"label_pool": digest(self.label_pool(wanted.method))} if self.label_pool(wanted.method) else {}
        return self._result("sample", class_name, **inputs)

    def _matched(self, class_name: str, wanted: SampleSet, method: MatchingMethod) -> Result:
        """What matching makes of a class, and, for trajectories, of all classes together, of which this is one's part.

        To ``images`` and ``latents`` come what was learned: ``learned_latents``, ``embeddings`` (ipc, P, E) and, for
        trajectories, the student's ``learning_rate``.
        """
        together = isinstance(method.objective, MTTObjective)
        inputs: dict[str, Any] = {
            "method": method.model_dump(mode="json", exclude=_MATTERS_OF_SPEED),
            "ipc": wanted.ipc,
            "seed": wanted.seed,
            "vae": self.backbone.vae,
            "denoiser": self.backbone.denoiser,
            "label": self.backbone.label_of(class_name),
            "dtype": self.config.compute.dtype,
            "latents": self._all_latents if together else self.latents(class_name).digest,
        }
        if method.objective.kind == "dc":  # its students tell the run's classes apart
            inputs["student_label"] = [self.classes.index(class_name), len(self.classes)]
        if together:
            inputs["experts"] = digest([expert.digest for expert in self.experts(wanted.method)])
        return self._result("match", class_name, **inputs)

    @cached_property
    def _all_latents(self) -> str:
        return self._latents_of(self.backbone.vae)

    @remembered
    def experts(self, method: str) -> list[Result]:
        """The trainings on real images that a method follows: ``trajectory`` (epochs + 1, P) float32 each."""
        chosen = self.config.methods[method]
        if not (isinstance(chosen, MatchingMethod) and isinstance(chosen.objective, MTTObjective)):
            return []
        objective = chosen.objective
        shared = {
            "images": self._train_fingerprint,
            "preprocessing": self._preprocessing,
            "width": objective.width,
            "dsa": list(objective.dsa),
            "epochs": objective.epochs_read,
            **objective.experts.model_dump(mode="json", exclude={"count"}),
        }
        return [
            self._result("experts", f"expert-{number:04d}", number=number, **shared)
            for number in range(objective.experts.count)
        ]

    @cached_property
    def _train_fingerprint(self) -> str:
        return digest([[name, self.catalog.fingerprint(name, "train")] for name in self.classes])

    def expert_jobs(self, method: str) -> list[str]:
        """Return the jobs that train a method's experts, called after the first compared method that has the same ones."""
        wanted = {expert.digest for expert in self.experts(method)}
        if not wanted:
            return []
        owner = next(n for n in self.config.compare if wanted <= {expert.digest for expert in self.experts(n)})
        count = -(-len(wanted) // self._experts_per_job(owner))
        return [f"{owner}-{number:03d}" for number in range(count)]

    def _experts_per_job(self, method: str) -> int:
        chosen = self.config.methods[method]
        assert isinstance(chosen, MatchingMethod)
        return chosen.experts_per_job

    def checkpoint(self, shard: str) -> Path:
        """Return the file from which a killed job of ``match`` resumes, named after what the job makes."""
        made = digest([result.digest for result in self.stage_results("match", shard)])
        return self.store.root / "match.checkpoints" / f"{made[:PREFIX]}.safetensors"

    def match_jobs(self, method: str) -> list[str]:
        """Return a matching method's jobs, METHOD-ipcK-seedS-NNN: one per shard, or one alone if classes hang together."""
        chosen = self.config.methods[method]
        if not isinstance(chosen, MatchingMethod):
            return []
        shards = ["000"] if isinstance(chosen.objective, MTTObjective) else self.shards
        return [f"{method}-ipc{s.ipc}-seed{s.seed}-{shard}" for s in self.sets(method) for shard in shards]

    def match_set(self, shard: str) -> tuple[SampleSet, list[str]]:
        """Return the set that a job of ``match`` works on, and its classes."""
        name, _, number = shard.rpartition("-")
        cell, _, seed = name.rpartition("-seed")
        method, _, ipc = cell.rpartition("-ipc")
        chosen = self.config.methods[method]
        assert isinstance(chosen, MatchingMethod)
        together = isinstance(chosen.objective, MTTObjective)
        return SampleSet(method, int(ipc), int(seed)), self.classes if together else self.shard_classes(number)

    @remembered
    def label_pool(self, method: str) -> list[int]:
        """Return the labels among which a method finds another class to mix in: the run's, or all that the backbone knows."""
        schedule = getattr(self.config.methods[method], "labels", None)
        if not isinstance(schedule, SoftLabelSchedule) or schedule.other == 0:
            return []
        return sorted(
            self.backbone.label_of(n) for n in (self.classes if schedule.pool == "run" else self.backbone.labels)
        )

    def _result(self, stage: str, class_name: str, **parts: Any) -> Result:
        return Result(stage, class_name, {"stage": stage, "recipe": RECIPES[stage], "class": class_name, **parts})

    @remembered
    def _method(self, name: str) -> dict[str, Any]:
        """A method's parameters."""
        return self.config.methods[name].model_dump(mode="json", exclude={"summary", "paper"})

    @property
    def _preprocessing(self) -> dict[str, Any]:
        dataset = self.config.dataset
        named = {} if dataset.resample == "bicubic" else {"resample": dataset.resample}
        return {"resolution": dataset.resolution, "crop": dataset.crop, **named}

    # ---------------------------------------------------------------- sets and trainings

    def sets(self, method: str) -> list[SampleSet]:
        """Return the sets that a method has to provide."""
        return [SampleSet(method, ipc, seed) for ipc in self.config.ipc for seed in self.config.seeds]

    @remembered
    def set_digest(self, wanted: SampleSet) -> str:
        """Return the digest of a set: its classes in label order, and what each is made of."""
        return digest_of_set({name: self.samples(name, wanted).digest for name in self.classes})

    def set_directory(self, wanted: SampleSet) -> Path:
        """Return the folder of a set's exported images."""
        name = f"{wanted.method}-ipc{wanted.ipc}-seed{wanted.seed}.{self.set_digest(wanted)[:PREFIX]}"
        return self.config.results / "datasets" / name

    def architectures(self, protocol: str) -> tuple[Student, ...]:
        """Return a protocol's students."""
        return students_of(self.config, protocol)

    @remembered
    def protocol_values(self, protocol: str, architecture: str, ipc: int) -> dict[str, Any]:
        """Return a protocol's values for a student at an IPC."""
        return protocol_values(self.config, protocol, architecture, ipc, len(self.classes))

    @remembered
    def trainings(self, method: str, ipc: int) -> list[Training]:
        """Return the trainings of one method at one IPC: by protocol, then by architecture as configured."""
        return [
            Training(SampleSet(method, ipc, seed), architecture, repeat, protocol)
            for protocol in self.config.evaluation.protocols
            for architecture in self.architectures(protocol)
            for seed in self.config.seeds
            for repeat in range(self.protocol_values(protocol, architecture.name, ipc)["repeats"])
        ]

    def student(self, training: Training) -> Recipe:
        """Return the training's recipe."""
        seed = 1000 * training.set.seed + training.repeat
        classes, ipc = len(self.classes), training.set.ipc
        return student_recipe(self.config, training.protocol, training.architecture, classes, ipc, seed)

    def training_recipe(self, training: Training) -> dict[str, Any]:
        """Return everything that determines a training."""
        student = self.student(training)
        soft: dict[str, Any] = {}
        if student.target == "teacher":
            soft = {"teacher": self.teacher_digest(training.protocol)}
        elif student.target == "stored":
            soft = {"labels": self.labels_digest(Labels(training.set, training.protocol))}
        return {
            "stage": "evaluate",
            "recipe": RECIPES["evaluate"],
            "set": self.set_digest(training.set),
            "test": self._test_fingerprint,
            "test_crop": [self.config.evaluation.resample, self.config.dataset.on_bad_image],
            "student": asdict(student),
            **soft,
        }

    def training_path(self, training: Training) -> Path:
        """Return the file that holds a training's score."""
        return self.store.root / f"{self.training_place(training)}.json"

    def training_place(self, training: Training) -> str:
        """Return what identifies a training below the store's root."""
        return f"evaluate/{digest(self.training_recipe(training))[:PREFIX]}"

    def measure_recipe(self, wanted: SampleSet) -> dict[str, Any]:
        """Return everything that determines the measurement of a set against the real images."""
        return {
            "stage": "measure",
            "recipe": RECIPES["measure"],
            "set": self.set_digest(wanted),
            "space": self.feature_space,
            "dtype": self.config.compute.dtype,
            "real": self._real_features,
        }

    def measure_path(self, wanted: SampleSet) -> Path:
        """Return the file that holds a set's measurement."""
        return self.store.root / "measure" / f"{digest(self.measure_recipe(wanted))[:PREFIX]}.json"

    @cached_property
    def _real_features(self) -> str:
        return digest([[name, self.real_features(name).digest] for name in self.classes])

    # ---------------------------------------------------------------- teachers and stored labels

    def teacher(self, protocol: str) -> Teacher:
        """Return the teacher that a protocol is configured with."""
        teacher: Teacher = self.config.evaluation.value(protocol, "teacher")
        return teacher

    def _example(self, protocol: str, ipc: int) -> Recipe:
        """Return the recipe of a protocol's first student, for what all of them share."""
        method, seed = self.config.compare[0], self.config.seeds[0]
        return self.student(Training(SampleSet(method, ipc, seed), self.architectures(protocol)[0], 0, protocol))

    @remembered
    def teacher_digest(self, protocol: str) -> str:
        """Return what identifies a protocol's teacher: its weights, or the training that makes them, and its classes.

        Raises:
            ConfigError: there is no such file.
        """
        teacher, identity = self.teacher(protocol), self._teacher_network(protocol)
        if teacher.classes is not None:
            identity["outputs"] = self._teacher_file(protocol, teacher.classes)
        if teacher.fit is not None:
            identity |= {
                "stage": "teacher",
                "recipe": RECIPES["teacher"],
                "images": self._train_fingerprint,
                "crop": [self.config.evaluation.resample, self.config.dataset.on_bad_image],
                "resolution": self._example(protocol, self.config.ipc[0]).resolution,
                "fit": teacher.fit.model_dump(mode="json"),
            }
        return digest([identity, self.classes])

    def _teacher_network(self, protocol: str) -> dict[str, Any]:
        """Return a teacher's architecture, and the identity of its weights if they are given."""
        teacher = self.teacher(protocol)
        given = {} if teacher.weights is None else {"weights": self._teacher_file(protocol, teacher.weights)}
        return {"architecture": teacher.architecture.model_dump(mode="json"), **given}

    def _teacher_file(self, protocol: str, path: Path) -> str:
        if not path.is_file():
            raise ConfigError(
                f"evaluation ({protocol}), teacher: there is no file {path}. Weights are fetched by you, never by a job; "
                "torchvision's are listed at https://docs.pytorch.org/vision/stable/models.html"
            )
        return file_digests([path], self.config.results / "cache")[0]

    @remembered
    def teacher_check(self, protocol: str) -> dict[str, Any]:
        """Return everything that determines how good a teacher is found to be on the real test images."""
        example = self._example(protocol, self.config.ipc[0])
        return {
            "stage": "teacher",
            "recipe": RECIPES["teacher"],
            "teacher": self.teacher_digest(protocol),
            "test": self._test_fingerprint,
            "test_crop": [self.config.evaluation.resample, self.config.dataset.on_bad_image],
            "resolution": example.resolution,
            "test_resize": example.test_resize,
            "dtype": example.dtype,
        }

    def teacher_record(self, protocol: str) -> Path:
        """Return the file that says how good a protocol's teacher is."""
        return self.store.root / "teachers" / f"{digest(self.teacher_check(protocol))[:PREFIX]}.json"

    def teacher_weights(self, protocol: str) -> Path:
        """Return the file of a teacher's weights: the user's, or the one that the stage ``teacher`` makes."""
        given = self.teacher(protocol).weights
        return given or self.store.root / "teachers" / f"{self.teacher_digest(protocol)[:PREFIX]}.safetensors"

    def teacher_job(self, protocol: str) -> str:
        """Return the job that makes and checks a teacher, called after the first protocol that has the same one."""
        record = self.teacher_record(protocol)
        return next(name for name in self.soft_protocols if self.teacher_record(name) == record)

    @cached_property
    def soft_protocols(self) -> list[str]:
        """The run's protocols with a teacher."""
        return self.config.evaluation.soft_protocols

    @cached_property
    def labels(self) -> dict[str, Labels]:
        """The soft labels that are stored, by the name of their job."""
        evaluation = self.config.evaluation
        stored = [name for name in evaluation.protocols if evaluation.preset(name).values["target"] == "stored"]
        wanted = [
            Labels(made, protocol)
            for method in self.config.compare
            for made in self.sets(method)
            for protocol in stored
        ]
        return {labels.job: labels for labels in wanted}

    def label_recipe(self, labels: Labels) -> Recipe:
        """Return the recipe by whose draws the images of stored labels are augmented and mixed."""
        seed = self.config.evaluation.value(labels.protocol, "label_seed")
        return replace(self._example(labels.protocol, labels.set.ipc), seed=LABEL_SEED if seed is None else seed)

    @remembered
    def labels_digest(self, labels: Labels) -> str:
        """Return the digest of stored labels."""
        recipe = self.label_recipe(labels)
        return digest(
            {
                "stage": "relabel",
                "recipe": RECIPES["relabel"],
                "set": self.set_digest(labels.set),
                "crop": self.config.evaluation.resample,
                "teacher": self.teacher_digest(labels.protocol),
                "seed": recipe.seed,
                **{key: getattr(recipe, key) for key in _LABELLED},
            }
        )

    def labels_path(self, labels: Labels) -> Path:
        """Return the Zarr group of stored labels."""
        return self.store.root / "labels" / f"{self.labels_digest(labels)[:PREFIX]}.zarr"

    @cached_property
    def _test_fingerprint(self) -> str:
        return digest([[name, self.catalog.fingerprint(name, "test")] for name in self.classes])

    # ---------------------------------------------------------------- jobs

    @property
    def shards(self) -> list[str]:
        """Names of the shards that have classes."""
        return [f"{index:03d}" for index in range(min(self.config.shards, len(self.classes)))]

    def shard_classes(self, shard: str) -> list[str]:
        """Return the classes of a shard, fixed by their place in the sorted class list, whatever work remains."""
        return sorted(self.classes)[int(shard) :: self.config.shards]

    def stage_results(self, stage: str, shard: str) -> list[Result]:
        """Return what a job of a class-level stage makes; the shards of ``sample`` are called METHOD-NNN."""
        if stage == "match":
            wanted, classes = self.match_set(shard)
            return [self.samples(name, wanted) for name in classes]
        method, _, number = shard.rpartition("-")
        if stage == "experts":
            size = self._experts_per_job(method)
            return self.experts(method)[int(number) * size :][:size]
        results: list[Result | None] = []
        for name in self.shard_classes(number):
            if stage == "encode":
                results.append(self.latents(name))
            elif stage == "features":
                results.append(self.real_features(name))
            elif stage == "cluster":
                for compared in self.config.compare:
                    for ipc in self.config.ipc:
                        results += self.clusterings(name, compared, ipc).values()
            elif stage == "invert":
                results += [self.gaussian(name, m) for m in self.config.compare]
            else:
                results += [self.samples(name, wanted) for wanted in self.sets(method)]
        return list({result.digest: result for result in results if result is not None}.values())

    def shards_of(self, stage: str) -> list[str]:
        """Return the names of a stage's jobs."""
        cells = [(method, ipc) for method in self.config.compare for ipc in self.config.ipc]
        return {
            "fit_backbone": ["backbone"],
            "experts": list(dict.fromkeys(job for method in self.config.compare for job in self.expert_jobs(method))),
            "sample": [
                f"{name}-{shard}"
                for name, method in self.config.compared().items()
                if not isinstance(method, MatchingMethod)
                for shard in self.shards
            ],
            "match": [job for method in self.config.compare for job in self.match_jobs(method)],
            "features": self.shards if self._stores_features else [],
            "export": list(self.config.compare),
            "measure": list(self.config.compare) if self.config.evaluation.set_metrics else [],
            "teacher": list(dict.fromkeys(map(self.teacher_job, self.soft_protocols))),
            "relabel": list(self.labels),
            "evaluate": [shard for cell in cells for shard in self._evaluate_shards(*cell)],
            "report": ["report"],
        }.get(stage, self.shards)

    def trainings_of(self, shard: str) -> list[Training]:
        """Return the trainings of an evaluate job, whose shards are called METHOD-ipcN-NNN."""
        cell, _, chunk = shard.rpartition("-")
        method, _, ipc = cell.rpartition("-ipc")
        return self._chunks(method, int(ipc))[int(chunk)]

    def jobs(self) -> list[Job]:
        """Return every job of the run, each after the jobs that it needs."""
        ordered: dict[tuple[str, str], Job] = {}

        def visit(key: tuple[str, str]) -> None:
            if key not in ordered:
                job = self.job(*key)
                for needed in job.needs:
                    visit(needed)
                ordered[key] = job

        visit(("report", "report"))
        return list(ordered.values())

    @remembered
    def job(self, stage: str, shard: str) -> Job:
        """Return one job.

        Its digest covers what it makes, not which jobs come before: those are ordered by ``needs``, and a change in them
        that matters here has changed the digests of what is made here.
        """
        content, items, needs = self._describe(stage, shard)
        name = digest({"stage": stage, "shard": shard, "content": content})
        return Job(stage, shard, name, items, tuple(needs), *self._gpus(stage, shard))

    def _describe(self, stage: str, shard: str) -> tuple[Any, int, list[tuple[str, str]]]:
        """Return what a job makes, how many class-level results or trainings that is, and which jobs it needs."""
        if stage in CLASS_STAGES:
            results = self.stage_results(stage, shard)
            made = [result.digest for result in results]
            if stage in (
                "encode",
                "features",
            ):  # a job that must not skip images looks again at classes where some were skipped
                made.append(self.config.dataset.on_bad_image)
            return made, len(results), self._needs(stage, shard)
        if stage == "fit_backbone":
            return self.fit_digest, 1, self._needs(stage, shard)
        if stage == "export":
            sets = self.sets(shard)
            return (
                [self.set_directory(wanted).name for wanted in sets],
                len(sets),
                self._set_jobs(shard),
            )
        if stage == "measure":
            sets = self.sets(shard)
            real = "features" if self._stores_features else "encode"
            return (
                [self.measure_recipe(wanted) for wanted in sets],
                len(sets) * len(self.classes),
                [*self._set_jobs(shard), *((real, number) for number in self.shards), *self._feature_jobs],
            )
        if stage == "teacher":
            return self.teacher_check(shard), 1, []
        if stage == "relabel":
            labels = self.labels[shard]
            teacher = ("teacher", self.teacher_job(labels.protocol))
            return (
                self.labels_digest(labels),
                self.label_recipe(labels).epochs,
                [("export", labels.set.method), teacher],
            )
        if stage == "evaluate":
            trainings = self.trainings_of(shard)
            needs = [("export", trainings[0].set.method)]
            for training in trainings:
                if (labels := Labels(training.set, training.protocol)).job in self.labels:
                    needs.append(("relabel", labels.job))
                elif training.protocol in self.soft_protocols:
                    needs.append(("teacher", self.teacher_job(training.protocol)))
            return (
                [self.training_recipe(training) for training in trainings],
                len(trainings),
                list(dict.fromkeys(needs)),
            )
        cells = [(method, ipc) for method in self.config.compare for ipc in self.config.ipc]
        recipes = [digest(self.training_recipe(training)) for cell in cells for training in self.trainings(*cell)]
        gpus = {"__all__": {"gpus", "nodes"}}
        shown = self.config.model_dump(
            mode="json",
            exclude={
                "results": True,
                "dataset": {"root", "test_root", "test_labels"},
                "backbone": {"path", "vae", "finetune"},
                "evaluation": {
                    "features": True,
                    "inception": True,
                    "architectures": gpus,
                    "settings": {"__all__": {"architectures": gpus}},
                },
                "compute": {"gpu", "price_per_gpu_hour"},
            },
        )
        measured = [
            digest(self.measure_recipe(wanted)) for method in self.shards_of("measure") for wanted in self.sets(method)
        ]
        content = {"recipe": RECIPES["report"], "config": shown, "trainings": recipes, "measured": measured}
        shards = [(stage, shard) for stage in ("evaluate", "measure") for shard in self.shards_of(stage)]
        return content, len(recipes), shards

    def _gpus(self, stage: str, shard: str) -> tuple[int, int]:
        """Return among how many GPUs a job shares its batches, and over how many nodes those are spread."""
        tune = self.config.backbone.finetune
        if stage == "fit_backbone" and tune is not None:
            return tune.gpus, 1
        if stage == "evaluate":
            student = self.trainings_of(shard)[0].architecture
            return student.gpus, student.nodes
        return 1, 1

    def _set_jobs(self, method: str) -> list[tuple[str, str]]:
        """Return the jobs that make a method's images."""
        matched = [("match", job) for job in self.match_jobs(method)]
        return matched or [("sample", f"{method}-{number}") for number in self.shards]

    def _needs(self, stage: str, shard: str) -> list[tuple[str, str]]:
        tunes = self.config.backbone.finetune is not None
        fit = [("fit_backbone", "backbone")] if self.fits else []
        if stage == "fit_backbone":
            return [("encode", number) for number in self.shards] if tunes else []
        if stage == "encode":
            return [] if tunes else fit
        if stage == "features":
            return self._feature_jobs
        if stage == "experts":
            return []
        # A fitted autoencoder comes before encode; a fine-tuned denoiser comes after it, before what denoises.
        denoiser = fit if tunes else []
        if stage == "match":
            wanted, _ = self.match_set(shard)
            experts = [("experts", job) for job in self.expert_jobs(wanted.method)]
            shards = self.shards if experts else [shard.rpartition("-")[2]]
            return [*(("encode", number) for number in shards), *experts, *denoiser]
        if stage == "cluster":
            return [("encode", shard)]
        if stage == "invert":
            return [("encode", shard), *denoiser]
        name, _, number = shard.rpartition("-")
        method = self.config.methods[name]
        if not isinstance(method, DiffusionMethod):
            return [("encode", number)]
        clustered = method.prototypes is not None or any(isinstance(term, TransportTerm) for term in method.guidance)
        needs = [("cluster", number)] if clustered else []
        needs += [("invert", number)] if isinstance(method.start, GaussianStart) else []
        return [*needs, *denoiser] or fit

    @property
    def _feature_jobs(self) -> list[tuple[str, str]]:
        """Return the job that makes what gives features, if there is one."""
        if self.config.evaluation.feature_space != "teacher":
            return []
        return [("teacher", self.teacher_job(self.soft_protocols[0]))]

    def _evaluate_shards(self, method: str, ipc: int) -> list[str]:
        return [f"{method}-ipc{ipc}-{chunk:03d}" for chunk in range(len(self._chunks(method, ipc)))]

    @remembered
    def _chunks(self, method: str, ipc: int) -> list[list[Training]]:
        """Part the trainings of a cell into jobs, each of trainings that want as many GPUs and nodes, the fewest first."""
        size, alike = self.config.evaluation.trainings_per_job, defaultdict[tuple[int, int], list[Training]](list)
        for training in self.trainings(method, ipc):
            alike[training.architecture.gpus, training.architecture.nodes].append(training)
        return [
            group[begin : begin + size] for _, group in sorted(alike.items()) for begin in range(0, len(group), size)
        ]

    # ---------------------------------------------------------------- checks

    def check(self) -> None:
        """Refuse what would fail late: a start off the grid, a class that the backbone does not know or that is too small.

        Raises:
            ConfigError, DataError, BackboneError: naming the key or the class, and the remedy.
        """
        for name, method in self.config.compared().items():
            if isinstance(method, DiffusionMethod):
                self._check_grid(name, method)
            elif isinstance(method, MatchingMethod):
                try:
                    offset_timesteps(self.backbone.timesteps, method.chain.steps)
                except ValueError as error:
                    raise ConfigError(f"methods.{name}.chain: {error}") from None
        self._check_students()
        self._check_pools()
        if self.config.backbone.finetune is not None:
            self._check_finetune()
        if self.config.evaluation.set_metrics:
            _ = self.feature_space
        for name in self.classes:
            self.backbone.label_of(name)
            self.catalog.count(name, "test")
        most, needing = max(
            ((self._images_needed(m), n) for n, m in self.config.compared().items()), key=lambda need: need[0]
        )
        for name in self.classes if most else []:
            if (count := self.catalog.count(name, "train")) < most:
                raise DataError(
                    f"class {name}: has {count} training images, fewer than the {most} that {needing} needs at IPC "
                    f"{max(self.config.ipc)}. Add images, leave the class out with dataset.classes, or lower ipc."
                )

    def _check_students(self) -> None:
        """Refuse values of the protocols that do not fit together."""
        for protocol in self.config.evaluation.protocols:
            for ipc in self.config.ipc:
                for architecture in self.architectures(protocol):
                    try:
                        recipe = self.student(
                            Training(SampleSet(self.config.compare[0], ipc, 0), architecture, 0, protocol)
                        )
                    except ValueError as error:
                        raise ConfigError(f"evaluation ({protocol}, {architecture.name}): {error}") from None
                    student = STUDENTS[architecture.name]
                    if recipe.resolution < student.smallest:
                        raise ConfigError(
                            f"evaluation ({protocol}): {architecture.name} takes {student.smallest} pixels at least, not "
                            f"resolution {recipe.resolution}"
                        )
                    side = self.config.dataset.resolution if recipe.train_size == "native" else recipe.resolution
                    if side % recipe.patches:
                        raise ConfigError(
                            f"evaluation ({protocol}): patches {recipe.patches} do not divide images of {side} pixels"
                        )

    def _check_finetune(self) -> None:
        """Refuse to fine-tune what is not a DiT in diffusers format."""
        path = self.pretrained.path
        if "num_attention_heads" not in self.pretrained.denoiser_config:
            raise ConfigError(f"backbone.finetune: {path} has a U-Net; only a DiT can be fine-tuned")
        if path.is_file():
            raise ConfigError(
                f"backbone.finetune: {path} is in its authors' layout, which spaces the timestep's frequencies otherwise than "
                "diffusers does. Set backbone.path to a directory in diffusers format, such as facebook/DiT-XL-2-256."
            )

    def _images_needed(self, method: CoresetMethod | DiffusionMethod | MatchingMethod) -> int:
        """Return how many real images of a class a method cannot do without."""
        most = max(self.config.ipc)
        if isinstance(method, CoresetMethod):
            return most * method.parts
        if isinstance(method, MatchingMethod):
            return most
        targets = [term.targets for term in method.guidance if isinstance(term, TransportTerm)]
        return max([0 if method.prototypes is None else most, *targets])

    def _check_grid(self, name: str, method: DiffusionMethod) -> None:
        sampler, start, timesteps = method.sampler, method.start, self.backbone.timesteps
        try:
            grid = spaced_timesteps(timesteps, sampler.steps, sampler.spacing)
        except ValueError as error:
            raise ConfigError(f"methods.{name}.sampler: {error}") from None
        usable = grid[1:-1] if isinstance(start, GaussianStart) and start.legacy_offset else grid[1:]
        if isinstance(start, GaussianStart | PrototypeStart) and start.timestep not in usable:
            nearest = usable[abs(usable - start.timestep).argmin()]
            raise ConfigError(
                f"methods.{name}.start.timestep: got {start.timestep}, which is not on the grid of {sampler.steps} steps with "
                f"spacing {sampler.spacing}; the nearest is {nearest}"
            )

    def _check_pools(self) -> None:
        """Refuse clustering spaces that do not fit the backbone."""
        pools = {"cluster": self.config.cluster.pool}
        for name, method in self.config.compared().items():
            if isinstance(prototypes := getattr(method, "prototypes", None), KMeansPrototypes):
                pools[f"methods.{name}.prototypes"] = prototypes.pool
        for place, pool in pools.items():
            side = self.backbone.latent_side
            if side is not None and side % pool:
                raise ConfigError(f"{place}.pool: got {pool}, which does not divide the {side}x{side} latents")


PACK = "pack"


class Pack(Recipes):
    """Some classes of a run, whichever shards they are in, as one shard that is called ``pack``."""

    def __init__(self, config: RunConfig, classes: Sequence[str]):
        super().__init__(config)
        if unknown := sorted(set(classes) - set(self.classes)):
            raise ConfigError(f"class {unknown[0]}: is not one of the {len(self.classes)} classes of run {config.run}")
        self._packed = sorted(set(classes))

    @property
    def shards(self) -> list[str]:
        """The one shard."""
        return [PACK]

    def shard_classes(self, shard: str) -> list[str]:
        """Return the classes that were named."""
        return self._packed
