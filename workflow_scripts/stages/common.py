"""What every stage's program does alike: its command line, its errors, and the manifest at its end."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from workflow_scripts.config import RunConfig, load, load_resolved
from workflow_scripts.errors import StillhouseError
from workflow_scripts.recipes import Job, Recipes
from workflow_scripts.store.digests import PREFIX, digest
from workflow_scripts.store.files import write_atomically


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options by which every program chooses its configuration."""
    parser.add_argument(
        "--config", type=Path, default=Path("config.yaml"), help="configuration file (default: config.yaml)"
    )
    parser.add_argument("--configfile", type=Path, nargs="+", default=[], help="further files, laid over it")
    parser.add_argument("--run", help="named run of the configuration file (default: the one it names)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. compute.sample_batch=64"
    )
    parser.add_argument("--resolved", type=Path, help="a complete configuration as JSON, in place of the above")


def read_config(arguments: argparse.Namespace) -> RunConfig:
    """Read the configuration that the options choose."""
    if arguments.resolved is not None:
        return load_resolved(arguments.resolved)
    return load(arguments.config, arguments.run, arguments.set, arguments.configfile)


def resolved_path(config: RunConfig) -> Path:
    """Return where a configuration is kept for ``--resolved``."""
    return config.results / "cache" / "configs" / f"{digest(config.canonical())[:PREFIX]}.json"


def write_resolved(config: RunConfig, path: Path) -> None:
    """Write a configuration for ``--resolved``, or note that it is still used if it is there."""
    text = config.canonical()
    if path.exists() and path.read_text() == text:
        with contextlib.suppress(PermissionError):  # of another user's file
            path.touch()
    else:
        write_atomically(path, text)


def machine_has_gpu() -> bool:
    """Say whether this machine has an NVIDIA GPU, without importing torch."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def launcher(gpus: int) -> str:
    """Return the command that starts a module once for each of ``gpus`` GPUs, or of those of this machine if that has fewer.

    The dashes keep torchrun from taking the module's options for its own.
    """
    here = len(list(Path("/dev").glob("nvidia[0-9]*")))
    count = min(gpus, here or gpus)
    torchrun = f"python -m torch.distributed.run --standalone --nproc-per-node {count} -m --"
    return torchrun if count > 1 else "python -m"


def process_rank() -> int:
    """Return this process's number among those that torchrun started for one job, 0 without it."""
    return int(os.environ.get("RANK", 0))


def stage_main(stage: str, doc: str | None, work: Callable[[Recipes, str], Mapping[str, Any]], shards: str) -> None:
    """Run a stage's program: parse the command line, do one job's work, write its manifest.

    Args:
        work: does the job called by its shard and returns what the manifest shall say.
        shards: how this stage's shards are called, for ``--help``.
    """
    parser = argparse.ArgumentParser(prog=f"python -m workflow_scripts.stages.{stage}", description=doc)
    add_config_arguments(parser)
    parser.add_argument("--shard", required=True, help=f"which job: {shards}")
    parser.add_argument(
        "--log", type=Path, help="file for progress and warnings; a failure is still told on standard error"
    )
    parser.add_argument(
        "--manifest", type=Path, help="where the caller expects the manifest; refused if that is not what would be made"
    )
    arguments = parser.parse_args()
    if arguments.log and process_rank():
        arguments.log = arguments.log.with_suffix(f".rank{process_rank()}.log")
    terminal = _log_to(arguments.log) if arguments.log else sys.stderr
    try:
        config = read_config(arguments)
        recipes = Recipes(config)
        known = recipes.shards_of(stage)
        if arguments.shard not in known:
            raise StillhouseError(f"this run has no such job; it has {', '.join(known[:10]) or 'none of this stage'}")
        job = recipes.job(stage, arguments.shard)
        _expect(job, config.results, arguments.manifest)
        content = work(recipes, arguments.shard)
        _expect(Recipes(config).job(stage, arguments.shard), config.results, config.results / job.manifest)
        if process_rank() == 0:
            write_manifest(config.results, job, content)
    except StillhouseError as error:
        for stream in {terminal, sys.stderr}:
            print(f"{stage} {arguments.shard}: {error}", file=stream, flush=True)
        sys.exit(1)


def _log_to(path: Path) -> TextIO:
    """Send this process's standard error to a file, libraries' included, and return what it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = os.fdopen(os.dup(2), "w")
    with path.open("w") as file:
        os.dup2(file.fileno(), 2)
    return before


def write_manifest(results: Path, job: Job, content: Mapping[str, Any]) -> None:
    """Write a job's manifest, whole or not at all."""
    record = {"stage": job.stage, "shard": job.shard, "digest": job.digest, **content}
    write_atomically(results / job.manifest, json.dumps(record, indent=1))


def _expect(job: Job, results: Path, expected: Path | None) -> None:
    if expected is not None and expected != results / job.manifest:
        raise StillhouseError(
            f"the images, the backbone or the code changed since this job was planned (expected {expected}, would make "
            f"{results / job.manifest}). Run the same snakemake command again: it plans anew and keeps what is still valid."
        )
