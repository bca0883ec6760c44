"""Gather a run's scores and pictures into ``report/``: index.html, scores.csv, scores.json and leaderboard.tex."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import yaml

from workflow_scripts.config import Architecture, DiffusionMethod
from workflow_scripts.evaluation.architectures import display_name
from workflow_scripts.methods.registry import ClassInputs, prototypes_of
from workflow_scripts.recipes import CLASS_STAGES, Recipes, SampleSet, Training
from workflow_scripts.report import page, tables
from workflow_scripts.report.data import (
    ContactSheet,
    DatasetSummary,
    LatentMap,
    MethodInfo,
    ReportData,
    ScoreRow,
    SheetRow,
    SkippedImage,
    StageTime,
)
from workflow_scripts.stages.common import stage_main
from workflow_scripts.stages.inputs import real_images, scaled_latents
from workflow_scripts.stages.publish import publish, report_folder
from workflow_scripts.stages.worker import environment
from workflow_scripts.store.files import write_atomically


def work(recipes: Recipes, shard: str) -> Mapping[str, Any]:
    """Write the report of a run."""
    config = recipes.config
    data = gather(recipes)
    folder = report_folder(config, recipes.job("report", "report"))
    rows = tables.csv_rows(data)
    write_atomically(folder / "scores.csv", tables.to_csv(rows))
    write_atomically(folder / "scores.json", json.dumps(rows, indent=1))
    write_atomically(folder / "leaderboard.tex", tables.latex(data))
    write_atomically(folder / "index.html", page.render(data))
    publish(config, recipes.job("report", "report"))
    return {"report": str(folder.relative_to(config.results) / "index.html")}


def gather(recipes: Recipes) -> ReportData:
    """Read everything that the report shows."""
    config = recipes.config
    trainings = [t for method in config.compare for ipc in config.ipc for t in recipes.trainings(method, ipc)]
    records = [json.loads(recipes.training_path(training).read_text()) for training in trainings]
    dataset = config.dataset
    return ReportData(
        run=config.run,
        title=config.title or config.run,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dataset=DatasetSummary(
            source=dataset.source if dataset.root is None else f"{dataset.source} {dataset.root}",
            classes=tuple(recipes.classes),
            train_counts=tuple(recipes.catalog.count(name, "train") for name in recipes.classes),
            test_counts=tuple(recipes.catalog.count(name, "test") for name in recipes.classes),
        ),
        methods=tuple(
            MethodInfo(name, method.summary, method.model_dump(mode="json", exclude={"summary", "paper"}))
            for name, method in config.compared().items()
        ),
        ipcs=config.ipc,
        architectures=_architectures(recipes),
        summarised=(UNSEEN,),
        scores=_scores(recipes, trainings, records),
        protocols={name: _protocol(recipes, name) for name in config.evaluation.protocols},
        stage_times=_stage_times(recipes, records),
        sheets=tuple(_sheet(recipes, method, ipc) for method in config.compare for ipc in config.ipc),
        maps=tuple(
            _map(recipes, name, max(i for i in config.ipc if i <= max(10, min(config.ipc))))
            for name in recipes.classes[: config.report.map_classes]
        ),
        skipped_images=_skipped(recipes, records),
        config_text=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        environment={**environment(records[0]["device"])["versions"], "classifiers trained on": records[0]["device"]},
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


def _resolution(recipes: Recipes, protocol: str, student: Architecture) -> int:
    resolution: int = recipes.protocol_values(protocol, student.name, recipes.config.ipc[0])["resolution"]
    return resolution


def _unseen(recipes: Recipes, protocol: str) -> list[Architecture]:
    names = recipes.config.evaluation.preset(protocol).unseen
    return [student for student in recipes.architectures(protocol) if student.name in names]


def _scores(recipes: Recipes, trainings: list[Training], records: list[dict[str, Any]]) -> tuple[ScoreRow, ...]:
    """Return a row per training, and for cross-architecture protocols one per set and repeat with the mean of the unseen."""
    rows = {training: _score(recipes, training, record) for training, record in zip(trainings, records, strict=True)}
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
            means.append(replace(row, architecture=UNSEEN, curve=(), **mean, **total))
    return (*rows.values(), *means)


def _skipped(recipes: Recipes, trainings: list[dict[str, Any]]) -> tuple[SkippedImage, ...]:
    """List the unreadable training images that encoding left out, and the test images that evaluation did."""
    encoded = [(result.class_name, recipes.store.record(result)) for result in _results(recipes, "encode")]
    train = [SkippedImage(name, bad["path"], bad["reason"]) for name, record in encoded for bad in record["skipped"]]
    test = {(bad["class"], bad["path"], bad["reason"]) for training in trainings for bad in training["skipped"]}
    return (*train, *(SkippedImage(*bad) for bad in sorted(test)))


def _key(recipes: Recipes, protocol: str, student: Architecture) -> str:
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
        **{key: record[key] for key in ("top1_best", "top1_last", "top5_last", "epochs", "images_seen", "seconds")},
    )


def _results(recipes: Recipes, stage: str) -> list[Any]:
    jobs = [job for job in recipes.jobs() if job.stage == stage]
    return [result for job in jobs for result in recipes.stage_results(stage, job.shard)]


def _stage_times(recipes: Recipes, trainings: list[dict[str, Any]]) -> tuple[StageTime, ...]:
    seconds: dict[str, list[float]] = defaultdict(list)
    devices: dict[str, str] = {}
    for stage in CLASS_STAGES:
        for result in _results(recipes, stage):
            record = recipes.store.record(result)
            seconds[stage].append(record["seconds"])
            devices[stage] = record["device"]
    seconds["evaluate"] = [training["seconds"] for training in trainings]
    devices["evaluate"] = trainings[0]["device"]
    return tuple(
        StageTime(stage, len(times), sum(times), sum(times) / len(times), devices[stage])
        for stage, times in seconds.items()
    )


def _sheet(recipes: Recipes, method: str, ipc: int) -> ContactSheet:
    """Show the first seed's images, each with the real image of its class whose latent is nearest."""
    config = recipes.config
    wanted = SampleSet(method, ipc, config.seeds[0])
    rows = []
    for label, name in enumerate(recipes.classes[: config.report.sheet_classes]):
        stored = recipes.store.read(recipes.samples(name, wanted)).arrays
        count = min(ipc, config.report.sheet_images)
        synthetic, latents = stored["images"][:count], stored["latents"][:count].reshape(count, -1)
        keys = recipes.store.record(recipes.latents(name))["images"]
        real = scaled_latents(recipes, name)[: len(keys)].reshape(len(keys), -1)
        distances = np.sqrt(((latents[:, None] - real[None]) ** 2).sum(2))
        nearest = distances.argmin(1)
        pictures = real_images(recipes, name, [keys[index] for index in nearest])
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


if __name__ == "__main__":
    stage_main("report", __doc__, work, "report")
