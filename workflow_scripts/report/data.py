"""What a report is made from.

Accuracies are percentages (0 to 100), times are seconds, images are uint8 arrays (H, W, 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Points = NDArray[np.floating]


@dataclass(frozen=True)
class DatasetSummary:
    """The real images. ``classes`` is in label order; the counts are images per class in the same order.

    ``titles`` are what people call the classes, where that is something else; ``subset`` is the published name of the data,
    under which others' results are found.

    Raises:
        ValueError: there is not one count per class.
    """

    source: str
    classes: tuple[str, ...]
    train_counts: tuple[int, ...]
    test_counts: tuple[int, ...]
    titles: Mapping[str, str] = field(default_factory=dict)
    subset: str | None = None

    def title(self, name: str) -> str:
        """What people call a class."""
        return self.titles.get(name, name)

    def __post_init__(self) -> None:
        if not len(self.classes) == len(self.train_counts) == len(self.test_counts):
            lengths = f"{len(self.train_counts)} train and {len(self.test_counts)} test counts"
            raise ValueError(f"{len(self.classes)} classes need as many counts, not {lengths}")


@dataclass(frozen=True)
class MethodInfo:
    """A method that the run compares; ``parameters`` may be nested."""

    name: str
    summary: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreRow:
    """One training of one classifier on one distilled set.

    ``architecture`` is a key of ``ReportData.architectures``; ``curve`` holds (epoch, top-1) pairs, ``per_class`` the top-1
    of each class in label order. Rows whose ``set_digest`` has the same ``ReportData.content`` were trained on the same images.
    """

    run: str
    method: str
    ipc: int
    seed: int
    protocol: str
    architecture: str
    repeat: int
    top1_best: float
    top1_last: float
    top5_last: float | None
    epochs: int
    images_seen: int
    seconds: float
    set_digest: str
    curve: tuple[tuple[int, float], ...] = ()
    per_class: tuple[float, ...] = ()
    teacher_top1: float | None = None


@dataclass(frozen=True)
class Measured:
    """The metrics of one distilled set against the real images, as ``stages/measure`` writes them.

    ``space`` names the features; ``audit`` is the summary of the search for copies.
    """

    method: str
    ipc: int
    seed: int
    set_digest: str
    space: str
    dimensions: int
    values: Mapping[str, float]
    warnings: Mapping[str, str]
    audit: Mapping[str, float | None]


@dataclass(frozen=True)
class ClosePair:
    """A synthetic image (H, W, 3) and the real one that it is nearest to, with the distance as a share of the usual one."""

    method: str
    ipc: int
    class_name: str
    real_class: str
    real_path: str
    synthetic: Images
    real: Images
    distance: float
    ratio: float | None
    percentile: float


@dataclass(frozen=True)
class Cost:
    """What a method's sets of one IPC cost, in seconds of one device: by stage, and the trainings on them.

    ``shared`` is what other methods use too: the encoding of all real images, if the method looks at those.
    """

    method: str
    ipc: int
    sets: int
    images: int
    stages: Mapping[str, float]
    shared: float
    training: float
    device: str


@dataclass(frozen=True)
class SetRecord:
    """Where a distilled set is, and its digest."""

    method: str
    ipc: int
    seed: int
    digest: str
    folder: str


@dataclass(frozen=True)
class Confusion:
    """How often images of each class (row) were taken for each class (column), over a method's trainings at an IPC."""

    method: str
    ipc: int
    counts: NDArray[np.integer]


@dataclass(frozen=True)
class StageTime:
    """What a stage cost: ``seconds`` is the sum over its results, ``mean_seconds`` the mean per result."""

    stage: str
    results: int
    seconds: float
    mean_seconds: float
    device: str


@dataclass(frozen=True)
class SheetRow:
    """The synthetic images of one class (n, H, W, 3), each with its nearest real image and the distance to it (n,).

    Distances are measured between latents. Without ``nearest_real`` the synthetic images stand alone.
    """

    class_name: str
    label: int
    synthetic: Images
    nearest_real: Images | None = None
    distances: Points | None = None


@dataclass(frozen=True)
class ContactSheet:
    """The distilled images of one method and IPC, for some or all of the classes."""

    method: str
    ipc: int
    rows: tuple[SheetRow, ...]


@dataclass(frozen=True)
class LatentMap:
    """One class's latents on the first two principal axes of its real latents.

    ``real`` is (N, 2); ``prototypes`` and ``synthetic`` hold (K, 2) per name. A prototype set that is named after a
    method takes that method's colour. ``explained_variance`` is the share of each axis, between 0 and 1.
    """

    class_name: str
    real: Points
    prototypes: Mapping[str, Points]
    synthetic: Mapping[str, Points]
    explained_variance: tuple[float, float]
    ipc: int | None = None


@dataclass(frozen=True)
class SkippedImage:
    """A real image that was left out, and why."""

    class_name: str
    path: str
    reason: str


@dataclass(frozen=True)
class ReportData:
    """Everything that the report of one run shows.

    ``architectures`` maps the key that scores use to the name that readers see. ``protocols`` maps a protocol's name to
    its settings, ``presets`` to the published protocol that it is, and ``protocol_changes`` to the settings that are not as
    published. ``contents`` maps the digest of a set to that of its images, so that sets of different origin with the same
    images count as one; sets that it does not name are different. Methods are drawn and listed in the order given.
    ``baselines`` are the methods that the others are compared with in the leaderboard; those that the run does not hold are
    ignored. ``summarised`` are keys of ``architectures`` that are means over others, which no average counts again.
    ``confusions`` and ``pairs`` may be of some methods only.

    Raises:
        ValueError: a score, sheet or map names a run, method, IPC or architecture that the report does not list.
    """

    run: str
    title: str
    created: str
    dataset: DatasetSummary
    methods: tuple[MethodInfo, ...]
    ipcs: tuple[int, ...]
    architectures: Mapping[str, str]
    scores: tuple[ScoreRow, ...]
    protocols: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stage_times: tuple[StageTime, ...] = ()
    sheets: tuple[ContactSheet, ...] = ()
    maps: tuple[LatentMap, ...] = ()
    measured: tuple[Measured, ...] = ()
    pairs: tuple[ClosePair, ...] = ()
    costs: tuple[Cost, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    sets: tuple[SetRecord, ...] = ()
    contents: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    presets: Mapping[str, str] = field(default_factory=dict)
    protocol_changes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped_images: tuple[SkippedImage, ...] = ()
    config_text: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ("random", "dit")
    summarised: tuple[str, ...] = ()

    def content(self, set_digest: str) -> str:
        """Return what sets with the same images share."""
        return self.contents.get(set_digest, set_digest)

    def __post_init__(self) -> None:
        methods = {method.name for method in self.methods}
        for score in self.scores:
            _check("run", score.run, {self.run}, "a score")
            _check("method", score.method, methods, "a score")
            _check("IPC", score.ipc, set(self.ipcs), "a score")
            _check("architecture", score.architecture, set(self.architectures), "a score")
        for sheet in self.sheets:
            _check("method", sheet.method, methods, "a contact sheet")
            _check("IPC", sheet.ipc, set(self.ipcs), "a contact sheet")
        for latent_map in self.maps:
            for name in latent_map.synthetic:
                _check("method", name, methods, f"the latent map of {latent_map.class_name}")
            if latent_map.ipc is not None:
                _check("IPC", latent_map.ipc, set(self.ipcs), f"the latent map of {latent_map.class_name}")


def _check(kind: str, value: object, known: set[Any], where: str) -> None:
    if value not in known:
        listed = ", ".join(sorted(map(str, known))) or "none"
        raise ValueError(f"{where} has {kind} {value!r}, but the report has only {listed}")
