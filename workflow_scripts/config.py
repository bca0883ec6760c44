"""The typed configuration of a run.

``config.yaml`` holds ``defaults`` and named ``runs``; a run is the defaults, overlaid by the run (and by the run that it
``extends``), overlaid by every other top-level key (which is where ``snakemake --config`` and ``--set`` put theirs).
The result is validated here before anything runs.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from workflow_scripts.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]


class Strict(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Dataset(Strict):
    """Where the real images are, and how each becomes a square of ``resolution`` pixels."""

    source: Literal["digits", "imagefolder"] = Field(
        description="digits ships with scikit-learn; imagefolder is root/class/*.png"
    )
    root: Path | None = Field(None, description="training images, one folder per class (imagefolder)")
    test_root: Path | None = Field(None, description="held-out images in the same layout (imagefolder)")
    classes: tuple[str, ...] | None = Field(
        None, description="the classes to use, in label order; default: all, sorted"
    )
    resolution: PositiveInt = Field(256, description="side in pixels at which the backbone sees an image")
    crop: Literal["adm", "resize"] = Field(
        "adm", description="adm: halve, bicubic, centre crop; resize: bicubic short side, centre crop"
    )
    fingerprint: Literal["stat", "content"] = Field(
        "stat", description="what identifies an image: path, size and mtime, or a hash of its bytes"
    )
    on_bad_image: Literal["fail", "skip"] = Field(
        "fail", description="an unreadable image stops the run, or is left out and listed in the report"
    )

    @model_validator(mode="after")
    def _folders(self) -> Dataset:
        if self.source == "imagefolder" and (self.root is None or self.test_root is None):
            raise ValueError(
                "source imagefolder needs root and test_root, folders that hold one folder of images per class"
            )
        return self


class FitVAE(Strict):
    """A small KL autoencoder and its training."""

    channels: tuple[PositiveInt, ...] = Field(
        (16, 32, 64), description="channels per level; each level but the last halves the side"
    )
    latent_channels: PositiveInt = 4
    layers_per_block: PositiveInt = 1
    kl_weight: NonNegativeFloat = 1e-6
    steps: PositiveInt = 1800
    batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 2e-3


class FitDiT(Strict):
    """A class-conditional DiT with learned variance, and its training."""

    layers: PositiveInt = 6
    heads: PositiveInt = 4
    head_dim: PositiveInt = 32
    patch_size: PositiveInt = 2
    steps: PositiveInt = 8000
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 1e-3
    warmup: NonNegativeInt = 400
    weight_decay: NonNegativeFloat = 0.0
    ema: Fraction = Field(0.999, description="decay of the averaged weights, the ones that are kept")
    label_dropout: Fraction = Field(0.1, description="chance that a label is replaced by the null class, for guidance")


class Fit(Strict):
    """Train a backbone on the run's training images."""

    vae: FitVAE = FitVAE()
    dit: FitDiT = FitDiT()
    seed: Annotated[int, Field(ge=0, le=255)] = 0
    checkpoint_every: PositiveInt = Field(
        500, description="steps between checkpoints; a killed fit resumes at the last"
    )


class Backbone(Strict):
    """A pre-trained backbone in diffusers format, or one to be fitted."""

    path: str | None = Field(None, description="directory with transformer/, vae/ and scheduler/")
    fit: Fit | None = None

    @model_validator(mode="after")
    def _one(self) -> Backbone:
        if (self.path is None) == (self.fit is None):
            raise ValueError(
                "give either path (a backbone in diffusers format) or fit (train one on this run's images)"
            )
        return self


class Encode(Strict):
    """VAE encoding of the real images."""

    flip: Literal["none", "both"] = Field(
        "none", description="both: each image's mirror image counts as a further real image"
    )


class Cluster(Strict):
    """Hierarchical divisive clustering (ManifoldGD)."""

    max_leaves: PositiveInt = Field(128, description="leaves of the stored tree; one tree serves every IPC up to this")
    split_restarts: PositiveInt = Field(10, description="restarts of each 2-means split")
    pool: PositiveInt = Field(1, description="average-pool latents by this factor for the clustering space")
    seed: int = 0


SAMPLERS = ("ddpm", "ddim")


class Sampler(Strict):
    """The denoising loop. Published choices: DiT/MGD3/ManifoldGD are the defaults; D3HR uses ddim, leading, 4 channels."""

    kind: Literal["ddpm", "ddim"] = "ddpm"
    spacing: Literal["linspace", "leading"] = "linspace"
    steps: PositiveInt = 50
    cfg_scale: NonNegativeFloat = 4.0
    cfg_channels: PositiveInt = Field(
        3, description="latent channels that are guided: 3 as in DiT's own code, 4 as in diffusers"
    )
    variance: Literal["learned", "fixed"] = Field(
        "learned", description="ddpm only: the model's interpolation, or the posterior variance"
    )


class NoiseStart(Strict):
    """Start from white noise at the first timestep."""

    kind: Literal["noise"] = "noise"


class Inversion(Strict):
    """DDIM inversion of the real latents (D3HR 1.4)."""

    cfg_scale: NonNegativeFloat | None = Field(
        None, description="guidance during inversion; default: the sampler's, as published"
    )
    evaluate_at: Literal["next", "current"] = Field(
        "next", description="timestep given to the network: the code's choice, or the paper's"
    )
    refinements: NonNegativeInt = Field(0, description="fixed-point iterations per step")


class GaussianStart(Strict):
    """Start from a group drawn from the class's Gaussian in the inverted domain (D3HR)."""

    kind: Literal["gaussian"]
    timestep: PositiveInt = Field(600, description="where the class Gaussian is fitted and sampling starts")
    legacy_offset: bool = Field(
        False, description="start one grid step later than the statistics, as the released code does"
    )
    construction: Literal["random", "best_of_m", "moment_matched"] = "moment_matched"
    candidates: PositiveInt = Field(100_000, description="groups compared by best_of_m")
    weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = Field(
        (1.0, 1.0, 0.5), description="of mean, spread and skewness in best_of_m"
    )
    inversion: Inversion = Inversion()


class KMeansPrototypes(Strict):
    """k-means with k = IPC (MGD3)."""

    kind: Literal["kmeans"]
    restarts: PositiveInt = 1
    pool: PositiveInt = 1
    seed: int = 0


class LeafPrototypes(Strict):
    """The IPC leaves of the divisive tree (ManifoldGD's released code)."""

    kind: Literal["leaves"]


class MultiscalePrototypes(Strict):
    """Nodes of the divisive tree from ``start_depth`` downwards, coarse before fine (ManifoldGD's paper)."""

    kind: Literal["multiscale"]
    start_depth: NonNegativeInt = 2


class ModeTerm(Strict):
    """Pull x0 towards the row's prototype (MGD3, eq. 6 as released)."""

    term: Literal["mode"]
    scale: NonNegativeFloat = Field(0.1, description="lambda")
    stop: NonNegativeInt = Field(25, description="guide while the step index is above this")


class TangentTerm(Strict):
    """The mode pull projected on the local tangent space of real latents (ManifoldGD, eq. 4)."""

    term: Literal["tangent"]
    scale: NonNegativeFloat = 0.1
    stop: NonNegativeInt = 25
    neighbours: Annotated[int, Field(ge=2)] = Field(64, description="real latents that span the tangent space")
    neighbourhood: Literal["cluster", "class"] = Field(
        "cluster", description="at most as many neighbours as the prototype's cluster has members, or no such limit"
    )
    tangent_variance: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="share of the neighbourhood's variance that the tangent space keeps"
    )
    tangent_dim: PositiveInt | None = Field(None, description="fixed dimension instead of tangent_variance")
    kappa: Fraction = Field(0.0, description="share of the normal part that is kept: 0 the paper's projection, 1 MGD3")
    normal_pull: NonNegativeFloat = Field(0.0, description="eta: extra pull of x0 towards the tangent plane")


class ReleasedManifoldTerm(Strict):
    """The additive term of ManifoldGD's released code, to the letter (nearly inert: see the method's notes)."""

    term: Literal["released_manifold"]
    scale: NonNegativeFloat = 0.1
    stop: NonNegativeInt = 25
    radius: PositiveFloat = 0.1
    radius_growth: PositiveFloat = 2.0
    warmup: PositiveInt = 5
    schedule: Literal["exp", "linear", "cosine"] = "exp"
    cloud: Annotated[int, Field(ge=2)] = 300
    neighbours: Annotated[int, Field(ge=2)] = 12
    tangent_dim: PositiveInt = 3
    bandwidth: PositiveFloat = 0.1

    @model_validator(mode="after")
    def _enough(self) -> ReleasedManifoldTerm:
        if self.neighbours > self.cloud:
            raise ValueError(
                f"neighbours ({self.neighbours}) are chosen from the cloud, which has only {self.cloud} points"
            )
        return self


class CoresetMethod(Strict):
    """Real images of each class, chosen by a rule on their latents."""

    kind: Literal["coreset"]
    select: Literal["random", "herding", "kmeans"]
    summary: str = ""


class DiffusionMethod(Strict):
    """Images sampled from the backbone: start latents, prototypes, and a sum of guidance terms."""

    kind: Literal["diffusion"]
    start: Annotated[NoiseStart | GaussianStart, Field(discriminator="kind")] = NoiseStart()
    prototypes: (
        Annotated[KMeansPrototypes | LeafPrototypes | MultiscalePrototypes, Field(discriminator="kind")] | None
    ) = None
    guidance: tuple[Annotated[ModeTerm | TangentTerm | ReleasedManifoldTerm, Field(discriminator="term")], ...] = ()
    sampler: Sampler = Sampler()
    summary: str = ""

    @model_validator(mode="after")
    def _prototypes(self) -> DiffusionMethod:
        if self.guidance and self.prototypes is None:
            raise ValueError(
                "guidance pulls towards prototypes: name them (prototypes: kind: kmeans, leaves or multiscale)"
            )
        if self.prototypes is not None and not self.guidance:
            raise ValueError("prototypes are given but no guidance term uses them")
        terms = [term.term for term in self.guidance]
        if terms.count("tangent") > 1:
            raise ValueError("guidance: give one tangent term at most")
        return self


Method = Annotated[CoresetMethod | DiffusionMethod, Field(discriminator="kind")]


class Architecture(Strict):
    """A classifier that is trained on the distilled set."""

    name: Literal["convnet", "resnet_ap10", "resnet18"]
    width: PositiveInt | None = Field(None, description="channels of the first stage; default: the published width")


class Evaluation(Strict):
    """The hard-label protocol; everything left unset takes the protocol's published value."""

    protocol: Literal["hard-sgd", "hard-adamw"] = "hard-sgd"
    architectures: Annotated[tuple[Architecture, ...], Field(min_length=1)]
    repeats: PositiveInt = Field(1, description="trainings per distilled set")
    resolution: PositiveInt = Field(224, description="side in pixels at which classifiers see images")
    resample: Literal["bilinear", "bicubic"] = Field("bilinear", description="how images are scaled to that resolution")
    epochs: PositiveInt | dict[int, PositiveInt] | None = Field(
        None, description="one number, or one per IPC; default: the published rule"
    )
    batch_size: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    evaluations: PositiveInt = Field(100, description="how often the test accuracy is measured during a training")
    crop_scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = Field(
        (0.5, 1.0), description="area range of RandomResizedCrop"
    )
    flip: bool = True
    jitter: Fraction = 0.4
    lighting: NonNegativeFloat = 0.1
    cutmix: Fraction = Field(1.0, description="chance of CutMix per batch")
    trainings_per_job: PositiveInt = 1

    @model_validator(mode="after")
    def _range(self) -> Evaluation:
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale: got {list(self.crop_scale)}; the smaller area comes first")
        return self


class Compute(Strict):
    """How to compute. Only ``dtype`` may change a result; the rest are matters of speed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    encode_batch: PositiveInt = 64
    invert_batch: PositiveInt = 128
    sample_batch: PositiveInt = 128
    workers: PositiveInt = Field(4, description="threads that decode images")


class Report(Strict):
    """What the report shows."""

    sheet_classes: PositiveInt = 10
    sheet_images: PositiveInt = 10
    map_classes: PositiveInt = 10


class RunConfig(Strict):
    """Everything that determines a run."""

    run: Name
    title: str = ""
    results: Path = Path("results")
    shards: PositiveInt = Field(1, description="classes are split into this many jobs per stage")
    dataset: Dataset
    backbone: Backbone
    encode: Encode = Encode()
    cluster: Cluster = Cluster()
    sampler: Sampler = Field(
        Sampler(), description="default of every diffusion method; a method's own sampler keys win"
    )
    methods: dict[Name, Method] = Field(description="the methods that a run can compare")
    compare: Annotated[tuple[Name, ...], Field(min_length=1)] = Field(
        description="the methods that this run does compare"
    )
    ipc: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1, 2)
    evaluation: Evaluation
    compute: Compute = Compute()
    report: Report = Report()

    @model_validator(mode="before")
    @classmethod
    def _sampler_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("methods"), dict):
            shared = values.get("sampler")
            methods = {
                name: {**method, "sampler": merge(shared, method.get("sampler", {}))}
                if isinstance(method, dict) and isinstance(shared, dict) and method.get("kind") == "diffusion"
                else method
                for name, method in values["methods"].items()
            }
            return {**values, "methods": methods}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        for name in self.compare:
            if name not in self.methods:
                raise ValueError(
                    f"compare names the method {name!r}, which methods does not define: {_one_of(name, self.methods)}"
                )
        for name, method in self.compared().items():
            if (
                isinstance(method, DiffusionMethod)
                and method.sampler.kind != "ddpm"
                and any(isinstance(term, ReleasedManifoldTerm) for term in method.guidance)
            ):
                raise ValueError(f"methods.{name}: the released_manifold term is defined for sampler.kind ddpm only")
        for what, values in (("compare", self.compare), ("ipc", self.ipc), ("seeds", self.seeds)):
            if len(set(values)) != len(values):
                raise ValueError(f"{what} holds a value twice: {list(values)}")
        epochs = self.evaluation.epochs
        if isinstance(epochs, dict) and (unset := [ipc for ipc in self.ipc if ipc not in epochs]):
            raise ValueError(f"evaluation.epochs has no entry for IPC {unset}; it has {sorted(epochs)}")
        trees = [
            n
            for n in self.compare
            if isinstance(getattr(self.methods[n], "prototypes", None), LeafPrototypes | MultiscalePrototypes)
        ]
        if trees and max(self.ipc) > self.cluster.max_leaves:
            raise ValueError(
                f"cluster.max_leaves is {self.cluster.max_leaves}, but {trees[0]} needs at least {max(self.ipc)} at that IPC"
            )
        return self

    def compared(self) -> dict[str, CoresetMethod | DiffusionMethod]:
        """Return the compared methods by name, in the order given."""
        return {name: self.methods[name] for name in self.compare}

    def canonical(self) -> str:
        """Return the configuration as JSON that :func:`load_resolved` reads back to an equal one."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1)


def merge(base: Any, overlay: Any) -> Any:
    """Overlay nested mappings; any other value replaces what was there.

    A mapping that names another ``kind`` than the one below replaces it whole, because the old kind's keys mean nothing to
    it; both kinds of sampler have the same keys.
    """
    if not (isinstance(base, Mapping) and isinstance(overlay, Mapping)):
        return overlay
    old, new = base.get("kind"), overlay.get("kind")
    if old != new and new is not None and old is not None and new not in SAMPLERS:
        return dict(overlay)
    return {**base, **{key: merge(base[key], value) if key in base else value for key, value in overlay.items()}}


def resolve(document: Mapping[str, Any]) -> RunConfig:
    """Choose and validate the run that a configuration document names.

    Raises:
        ConfigError: with one line per mistake, each naming the key, what it got and what is allowed.
    """
    runs = _mapping(document.get("runs"), "runs")
    name = str(document.get("run"))
    if name not in runs:
        raise ConfigError(f"run: there is no run named {name!r}; {_one_of(name, runs)}")
    values: Any = {}
    for layer in (_mapping(document.get("defaults"), "defaults"), *_lineage(name, runs)):
        values = merge(values, {key: value for key, value in layer.items() if key != "extends"})
    overrides = {key: value for key, value in document.items() if key not in ("defaults", "runs")}
    return _validate(merge(values, overrides))


def load(path: Path, run: str | None = None, overrides: Iterable[str] = (), overlays: Iterable[Path] = ()) -> RunConfig:
    """Read a ``config.yaml``, overlay further files, choose a run and apply ``key.sub=value`` overrides (values are YAML)."""
    document = read_document(path, overlays)
    if run is not None:
        document["run"] = run
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override}: write key=value, for instance --set compute.sample_batch=64")
        try:
            nested: Any = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: the value is not YAML: {' '.join(str(error).split())}") from None
        for part in reversed(key.split(".")):
            nested = {part: nested}
        document = merge(document, nested)
    return resolve(document)


def read_document(path: Path, overlays: Iterable[Path] = ()) -> dict[str, Any]:
    """Read a ``config.yaml`` and overlay further files."""
    document = _read_yaml(path)
    for overlay in overlays:
        document = merge(document, _read_yaml(overlay))
    return document


def load_resolved(path: Path) -> RunConfig:
    """Read a configuration written by :meth:`RunConfig.canonical`, or a complete one in YAML."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        values = _read_yaml(path)  # which says what is wrong, if anything is
    return _validate(values)


def _lineage(name: str, runs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    layers: list[Mapping[str, Any]] = []
    seen: list[str] = []
    current: str | None = name
    while current is not None:
        if current not in runs:
            raise ConfigError(f"runs.{seen[-1]}.extends: there is no run named {current!r}; {_one_of(current, runs)}")
        if current in seen:
            raise ConfigError(f"runs.{name}.extends goes in a circle: {' -> '.join([*seen, current])}")
        seen.append(current)
        layer = _mapping(runs[current], f"runs.{current}")
        layers.insert(0, layer)
        current = layer.get("extends")
        if current is not None and not isinstance(current, str):
            raise ConfigError(f"runs.{seen[-1]}.extends: got {current!r}; give the name of one run")
    return layers


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: got {value!r}; expected a mapping of keys to values")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    return document


def _validate(values: Any) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        errors: list[dict[str, Any]] = [dict(e) for e in error.errors()]
        # What holds a wrong item is then said to be too short as well.
        inner = {e["loc"][:-1] for e in errors if e["loc"]}
        told = [e for e in errors if not (e["type"] == "too_short" and e["loc"] in inner)]
        raise ConfigError("\n".join(dict.fromkeys(_explain(e, values) for e in told))) from None


def _explain(error: dict[str, Any], values: Any) -> str:
    """Say in one line what is wrong at one key."""
    place, section = _locate(error["loc"], values)
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key; {_one_of(str(error['loc'][-1]), _allowed_keys(section))}"
    if error["type"] == "missing":
        return f"{place}: missing; it must be set"
    if error["type"] == "value_error":
        return f"{place or 'configuration'}: {message}"
    return f"{place}: got {error['input']!r}; {message[0].lower()}{message[1:]}"


def _locate(loc: tuple[Any, ...], values: Any) -> tuple[str, type[BaseModel] | None]:
    """Return the key path without the tags that pydantic adds for unions, and the section that holds the last key."""
    path: list[str] = []
    section: Any = RunConfig
    parent: Any = None
    node = values
    for part in loc:
        models = [m for m in _models(section) if m.__name__ == part or part in _tags(m)]
        if (
            isinstance(node, Mapping)
            and part not in node
            and models
            and part not in getattr(section, "model_fields", {})
        ):
            section = models[0]
            continue
        path.append(str(part))
        parent, section = section, _child(section, part)
        node = (
            node.get(part)
            if isinstance(node, Mapping)
            else node[part]
            if isinstance(node, list) and isinstance(part, int)
            else None
        )
    return ".".join(path), parent if isinstance(parent, type) else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models(argument)]


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    return tuple(
        tag
        for key in ("kind", "term")
        if key in model.model_fields
        for tag in getattr(model.model_fields[key].annotation, "__args__", ())
    )


def _child(section: Any, key: Any) -> Any:
    if isinstance(section, type) and issubclass(section, BaseModel):
        field = section.model_fields.get(str(key))
        return field.annotation if field else None
    models = _models(section)
    return models[0] if len(models) == 1 and isinstance(key, str) and key in models[0].model_fields else section


def _allowed_keys(section: type[BaseModel] | None) -> list[str]:
    return sorted(section.model_fields) if section and issubclass(section, BaseModel) else []


def _one_of(got: str, allowed: Iterable[str]) -> str:
    names = sorted(map(str, allowed))
    close = difflib.get_close_matches(got, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(names)}"
