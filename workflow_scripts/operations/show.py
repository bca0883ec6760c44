"""``stillhouse plan``: a survey of a run, for people and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from workflow_scripts.operations.cost import Bill, Cost, cost
from workflow_scripts.operations.retry import explain, set_aside
from workflow_scripts.operations.survey import StageSurvey, survey
from workflow_scripts.recipes import Recipes


def plan(recipes: Recipes, *, verbose: bool, as_json: bool) -> None:
    """Print what is valid, what is missing and why, and what it will cost; ``verbose`` names every missing item."""
    surveys = survey(recipes, explain=True)
    costs = cost(recipes, surveys)
    if as_json:
        content = {
            "run": recipes.config.run,
            "images": recipes.catalog.describe(),
            "stages": [_as_dict(stage) for stage in surveys],
            "set_aside": [asdict(one) for one in set_aside(recipes)],
            "cost": _cost_as_dict(costs),
        }
        print(json.dumps(content, indent=1))
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
    _show_cost(console, costs)
    console.print(f"{jobs} jobs to run." if jobs else "Nothing to run.")


def _show_cost(console: Console, costs: Cost) -> None:
    """Print hours, bytes and price per stage: of what is missing, and of the whole run where that is more."""
    console.print(f"Cost on {costs.speeds.device} ({costs.speeds.source}):", highlight=False, soft_wrap=True)

    def cells(missing: Bill, whole: Bill) -> list[str]:
        written = [(_hours(missing), _hours(whole)), (_size(missing), _size(whole))]
        if costs.price is not None:
            written.append((_price(missing, costs.price), _price(whole, costs.price)))
        return [*(one if one == all_ else f"{one} of {all_}" for one, all_ in written), _basis(missing)]

    headings = [
        "GPU-hours" if costs.speeds.on_gpu else "hours",
        "disk",
        *(["price"] if costs.price else []),
        "hours are",
    ]
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column("stage", "all")
    table.add_column("jobs", str(sum(stage.jobs_to_run for stage in costs.stages)), justify="right")
    for heading, total in zip(headings, cells(costs.missing, costs.whole), strict=True):
        table.add_column(heading, total, justify="left" if heading == "hours are" else "right")
    for stage in costs.stages:
        table.add_row(stage.stage, str(stage.jobs_to_run), *cells(stage.missing, stage.whole))
    console.print(table)


def _hours(bill: Bill) -> str:
    if bill.hours is None:
        return "?"
    if not bill.hours:
        return "-"
    return (
        "<0.01" if bill.hours < 0.005 else f"{bill.hours:,.{2 if bill.hours < 10 else 1 if bill.hours < 100 else 0}f}"
    )


def _size(bill: Bill) -> str:
    if bill.bytes is None:
        return "?"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if bill.bytes >= size:
            return f"{bill.bytes / size:.3g} {unit}"
    return "<1 MB" if bill.bytes else "-"


def _price(bill: Bill, price: float) -> str:
    return "?" if bill.hours is None else f"{bill.hours * price:,.2f}" if bill.hours else "-"


def _basis(bill: Bill) -> str:
    """Say how hours are known: by the part that each basis gives, the largest first."""
    total = sum(bill.basis.values())
    parts = sorted(((hours / total, basis) for basis, hours in bill.basis.items() if hours), reverse=True)
    told = ", ".join(basis if share > 0.995 else f"{share:.0%} {basis}" for share, basis in parts if share >= 0.005)
    return f"{told}; some unknown" if bill.hours is None and told else "unknown" if bill.hours is None else told


def _cost_as_dict(costs: Cost) -> dict[str, Any]:
    def bill(of: Bill) -> dict[str, Any]:
        price = None if of.hours is None or costs.price is None else of.hours * costs.price
        return {"hours": of.hours, "bytes": of.bytes, "price": price, "basis": dict(of.basis)}

    stages = [
        {"stage": stage.stage, "jobs": stage.jobs, "jobs_to_run": stage.jobs_to_run}
        | {"missing": bill(stage.missing), "whole": bill(stage.whole)}
        for stage in costs.stages
    ]
    about = {"device": costs.speeds.device, "gpu": costs.speeds.on_gpu, "source": costs.speeds.source}
    return about | {
        "price_per_gpu_hour": costs.price,
        "stages": stages,
        "missing": bill(costs.missing),
        "whole": bill(costs.whole),
    }


def _tell_set_aside(console: Console, recipes: Recipes) -> None:
    if aside := set_aside(recipes):
        console.print("[bold red]Set aside[/], until `stillhouse retry`:")
        for one in aside:
            console.print(f"  {explain(one)}", highlight=False, soft_wrap=True, markup=False)


def _as_dict(stage: StageSurvey) -> dict[str, Any]:
    missing = [{"job": item.job, "of": item.of, "exists": item.exists, "why": item.why} for item in stage.missing]
    return {
        "stage": stage.stage,
        "valid": len(stage.items) - len(stage.missing),
        "missing": len(stage.missing),
        "jobs": stage.jobs,
        "jobs_to_run": stage.jobs_to_run,
        "missing_items": missing,
    }
