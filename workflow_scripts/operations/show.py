"""``stillhouse plan``: a survey of a run, for people and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from workflow_scripts.operations.retry import explain, set_aside
from workflow_scripts.operations.survey import StageSurvey, survey
from workflow_scripts.recipes import Recipes


def plan(recipes: Recipes, *, verbose: bool, as_json: bool) -> None:
    """Print what is valid, what is missing and why; ``verbose`` names every missing item."""
    surveys = survey(recipes, explain=True)
    if as_json:
        stages = [_as_dict(stage) for stage in surveys]
        aside = [asdict(one) for one in set_aside(recipes)]
        told = {"run": recipes.config.run, "images": recipes.catalog.describe(), "stages": stages, "set_aside": aside}
        print(json.dumps(told, indent=1))
        return
    console = Console()
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("stage", "valid", "missing", "jobs to run"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    table.add_column("why")
    for stage in surveys:
        missing, count = len(stage.missing), len(stage.items)
        why = "; ".join(f"{number} {text}" for text, number in stage.reasons.most_common(3))
        table.add_row(
            stage.stage, str(count - missing), str(missing or "-"), f"{stage.jobs_to_run} of {stage.jobs}", why
        )
    classes = len(recipes.classes)
    console.print(f"Run [bold]{recipes.config.run}[/]: {classes} classes, backbone {recipes.backbone.path}")
    for split, found in recipes.catalog.describe().items():
        console.print(f"{split}: {found}", highlight=False, soft_wrap=True, markup=False)
    if note := recipes.backbone.licence_note():
        console.print(note)
    console.print(table)
    if verbose:
        for stage in surveys:
            for item in stage.missing:
                console.print(f"{stage.stage:12} {item.job:28} {item.of}: {item.why}", highlight=False, soft_wrap=True)
    _tell_set_aside(console, recipes)
    jobs = sum(stage.jobs_to_run for stage in surveys)
    console.print(f"{jobs} jobs to run." if jobs else "Nothing to run.")


def _tell_set_aside(console: Console, recipes: Recipes) -> None:
    if aside := set_aside(recipes):
        console.print("[bold red]Set aside[/], until `stillhouse retry`:")
        for one in aside:
            console.print(f"  {explain(one)}", highlight=False, soft_wrap=True, markup=False)


def _as_dict(stage: StageSurvey) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "valid": len(stage.items) - len(stage.missing),
        "missing": len(stage.missing),
        "jobs": stage.jobs,
        "jobs_to_run": stage.jobs_to_run,
        "missing_items": [asdict(item) for item in stage.missing],
    }
