"""``stillhouse methods``: what can be compared, from which paper, and every option with its type, default and value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from workflow_scripts.config import RunConfig, models_in, one_of, tags_of
from workflow_scripts.errors import ConfigError

TAGS = ("kind", "term")
TOLD_ABOVE = {*TAGS, "summary", "paper"}


@dataclass(frozen=True)
class Option:
    """One key of a method: what it may be, what it is if nothing is said, and what it is here."""

    key: str
    type: str
    required: bool
    default: Any
    value: Any
    description: str


@dataclass(frozen=True)
class Part:
    """One section of a method, such as its start.

    Attributes:
        path: where it is in the method, "" for the method itself.
        choice: its kind, if there are several; ``choices`` are those.
        about: what this kind does.
    """

    path: str
    choice: str | None
    choices: tuple[str, ...]
    about: str
    options: tuple[Option, ...]


def methods(config: RunConfig, names: Sequence[str], *, options: bool, as_json: bool) -> None:
    """Print the methods called ``names``, or all: an overview, or every option of them.

    Raises:
        ConfigError: if there is no method of that name.
    """
    for name in names:
        if name not in config.methods:
            raise ConfigError(f"methods: there is no method named {name!r}; {one_of(name, config.methods)}")
    chosen = names or list(config.methods)
    if as_json:
        print(json.dumps([_as_dict(config, name) for name in chosen], indent=1))
        return
    console = Console(highlight=False)
    if names or options:
        for name in chosen:
            _show(console, config, name)
    else:
        _overview(console, config)


def parts_of(section: BaseModel, path: str = "", choices: tuple[str, ...] = ()) -> Iterator[Part]:
    """Yield a section's own options, then those of the sections in it."""
    kind = type(section)
    schema = kind.model_json_schema()["properties"]
    options, inner = [], list[Part]()
    for key, field in kind.model_fields.items():
        value = getattr(section, key)
        known = tuple(tag for model in models_in(field.annotation) for tag in tags_of(model))
        below = f"{path}.{key}" if path else key
        if isinstance(value, BaseModel):
            inner += parts_of(value, below, known)
        elif known and isinstance(value, tuple):
            inner += [part for item in value for part in parts_of(item, below, known)]
            if not value:
                inner.append(Part(below, "none", known, "", ()))
        elif known:
            inner.append(Part(below, "none", known, "", ()))
        elif key not in TOLD_ABOVE:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            text = field.description or ""
            options.append(Option(key, _type(schema[key]), field.is_required(), default, value, text))
    tag = next((getattr(section, name) for name in TAGS if name in kind.model_fields), None)
    about = " ".join((kind.__doc__ or "").split("\n\n")[0].replace("``", "").split())
    yield Part(path, tag, choices, about, tuple(options))
    yield from inner


def _type(schema: dict[str, Any]) -> str:
    """Say in a few words what a JSON schema allows."""
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " | ".join(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "value")
    if kind == "boolean":
        return "true | false"
    if kind == "array":
        if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])}: {_type(schema['prefixItems'][0])}"
        return f"list of: {_type(schema['items'])}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    return " ".join([kind, ", ".join(limits)]).strip()


def _as_dict(config: RunConfig, name: str) -> dict[str, Any]:
    method = config.methods[name]
    return {
        "method": name,
        "kind": method.kind,
        "paper": method.paper,
        "summary": method.summary,
        "compared": name in config.compare,
        "parts": [asdict(part) for part in parts_of(method)],
    }


def _overview(console: Console, config: RunConfig) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, method in config.methods.items():
        mark = "*" if name in config.compare else " "
        paper = f"[dim]{escape(method.paper)}[/]\n" if method.paper else ""
        table.add_row(f"{mark} [bold]{escape(name)}[/]", f"{escape(method.summary)}\n{paper}".rstrip("\n"))
    console.print(table)
    console.print(f"\n* compared by run {config.run}. Options: stillhouse methods NAME, or --options for all.")


def _show(console: Console, config: RunConfig, name: str) -> None:
    """Print a method and all of its options; a value that is not the default is set in bold."""
    method = config.methods[name]
    console.print(f"[bold]{escape(name)}[/]" + (f"  [dim]{escape(method.paper)}[/]" if method.paper else ""))
    for line in filter(None, (method.summary, "" if name in config.compare else f"Not compared by run {config.run}.")):
        console.print(Padding(escape(line), (0, 0, 0, 2)))
    for part in parts_of(method):
        console.print()
        title = f"[bold]{escape(part.path or 'kind')}[/]: {part.choice}" if part.choice else f"[bold]{part.path}[/]"
        others = [choice for choice in part.choices if choice != part.choice]
        console.print(Padding(title + (f"  [dim]or {', '.join(others)}[/]" if others else ""), (0, 0, 0, 2)))
        if part.about:
            console.print(Padding(escape(part.about), (0, 0, 0, 2)))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(max_width=16)
        table.add_column()
        for option in part.options:
            changed = option.required or option.value != option.default
            default = (
                "must be set" if option.required else f"default {_written(option.default)}" if changed else "default"
            )
            value = escape(_written(option.value))
            meaning = f"[dim]{escape(option.type)}; {escape(default)}[/]" + (
                f"\n{escape(option.description)}" if option.description else ""
            )
            table.add_row(escape(option.key), f"[bold]{value}[/]" if changed else value, meaning)
        if part.options:
            console.print(Padding(table, (0, 0, 0, 4)))
    console.print()


def _written(value: Any) -> str:
    """Write a value as YAML does."""
    return value if isinstance(value, str) else json.dumps(value)
