"""Published accuracies, and which of them a run may be compared with.

``published.csv`` holds one row per number. A full data set's accuracy has the method ``full`` and no IPC. ``selection`` says
which epoch the number is of: ``best`` is chosen on the test set, ``last`` is not. Protocols:

- ``hard-sgd``, ``hard-adamw``: the hard-label protocols of Minimax and of IGD; ``hard-unstated`` where sources do not say
- ``soft-online``: RDED's teacher on each batch; ``soft-stored``: SRe2L's stored labels; ``soft-unstated``
- ``glad-128``: GLaD's cross-architecture protocol at 128 px
- ``own``: a protocol of the paper's own, comparable with nothing else
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

Selection = Literal["best", "last"]
Trust = Literal["primary", "secondary", "quoted", "rerun", "unverified"]

TRUST: dict[Trust, str] = {
    "primary": "read in the method's own paper, README or code",
    "secondary": "the method's own number, read in notes about its paper",
    "quoted": "printed in another work's table",
    "rerun": "measured by others with the method's code",
    "unverified": "from memory or an uncertain transcription: not to be quoted",
}
"""How far a number can be trusted."""

PROTOCOLS = (
    "hard-sgd",
    "hard-adamw",
    "hard-unstated",
    "soft-online",
    "soft-stored",
    "soft-unstated",
    "glad-128",
    "own",
)

NAMES = {
    "soft-rded": "soft-online",
    "soft-d3hr": "soft-online",
    "soft-cao2": "soft-online",
    "soft-fkd": "soft-stored",
    "glad": "glad-128",
}
"""What ``evaluation.protocols`` calls a protocol, and under which name its published numbers are; others have one name."""

FILE = Path(__file__).with_name("published.csv")


@dataclass(frozen=True)
class Published:
    """One published number.

    Attributes:
        method: Lower-case name, as this repository's where it has the method.
        dataset: As in ``workflow_scripts/data/imagenet.json`` where it is one of those.
        ipc: Images per class; None for the full data set.
        architecture: The classifier in print, such as ``ResNetAP-10``.
        protocol: One of ``PROTOCOLS``.
        selection: The epoch that the number is of.
        value: Top-1 accuracy in percent.
        spread: What the source prints behind the plus-minus sign, in points; None where it prints nothing. Of what it is
            the spread (sets or trainings, sample or population) differs between sources.
        source: Where the number was read, and what to know about it.
        trust: A key of ``TRUST``.
    """

    method: str
    dataset: str
    ipc: int | None
    architecture: str
    protocol: str
    selection: Selection
    value: float
    spread: float | None
    source: str
    trust: Trust


@dataclass(frozen=True)
class Mismatch:
    """A row that does not match, and why not."""

    row: Published
    reason: str


@dataclass(frozen=True)
class Matches:
    """Rows that may stand beside a run's scores, and all others with the reason why not, both in the order of the file."""

    rows: tuple[Published, ...]
    others: tuple[Mismatch, ...]


def load(path: Path = FILE) -> tuple[Published, ...]:
    """Read the published numbers.

    Raises:
        ValueError: A row has a missing, unknown or impossible value; the message names the file and the line.
    """
    names = [field.name for field in fields(Published)]
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if reader.fieldnames != names:
            raise ValueError(f"{path}: the columns must be {', '.join(names)}, not {reader.fieldnames}")
        rows = []
        for row in reader:
            try:
                rows.append(_parse(row))
            except ValueError as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return tuple(rows)


def matching(
    rows: Iterable[Published],
    dataset: str,
    protocol: str,
    architecture: str,
    ipc: int | None,
    *,
    selection: Selection | None = None,
    trust: Sequence[Trust] = ("primary", "secondary", "quoted", "rerun"),
) -> Matches:
    """Part rows into those measured under the given conditions and the others.

    A full data set's accuracy matches any IPC, as the bound that it is. Rows of a paper's own or of an unstated protocol
    never match, whatever ``protocol`` is.

    Args:
        rows: What :func:`load` returns, or part of it.
        dataset: See :class:`Published`.
        protocol: The run's protocol.
        architecture: The classifier in print, see ``evaluation.architectures.display_name``; narrow ones match nothing.
        ipc: Images per class; None for the full data set.
        selection: The epoch that the run reports; None for either.
        trust: Grades of trust that may stand beside measured scores.
    """
    found, others = [], []
    for row in rows:
        wanted = {
            "data set": (row.dataset, dataset),
            "protocol": (row.protocol, protocol),
            "architecture": (row.architecture, architecture),
            "IPC": (row.ipc, None if row.ipc is None else ipc),
            "epoch": (row.selection, row.selection if selection is None else selection),
        }
        reasons = [f"{name} {has}, not {wants}" for name, (has, wants) in wanted.items() if has != wants]
        if row.protocol == protocol and (protocol == "own" or protocol.endswith("-unstated")):
            reasons.append(f"protocol {protocol} need not be that of another paper")
        if row.trust not in trust:
            reasons.append(f"{row.trust}: {TRUST[row.trust]}")
        if reasons:
            others.append(Mismatch(row, "; ".join(reasons)))
        else:
            found.append(row)
    return Matches(tuple(found), tuple(others))


def _parse(row: dict[str, str]) -> Published:
    for name, text in row.items():
        if not isinstance(text, str) or name is None:
            raise ValueError("the row has not one value per column")
        if text != text.strip() or (not text and name not in ("ipc", "spread")):
            raise ValueError(f"{name} is {text!r}")
    for name, known in (("protocol", PROTOCOLS), ("selection", get_args(Selection)), ("trust", get_args(Trust))):
        if row[name] not in known:
            raise ValueError(f"{name} is {row[name]!r}, which is none of {', '.join(known)}")
    ipc, value = int(row["ipc"]) if row["ipc"] else None, float(row["value"])
    spread = float(row["spread"]) if row["spread"] else None
    if (ipc is None) != (row["method"] == "full") or (ipc is not None and ipc < 1):
        raise ValueError(f"ipc is {row['ipc']!r}: a number from 1, or empty for the method `full` alone")
    if not 0 <= value <= 100 or not (spread is None or 0 <= spread <= 50) or not math.isfinite(value):
        raise ValueError(f"value {row['value']} or spread {row['spread']} is not a percentage")
    return Published(
        row["method"],
        row["dataset"],
        ipc,
        row["architecture"],
        row["protocol"],
        row["selection"],  # type: ignore[arg-type]
        value,
        spread,
        row["source"],
        row["trust"],  # type: ignore[arg-type]
    )
