"""The workflow through Snakemake itself, from a folder that holds nothing but the workflow and a configuration."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import support
import yaml
from support import Site, stored, tally

STAGES = ("encode", "cluster", "invert", "sample", "export", "evaluate", "measure", "report")
# One method that needs every stage: modes as in MGD3, from a Gaussian start as in D3HR.
METHOD = {
    "kind": "diffusion",
    "start": {"kind": "gaussian", "timestep": 600},
    "prototypes": {"kind": "kmeans"},
    "guidance": [{"term": "mode", "scale": 0.1, "stop": 4}],
    "sampler": {"kind": "ddim", "spacing": "leading", "cfg_channels": 4},
}


@dataclass(frozen=True)
class Checkout:
    """A working copy of the workflow, with its own ``.snakemake`` and its own results."""

    folder: Path
    site: Site

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``snakemake --cores 2`` here, over the configuration ``tiny.yaml``."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", "tiny.yaml", *arguments],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "HOME": str(self.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def jobs(self) -> dict[str, int]:
        """How many jobs of each stage have left a manifest."""
        manifests = [path.parent.name for path in (self.site.results / "manifests").glob("*/*.json")]
        return {stage: manifests.count(stage) for stage in sorted(set(manifests))}

    def files(self) -> dict[Path, int]:
        """Every file of the results, with its modification time; the configuration's tells when it was last used."""
        found = (path for path in self.site.results.rglob("*") if not path.is_dir() and path.parent.name != "configs")
        return {path: path.lstat().st_mtime_ns for path in found}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_backbone: Path) -> Checkout:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("Snakefile", "config.yaml", "rules", "envs", "workflow_scripts", "slurm_profile"):
        (folder / name).symlink_to(support.ROOT / name)
    shutil.copytree(tiny_images, folder, dirs_exist_ok=True)
    site = Site(folder / "train", folder / "test", tiny_backbone, folder / "results")
    run = support.tiny_run(Path("train"), Path("test"), tiny_backbone)
    run |= {"methods": {"mine": METHOD}, "compare": ["mine"], "ipc": [2], "seeds": [0], "report": {}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"run": "tiny", "runs": {"tiny": run}}))
    return Checkout(folder, site)


@pytest.fixture(scope="module")
def first(checkout: Checkout) -> subprocess.CompletedProcess[str]:
    return checkout.snakemake()


def quick(checkout: Checkout, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    return checkout.snakemake(*arguments), time.monotonic() - began


def test_a_run_ends_with_its_report(checkout: Checkout, first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 0, first.stdout
    report = checkout.site.results / "tiny" / "report"
    assert (report / "index.html").is_file()
    assert {path.suffix for path in (report / "figures").iterdir()} >= {".svg", ".pdf"}
    assert "Report: results/tiny/report/index.html" in first.stdout, "it says where the report is"
    with (report / "scores.csv").open(newline="") as file:
        assert [(row["run"], row["method"]) for row in csv.DictReader(file)] == [("tiny", "mine")]
    assert checkout.jobs() == dict.fromkeys(STAGES, 1)
    per_class = dict.fromkeys(support.CLASSES, 1)
    assert tally(stored(checkout.site.results)) == {
        stage: per_class for stage in ("encode", "cluster", "invert", "sample")
    }
    assert not support.leftovers(checkout.site.results)
    for kind, suffix in (("logs", "log"), ("benchmarks", "tsv")):
        assert len(list((checkout.site.results / kind).glob(f"*/*.{suffix}"))) == len(STAGES)


def test_snakemakes_report_holds_ours(checkout: Checkout, first: subprocess.CompletedProcess[str]) -> None:
    ended = checkout.snakemake("--report", "all.html")
    assert ended.returncode == 0, ended.stdout
    text = (checkout.folder / "all.html").read_text()
    assert "leaderboard.csv" in text and "index.html" in text and ".svg" in text
    assert "Distilled data sets of one run" in text, "its caption"


def test_a_second_run_starts_no_job_with_or_without_snakemakes_memory(
    checkout: Checkout, first: subprocess.CompletedProcess[str]
) -> None:
    before = checkout.files()
    for forget in (False, True):
        if forget:
            shutil.rmtree(checkout.folder / ".snakemake")
        again, seconds = quick(checkout)
        assert again.returncode == 0, again.stdout
        assert "Nothing to be done" in again.stdout
        assert "localrule all" not in again.stdout and "rule " not in again.stdout
        assert "results/tiny/report/index.html" in again.stdout
        assert checkout.files() == before
        print(f"{seconds:.1f} s")


def test_neither_age_nor_code_starts_a_job(checkout: Checkout, first: subprocess.CompletedProcess[str]) -> None:
    for path in (checkout.site.results / "manifests").glob("encode/*.json"):
        os.utime(path)  # younger than all that was made from it
    planned, _ = quick(checkout, "--dry-run")
    assert planned.returncode == 0, planned.stdout
    assert "Nothing to be done" in planned.stdout


def test_shards_change_jobs_and_no_class(checkout: Checkout, first: subprocess.CompletedProcess[str]) -> None:
    planned, _ = quick(checkout, "--dry-run", "--config", "shards=3")
    counts = planned_jobs(planned)
    assert counts["encode"] == counts["sample"] == 3
    assert "evaluate" not in counts, "exports look whether their sets are there, and nothing is trained anew"


def test_what_snakemake_remembers_decides_nothing(checkout: Checkout, first: subprocess.CompletedProcess[str]) -> None:
    """A job that it would start for its input's other names would keep it from looking at what is missing beside."""
    for path in (checkout.folder / ".snakemake" / "metadata").rglob("*"):
        if path.is_file():
            path.write_text(json.dumps(json.loads(path.read_text()) | {"input": ["another.json"], "params": ["other"]}))
    planned, _ = quick(checkout, "--dry-run")
    assert "Nothing to be done" in planned.stdout
    planned, _ = quick(checkout, "--dry-run", "--config", "compare=[mine, random]")
    made = {"sample": 1, "export": 1, "measure": 1, "evaluate": 1, "report": 1}
    assert planned_jobs(planned) == made | {"all": 1}


def planned_jobs(planned: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """The table that a dry run ends with."""
    assert planned.returncode == 0, planned.stdout
    table = (line.split() for line in planned.stdout.rpartition("Job stats:")[2].splitlines())
    counts = {words[0]: int(words[1]) for words in table if len(words) == 2 and words[1].isdigit()}
    del counts["total"]
    return counts


def test_the_profile_asks_for_what_each_job_needs(checkout: Checkout, first: subprocess.CompletedProcess[str]) -> None:
    rules = checkout.folder / "rules"
    rules.unlink()
    rules.mkdir()
    for path in (support.ROOT / "rules").iterdir():  # a job with a message does not show its resources
        (rules / path.name).write_text(re.sub(r"    message:\n.*\n", "", path.read_text()))
    try:
        profile = ["--workflow-profile", "slurm_profile", "--forceall", "--config", "compute={device: auto}"]
        planned, _ = quick(checkout, "--dry-run", *profile)
    finally:
        shutil.rmtree(rules)
        rules.symlink_to(support.ROOT / "rules")
    assert planned.returncode == 0, planned.stdout
    blocks = {block.split(":")[0]: block for block in planned.stdout.split("rule ")[1:]}
    assert blocks.keys() >= set(STAGES)
    for stage, partition, gpu, minutes in (
        ("encode", "gpu", 1, 18),
        ("cluster", "cpu", 0, 13),
        ("sample", "gpu", 1, 16),
    ):
        (resources,) = [line for line in blocks[stage].splitlines() if line.strip().startswith("resources:")]
        for wanted in (f"slurm_partition={partition}", f"gpu={gpu}", f"runtime={minutes}"):
            assert wanted in resources, (stage, resources)


BAD: dict[str, tuple[list[str], list[str]]] = {
    "impossible value": (["--config", "shards=0"], ["shards: got 0; input should be greater than 0"]),
    "unknown key": (["--config", "shard=3"], ["shard: unknown key; did you mean 'shards'?"]),
    "unknown run": (["--config", "run=tinny"], ["run: there is no run named 'tinny'; did you mean 'tiny'?"]),
}


@pytest.mark.parametrize(("arguments", "messages"), BAD.values(), ids=BAD)
def test_a_bad_configuration_ends_with_one_message(
    arguments: list[str], messages: list[str], checkout: Checkout
) -> None:
    ended, _ = quick(checkout, *arguments)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stdout
    lines = [line for line in ended.stdout.splitlines() if line.startswith("stillhouse: ")]
    assert len(lines) == 1, ended.stdout
    for message in messages:
        assert message in lines[0]
    assert len(ended.stdout.splitlines()) <= 3, ended.stdout


def spoiled(path: Path) -> Callable[[], None]:
    """Put half of a file in its place; return how to bring it back as it was."""
    stat, content = path.stat(), path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])

    def undo() -> None:
        path.unlink()
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return undo


def test_a_bad_image_is_named_on_the_terminal(checkout: Checkout, first: subprocess.CompletedProcess[str]) -> None:
    before = stored(checkout.site.results)
    broken = min((checkout.folder / "train" / "bee").iterdir())
    undo = spoiled(broken)
    ended, _ = quick(checkout)
    undo()
    assert ended.returncode == 1
    (message,) = [line for line in ended.stdout.splitlines() if line.startswith("encode 000: ")]
    for part in (f"train/bee/{broken.name}", "class bee", "cannot be decoded", "on_bad_image: skip"):
        assert part in message
    assert "Traceback" not in ended.stdout
    assert stored(checkout.site.results) == before

    planned, _ = quick(checkout, "--dry-run")
    assert "Nothing to be done" in planned.stdout, "the image is as it was, and so is everything else"


def test_a_killed_run_goes_on_with_the_same_command(
    checkout: Checkout, first: subprocess.CompletedProcess[str]
) -> None:
    """``kill -9`` of Snakemake and its jobs; only the lock of the working directory has to be lifted."""
    before = stored(checkout.site.results)
    change = ["--until", "sample", "--config", "seeds=[5]"]
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", "tiny.yaml", *change]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        command,
        cwd=checkout.folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    support.wait_until(lambda: process.poll() is not None or len(stored(checkout.site.results)) > len(before), 120)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    between = stored(checkout.site.results)
    assert between.items() > before.items()
    again, _ = quick(checkout, "--nolock", *change)
    assert again.returncode == 0, again.stdout
    assert stored(checkout.site.results).items() >= between.items()
    assert len(stored(checkout.site.results)) == len(before) + 3
    assert set(between) - set(before), "what was done before the kill was kept"
