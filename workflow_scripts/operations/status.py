"""``stillhouse status``: a run's progress on a terminal, as JSON and as a page that reloads itself."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import jinja2
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from workflow_scripts.operations.progress import Progress, Snapshot, StageProgress
from workflow_scripts.operations.queue import Queued
from workflow_scripts.store.files import write_atomically

HEADINGS = ("done", "running", "set aside", "missing", "images/s", "time left")
JOB_HEADINGS = ("SLURM job", "node", "age", "limit in", "made", "what")
BAR = 24
RETRY = "What is set aside waits for `stillhouse retry`."
SHOWN = 30


def status(progress: Progress, *, every: float | None, as_json: bool, page: Path | None) -> None:
    """Show how far a run is, once or again and again until it is finished or the user has seen enough.

    Args:
        every: seconds between two looks; None for one look.
        page: where to write an HTML page as well.
    """
    console = Console()

    def look() -> Snapshot:
        snapshot = progress.look()
        if page is not None:
            write_atomically(page, to_html(snapshot, reload=max(5, round(every or 30))), durable=False)
        return snapshot

    snapshot = look()
    if every is None or as_json or not console.is_terminal:
        while True:
            if as_json:
                print(to_json(snapshot, indent=1 if every is None else None), flush=True)
            else:
                console.print(to_text(snapshot))
            if every is None or snapshot.finished:
                break
            time.sleep(every)
            snapshot = look()
    else:
        rows = max(3, console.height - len(snapshot.stages) - 14)  # what does not fit cannot be drawn over
        with Live(to_text(snapshot, rows), console=console, auto_refresh=False) as live:
            while not snapshot.finished:
                time.sleep(every)
                snapshot = look()
                live.update(to_text(snapshot, rows), refresh=True)
    if page is not None and not as_json:
        console.print(f"Page: {page}", highlight=False, soft_wrap=True)


def to_json(snapshot: Snapshot, indent: int | None = 1) -> str:
    """Write a snapshot as JSON."""
    content = asdict(snapshot) | {"finished": snapshot.finished}
    content["stages"] = [asdict(stage) | {"total": stage.total} for stage in snapshot.stages]
    return json.dumps(content, indent=indent)


def to_text(snapshot: Snapshot, shown: int = SHOWN) -> RenderableType:
    """Lay a snapshot out for a terminal, with so many jobs and a third as many failures at most."""
    stages = Table(box=box.SIMPLE_HEAD)
    stages.add_column("stage", no_wrap=True)
    stages.add_column("")
    for heading in HEADINGS:
        stages.add_column(heading, justify="right", no_wrap=True)
    for stage in snapshot.stages:
        stages.add_row(stage.stage, _bar(stage), *_cells(stage))
    parts: list[RenderableType] = [
        Text.assemble("Run ", (snapshot.run, "bold")),
        stages,
        Text("   ".join(f"{name}: {value}" for name, value in _figures(snapshot))),
    ]
    if rows := _job_rows(snapshot):
        jobs = Table(*JOB_HEADINGS, box=box.SIMPLE_HEAD)
        for row in rows[:shown]:
            jobs.add_row(*map(escape, row))
        if len(rows) > shown:
            jobs.add_row("", "", "", "", "", f"and {len(rows) - shown} more")
        parts.append(jobs)
    troubles = _troubles(snapshot)
    few = -(-shown // 3)
    for what, error in troubles[:few]:
        parts.append(Text.assemble((what, "red"), ": ", error))
    if len(troubles) > few:
        parts.append(Text(f"and {len(troubles) - few} more", style="red"))
    if snapshot.set_aside:
        parts.append(Text(RETRY))
    parts.append(Text(f"Report: {snapshot.page}" if snapshot.page else "No report yet."))
    return Group(*parts)


def to_html(snapshot: Snapshot, reload: int) -> str:
    """Make a page that asks for itself anew every ``reload`` seconds until the run is finished."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("status.html.j2").render(
        run=snapshot,
        reload=reload,
        moment=time.strftime("%d %B %Y, %H:%M:%S", time.localtime(snapshot.time)),
        done=sum(stage.done for stage in snapshot.stages),
        total=sum(stage.total for stage in snapshot.stages),
        figures=_figures(snapshot),
        headings=HEADINGS,
        rows=[(stage, _cells(stage)) for stage in snapshot.stages],
        job_headings=JOB_HEADINGS,
        jobs=_job_rows(snapshot),
        troubles=_troubles(snapshot),
        remedy=RETRY,
    )


def _bar(stage: StageProgress) -> Text:
    done, running, aside = (
        round(BAR * count / max(stage.total, 1)) for count in (stage.done, stage.running, stage.set_aside)
    )
    done = done if stage.done == stage.total else min(done, BAR - 1)  # full only when all is there
    parts = [("█" * done, "green"), ("█" * running, "yellow"), ("█" * aside, "red"), ("░" * BAR, "grey50")]
    bar = Text.assemble(*parts)
    bar.truncate(BAR)
    return bar


def _cells(stage: StageProgress) -> list[str]:
    """Write a stage's numbers; images per second are those of all its workers, or of one while none works."""
    rate = stage.images_per_second
    return [
        f"{stage.done} of {stage.total}",
        *(str(count or "-") for count in (stage.running, stage.set_aside, stage.missing)),
        "-" if rate is None else f"{rate * max(stage.workers, 1):.3g}",
        duration(stage.seconds_left) if stage.seconds_left else "-",
    ]


def _figures(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Return what is to be said of the run as a whole: names and values."""
    waiting = Counter(job.state for job in snapshot.jobs)
    left = "-" if snapshot.seconds_left is None else duration(snapshot.seconds_left)
    if snapshot.unmeasured and snapshot.seconds_left is not None:
        left += f", without {', '.join(snapshot.unmeasured)}"
    hours = f"{snapshot.gpu_hours:,.2f}"
    if snapshot.planned_gpu_hours is not None:
        hours += f" of {snapshot.planned_gpu_hours:,.2f} planned"
    figures = [("time left", left), ("workers", str(len(snapshot.workers))), ("GPU-hours", hours)]
    if snapshot.other_hours >= 0.005:
        figures.append(("hours without GPU", f"{snapshot.other_hours:,.2f}"))
    figures += [(f"other jobs {state.lower()}", str(count)) for state, count in sorted(waiting.items())]
    return figures


def _job_rows(snapshot: Snapshot) -> list[list[str]]:
    """Return one row per worker, then one per job in the queue that is no worker yet."""
    ids = {job.number: job.id for job in snapshot.jobs}
    rows = []
    for worker in snapshot.workers:
        hand = f": {worker.in_hand[0]}" if worker.in_hand else ""
        hand += f" and {len(worker.in_hand) - 1} more" if len(worker.in_hand) > 1 else ""
        rows.append(
            [
                "-" if worker.job is None else ids.get(worker.job, worker.job),
                worker.host,
                duration(worker.age),
                "-" if worker.seconds_left is None else duration(worker.seconds_left),
                str(worker.made),
                f"{worker.stage} {worker.shard}{hand}",
            ]
        )
    return rows + [_queued_row(job) for job in snapshot.jobs]


def _troubles(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Return what failed and how: results that are set aside, then jobs that ended in an error."""
    aside = [
        (f"{one.stage} {one.job}: {one.of} failed {one.failures} times", f"{one.error} (traceback: {one.file})")
        for one in snapshot.set_aside
    ]
    return aside + [(f"{one.stage} {one.shard}", one.error) for one in snapshot.broken]


def _queued_row(job: Queued) -> list[str]:
    waits = f" ({job.reason})" if job.state == "PENDING" else ""
    what = job.comment.removeprefix("rule_") if job.comment not in ("", "(null)") else job.name
    return [job.id, job.node or "-", duration(job.age), "-", "-", f"{job.state.lower()}{waits}: {what}"]


def duration(seconds: float) -> str:
    """Write a time in its two largest units."""
    seconds = max(0, round(seconds))
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // part} {smaller}"
    return f"{seconds} s"
