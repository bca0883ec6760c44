"""Where a run's reports are kept, and which of them ``results/<run>/report`` shows."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from workflow_scripts.config import RunConfig
from workflow_scripts.errors import StillhouseError
from workflow_scripts.recipes import Job
from workflow_scripts.store.digests import PREFIX
from workflow_scripts.store.files import TEMPORARY


def report_folder(config: RunConfig, job: Job) -> Path:
    """Return where the report of exactly this configuration and these scores is kept."""
    return config.results / config.run / "reports" / job.digest[:PREFIX]


def publish(config: RunConfig, job: Job) -> Path | None:
    """Let ``results/<run>/report`` point to the report that belongs to the configuration; return its page, if it exists."""
    folder = report_folder(config, job)
    if not (folder / "index.html").exists():
        return None
    link = config.results / config.run / "report"
    target = Path("reports") / folder.name
    if link.is_dir() and not link.is_symlink():
        raise StillhouseError(
            f"{link} is a directory, as in a copy that followed links: remove it, it will be a link again"
        )
    if not (link.is_symlink() and Path(os.readlink(link)) == target):
        temporary = link.with_name(f"{TEMPORARY}{link.name}.{uuid.uuid4().hex}")
        temporary.symlink_to(target)
        temporary.replace(link)
    return link / "index.html"
