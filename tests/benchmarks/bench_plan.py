"""Measure planning at the size of ImageNet-1K: 1000 classes x 6 methods x 3 IPCs x 3 seeds.

    python tests/benchmarks/bench_plan.py                  # everything made, then one class changed
    python tests/benchmarks/bench_plan.py --images 1300 --listing    # listing ImageNet: at first, and from the notes

Images are names of one tiny file per class, results are records without arrays: to a planner, that is a finished run.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from workflow_scripts.config import load
from workflow_scripts.data.imagenet import wnids
from workflow_scripts.recipes import CLASS_STAGES, Recipes
from workflow_scripts.stages.publish import report_folder

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
)


def build(folder: Path, classes: int, images: int) -> None:
    """Write a working copy, images and a backbone's files."""
    for name in ("Snakefile", "config.yaml", "rules", "envs", "workflow_scripts"):
        (folder / name).symlink_to(ROOT / name)
    for name in wnids()[:classes]:
        for split, count in (("train", images), ("val", 2)):
            directory = folder / split / name
            directory.mkdir(parents=True)
            first = directory / f"{name}_0.JPEG"
            first.write_bytes(b"image")
            for index in range(1, count):
                os.link(first, directory / f"{name}_{index}.JPEG")
    for name in FILES:
        (folder / "backbone" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "backbone" / name).write_text(json.dumps({"file": name}))
    (folder / "backbone" / "labels.json").write_text(json.dumps(wnids()[:classes]))
    run = {
        "extends": "imagenet1k",
        "dataset": {"source": "imagenet", "subset": None, "root": "train", "test_root": "val"},
        "backbone": {"path": "backbone"},
        "compare": ["random", "kmeans", "dit", "mgd3", "manifoldgd", "d3hr"],
        "ipc": [1, 10, 50],
        "seeds": [0, 1, 2],
    }
    (folder / "bench.yaml").write_text(yaml.safe_dump({"run": "bench", "runs": {"bench": run}}))


def recipes() -> Recipes:
    """Plan in the working directory."""
    return Recipes(load(Path("config.yaml"), "bench", overlays=[Path("bench.yaml")]))


def mark_as_made(plan: Recipes) -> int:
    """Write the record of every result, and every set, score, report and manifest; return the number of results."""
    written = 0
    results = plan.config.results
    for job in plan.jobs():
        for result in plan.stage_results(job.stage, job.shard) if job.stage in CLASS_STAGES else ():
            plan.store.path(result).mkdir(parents=True, exist_ok=True)
            record = {"digest": result.digest, "recipe": result.recipe}
            (plan.store.path(result) / "zarr.json").write_text(json.dumps({"attributes": record}))
            written += 1
        for wanted in plan.sets(job.shard) if job.stage == "export" else ():
            plan.set_directory(wanted).mkdir(parents=True)
        for training in plan.trainings_of(job.shard) if job.stage == "evaluate" else ():
            plan.training_path(training).parent.mkdir(parents=True, exist_ok=True)
            plan.training_path(training).write_text("{}")
        if job.stage == "report":
            report_folder(plan.config, job).mkdir(parents=True)
            (report_folder(plan.config, job) / "index.html").write_text("")
        (results / job.manifest).parent.mkdir(parents=True, exist_ok=True)
        (results / job.manifest).write_text("{}")
    return written


def timed(title: str, *command: str) -> None:
    """Run a command and print its times and its last lines."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said = (ended.stdout + ended.stderr).strip()
    told = [line for line in said.splitlines() if line.startswith(("Nothing", "total")) or line.endswith("to run.")]
    print(f"{title:44} {seconds:7.1f} s, CPU {cpu:5.1f} s   {'; '.join(told) or said[-200:]}", flush=True)


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--images", type=int, default=60, help="training images per class")
    parser.add_argument("--listing", action="store_true", help="stop after the first two plans")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    overlay = ["--configfile", "bench.yaml"]
    plan = ["workflow_scripts.cli", "plan", *overlay]
    dry_run = ["snakemake", "-n", "--quiet", "rules", "--cores", "2", *overlay]
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), options.classes, options.images)
        os.chdir(folder)
        time.sleep(2)  # a folder that changed just now is not noted
        timed("plan, first listing", *plan)
        timed("plan, nothing made", *plan)
        if options.listing:
            return
        began = time.perf_counter()
        written = mark_as_made(recipes())
        print(f"{written} results marked as made in {time.perf_counter() - began:.0f} s", flush=True)
        timed("plan, everything made", *plan)
        timed("snakemake -n, everything made", *dry_run)
        timed("plan, one method changed", *plan, "--set", "methods.mgd3.sampler.steps=25")
        (Path("train") / wnids()[3] / "new.JPEG").write_bytes(b"new")
        timed("plan, one class changed", *plan)
        timed("snakemake -n, one class changed", *dry_run)


if __name__ == "__main__":
    main()
