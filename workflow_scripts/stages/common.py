"""What every stage's program does alike: its command line, its errors, and the manifest at its end."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from workflow_scripts.config import RunConfig, load, load_resolved
from workflow_scripts.errors import StillhouseError
from workflow_scripts.recipes import GPU_STAGES, PACK, Job, Pack, Recipes
from workflow_scripts.stages.notice import NOTICE, UNFINISHED, Unfinished
from workflow_scripts.store.digests import PREFIX, digest
from workflow_scripts.store.events import Events, slurm_job
from workflow_scripts.store.files import write_atomically

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
FIRST_PORT, PORTS = 20_000, 10_000  # below those that Linux gives to whoever asks for any


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


def launcher(gpus: int, nodes: int = 1) -> str:
    """Return the shell command that starts a module once for each of a node's ``gpus``, or of those it has if it has fewer.

    On several nodes, inside of a SLURM job that has them, torchrun is started on each. The dashes keep it from taking the
    module's options for its own.
    """
    here = len(list(Path("/dev").glob("nvidia[0-9]*")))
    count = min(gpus, here or gpus)
    torchrun = f"python -m torch.distributed.run --nproc-per-node {count}"
    if nodes > 1:
        # The nodes meet at the one that this is run on. SLURM gives a step all CPUs and GPUs of the job if it is not asked.
        step = f"srun --nodes {nodes} --ntasks-per-node 1 --cpu-bind none --kill-on-bad-exit=1"
        place = f"$(hostname):$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))"
        meeting = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID --rdzv-endpoint {place}"
        return f"{step} {torchrun} {meeting} -m --"
    return f"{torchrun} --standalone -m --" if count > 1 else "python -m"


def process_rank() -> int:
    """Return this process's number among those that torchrun started for one job, 0 without it."""
    return int(os.environ.get("RANK", 0))


def sees_gpu() -> bool:
    """Say whether this process has a GPU for itself, without importing torch."""
    return machine_has_gpu() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for what is asked for next, instead of giving it back to the kernel.

    Otherwise every batch on a CPU gets fresh pages, and zeroing those takes a quarter of a small network's training.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # elsewhere than with glibc there is none
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)


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
        "--classes",
        nargs="+",
        metavar="CLASS",
        help=f"classes to work on in place of a shard's, which is called {PACK} then; without a manifest",
    )
    parser.add_argument(
        "--log", type=Path, help="file for progress and warnings; a failure is still told on standard error"
    )
    parser.add_argument(
        "--manifest", type=Path, help="where the caller expects the manifest; refused if that is not what would be made"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="stop in good order, with exit status 75, before so many minutes are over (default: those that SLURM leaves)",
    )
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.log and process_rank():
        arguments.log = arguments.log.with_suffix(f".rank{process_rank()}.log")
    terminal = _log_to(arguments.log) if arguments.log else sys.stderr
    NOTICE.give(arguments.minutes)
    try:
        config = read_config(arguments)
        recipes = Pack(config, arguments.classes) if arguments.classes else Recipes(config)
        known = recipes.shards_of(stage)
        if arguments.shard not in known:
            raise StillhouseError(f"this run has no such job; it has {', '.join(known[:10]) or 'none of this stage'}")
        job = recipes.job(stage, arguments.shard)
        _expect(job, config.results, arguments.manifest)
        events = Events(config.results, stage, arguments.shard, job.digest[:PREFIX])
        with _told(events, job, config) if process_rank() == 0 else contextlib.nullcontext():
            content = work(recipes, arguments.shard)
            if arguments.classes:
                return
            _expect(Recipes(config).job(stage, arguments.shard), config.results, config.results / job.manifest)
            if process_rank() == 0:
                write_manifest(config.results, job, content)
    except StillhouseError as error:
        for stream in {terminal, sys.stderr}:
            print(f"{stage} {arguments.shard}: {error}", file=stream, flush=True)
        sys.exit(UNFINISHED if isinstance(error, Unfinished) else 1)


@contextlib.contextmanager
def _told(events: Events, job: Job, config: RunConfig) -> Iterator[None]:
    """Tell the events of a job's begin and end, of all its processes."""
    left = NOTICE.seconds_left()
    events.tell(
        "start",
        run=config.run,
        digest=job.digest,
        host=platform.node(),
        pid=os.getpid(),
        job=slurm_job(),
        gpu=job.stage in GPU_STAGES and config.compute.device != "cpu" and sees_gpu(),
        processes=int(os.environ.get("WORLD_SIZE", 1)),
        deadline=None if left is None else round(time.time() + left),
    )
    try:
        yield
    except BaseException as error:
        status = UNFINISHED if isinstance(error, Unfinished) else 1
        events.tell("stop", status=status, reason=str(error) or type(error).__name__)
        raise
    events.tell("stop", status=0)


def _log_to(path: Path) -> TextIO:
    """Send this process's standard error to a file, libraries' included, and return what it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = os.fdopen(os.dup(2), "w")
    with path.open("a") as file:  # after what an earlier attempt said
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
