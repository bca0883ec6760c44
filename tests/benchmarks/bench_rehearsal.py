"""Run the rehearsal in one go and measure every stage: seconds, CPU seconds and peak memory of its jobs, files in the store.

    python tests/benchmarks/bench_rehearsal.py FOLDER                  # 1000 classes; FOLDER gets images and results
    python tests/benchmarks/bench_rehearsal.py FOLDER --classes 50     # does the peak memory depend on the classes?
    ... --shards 1 --methods random mgd3 d3hr                          # in fewer jobs

Each job is a forked process that does what the stage's program does, without the imports: a program of its own takes some
seconds and 0.3 GB more. Called again for the same folder, it goes on with what is missing.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import support

from workflow_scripts.config import RunConfig, load
from workflow_scripts.operations.rehearse import OVERLAY, rehearse
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import write_manifest


def in_child(function) -> tuple[float, resource.struct_rusage]:
    """Call a function in a forked process; return how long it took, and what it used."""
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status, used = os.wait4(child, 0)
    if status:
        sys.exit(f"a job failed ({status})")
    return time.perf_counter() - began, used


def run(config: RunConfig, folder: Path) -> None:
    """Run every job whose manifest is missing, one after another."""
    torch.set_num_threads(1)
    work = support.workers()
    listed = folder / "jobs.json"

    def list_jobs() -> None:
        listed.write_text(json.dumps([(job.stage, job.shard, job.manifest) for job in Recipes(config).jobs()]))

    def do(stage: str, shard: str) -> None:
        recipes = Recipes(config)
        write_manifest(config.results, recipes.job(stage, shard), work[stage](recipes, shard))

    in_child(list_jobs)
    stages: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for stage, shard, manifest in json.loads(listed.read_text()):
        if not (config.results / manifest).exists():
            seconds, used = in_child(lambda stage=stage, shard=shard: do(stage, shard))
            stages[stage].append((seconds, used.ru_utime + used.ru_stime, used.ru_maxrss))
            print(
                f"  {stage} {shard}: {seconds:.1f} s, CPU {sum(used[:2]):.1f} s, {used.ru_maxrss / 1024:.0f} MB",
                flush=True,
            )
    print(f"{'stage':10} {'jobs':>5} {'seconds':>9} {'CPU s':>9} {'peak MB':>9}")
    for stage, jobs in stages.items():
        wall, cpu, peak = sum(j[0] for j in jobs), sum(j[1] for j in jobs), max(j[2] for j in jobs)
        print(f"{stage:10} {len(jobs):5} {wall:9.1f} {cpu:9.1f} {peak / 1024:9.0f}")


def count_files(results: Path) -> None:
    """Print how many files the store has, and how many the largest result."""
    folders = [record.parent for record in (results / "store").glob("*.zarr/*/*/zarr.json")]
    files = [sum(path.is_file() for path in folder.rglob("*")) for folder in folders]
    print(f"{len(files)} class-level results in {sum(files)} files, at most {max(files)} each")


def main() -> None:
    """Print one line per stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--methods", nargs="+", help="default: all that need no training")
    options = parser.parse_args()
    if not (options.folder / OVERLAY).exists():
        in_child(lambda: rehearse(options.folder, options.classes, 6))
    settings = (f"results={options.folder / 'results'}", f"shards={options.shards}", "compute.device=cpu")
    settings += (f"compare={options.methods}",) if options.methods else ()
    config = load(support.ROOT / "config.yaml", None, settings, [options.folder / OVERLAY])
    run(config, options.folder)
    count_files(config.results)


if __name__ == "__main__":
    main()
