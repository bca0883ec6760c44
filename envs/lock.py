# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Pin every version: ``uv run envs/lock.py`` keeps what is pinned where the ranges allow it.

``--upgrade`` takes the newest versions, ``--upgrade-package NAME`` that of one package; such options go to
``uv pip compile``.

From the ranges in ``pyproject.toml`` it writes

* ``envs/requirements.lock``: every package with hashes, for Linux on x86_64 and aarch64 and every supported Python;
* the constraint lists in ``pyproject.toml``: the same versions, which ``uv run`` and ``uv sync`` obey;
* ``envs/stillhouse.yaml``: the same versions as the conda environment of the rules.

Nothing it writes names a package index, so each site uses its own.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ENVS = Path(__file__).resolve().parent
PYPROJECT, LOCK, CONDA = ENVS.parent / "pyproject.toml", ENVS / "requirements.lock", ENVS / "stillhouse.yaml"

# What builds this package, and (setuptools) the dependencies that are published as source only.
BUILD = ("hatchling", "setuptools")

PLATFORM = re.compile(
    r"(?: and )?(?:sys_platform == 'linux'|platform_machine == '(?:x86_64|aarch64)'"
    r"|platform_python_implementation == 'CPython')"
)

LOCK_HEADER = "# Written by envs/lock.py for Linux on x86_64 and aarch64. Do not edit.\n"
CONDA_HEADER = """\
# Written by envs/lock.py from envs/requirements.lock. Do not edit.
# One environment for GPU and CPU rules: the CUDA build of torch also runs without a GPU. The versions are spelled
# out because Snakemake recognises a changed environment by the content of this file and installs from a copy of it.
name: stillhouse
channels:
  - conda-forge
  - nodefaults
dependencies:
  - python =3.11
  - pip
  - pip:
"""


def without_platform(pin: str) -> str:
    """Drop the platform from a pin's marker where the pin is the same on each platform of the lock."""
    package, _, marker = pin.partition(" ; ")
    remaining = {PLATFORM.sub("", term).strip("()").removeprefix(" and ") for term in marker.split(") or (")}
    if len(remaining) > 1:
        return pin
    return f"{package} ; {python}" if (python := remaining.pop()) else package


def pins(lock: str) -> list[str]:
    """The lock's requirements, without their hashes."""
    return [line.removesuffix(" \\") for line in lock.splitlines() if line[:1] not in ("", " ", "#")]


def constrain(pyproject: str, build: list[str], requirements: list[str]) -> str:
    """Replace the two lists of constraints in the text of ``pyproject.toml``."""
    for key, values in (("build-constraint-dependencies", build), ("constraint-dependencies", requirements)):
        lines = "".join(f'    "{value}",\n' for value in values)
        pyproject, count = re.subn(rf"(?ms)^{key} = \[\n.*?^\]$", f"{key} = [\n{lines}]", pyproject)
        if count != 1:
            raise SystemExit(f"pyproject.toml must have one list `{key}`, its brackets on lines of their own")
    return pyproject


def main() -> None:
    """Resolve in a scratch directory, and write the files only when all of it has succeeded."""
    ranges = PYPROJECT.read_text()
    with TemporaryDirectory() as scratch:
        project, lock, build = (Path(scratch, name) for name in ("pyproject.toml", LOCK.name, "build.lock"))

        def uv(output: Path, *command: str) -> list[str]:
            plain = ("--quiet", "--no-annotate", "--no-header", "--output-file", output)
            subprocess.run(["uv", *command, *plain], cwd=scratch, check=True)
            text = re.sub(r"(?m)^\w.*?(?=(?: \\)?$)", lambda pin: without_platform(pin[0]), output.read_text())
            output.write_text(text)
            return pins(text)

        # Versions found in an existing lock are kept where the ranges allow them.
        if LOCK.exists():
            shutil.copy(LOCK, lock)
        project.write_text(constrain(ranges, [], []))
        versions = uv(lock, "pip", "compile", project.name, "--universal", "--group", "dev", *sys.argv[1:])
        # The second pass has uv resolve the project under these pins, and reduces the hashes to those of the platforms.
        project.write_text(constrain(ranges, [], versions))
        versions = uv(lock, "export", "--no-emit-project", "--all-groups")
        Path(scratch, "build.in").write_text("\n".join(BUILD))
        builders = uv(build, "pip", "compile", "build.in", "--universal", "--constraint", lock.name)
        text = lock.read_text()

    LOCK.write_text(LOCK_HEADER + text)
    PYPROJECT.write_text(constrain(ranges, builders, versions))
    CONDA.write_text(CONDA_HEADER + "".join(f"      - {pin}\n" for pin in versions))


if __name__ == "__main__":
    main()
