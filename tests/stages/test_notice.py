"""How long a SLURM job may still run."""

from pathlib import Path

import pytest

from workflow_scripts.stages.notice import slurm_seconds_left


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        ("41 1:02:03", 3723.0),
        ("40 5:00\\n41 10:00\\n42 20:00", 600.0),  # the task of an array that has the array's own number
        ("41 UNLIMITED", None),
        ("40 5:00", None),
        ("", None),
    ],
)
def test_squeue_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, seconds: float | None) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\nprintf '{answer}\\n'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert slurm_seconds_left() == seconds


def test_without_a_job_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert slurm_seconds_left() is None
