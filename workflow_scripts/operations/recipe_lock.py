"""The recipe lock: a hash of the code that gives each stage's results their meaning, beside the stage's recipe number.

A change of that code must be looked at: either results mean something else, and the number is raised in
:mod:`workflow_scripts.recipes`, or they do not. Both are acknowledged with ``stillhouse lock-recipes``.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from workflow_scripts.recipes import RECIPES

PACKAGE = Path(__file__).resolve().parent.parent
LOCK = PACKAGE / "recipes.lock.json"
_IMAGES = (
    "data/preprocess.py",
    "data/sources.py",
    "data/digits_photo.py",
    "data/layouts.py",
    "data/validation_labels.py",
)
_DENOISING = ("diffusion/backbone.py", "diffusion/schedule.py", "stages/inputs.py")
_TRAINING = tuple(f"evaluation/{name}.py" for name in ("architectures", "augment", "dsa", "protocols", "training"))
_FEATURES = (
    "stages/classifiers.py",
    *(f"evaluation/{name}.py" for name in ("architectures", "augment", "inception", "teacher")),
)
MEANING = {
    "fit_backbone": (
        "stages/fit_backbone.py",
        "stages/inputs.py",
        "diffusion/fit.py",
        "diffusion/finetune.py",
        "diffusion/schedule.py",
        *_IMAGES,
    ),
    "encode": ("stages/encode.py", "stages/inputs.py", "diffusion/backbone.py", *_IMAGES),
    "features": ("stages/features.py", "stages/inputs.py", *_FEATURES, *_IMAGES),
    "cluster": ("stages/cluster.py", "stages/inputs.py", "methods/modes.py"),
    "invert": ("stages/invert.py", "diffusion/inversion.py", *_DENOISING),
    "sample": (
        "stages/sample.py",
        "diffusion/sampler.py",
        "diffusion/noise.py",
        *(f"methods/{name}.py" for name in ("coresets", "d3hr", "dmgd", "manifoldgd", "mgd3", "modes", "registry")),
        *_DENOISING,
        *_IMAGES,
    ),
    "experts": (
        "stages/experts.py",
        "stages/inputs.py",
        "evaluation/dsa.py",
        "methods/matching.py",
        "diffusion/noise.py",
        "evaluation/architectures.py",
        *_IMAGES,
    ),
    "match": (
        "stages/match.py",
        *(f"methods/{name}.py" for name in ("ld3m", "matching")),
        "evaluation/dsa.py",
        "diffusion/noise.py",
        "evaluation/architectures.py",
        *_DENOISING,
        *_IMAGES,
    ),
    "export": ("stages/export.py",),
    "teacher": ("stages/teacher.py", "stages/classifiers.py", "evaluation/teacher.py", *_TRAINING, *_IMAGES),
    "relabel": (
        "stages/relabel.py",
        "stages/classifiers.py",
        "evaluation/soft_labels.py",
        "evaluation/teacher.py",
        *_TRAINING,
        *_IMAGES,
    ),
    "evaluate": (
        "stages/evaluate.py",
        "stages/classifiers.py",
        "evaluation/soft_labels.py",
        *_TRAINING,
        *_IMAGES,
    ),
    "measure": (
        "stages/measure.py",
        "stages/features.py",
        "stages/inputs.py",
        *_FEATURES,
        "evaluation/measures.py",
        "evaluation/set_metrics.py",
        "diffusion/backbone.py",
    ),
    "report": ("stages/report.py", *(f"report/{name}.py" for name in ("data", "figures", "page", "tables"))),
}


def current() -> dict[str, dict[str, Any]]:
    """Return each stage's recipe number and the hash of its code."""
    return {stage: {"recipe": RECIPES[stage], "code": _hash(files)} for stage, files in MEANING.items()}


def locked() -> dict[str, dict[str, Any]]:
    """Return what was acknowledged last."""
    content: dict[str, dict[str, Any]] = json.loads(LOCK.read_text())
    return content


def write() -> None:
    """Acknowledge the code as it is."""
    LOCK.write_text(json.dumps(current(), indent=1) + "\n")


def _hash(files: tuple[str, ...]) -> str:
    sha256 = hashlib.sha256()
    for name in files:
        tree = ast.parse((PACKAGE / name).read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]  # type: ignore[attr-defined]
        sha256.update(f"{name}\n{ast.dump(tree)}".encode())
    return sha256.hexdigest()
