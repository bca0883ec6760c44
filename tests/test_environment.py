"""The pinned versions agree wherever they are written, and no committed file depends on one machine."""

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "envs/requirements.lock").read_text()
CONDA = ROOT / "envs/stillhouse.yaml"
REGENERATE = "run `uv run envs/lock.py` and commit what it writes"

PINS = [line.removesuffix(" \\") for line in LOCK.splitlines() if re.match(r"\w", line)]

ADDRESS = re.compile(r"^-(?!-hash=sha256:)|://|@|\b(?:file:|git\+|www\.)|\.(?:com|io|net|org)\b")
INDEX = re.compile(r"index[-_]url|find[-_]links|pypi\.org|pythonhosted\.org", re.IGNORECASE)
PERSONAL_PATH = re.compile(r"(?<![\w.*}~/-])/(?:home|root|work|Users|mnt|scratch)/", re.IGNORECASE)


def test_every_locked_package_is_pinned_once_per_python_and_hashed() -> None:
    entries = re.findall(r"(?m)^\w.*(?:\\\n    --hash=sha256:[0-9a-f]{64} ?)+$", LOCK)
    assert len(entries) == len(PINS) > 0, f"the lock has an entry without hashes; {REGENERATE}"
    for python in ("3.11", "3.12", "3.13"):
        environment = {"python_version": python, "python_full_version": f"{python}.0"}
        requirements = [Requirement(pin) for pin in PINS]
        names = [r.name for r in requirements if r.marker is None or r.marker.evaluate(environment)]
        assert len(names) == len(set(names)), f"a package is pinned twice for Python {python}; {REGENERATE}"
        assert all(str(requirement.specifier).startswith("==") for requirement in requirements)


def test_uv_is_constrained_to_the_lock() -> None:
    uv = PYPROJECT["tool"]["uv"]
    assert uv["constraint-dependencies"] == PINS, f"pyproject.toml differs from the lock; {REGENERATE}"
    build = uv["build-constraint-dependencies"]
    assert set(build) <= set(PINS), f"the build tools in pyproject.toml differ from the lock; {REGENERATE}"
    backend = {Requirement(r).name for r in PYPROJECT["build-system"]["requires"]}
    missing = backend - {Requirement(r).name for r in build}
    assert not missing, f"{missing} build this package and are not constrained; add them to BUILD in envs/lock.py"


def test_conda_environment_is_the_lock() -> None:
    *packages, pip = yaml.safe_load(CONDA.read_text())["dependencies"]
    assert pip["pip"] == PINS, f"{CONDA.name} differs from the lock; {REGENERATE}"
    python = next(package.split("=")[1] for package in packages if package.startswith("python "))
    assert Version(python) in Requirement(f"python{PYPROJECT['project']['requires-python']}").specifier


def test_lock_satisfies_the_declared_ranges() -> None:
    pinned: dict[str, list[Version]] = {}
    for requirement in map(Requirement, PINS):
        pinned.setdefault(requirement.name, []).append(Version(str(requirement.specifier).removeprefix("==")))
    for declared in map(Requirement, PYPROJECT["project"]["dependencies"] + PYPROJECT["dependency-groups"]["dev"]):
        versions = pinned.get(canonicalize_name(declared.name), [])
        assert versions, f"{declared} is not in the lock; {REGENERATE}"
        assert all(v in declared.specifier for v in versions), f"{declared} but {versions} locked; {REGENERATE}"


@pytest.mark.parametrize("text", [LOCK, CONDA.read_text()], ids=["requirements.lock", CONDA.name])
def test_pins_name_no_address(text: str) -> None:
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    found = [line for line in lines if not line.startswith("#") and ADDRESS.search(line)]
    assert not found, f"{found} point to an index or an address; {REGENERATE}"


def test_running_environment_has_the_locked_versions() -> None:
    wrong = []
    for requirement in map(Requirement, PINS):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            version = Version(metadata.version(requirement.name)).public  # torch may append its CUDA version
        except metadata.PackageNotFoundError:
            version = "missing"
        if version != str(requirement.specifier).removeprefix("=="):
            wrong.append(f"{requirement.name}: {version}, locked {requirement.specifier}")
    assert not wrong, "this environment is not the locked one:\n" + "\n".join(wrong)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout: nothing says which files are committed")
def test_committed_files_name_no_index_and_no_personal_path() -> None:
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    assert listing.returncode == 0, f"git cannot list the files of this checkout:\n{listing.stderr}"
    found = []
    for path in filter(Path.is_file, (ROOT / name for name in listing.stdout.split("\0") if name)):
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            if match := INDEX.search(line) or PERSONAL_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found, "these lines belong to one machine or site:\n" + "\n".join(found)
