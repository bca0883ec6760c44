"""Made-up runs: digits that look like digits, scores that look like scores."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from sklearn.datasets import load_digits

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

SUMMARIES = {
    "random": "Real images of each class, drawn at random.",
    "herding": "Real images whose running mean stays close to the class mean.",
    "kmeans": "The real image nearest to each k-means centre.",
    "dit": "The backbone's own samples, unguided.",
    "mgd3": "Guidance towards k-means modes, stopped half way.",
    "manifoldgd": "The mode pull projected on the local tangent space of real latents.",
    "d3hr": "Samples from each class's Gaussian in the inverted domain, chosen to match its moments.",
}
LEVELS = {"random": 0, "herding": 3, "kmeans": 6, "dit": 4, "mgd3": 9, "manifoldgd": 10, "d3hr": 8}
REAL = ("random", "herding", "kmeans")


def make_scores(
    methods: tuple[str, ...],
    ipcs: tuple[int, ...],
    architectures: tuple[str, ...],
    seeds: int = 3,
    repeats: int = 1,
    curves: bool = True,
    protocol: str = "hard-sgd",
) -> tuple[ScoreRow, ...]:
    rng = np.random.default_rng(0)
    rows = []
    for method in methods:
        for ipc in ipcs:
            for place, architecture in enumerate(architectures):
                for seed in range(seeds):
                    for repeat in range(repeats):
                        level = 40 + 17 * np.log10(ipc) + LEVELS.get(method, 5) + 4 * place
                        last = float(level + rng.normal(0, 1.5))
                        best = last + abs(float(rng.normal(0, 0.8)))
                        epochs = np.arange(20, 2001, 60)
                        values = last * (1 - np.exp(-epochs / 250)) + rng.normal(0, 0.6, len(epochs))
                        curve = tuple((int(e), float(v)) for e, v in zip(epochs, values, strict=True)) if curves else ()
                        rows.append(
                            ScoreRow(
                                "digits", method, ipc, seed, protocol, architecture, repeat, best, last,
                                min(last + 32, 100.0), 2000, 2000 * ipc * 10, 31.4, f"{method}-{ipc}-{seed}", curve,
                                tuple(np.clip(last + 2.0 * np.arange(-5, 5), 0, 100).tolist()) if curves else (),
                            )
                        )  # fmt: skip
    return tuple(rows)


def make_demo(ipcs: tuple[int, ...] = (1, 10)) -> ReportData:
    rng = np.random.default_rng(1)
    digits = load_digits()
    pixels = np.kron(digits.images / 16 * 255, np.ones((1, 4, 4)))
    soft = (pixels + np.roll(pixels, 1, 1) + np.roll(pixels, 1, 2) + np.roll(pixels, (1, 1), (1, 2))) / 4
    images = np.repeat(soft.astype(np.uint8)[..., None], 3, axis=-1)
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    sheets, maps = [], []
    for method in SUMMARIES:
        for ipc in ipcs:
            rows = []
            for label, name in enumerate(names):
                real = images[rng.choice(np.flatnonzero(digits.target == label), ipc, replace=False)]
                noise = 0 if method in REAL else rng.normal(0, 22, real.shape)
                synthetic = np.clip(real + noise, 0, 255).astype(np.uint8)
                distances = np.zeros(ipc) if method in REAL else rng.gamma(9, 1.4, ipc)
                rows.append(SheetRow(name, label, synthetic, real, distances))
            sheets.append(ContactSheet(method, ipc, tuple(rows)))
    for label, name in enumerate(names):
        flat = digits.data[digits.target == label]
        flat = flat - flat.mean(0)
        _, spread, axes = np.linalg.svd(flat, full_matrices=False)
        plane = flat @ axes[:2].T
        share = spread[:2] ** 2 / (spread**2).sum()
        modes = plane[rng.choice(len(plane), 10, replace=False)] * 0.8
        synthetic = {m: modes + rng.normal(0, 3, modes.shape) for m in ("dit", "mgd3", "manifoldgd", "d3hr")}
        maps.append(LatentMap(name, plane, {"k-means": modes}, synthetic, (float(share[0]), float(share[1])), 10))
    architectures = {"convnet": "ConvNet-3", "resnet_ap10": "ResNetAP-10"}
    shared = {"kind": "ddpm", "steps": 50, "cfg_scale": 4.0, "cfg_channels": 3}
    return ReportData(
        run="digits",
        title="Seven ways to distil the digits",
        created="2026-02-03T14:05:00+00:00",
        dataset=DatasetSummary("digits (scikit-learn, 32 × 32)", names, tuple(range(140, 150)), (36,) * 10),
        methods=tuple(
            MethodInfo(
                name,
                summary,
                {"kind": "coreset", "select": name}
                if name in REAL
                else {"kind": "diffusion", "sampler": shared, "guidance": [{"term": name}] if name != "dit" else []},
            )
            for name, summary in SUMMARIES.items()
        ),
        ipcs=ipcs,
        architectures=architectures,
        scores=make_scores(tuple(SUMMARIES), ipcs, tuple(architectures)),
        protocols={
            "hard-sgd": {
                "optimiser": "SGD", "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 64,
                "epochs": {1: 3000, 10: 2000}, "cutmix": 1.0, "crop_scale": (0.5, 1.0), "evaluations": 100,
            }
        },
        stage_times=(
            StageTime("fit", 1, 1860.0, 1860.0, "NVIDIA H100"),
            StageTime("encode", 10, 4.2, 0.42, "NVIDIA H100"),
            StageTime("cluster", 10, 21.0, 2.1, "CPU"),
            StageTime("invert", 10, 63.0, 6.3, "NVIDIA H100"),
            StageTime("sample", 240, 610.0, 2.54, "NVIDIA H100"),
            StageTime("evaluate", 84, 2637.6, 31.4, "NVIDIA H100"),
        ),
        sheets=tuple(sheets),
        maps=tuple(maps),
        skipped_images=(SkippedImage("three", "train/three/0041.png", "truncated after 112 of 640 bytes"),),
        config_text="run: digits\nipc: [1, 10]\nseeds: [0, 1, 2]\nsampler:\n  steps: 50\n  cfg_scale: 4.0\n",
        environment={"python": "3.11.13", "torch": "2.11.0", "diffusers": "0.36.0", "device": "NVIDIA H100"},
        notes=("Digits are 8 × 8 scans, enlarged fourfold.",),
    )  # fmt: skip


def make_measured(methods: tuple[str, ...], ipc: int, classes: int = 10, seeds: int = 3) -> tuple[Measured, ...]:
    """Made-up measurements in which ``method`` number p has the Fréchet distance 10 (p + 1) + seed."""
    return tuple(
        Measured(
            method, ipc, seed, f"{method}-{ipc}-{seed}", "latents", 256,
            {"frechet": 10.0 * (place + 1) + seed, "precision": 0.5, "vendi": 1.0 + place}, {"frechet": "biased upward"},
            {"images": classes * ipc, "copies": place == 0, "suspect_percent": 2.0, "median_ratio": 0.8,
             "other_class_percent": 5.0},
        )
        for place, method in enumerate(methods)
        for seed in range(seeds)
    )  # fmt: skip


def make_whole() -> ReportData:
    """The demo with everything that a report can hold."""
    demo = make_demo()
    rng = np.random.default_rng(2)
    methods = tuple(SUMMARIES)
    first = demo.sheets[-1].rows[0]
    return dataclasses.replace(
        demo,
        measured=(*make_measured(methods, 1), *make_measured(methods, 10)),
        pairs=tuple(
            ClosePair(
                "dit", 10, "zero", "one", "train/one/7.png", first.synthetic[0], first.synthetic[0] // 2, 3.2, 0.4, 1.5
            )
            for _ in range(3)
        ),
        costs=tuple(
            Cost(method, ipc, 3, 30 * ipc, {"sample": 20.0 * (place + 1), "cluster": 1.0}, 4.2, 60.0, "NVIDIA H100")
            for place, method in enumerate(methods)
            for ipc in demo.ipcs
        ),
        confusions=(Confusion("mgd3", 10, rng.integers(0, 9, (10, 10)) + 80 * np.eye(10, dtype=int)),),
        sets=tuple(
            SetRecord(m, i, s, f"{m}{i}{s}" * 8, f"datasets/{m}") for m in methods for i in (1, 10) for s in range(3)
        ),
        digests={"test images": "0123456789abcdef"},
    )


def make_minimal(**changes: object) -> ReportData:
    """One method, one IPC, one training."""
    content: dict = {
        "run": "digits",
        "title": "One training",
        "created": "2026-02-03T14:05:00",
        "dataset": DatasetSummary("digits", ("zero", "one"), (10, 10), (5, 5)),
        "methods": (MethodInfo("random"),),
        "ipcs": (1,),
        "architectures": {"convnet": "ConvNet-3"},
        "scores": make_scores(("random",), (1,), ("convnet",), seeds=1, curves=False),
    }
    return ReportData(**{**content, **changes})


@pytest.fixture(scope="session")
def demo() -> ReportData:
    return make_demo()


@pytest.fixture(scope="session")
def whole() -> ReportData:
    return make_whole()


@pytest.fixture(scope="session")
def minimal() -> Callable[..., ReportData]:
    return make_minimal
