"""Gather a run's scores, measurements and pictures into ``report/``: index.html, its tables, and its figures as files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import numpy as np
import yaml

from workflow_scripts.config import CoresetMethod, DiffusionMethod, Evaluation
from workflow_scripts.data.imagenet import class_title, subset_classes, subset_names
from workflow_scripts.evaluation.architectures import display_name
from workflow_scripts.methods.registry import ClassInputs, prototypes_of
from workflow_scripts.recipes import CLASS_STAGES, RECIPES, Recipes, SampleSet, Training
from workflow_scripts.report import figures, page, tables
from workflow_scripts.report.data import (
    ClosePair,
    Confusion,
    ContactSheet,
    Cost,
    DatasetSummary,
    LatentMap,
    Measured,
    MethodInfo,
    ReportData,
    ScoreRow,
    SetRecord,
    SheetRow,
    SkippedImage,
    StageTime,
)
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.inputs import real_images, scaled_latents
from workflow_scripts.stages.publish import publish, report_folder
from workflow_scripts.stages.worker import environment
from workflow_scripts.store.digests import digest
from workflow_scripts.store.files import write_atomically
from workflow_scripts.store.results import Result


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Write the report of a run."""
    config = recipes.config
    data = gather(recipes)
    folder = report_folder(config, recipes.job("report", "report"))
    for name, text in page.downloads(data).items():
        write_atomically(folder / name, text)
    write_atomically(folder / "scores.json", json.dumps(tables.csv_rows(data), indent=1))
    made = page.render(data)
    (folder / "figures").mkdir(exist_ok=True)
    for name, drawing in made.drawings.items() if config.report.figure_files else ():
        for suffix, content in drawing.files().items():
            write_atomically(folder / "figures" / f"{name}.{suffix}", content, durable=False)
    write_atomically(folder / "index.html", made.html)
    publish(config, recipes.job("report", "report"))
    return {"report": str(folder.relative_to(config.results) / "index.html")}


def gather(recipes: Recipes) -> ReportData:
    """Read everything that the report shows."""
    config = recipes.config
    trainings = [t for method in config.compare for ipc in config.ipc for t in recipes.trainings(method, ipc)]
    settings = config.evaluation
    keys = {_key(architecture): architecture for architecture in settings.architectures}
    example = recipes.student(trainings[0])
    scores, skipped, devices = [], set(), {}
    for training in trainings:
        record = json.loads(recipes.training_path(training).read_text())
        scores.append(_score(recipes, training, record))
        skipped |= {(bad["class"], bad["path"], bad["reason"]) for bad in record["skipped"]}
        devices["evaluate"] = record["device"]
    seconds = _Seconds(recipes)
    dataset = config.dataset
    measured, pairs = _measured(recipes)
    return ReportData(
        run=config.run,
        title=config.title or config.run,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dataset=DatasetSummary(
            source=dataset.source if dataset.root is None else f"{dataset.source} {dataset.root}",
            classes=tuple(recipes.classes),
            train_counts=tuple(recipes.catalog.count(name, "train") for name in recipes.classes),
            test_counts=tuple(recipes.catalog.count(name, "test") for name in recipes.classes),
            titles={name: title for name in recipes.classes if (title := class_title(name)) != name},
            subset=dataset.subset or _same_classes(recipes),
        ),
        methods=tuple(
            MethodInfo(name, method.summary, method.model_dump(mode="json", exclude={"summary", "paper"}))
            for name, method in config.compared().items()
        ),
        ipcs=config.ipc,
        architectures={
            key: display_name(a.name, resolution=settings.resolution, width=a.width) for key, a in keys.items()
        },
        scores=tuple(scores),
        protocols={
            settings.protocol: {f.name: getattr(example, f.name) for f in fields(example) if f.name not in _VARYING}
            | {"epochs": {ipc: recipes.epochs(ipc) for ipc in config.ipc}}
        },
        protocol_changes={settings.protocol: _protocol_changes(settings)},
        stage_times=(*seconds.stage_times(), _evaluation_time(scores, devices)),
        sheets=tuple(_sheet(recipes, method, ipc) for method in config.compare for ipc in config.ipc),
        maps=tuple(
            _map(recipes, name, max(i for i in config.ipc if i <= max(10, min(config.ipc))))
            for name in recipes.classes[: config.report.map_classes]
            if recipes.store.exists(recipes.latents(name))
        ),
        measured=measured,
        pairs=pairs,
        costs=tuple(seconds.cost(method, ipc, scores) for method in config.compare for ipc in config.ipc),
        confusions=_confusions(recipes, trainings, scores),
        sets=tuple(
            SetRecord(s.method, s.ipc, s.seed, recipes.set_digest(s), f"datasets/{recipes.set_directory(s).name}")
            for method in config.compare
            for s in recipes.sets(method)
        ),
        digests=_digests(recipes),
        skipped_images=(
            *seconds.skipped,
            *(SkippedImage(*bad) for bad in sorted(skipped)),
        ),
        config_text=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        environment={
            **environment(devices["evaluate"])["versions"],
            "classifiers trained on": devices["evaluate"],
            "hosts": ", ".join(sorted(seconds.hosts)),
        },
    )


_VARYING = {"architecture", "width", "epochs", "seed", "classes"}


# Settings of an evaluation that do not make it another protocol.
_FREE = {"protocol", "architectures", "repeats", "trainings_per_job", "set_metrics", "inception"}


def _protocol_changes(settings: Evaluation) -> tuple[str, ...]:
    """Name the settings that are not as published."""
    defaults = {name: info.default for name, info in Evaluation.model_fields.items() if name not in _FREE}
    return tuple(name for name, default in defaults.items() if getattr(settings, name) != default)


def _same_classes(recipes: Recipes) -> str | None:
    """Name the published subset of ImageNet that has the run's classes, in any order."""
    classes = set(recipes.classes)
    return next((name for name in subset_names() if set(subset_classes(name)) == classes), None)


def _digests(recipes: Recipes) -> dict[str, str]:
    return {
        "report": recipes.job("report", "report").digest,
        "training images": digest([[name, recipes.catalog.fingerprint(name, "train")] for name in recipes.classes]),
        "test images": digest([[name, recipes.catalog.fingerprint(name, "test")] for name in recipes.classes]),
        "backbone, denoiser": recipes.backbone.denoiser,
        "backbone, autoencoder": recipes.backbone.vae,
        **{f"features ({name})": weights for name, weights in [recipes.feature_space.values()]},
        "recipe numbers": ", ".join(f"{stage} {number}" for stage, number in RECIPES.items()),
    }


def _measured(recipes: Recipes) -> tuple[tuple[Measured, ...], tuple[ClosePair, ...]]:
    """Read the measurements, and the pictures of the closest pairs of each method's first set at its largest IPC."""
    measured, pairs = [], []
    config = recipes.config
    for method in recipes.shards_of("measure"):
        shown = SampleSet(method, max(config.ipc), config.seeds[0])
        for wanted in recipes.sets(method):
            record = json.loads(recipes.measure_path(wanted).read_text())
            found = {key: record[key] for key in ("space", "dimensions", "values", "warnings", "audit")}
            of = (wanted.method, wanted.ipc, wanted.seed, recipes.set_digest(wanted))
            measured.append(Measured(*of, **found))
            if wanted == shown and not isinstance(config.methods[method], CoresetMethod):
                pairs += [_pair(recipes, wanted, pair) for pair in record["closest"][: config.report.pairs]]
    return tuple(measured), tuple(pairs)


def _pair(recipes: Recipes, wanted: SampleSet, pair: Mapping[str, Any]) -> ClosePair:
    synthetic = recipes.store.read(recipes.samples(pair["class"], wanted), "images").arrays["images"][[pair["index"]]]
    real = real_images(recipes, pair["real_class"], [pair["real"]])
    return ClosePair(
        wanted.method,
        wanted.ipc,
        pair["class"],
        pair["real_class"],
        pair["real"],
        synthetic[0],
        real[0],
        pair["distance"],
        pair["ratio"],
        pair["percentile"],
    )


def _confusions(recipes: Recipes, trainings: list[Training], scores: list[ScoreRow]) -> tuple[Confusion, ...]:
    """Add up the confusions of the best method at each IPC over its trainings, if they were recorded."""
    found = []
    for ipc in recipes.config.ipc:
        by_method: dict[str, list[float]] = defaultdict(list)
        for score in scores:
            if score.ipc == ipc:
                by_method[score.method].append(score.top1_last)
        best = max(by_method, key=lambda method: float(np.mean(by_method[method])))
        total: np.ndarray | None = None
        for training in trainings:
            if (training.set.method, training.set.ipc) == (best, ipc):
                counts = json.loads(recipes.training_path(training).read_text()).get("confusion")
                if counts is not None:
                    total = np.array(counts) if total is None else total + np.array(counts)
        if total is not None:
            found.append(Confusion(best, ipc, total))
    return tuple(found)


def _key(architecture: Any) -> str:
    return architecture.name if architecture.width is None else f"{architecture.name}-w{architecture.width}"


def _score(recipes: Recipes, training: Training, record: Mapping[str, Any]) -> ScoreRow:
    wanted = training.set
    return ScoreRow(
        run=recipes.config.run,
        method=wanted.method,
        ipc=wanted.ipc,
        seed=wanted.seed,
        protocol=recipes.config.evaluation.protocol,
        architecture=_key(training.architecture),
        repeat=training.repeat,
        set_digest=recipes.set_digest(wanted),
        curve=tuple((int(epoch), float(top1)) for epoch, top1 in record["curve"]),
        per_class=tuple(record.get("per_class") or ()),
        teacher_top1=record.get("teacher_top1"),
        **{key: record[key] for key in ("top1_best", "top1_last", "top5_last", "epochs", "images_seen", "seconds")},
    )


class _Seconds:
    """What the run's class-level results cost, each read once, and who made them."""

    def __init__(self, recipes: Recipes):
        self._recipes = recipes
        self._read: dict[str, tuple[str, float]] = {}
        self.devices: dict[str, str] = {}
        self.hosts: set[str] = set()
        self.skipped: dict[SkippedImage, None] = {}  # in order, each once
        for job in recipes.jobs():
            if job.stage in CLASS_STAGES:
                for result in recipes.stage_results(job.stage, job.shard):
                    self._add(result)

    def _add(self, result: Result) -> None:
        if result.digest not in self._read:
            record = self._recipes.store.record(result)
            self._read[result.digest] = (result.stage, record["seconds"])
            self.devices[result.stage] = record["device"]
            self.hosts.add(record["host"])
            for bad in record.get("skipped", ()):
                self.skipped[SkippedImage(result.class_name, bad["path"], bad["reason"])] = None

    def stage_times(self) -> list[StageTime]:
        """Return what each stage cost."""
        by_stage: dict[str, list[float]] = defaultdict(list)
        for stage, seconds in self._read.values():
            by_stage[stage].append(seconds)
        return [
            StageTime(stage, len(times), sum(times), sum(times) / len(times), self.devices[stage])
            for stage in CLASS_STAGES
            if (times := by_stage[stage])
        ]

    def cost(self, method: str, ipc: int, scores: Iterable[ScoreRow]) -> Cost:
        """Return what a method's sets of one IPC cost, seeds that gave the same images counted once."""
        recipes = self._recipes
        sets = [wanted for wanted in recipes.sets(method) if wanted.ipc == ipc]
        made = [*recipes.experts(method)]
        for name in recipes.classes:
            gaussian = recipes.gaussian(name, method)
            made += [*recipes.clusterings(name, method, ipc).values(), *([gaussian] if gaussian else [])]
            made += [recipes.samples(name, wanted) for wanted in sets]
        stages: dict[str, float] = defaultdict(float)
        for result in {result.digest: result for result in made}.values():
            stages[result.stage] += self._read[result.digest][1]
        different = len({recipes.set_digest(wanted) for wanted in sets})
        last = "match" if "match" in stages else "sample"
        looks = recipes.samples(recipes.classes[0], sets[0]).recipe.keys() & {
            "latents",
            "prototypes",
            "targets",
            "gaussian",
        }
        encoded = [self._read.get(recipes.latents(name).digest) for name in recipes.classes] if looks else []
        return Cost(
            method,
            ipc,
            different,
            different * ipc * len(recipes.classes),
            dict(stages),
            sum(one[1] for one in encoded if one),
            sum(score.seconds for score in scores if (score.method, score.ipc) == (method, ipc)),
            self.devices[last],
        )


def _evaluation_time(scores: list[ScoreRow], devices: Mapping[str, str]) -> StageTime:
    total = sum(score.seconds for score in scores)
    return StageTime("evaluate", len(scores), total, total / len(scores), devices["evaluate"])


def _sheet(recipes: Recipes, method: str, ipc: int) -> ContactSheet:
    """Show the first seed's images, each with the real image of its class whose latent is nearest."""
    config = recipes.config
    wanted = SampleSet(method, ipc, config.seeds[0])
    rows = []
    for label, name in enumerate(recipes.classes[: config.report.sheet_classes]):
        stored = recipes.store.read(recipes.samples(name, wanted), "images", "latents").arrays
        count = min(ipc, config.report.sheet_images)
        synthetic, latents = shrink(stored["images"][:count]), stored["latents"][:count].reshape(count, -1)
        if not recipes.store.exists(recipes.latents(name)):
            rows.append(SheetRow(name, label, synthetic))
            continue
        keys = recipes.store.record(recipes.latents(name))["images"]
        real = scaled_latents(recipes, name)[: len(keys)].reshape(len(keys), -1)
        distances = np.sqrt(((latents[:, None] - real[None]) ** 2).sum(2))
        nearest = distances.argmin(1)
        pictures = shrink(real_images(recipes, name, [keys[index] for index in nearest]))
        rows.append(SheetRow(name, label, synthetic, pictures, distances.min(1)))
    return ContactSheet(method, ipc, tuple(rows))


def _map(recipes: Recipes, name: str, ipc: int) -> LatentMap:
    """Project a class's real latents, prototypes and synthetic latents on the real latents' two principal axes."""
    config = recipes.config
    real = scaled_latents(recipes, name)
    shape = real.shape[1:]
    flat = real.reshape(len(real), -1)
    centre = flat.mean(0)
    _, values, axes = np.linalg.svd(flat - centre, full_matrices=False)
    shares = values**2 / max(float((values**2).sum()), 1e-30)
    shares, axes = np.append(shares, 0.0), axes if len(axes) > 1 else np.vstack([axes, np.zeros_like(axes)])

    def project(points: np.ndarray) -> np.ndarray:
        return (points.reshape(len(points), -1) - centre) @ axes[:2].T

    prototypes, synthetic = {}, {}
    for key, method in config.compared().items():
        synthetic[key] = project(
            recipes.store.read(recipes.samples(name, SampleSet(key, ipc, config.seeds[0])), "latents").arrays["latents"]
        )
        modes = recipes.clusterings(name, key, ipc).get("prototypes")
        if modes is not None and isinstance(method, DiffusionMethod):
            found = prototypes_of(method, ClassInputs(name, shape, modes=recipes.store.read(modes).arrays), ipc)
            if found is not None:
                prototypes[key] = project(found.means)
    return LatentMap(name, project(flat), prototypes, synthetic, (float(shares[0]), float(shares[1])), ipc)


def shrink(images: np.ndarray) -> np.ndarray:
    """Scale images down to what the page can show of them, and a bit more."""
    return figures.shrink(images, 2 * page.THUMBNAIL_SIDE)


if __name__ == "__main__":
    stage_main("report", __doc__, work, "report")
