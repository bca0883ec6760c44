"""Style, types and workflow conventions, checked with the same commands a developer runs by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

CHECKS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    "snakefmt": ["snakefmt", "--check", "--diff", "Snakefile", "rules"],
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of this environment from the repository root, as ``python -m`` so that no other one is found."""
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | {"NO_COLOR": "1", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("command", CHECKS.values(), ids=CHECKS)
def test_code(command: list[str]) -> None:
    result = run(*command)
    assert result.returncode == 0, f"`{' '.join(command)}` exits with {result.returncode}:\n{result.stdout}"


def test_snakemake_lint() -> None:
    result = run("snakemake", "--lint")
    assert result.returncode == 0, f"`snakemake --lint` exits with {result.returncode}:\n{result.stdout}"
    assert "Lints for" not in result.stdout, f"`snakemake --lint` has suggestions:\n{result.stdout}"
    assert "good condition" in result.stdout, f"`snakemake --lint` did not finish:\n{result.stdout}"
