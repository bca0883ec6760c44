"""``stillhouse protocols``: the published evaluation protocols, every value of each, and what a run has changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from workflow_scripts.config import RunConfig, one_of
from workflow_scripts.errors import ConfigError
from workflow_scripts.evaluation.protocols import PROTOCOLS, RECIPE_FIELDS, STUDENTS, Rule


def protocols(config: RunConfig, names: Sequence[str], *, as_json: bool) -> None:
    """Print the protocols called ``names``, or all of them and the run's variants, with all of their values.

    Raises:
        ConfigError: if there is no protocol of that name.
    """
    known = [*PROTOCOLS, *(name for name in config.evaluation.settings if name not in PROTOCOLS)]
    for name in names:
        if name not in known:
            raise ConfigError(f"evaluation.protocols: there is no protocol named {name!r}; {one_of(name, known)}")
    described = [describe(config, name) for name in names or known]
    if as_json:
        print(json.dumps(described, indent=1))
        return
    console = Console(highlight=False)
    for protocol in described:
        _show(console, protocol)
    console.print(
        f"* evaluated by run {config.run}; bold: what the run sets. Override a value for all protocols below evaluation, for "
        "one below evaluation.settings.NAME, where preset: makes NAME a variant of another protocol.\n"
        f"Students: {', '.join(STUDENTS)}."
    )


def describe(config: RunConfig, name: str) -> dict[str, Any]:
    """Return all that is to be said about a protocol, with published values and the run's."""
    evaluation = config.evaluation
    preset = evaluation.preset(name)
    own = evaluation.settings.get(name)
    students = evaluation.value(name, "architectures")
    values: dict[str, Any] = {"architectures": {"published": list(preset.architectures)}}
    if students is not None:
        values["architectures"]["run"] = [student.model_dump(mode="json", exclude_none=True) for student in students]
    for key in ("repeats", *(key for key in RECIPE_FIELDS if key in preset.values)):
        published = preset.values[key]
        values[key] = {"published": published.text if isinstance(published, Rule) else published}
        configured = evaluation.value(name, key) if key != "target" else None
        if configured is not None and configured != published:
            values[key]["run"] = configured
    return {
        "protocol": name,
        "preset": name if own is None or own.preset is None else own.preset,
        "summary": preset.summary,
        "papers": list(preset.papers),
        "evaluated": name in evaluation.protocols,
        "unseen": list(preset.unseen),
        "values": values,
    }


def _show(console: Console, protocol: dict[str, Any]) -> None:
    mark = "* " if protocol["evaluated"] else ""
    variant = "" if protocol["preset"] == protocol["protocol"] else f"  (a variant of {protocol['preset']})"
    papers = escape("; ".join(protocol["papers"]))
    console.print(f"{mark}[bold]{escape(protocol['protocol'])}[/]{variant}  [dim]{papers}[/]")
    console.print(Padding(escape(protocol["summary"]), (0, 0, 1, 2)))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for key, value in protocol["values"].items():
        published = escape(_written(value["published"]))
        changed = f"[bold]{escape(_written(value['run']))}[/] [dim]in place of {published}[/]" if "run" in value else ""
        table.add_row(key, changed or published)
    if protocol["unseen"]:
        table.add_row("score", f"mean of {', '.join(protocol['unseen'])}")
    console.print(Padding(table, (0, 0, 1, 4)))


def _written(value: Any) -> str:
    """Write a value as a table does."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_written, value)) or "none"
    if isinstance(value, dict) and "name" in value:
        return value["name"] if "width" not in value else f"{value['name']} (width {value['width']})"
    return "none" if value is None else json.dumps(value)
