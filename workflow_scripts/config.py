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

from workflow_scripts.data.imagenet import subset_classes, subset_names
from workflow_scripts.errors import ConfigError
from workflow_scripts.evaluation.protocols import (
    PROTOCOLS,
    STUDENTS,
    ArchitectureName,
    Decay,
    Dtype,
    Optimizer,
    Protocol,
    Quirk,
    Schedule,
    TrainSize,
)

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]


class Strict(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Generate(Strict):
    """How many images a made-up source makes for each class, and from which seed."""

    train: PositiveInt = 1000
    test: PositiveInt = 200
    seed: NonNegativeInt = 0


class Dataset(Strict):
    """Where the real images are, and how each becomes a square of ``resolution`` pixels."""

    source: Literal["digits", "digits-photo", "imagefolder", "imagenet", "class-tars", "webdataset", "parquet"] = Field(
        description="digits ships with scikit-learn; digits-photo paints them over photographs; imagefolder is "
        "root/class/*.png; imagenet finds out the layouts of root and test_root; the others name root's layout and find "
        "out test_root's"
    )
    generate: Generate = Field(Generate(), description="how many images digits-photo makes")
    root: Path | None = Field(None, description="training images: a folder, or a tar or parquet file")
    test_root: Path | None = Field(None, description="held-out images, in any layout (imagefolder: the same)")
    classes: tuple[str, ...] | None = Field(
        None, description="the classes to use, in label order; default: all, sorted"
    )
    subset: str | None = Field(None, description="a published subset of ImageNet in place of classes, e.g. imagewoof")
    test_labels: Path | None = Field(
        None, description="file with the classes of flat test images; default: one that lies near them"
    )
    resolution: PositiveInt = Field(256, description="side in pixels at which the backbone sees an image")
    crop: Literal["adm", "resize"] = Field(
        "adm", description="adm: halve, bicubic, centre crop; resize: short side, centre crop"
    )
    resample: Literal["bilinear", "bicubic", "lanczos", "box"] = Field(
        "bicubic", description="interpolation of crop: resize; adm is bicubic by definition"
    )
    fingerprint: Literal["stat", "content"] = Field(
        "stat", description="what identifies an image: name, size and mtime, or name and a hash of its bytes"
    )
    on_bad_image: Literal["fail", "skip"] = Field(
        "fail", description="an unreadable image stops the run, or is left out and listed in the report"
    )

    @model_validator(mode="after")
    def _subset(self) -> Dataset:
        if self.subset is not None:
            if self.classes is not None:
                raise ValueError("give classes or subset, not both")
            if self.subset not in subset_names():
                raise ValueError(f"subset: there is none named {self.subset!r}; {one_of(self.subset, subset_names())}")
        return self

    @model_validator(mode="after")
    def _interpolation(self) -> Dataset:
        if self.crop == "adm" and self.resample != "bicubic":
            raise ValueError(f"crop adm is bicubic; resample: {self.resample} needs crop: resize")
        return self

    @property
    def on_disk(self) -> bool:
        """Whether the images are files of the user's."""
        return not self.source.startswith("digits")

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """What label indices stand for: ImageNet's sorted WordNet ids, or None for what the files say."""
        return subset_classes("imagenet1k") if self.source == "imagenet" or self.subset is not None else None

    @property
    def chosen_classes(self) -> tuple[str, ...] | None:
        """The classes to use in label order, or None for all that the source has."""
        return self.classes if self.subset is None else subset_classes(self.subset)

    @model_validator(mode="after")
    def _folders(self) -> Dataset:
        if self.on_disk and (self.root is None or self.test_root is None):
            raise ValueError(
                f"source {self.source} needs root and test_root, where the training and the test images are"
            )
        return self


class FitVAE(Strict):
    """A small autoencoder, KL or VQ, and its training."""

    channels: tuple[PositiveInt, ...] = Field(
        (16, 32, 64), description="channels per level; each level but the last halves the side"
    )
    latent_channels: PositiveInt = 4
    layers_per_block: PositiveInt = 1
    kl_weight: NonNegativeFloat = 1e-6
    codes: Annotated[int, Field(ge=2)] = Field(512, description="entries of the codebook; of no use to autoencoder: kl")
    commitment: NonNegativeFloat = Field(1.0, description="weight of the codebook's losses; likewise")
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


class FitUNet(Strict):
    """A class-conditional U-Net that attends to the label's embedding, and its training."""

    channels: tuple[PositiveInt, ...] = Field(
        (64, 128), description="channels per level; each but the last halves the side"
    )
    layers_per_block: PositiveInt = 1
    heads: PositiveInt = 4
    embedding: PositiveInt = Field(128, description="size of a label's embedding")
    steps: PositiveInt = 8000
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 5e-4
    warmup: NonNegativeInt = 400
    weight_decay: NonNegativeFloat = 0.0
    ema: Fraction = 0.999
    label_dropout: Fraction = 0.1


class Fit(Strict):
    """Train a backbone on the run's training images."""

    autoencoder: Literal["kl", "vq"] = "kl"
    denoiser: Literal["dit", "unet"] = "dit"
    vae: FitVAE = FitVAE()
    dit: FitDiT = FitDiT()
    unet: FitUNet = FitUNet()
    seed: Annotated[int, Field(ge=0, le=255)] = 0
    checkpoint_every: PositiveInt = Field(
        500, description="steps between checkpoints; a killed fit resumes at the last"
    )

    def identity(self) -> dict[str, Any]:
        """Return what determines the fitted backbone; what it does not use is left out, and so are the kinds of old."""
        unused = {"checkpoint_every", "dit" if self.denoiser == "unet" else "unet"}
        content = self.model_dump(mode="json", exclude=unused)
        for key in ("codes", "commitment") if self.autoencoder == "kl" else ("kl_weight",):
            del content["vae"][key]
        return {key: value for key, value in content.items() if value not in ("kl", "dit")}


class FineTune(Strict):
    """Go on training a pre-trained DiT on the latents of the run's training images; its autoencoder stays as it is."""

    trainable: Literal["difffit", "all"] = Field(
        "difffit",
        description="biases, norms, label embeddings and a scale for each block's branches (DiffFit); or all weights",
    )
    steps: PositiveInt = 24_000
    batch_size: PositiveInt = Field(256, description="of all GPUs together")
    learning_rate: PositiveFloat | None = Field(None, description="default: 1e-3 for difffit, 1e-4 for all")
    warmup: NonNegativeInt = 500
    weight_decay: NonNegativeFloat = 0.0
    ema: Fraction = Field(0.9999, description="decay of the averaged weights, the ones that are kept")
    label_dropout: Fraction = Field(0.1, description="chance that a label is replaced by the null class, for guidance")
    new_classes: Literal["mean", "random"] = Field(
        "mean",
        description="embedding with which classes begin that the backbone does not know by name: the mean of those it knows, "
        "or a draw with their mean and spread; those that it knows keep theirs",
    )
    seed: Annotated[int, Field(ge=0, le=255)] = 0
    gpus: PositiveInt = Field(1, description="share the batch among so many; changes results by rounding only")
    micro_batch: PositiveInt = Field(32, description="images per GPU in one pass; likewise")
    checkpoint_every: PositiveInt = Field(
        500, description="steps between checkpoints; a killed fit resumes at the last"
    )

    @model_validator(mode="after")
    def _shared(self) -> FineTune:
        if self.batch_size % self.gpus:
            raise ValueError(f"batch_size ({self.batch_size}) cannot be shared equally among {self.gpus} gpus")
        return self

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return self.learning_rate or {"difffit": 1e-3, "all": 1e-4}[self.trainable]

    def identity(self) -> dict[str, Any]:
        """Return what determines the fine-tuned weights."""
        content = self.model_dump(mode="json", exclude={"gpus", "micro_batch", "checkpoint_every"})
        return {**content, "learning_rate": self.rate}


class Backbone(Strict):
    """A pre-trained backbone as it is or to be fine-tuned, or one to be fitted."""

    path: str | None = Field(
        None,
        description="directory with transformer/ or unet/, vae/ and scheduler/; a repository's id in the Hugging Face cache, "
        "such as facebook/DiT-XL-2-256; or a checkpoint of DiT's or latent diffusion's authors (.pt, .safetensors)",
    )
    vae: str | None = Field(
        None, description="autoencoder in place of the backbone's own: a directory, or a repository's id in the cache"
    )
    finetune: FineTune | None = Field(None, description="train the backbone at path further on this run's images")
    fit: Fit | None = None

    @model_validator(mode="after")
    def _one(self) -> Backbone:
        if (self.path is None) == (self.fit is None):
            raise ValueError(
                "give either path (a backbone in diffusers format) or fit (train one on this run's images)"
            )
        if self.fit is not None and self.vae is not None:
            raise ValueError("vae belongs to path; fit trains an autoencoder of its own")
        if self.fit is not None and self.finetune is not None:
            raise ValueError("finetune belongs to path, the backbone to begin with; fit begins with none")
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
    """How the real latents are taken to the start timestep (D3HR 1.4)."""

    map: Literal["ddim", "noise"] = Field(
        "ddim", description="ddim: deterministic inversion; noise: forward noising, the control without a network"
    )
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
    construction: Literal["random", "best_of_m", "moment_matched"] = Field(
        "moment_matched",
        description="independent draws; the published search over groups; or one group made to match mean and spread exactly. "
        "At IPC 1, which has no spread, all are one plain draw",
    )
    candidates: PositiveInt = Field(100_000, description="groups compared by best_of_m")
    weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = Field(
        (1.0, 1.0, 0.5), description="of mean, spread and skewness in best_of_m"
    )
    inversion: Inversion = Inversion()


class PrototypeStart(Strict):
    """Start from each image's prototype, noised to a timestep (D4M)."""

    kind: Literal["prototype"]
    timestep: PositiveInt = Field(700, description="how far the prototype is noised; 700 of 1000 is D4M's strength 0.7")


class ClassLabels(Strict):
    """Tell the network the class's label, as it was trained."""

    kind: Literal["class"] = "class"


class SoftLabelSchedule(Strict):
    """Tell the network a label that sharpens while sampling goes on (DMGD, semantic matching). Defaults as in the code."""

    kind: Literal["soft"]
    explore_above: PositiveInt = Field(900, description="timestep above which the class is not told at all")
    refine_below: PositiveInt = Field(500, description="timestep from which on the plain label is told")
    noise: NonNegativeFloat = Field(0.06, description="beta_n, amount of noise in the label")
    other: NonNegativeFloat = Field(0.01, description="beta_s, amount of another class's label")
    law: Literal["uniform", "gaussian"] = Field(
        "uniform", description="of the noise: the code's U[0, 1), or the paper's N(0, 1)"
    )
    mixing: Literal["variance", "linear"] = Field(
        "variance", description="weight of what is mixed in: sqrt(1 - s) as in the code, or 1 - sqrt(s) as in the paper"
    )
    null_label: Literal["mixed", "plain"] = Field(
        "mixed", description="mix into the null label too, as the code does, or not"
    )
    renormalise: bool = Field(
        True, description="restore mean and spread of the embeddings after mixing, as the code does"
    )
    other_while_exploring: bool = Field(
        False, description="mix the other class in while exploring too, as in the paper"
    )
    pool: Literal["run", "backbone"] = Field(
        "run", description="other classes to draw from: the run's, or all the backbone knows"
    )

    @model_validator(mode="after")
    def _order(self) -> SoftLabelSchedule:
        if self.explore_above <= self.refine_below:
            raise ValueError(f"explore_above ({self.explore_above}) must be above refine_below ({self.refine_below})")
        return self


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
    scale: NonNegativeFloat = Field(0.1, description="lambda")
    stop: NonNegativeInt = Field(25, description="guide while the step index is above this")
    neighbours: Annotated[int, Field(ge=2)] = Field(64, description="real latents that span the tangent space")
    around: Literal["prototype", "x0"] = Field(
        "prototype",
        description="they are those nearest to the prototype, or to the current prediction x0, chosen anew at each step",
    )
    noisy: bool = Field(
        False, description="bring them to the noise level with noise of their own at each step, as published (eq. 5)"
    )
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


class TransportTerm(Strict):
    """Optimal transport from a class's images to its k-means masses (DMGD, distribution matching). Defaults as published."""

    term: Literal["transport"]
    scale: NonNegativeFloat = Field(
        0.5, description="rho; with unit_gradient the pull per step, in standard deviations"
    )
    window: tuple[NonNegativeInt, NonNegativeInt] = Field((30, 45), description="step indices, both included")
    targets: PositiveInt = Field(10, description="K, k-means masses that stand for the class, whatever the IPC")
    restarts: PositiveInt = Field(1, description="of that k-means")
    seed: int = Field(0, description="of that k-means")
    epsilon: PositiveFloat = Field(0.1, description="entropic regularisation, in units of the chord distance")
    sweeps: PositiveInt = Field(5, description="Sinkhorn iterations")
    log_domain: bool = Field(False, description="iterate on potentials: needed where epsilon is small")
    unit_gradient: bool = Field(
        False, description="scale each gradient to length sqrt(D), so that it does not fade with IPC"
    )
    differentiate_plan: bool = Field(
        False, description="back-propagate through the iterations, as the code does; the paper does not"
    )
    matching: Literal["greedy", "synchronous"] = Field(
        "greedy", description="images of a class one after another, as published, or all at once"
    )

    @model_validator(mode="after")
    def _order(self) -> TransportTerm:
        if self.window[0] > self.window[1]:
            raise ValueError(f"window: got {list(self.window)}; the lower step comes first")
        return self


class CoresetMethod(Strict):
    """Real images of each class, chosen by a rule on their latents."""

    kind: Literal["coreset"]
    select: Literal["random", "herding", "kmeans", "kcenter", "crops"] = Field(
        description="draw; follow the class mean; nearest to k-means centroids; greedy k-center; 2 x 2 collages of random ones"
    )
    summary: str = ""
    paper: str = Field("", description="where the method is from; it is shown and changes nothing")

    @property
    def seeded(self) -> bool:
        """Say whether the choice depends on the seed."""
        return self.select not in ("herding", "kcenter")

    @property
    def parts(self) -> int:
        """Return how many real images make one distilled image."""
        return 4 if self.select == "crops" else 1


class DiffusionMethod(Strict):
    """Images sampled from the backbone: start latents, prototypes, and a sum of guidance terms."""

    kind: Literal["diffusion"]
    start: Annotated[NoiseStart | GaussianStart | PrototypeStart, Field(discriminator="kind")] = NoiseStart()
    labels: Annotated[ClassLabels | SoftLabelSchedule, Field(discriminator="kind")] = ClassLabels()
    prototypes: (
        Annotated[KMeansPrototypes | LeafPrototypes | MultiscalePrototypes, Field(discriminator="kind")] | None
    ) = None
    guidance: tuple[
        Annotated[ModeTerm | TangentTerm | ReleasedManifoldTerm | TransportTerm, Field(discriminator="term")], ...
    ] = ()
    sampler: Sampler = Sampler()
    summary: str = ""
    paper: str = Field("", description="where the method is from; it is shown and changes nothing")

    @model_validator(mode="after")
    def _prototypes(self) -> DiffusionMethod:
        terms = [term.term for term in self.guidance]
        pulled = [name for name in terms if name != "transport"]
        starts = isinstance(self.start, PrototypeStart)
        if (pulled or starts) and self.prototypes is None:
            raise ValueError(
                f"{'guidance pulls towards' if pulled else 'start noises'} prototypes: name them "
                "(prototypes: kind: kmeans, leaves or multiscale)"
            )
        if self.prototypes is not None and not pulled and not starts:
            raise ValueError("prototypes are given, but neither start nor a guidance term uses them")
        for name in ("tangent", "transport"):
            if terms.count(name) > 1:
                raise ValueError(f"guidance: give one {name} term at most")
        return self


class Residual(Strict):
    """What LD3M's reverse process is pulled to, with a weight w that decays along it. Defaults as in the released code."""

    target: Literal["x0", "mean"] = Field(
        "x0",
        description="what is blended: the predicted clean latent, or the mean of the reverse step (the paper's eq. 7)",
    )
    source: Literal["quantised", "latent", "noised"] = Field(
        "quantised",
        description="with what: the quantised start latent (itself for KL), itself, or its noised state (eq. 7)",
    )
    schedule: Literal["index", "literal"] = Field(
        "index", description="w: j/(S-1), from 1 to exactly 0; or the paper's t/T, from 1 to 1/S"
    )
    strength: Fraction = Field(1.0, description="factor of w; 0 is plain sampling")


class Chain(Strict):
    """LD3M's short differentiable reverse process, on the grid 1, 1 + k, 1 + 2k, ... with k = T // steps."""

    steps: Annotated[int, Field(ge=2)] = 10
    update: Literal["ddim", "ddpm"] = Field(
        "ddim", description="DDIM with eta 0 as in the code, or DDPM as in the paper"
    )
    ddpm_noise: Literal["deviation", "variance"] = Field(
        "deviation", description="factor of DDPM's noise: sigma, or sigma^2 as eq. 7 is printed"
    )
    cfg_scale: NonNegativeFloat = 3.0
    residual: Residual = Residual()
    noise: Literal["fixed", "resample"] = Field(
        "fixed", description="an image's start noise: always the same, or drawn anew in each iteration"
    )
    clamp: Literal["straight_through", "hard"] = Field(
        "straight_through",
        description="gradient of pixels beyond [-1, 1]: passed on, or zero as published, which leaves them there",
    )


DSAOperation = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]
DSA_OPERATIONS: tuple[DSAOperation, ...] = ("color", "crop", "cutout", "flip", "scale", "rotate")


class Objective(Strict):
    """What all objectives of matching have: learning rates, students and augmentation."""

    lr_latents: NonNegativeFloat
    lr_embeddings: NonNegativeFloat
    width: PositiveInt = Field(
        128, description="channels of the ConvNet that compares; its depth follows the resolution"
    )
    dsa: tuple[DSAOperation, ...] = Field(
        DSA_OPERATIONS, description="one of these augmentations per batch; empty: none"
    )


class DCObjective(Objective):
    """Gradient matching at random networks (DC). Learning rates as published for LD3M."""

    kind: Literal["dc"]
    lr_latents: NonNegativeFloat = 0.1
    lr_embeddings: NonNegativeFloat = 0.1
    batch_real: PositiveInt = 256


class DMObjective(Objective):
    """Matching of mean features of random networks (DM). Learning rates as published for LD3M."""

    kind: Literal["dm"]
    lr_latents: NonNegativeFloat = 1.0
    lr_embeddings: NonNegativeFloat = 1.0
    batch_real: PositiveInt = 256


class Experts(Strict):
    """Trainings on the real images, whose trajectories MTT follows."""

    count: PositiveInt = Field(100, description="the code's readme has 5000, of 10 MB each at 128 pixels")
    learning_rate: PositiveFloat = 0.01
    batch_size: PositiveInt = 256


class MTTObjective(Objective):
    """Trajectory matching (MTT). Learning rates, epochs and steps as published for LD3M."""

    kind: Literal["mtt"]
    lr_latents: NonNegativeFloat = 1000.0
    lr_embeddings: NonNegativeFloat = 1000.0
    max_start: PositiveInt = Field(2, description="students start at an expert's epoch 0 to max_start - 1")
    expert_epochs: PositiveInt = Field(2, description="M, epochs of the expert that a student is to cover")
    student_steps: PositiveInt = Field(10, description="N, steps that it has for that")
    batch_synthetic: PositiveInt | None = Field(None, description="images per student step; default: all")
    student_lr: PositiveFloat = Field(0.01, description="beta at the start; it is learned")
    lr_student_lr: NonNegativeFloat = 1e-6
    gradient: Literal["tesla", "unrolled"] = Field(
        "tesla", description="each student step's parameters taken as constant, or the graph of all steps (MTT)"
    )
    halve_gradient: bool = Field(False, description="halve the images' gradient, as a slip in the released code does")
    experts: Experts = Experts()

    @property
    def epochs_read(self) -> int:
        """Return the last epoch of an expert that is ever looked at."""
        return self.max_start - 1 + self.expert_epochs


class MatchingMethod(Strict):
    """Latents and class embeddings, learned through the denoiser by matching real images (LD3M)."""

    kind: Literal["matching"]
    objective: Annotated[DCObjective | DMObjective | MTTObjective, Field(discriminator="kind")]
    chain: Chain = Chain()
    initial: Literal["real", "noise"] = Field(
        "real", description="start from latents of real images, or from white noise"
    )
    iterations: PositiveInt = 10_000
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    legacy_colour: bool = Field(
        False, description="normalise synthetic images with another mean than real ones, as the released code does"
    )
    chunk: PositiveInt = Field(10, description="images denoised at once; changes results by rounding only")
    checkpointing: bool = Field(
        True, description="recompute activations in the backward pass: a third slower, far less memory"
    )
    checkpoint_every: PositiveInt = Field(
        100, description="iterations between checkpoints, at which a killed job resumes"
    )
    experts_per_job: PositiveInt = 10
    summary: str = ""
    paper: str = Field("", description="where the method is from; it is shown and changes nothing")


Method = Annotated[CoresetMethod | DiffusionMethod | MatchingMethod, Field(discriminator="kind")]


AreaRange = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]


class Architecture(Strict):
    """A classifier."""

    name: ArchitectureName = Field(
        description="convnet, resnet_ap10 and resnet18 have instance norm (hard labels), glad_* are GLaD's, convnet_bn is "
        "RDED's, the others torchvision's"
    )
    width: PositiveInt | None = Field(None, description="channels of the first stage; default: the published width")

    @model_validator(mode="after")
    def _width(self) -> Architecture:
        if self.width is not None and STUDENTS[self.name].width is None:
            raise ValueError(f"width: {self.name} has one width only")
        return self


class Student(Architecture):
    """A classifier that is trained on the distilled set, and on how many GPUs at once."""

    gpus: PositiveInt = Field(
        1, description="share each batch among so many; in no digest: changes results by rounding, and dropout"
    )
    nodes: PositiveInt = Field(1, description="spread the GPUs over so many nodes, at least two on each; likewise")

    @model_validator(mode="after")
    def _spread(self) -> Student:
        if self.nodes > 1 and (self.gpus % self.nodes or self.gpus < 2 * self.nodes):
            raise ValueError(
                f"gpus: {self.gpus} cannot be spread over {self.nodes} nodes: each takes as many, at least 2"
            )
        return self


class FitTeacher(Strict):
    """A training of the teacher on the run's real training images: SGD, cosine to 0, random crops."""

    epochs: PositiveInt = 100
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 0.05
    weight_decay: NonNegativeFloat = 5e-4
    crop_scale: AreaRange = (0.25, 1.0)
    flip: bool = True
    dtype: Dtype = "float32"
    seed: NonNegativeInt = 0


class Teacher(Strict):
    """The network whose opinions are soft labels."""

    architecture: Architecture = Architecture(name="resnet18_bn")
    weights: Path | None = Field(
        None, description="file of its weights (.pth, .pt or .safetensors), as torchvision or this project writes them"
    )
    classes: Path | None = Field(
        None,
        description="JSON list of what its outputs stand for; default: the run's classes, or, for 1000 outputs, ImageNet's",
    )
    fit: FitTeacher | None = None

    @model_validator(mode="after")
    def _one(self) -> Teacher:
        if (self.weights is None) == (self.fit is None):
            raise ValueError("give either weights (a file) or fit (train one on this run's images)")
        return self


class ProtocolSettings(Strict):
    """What overrides a protocol's published values; what is left unset keeps them. See `stillhouse protocols`."""

    architectures: Annotated[tuple[Student, ...], Field(min_length=1)] | None = None
    repeats: PositiveInt | None = Field(None, description="trainings per distilled set")
    resolution: PositiveInt | None = Field(None, description="side in pixels at which classifiers see images")
    epochs: PositiveInt | dict[int, PositiveInt] | None = Field(None, description="one number, or one per IPC")
    batch_size: PositiveInt | None = None
    optimizer: Optimizer | None = None
    learning_rate: PositiveFloat | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    weight_decay: NonNegativeFloat | None = None
    decay: Decay | None = Field(None, description="all parameters decay, or only matrices (of more than one dimension)")
    schedule: Schedule | None = Field(
        None, description="of the learning rate; half-cosine ends at one half, warmup-cosine rises over half the epochs"
    )
    milestones: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(
        None, description="of schedule step: fractions of the epochs"
    )
    gamma: PositiveFloat | None = Field(None, description="of schedule step: factor at each milestone")
    ema: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="decay of averaged weights; 0: the last ones"
    )
    train_size: TrainSize | None = Field(None, description="size of images before the random crop")
    patches: PositiveInt | None = Field(None, description="tiles per side that are shuffled; 1: none")
    crop_scale: AreaRange | None = Field(None, description="area range of RandomResizedCrop; [1, 1]: all of the image")
    flip: bool | None = None
    jitter: Fraction | None = Field(None, description="strength of brightness, contrast and saturation")
    lighting: NonNegativeFloat | None = Field(None, description="strength of PCA lighting")
    dsa: tuple[DSAOperation, ...] | None = Field(None, description="one of these augmentations per batch")
    cutmix: Fraction | None = Field(None, description="chance of CutMix per batch")
    mixup: Fraction | None = Field(None, description="chance of MixUp per batch")
    mix_alpha: PositiveFloat | None = Field(None, description="parameter of their Beta distribution")
    temperature: PositiveFloat | None = None
    test_resize: Annotated[float, Field(ge=1)] | None = Field(
        None, description="short side of a test image before the centre crop, in units of the resolution"
    )
    evaluations: PositiveInt | None = Field(
        None, description="how often the test accuracy would be measured in all epochs"
    )
    test_from: Fraction | None = Field(None, description="share of the epochs before it is first measured")
    dtype: Dtype | None = None
    published_quirks: tuple[Quirk, ...] | None = Field(
        None,
        description="double-batchnorm: a second forward pass per step moves the running statistics twice, as published",
    )
    teacher: Teacher | None = None
    label_seed: NonNegativeInt | None = Field(None, description="of stored labels; default 42, as published")

    @model_validator(mode="after")
    def _range(self) -> ProtocolSettings:
        if self.crop_scale is not None and self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale: got {list(self.crop_scale)}; the smaller area comes first")
        return self


class OneProtocol(ProtocolSettings):
    """What overrides one protocol."""

    preset: Name | None = Field(
        None, description="the protocol that this is a variant of, if its name is not a protocol's"
    )


class DDRanking(Strict):
    """Which of the run's protocols DD-Ranking's scores are made from (`stillhouse dd-ranking`)."""

    hard: Name = Field(description="protocol with hard labels")
    own: Name = Field(description="protocol with the method's own labels and augmentation")
    plain: Name | None = Field(None, description="the same without augmentation; without it there is no ARS")
    real: dict[ArchitectureName, Annotated[float, Field(ge=0, le=100)]] = Field(
        description="top-1 in percent with hard labels on the full real set, by student: HLR is measured against it"
    )
    baseline: Name = Field("random", description="compared method that draws real images at random")


class Evaluation(ProtocolSettings):
    """The protocols by which sets are judged. Values set here are for all of them; those in ``settings`` win for one."""

    protocols: Annotated[tuple[Name, ...], Field(min_length=1)] = Field(
        ("hard-sgd",), description="names of protocols, or of variants in settings"
    )
    settings: dict[Name, OneProtocol] = Field({}, description="values for one protocol each, by its name")
    resample: Literal["bilinear", "bicubic"] = Field("bilinear", description="how images are scaled to the resolution")
    trainings_per_job: PositiveInt = 1
    dd_ranking: DDRanking | None = None
    set_metrics: bool = Field(True, description="measure each distilled set against the real images, without training")
    features: Literal["auto", "inception", "teacher", "latents"] = Field(
        "auto",
        description="what sets are measured on: Inception's features (FID and KID), those of the teacher of the first protocol "
        "with soft labels, or VAE latents; auto: the first of these that the run has",
    )
    inception: Path | None = Field(
        None,
        description="weights of Inception-v3, for FID and KID: torch-fidelity's or pytorch-fid's file, or torchvision's "
        "(which give other numbers, called otherwise)",
    )

    @model_validator(mode="after")
    def _known(self) -> Evaluation:
        for name in dict.fromkeys((*self.protocols, *self.settings)):
            own = self.settings.get(name)
            wanted = name if own is None or own.preset is None else own.preset
            if wanted not in PROTOCOLS:
                raise ValueError(
                    f"there is no protocol named {wanted!r}; {one_of(wanted, PROTOCOLS)}, or a variant of one "
                    "(settings: NAME: preset: PROTOCOL)"
                )
        if len(set(self.protocols)) != len(self.protocols):
            raise ValueError(f"protocols holds a value twice: {list(self.protocols)}")
        ranking = self.dd_ranking
        for ranked in (ranking.hard, ranking.own, ranking.plain) if ranking is not None else ():
            if ranked is not None and ranked not in self.protocols:
                raise ValueError(
                    f"dd_ranking names {ranked!r}, which is none of protocols: {', '.join(self.protocols)}"
                )
        for name in self.soft_protocols:
            if self.value(name, "teacher") is None:
                raise ValueError(
                    f"protocol {name} needs a teacher: set teacher.weights to a file, or teacher.fit to {{}} to train one "
                    f"on this run's images (in evaluation, or for this protocol in evaluation.settings.{name})"
                )
        if self.features == "inception" and self.inception is None:
            raise ValueError("features: inception needs the file of its weights (evaluation.inception)")
        if self.features == "teacher" and not self.soft_protocols:
            raise ValueError(
                f"features: teacher needs a protocol with soft labels, and there is none among {', '.join(self.protocols)}"
            )
        return self

    @property
    def soft_protocols(self) -> list[str]:
        """The protocols with a teacher."""
        return [name for name in self.protocols if self.preset(name).values["target"] != "hard"]

    @property
    def feature_space(self) -> Literal["inception", "teacher", "latents"]:
        """What sets are measured on."""
        if self.features != "auto":
            return self.features
        if self.inception is not None:
            return "inception"
        return "teacher" if self.soft_protocols else "latents"

    def preset(self, protocol: str) -> Protocol:
        """Return the published protocol that a name stands for."""
        own = self.settings.get(protocol)
        return PROTOCOLS[protocol if own is None or own.preset is None else own.preset]

    def value(self, protocol: str, key: str) -> Any:
        """Return what is set for a protocol, or None."""
        own = getattr(self.settings.get(protocol), key, None)
        return getattr(self, key) if own is None else own


class Compute(Strict):
    """How to compute. Only ``dtype`` may change a result; the rest are matters of speed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    encode_batch: PositiveInt = 64
    invert_batch: PositiveInt = 128
    sample_batch: PositiveInt = 128
    workers: PositiveInt = Field(4, description="threads that decode images")
    students_at_once: PositiveInt | None = Field(
        None,
        description="trainings of small networks that share a step; changes results by rounding only; default: 8 on a GPU",
    )
    gpu: str | None = Field(
        None,
        description="what plan counts hours of, such as h100; default: the device that stillhouse bench measured last",
    )
    price_per_gpu_hour: PositiveFloat | None = Field(None, description="in any currency; plan multiplies it")
    attempts: PositiveInt = Field(
        3, description="failures of a class after which it is set aside, until `stillhouse retry`"
    )


class Report(Strict):
    """What the report shows."""

    sheet_classes: PositiveInt = 10
    sheet_images: PositiveInt = 10
    map_classes: PositiveInt = 10
    figure_files: bool = Field(True, description="write the figures as SVG and PDF too, beside the page")
    pairs: NonNegativeInt = Field(6, description="closest pairs of a synthetic and a real image shown of each method")


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
                    f"compare names the method {name!r}, which methods does not define: {one_of(name, self.methods)}"
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
        ranking = self.evaluation.dd_ranking
        if ranking is not None and ranking.baseline not in self.compare:
            raise ValueError(
                f"evaluation.dd_ranking.baseline: {ranking.baseline!r} is none of compare: {', '.join(self.compare)}"
            )
        for name in self.evaluation.protocols:
            epochs = self.evaluation.value(name, "epochs")
            if isinstance(epochs, dict) and (unset := [ipc for ipc in self.ipc if ipc not in epochs]):
                raise ValueError(f"evaluation.epochs has no entry for IPC {unset}; it has {sorted(epochs)} ({name})")
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

    def compared(self) -> dict[str, CoresetMethod | DiffusionMethod | MatchingMethod]:
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
        raise ConfigError(f"run: there is no run named {name!r}; {one_of(name, runs)}")
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
            raise ConfigError(f"runs.{seen[-1]}.extends: there is no run named {current!r}; {one_of(current, runs)}")
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
        return f"{place}: unknown key; {one_of(str(error['loc'][-1]), _allowed_keys(section))}"
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
        models = [m for m in models_in(section) if m.__name__ == part or part in tags_of(m)]
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


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a field's type may hold."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in getattr(annotation, "__args__", ()) for model in models_in(argument)]


def tags_of(model: type[BaseModel]) -> tuple[str, ...]:
    """Return the values of ``kind`` or ``term`` by which a section is chosen."""
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
    models = models_in(section)
    return models[0] if len(models) == 1 and isinstance(key, str) and key in models[0].model_fields else section


def _allowed_keys(section: type[BaseModel] | None) -> list[str]:
    return sorted(section.model_fields) if section and issubclass(section, BaseModel) else []


def one_of(got: str, allowed: Iterable[str]) -> str:
    """Say what would be allowed in place of what was given, the likeliest first."""
    names = sorted(map(str, allowed))
    close = difflib.get_close_matches(got, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(names)}"
