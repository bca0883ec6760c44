"""Gather a run's scores, measurements and pictures into ``report/``: index.html, its tables, and its figures as files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import yaml

from workflow_scripts.config import CoresetMethod, DiffusionMethod, Evaluation, ProtocolSettings, Student
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
    rows: dict[Training, ScoreRow] = {}
    skipped, devices = set(), {}
    for training in trainings:
        record = json.loads(recipes.training_path(training).read_text())
        rows[training] = _score(recipes, training, record)
        skipped |= {(bad["class"], bad["path"], bad["reason"]) for bad in record["skipped"]}
        devices["evaluate"] = record["device"]
    scores = list(rows.values())
    seconds = _Seconds(recipes)
    evaluation = config.evaluation
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
        architectures=_architectures(recipes),
        summarised=(UNSEEN,),
        scores=(*scores, *_unseen_means(recipes, rows)),
        protocols={name: _protocol(recipes, name) for name in evaluation.protocols},
        presets={name: _preset(evaluation, name) for name in evaluation.protocols},
        protocol_changes={name: _protocol_changes(evaluation, name) for name in evaluation.protocols},
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
        contents=seconds.contents(),
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


_VARYING = {"architecture", "width", "epochs", "batch_size", "learning_rate", "seed", "classes"}
_BY_CASE = ("epochs", "batch_size", "learning_rate")
UNSEEN = "unseen"
"""Key of the pseudo-architecture that has the mean over a cross-architecture protocol's unseen students."""


def _protocol(recipes: Recipes, protocol: str) -> dict[str, Any]:
    """Return a protocol's values as used; those that vary by IPC or student are mappings."""
    architecture, ipcs = recipes.architectures(protocol)[0], recipes.config.ipc
    example = recipes.student(Training(SampleSet(recipes.config.compare[0], ipcs[0], 0), architecture, 0, protocol))
    values = {f.name: getattr(example, f.name) for f in fields(example) if f.name not in _VARYING}
    for key in _BY_CASE:
        by_student = {
            student.name: {ipc: recipes.protocol_values(protocol, student.name, ipc)[key] for ipc in ipcs}
            for student in recipes.architectures(protocol)
        }
        one, *others = by_student.values()
        values[key] = one if all(other == one for other in others) else by_student
    return values


def _architectures(recipes: Recipes) -> dict[str, str]:
    """Return each student's name in print by its key."""
    shown = {}
    for protocol in recipes.config.evaluation.protocols:
        for student in recipes.architectures(protocol):
            title = display_name(student.name, resolution=_resolution(recipes, protocol, student), width=student.width)
            shown[_key(recipes, protocol, student)] = title
        if unseen := _unseen(recipes, protocol):
            shown[UNSEEN] = f"mean of {len(unseen)} unseen"
    return shown


def _resolution(recipes: Recipes, protocol: str, student: Student) -> int:
    resolution: int = recipes.protocol_values(protocol, student.name, recipes.config.ipc[0])["resolution"]
    return resolution


def _unseen(recipes: Recipes, protocol: str) -> list[Student]:
    names = recipes.config.evaluation.preset(protocol).unseen
    return [student for student in recipes.architectures(protocol) if student.name in names]


def _unseen_means(recipes: Recipes, rows: Mapping[Training, ScoreRow]) -> list[ScoreRow]:
    """Return, for cross-architecture protocols, a row per set and repeat with the mean of the unseen students."""
    means = []
    for training, row in rows.items():
        unseen = _unseen(recipes, training.protocol)
        if unseen and training.architecture == unseen[0]:
            others = [rows[replace(training, architecture=student)] for student in unseen]
            mean = {
                key: sum(getattr(other, key) for other in others) / len(others)
                for key in ("top1_best", "top1_last", "top5_last")
            }
            total = {key: sum(getattr(other, key) for other in others) for key in ("images_seen", "seconds")}
            means.append(replace(row, architecture=UNSEEN, curve=(), per_class=(), **mean, **total))
    return means


# What may be set for a protocol without making it another one.
_FREE = {"architectures", "repeats", "teacher", "label_seed", "dtype"}


def _preset(evaluation: Evaluation, protocol: str) -> str:
    own = evaluation.settings.get(protocol)
    return protocol if own is None or own.preset is None else own.preset


def _protocol_changes(evaluation: Evaluation, protocol: str) -> tuple[str, ...]:
    """Name the settings that are not as published."""
    published = evaluation.preset(protocol).values
    chosen = {key: evaluation.value(protocol, key) for key in ProtocolSettings.model_fields if key not in _FREE}
    changed = [key for key, value in chosen.items() if value is not None and value != published.get(key)]
    return tuple(changed) if evaluation.resample == "bilinear" else (*changed, "resample")


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
        **_feature_digest(recipes),
        "recipe numbers": ", ".join(f"{stage} {number}" for stage, number in RECIPES.items()),
    }


def _feature_digest(recipes: Recipes) -> dict[str, str]:
    if not recipes.config.evaluation.set_metrics:
        return {}
    space = recipes.feature_space
    return {f"features ({recipes.feature_teacher or space['name']})": space["weights"]}


def _measured(recipes: Recipes) -> tuple[tuple[Measured, ...], tuple[ClosePair, ...]]:
    """Read the measurements, and the pictures of the closest pairs of each method's first set at its largest IPC."""
    measured, pairs = [], []
    config = recipes.config
    for method in recipes.shards_of("measure"):
        shown = SampleSet(method, max(config.ipc), config.seeds[0])
        for wanted in recipes.sets(method):
            record = json.loads(recipes.measure_path(wanted).read_text())
            found = {key: record[key] for key in ("space", "dimensions", "values", "warnings", "audit")}
            found["space"] = recipes.feature_teacher or found["space"]  # by what this run calls the teacher
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


def _key(recipes: Recipes, protocol: str, student: Student) -> str:
    """Return a student's key, which names the resolution if the run's protocols have it at several."""
    key = student.name if student.width is None else f"{student.name}-w{student.width}"
    sizes = {
        _resolution(recipes, name, student)
        for name in recipes.config.evaluation.protocols
        if student in recipes.architectures(name)
    }
    return f"{key}-{_resolution(recipes, protocol, student)}px" if len(sizes) > 1 else key


def _score(recipes: Recipes, training: Training, record: Mapping[str, Any]) -> ScoreRow:
    wanted = training.set
    return ScoreRow(
        run=recipes.config.run,
        method=wanted.method,
        ipc=wanted.ipc,
        seed=wanted.seed,
        protocol=training.protocol,
        architecture=_key(recipes, training.protocol, training.architecture),
        repeat=training.repeat,
        set_digest=recipes.set_digest(wanted),
        curve=tuple((int(epoch), float(top1)) for epoch, top1 in record["curve"]),
        per_class=tuple(record.get("class_top1") or ()),
        teacher_top1=record.get("teacher_top1"),
        seconds=record["seconds"] * record.get("processes", 1),
        **{key: record[key] for key in ("top1_best", "top1_last", "top5_last", "epochs", "images_seen")},
    )


class _Seconds:
    """What the run's class-level results cost, each read once, and who made them."""

    def __init__(self, recipes: Recipes):
        self._recipes = recipes
        self._read: dict[str, tuple[str, float]] = {}
        self._images: dict[str, str] = {}
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
            self._images[result.digest] = record["checksums"].get("images", "")
            self.devices[result.stage] = record["device"]
            self.hosts.add(record["host"])
            listed = record["skipped"] if result.stage in ("encode", "features") else ()  # experts only count theirs
            for bad in listed:
                self.skipped[SkippedImage(result.class_name, bad["path"], bad["reason"])] = None

    def contents(self) -> dict[str, str]:
        """Return the digest of each set's images, by the set's digest."""
        recipes = self._recipes
        return {
            recipes.set_digest(wanted): digest(
                [self._images[recipes.samples(n, wanted).digest] for n in recipes.classes]
            )
            for method in recipes.config.compare
            for wanted in recipes.sets(method)
        }

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
        """Return what a method's sets of one IPC cost, those that seeds share counted once."""
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
