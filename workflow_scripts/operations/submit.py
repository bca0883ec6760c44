"""``stillhouse submit``: send a run's controller, or what it misses, to a cluster through submitit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

import submitit

from workflow_scripts.errors import StillhouseError
from workflow_scripts.operations.compact import Packing, PackWorker
from workflow_scripts.operations.controller import Controller
from workflow_scripts.operations.progress import job_name
from workflow_scripts.operations.queue import queue
from workflow_scripts.operations.site_profile import Profile
from workflow_scripts.recipes import GPU_STAGES, Recipes
from workflow_scripts.stages.common import resolved_path, write_resolved

Cluster = Literal["slurm", "local", "debug"]
CLUSTERS: tuple[Cluster, ...] = ("slurm", "local", "debug")
DAY = 24 * 60
NOTICE_SECONDS = 120
"""How long before the time limit, or before it is preempted where SLURM tells so, a job begins to stop."""
RESTARTS = 10_000
"""How often a job may run into its time limit and go on in a new one; only those that get on do."""


@dataclass(frozen=True)
class Request:
    """What each job asks the cluster for.

    Attributes:
        gpu: a GPU, of this type if one is named.
        reservation, qos, account, partition: as in sbatch; None for the cluster's default.
    """

    name: str
    minutes: int
    cpus: int = 1
    memory_mb: int = 4000
    gpu: bool | str = False
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    at_once: int = 64


def submit_controller(
    recipes: Recipes,
    profile: Profile | None,
    cluster: Cluster,
    *,
    minutes: int | None = None,
    partition: str | None = None,
    extra: Sequence[str] = (),
) -> list[submitit.Job[Any]]:
    """Submit the job that runs Snakemake.

    Args:
        minutes: after so many the job goes on in a new one, if it is not done; by default a day, or what the profile allows.
        extra: further arguments for ``snakemake``.

    Raises:
        StillhouseError: if a controller of this run is there already, or the cluster refuses.
    """
    config = recipes.config
    if not Path("Snakefile").is_file():
        raise StillhouseError("there is no Snakefile here: run this command in the directory of the workflow")
    refuse_second(config.run)
    write_resolved(config, resolved_path(config))
    own = ["--workflow-profile", str(profile.path.parent)] if profile is not None else ["--cores", "all"]
    command = [*own, "--config", f"resolved={resolved_path(config)}", *extra]
    longest = DAY if profile is None else min(DAY, profile.number("controller", "minutes_max", DAY))
    request = Request(
        name=job_name(config.run),
        minutes=minutes or round(longest),
        partition=partition or (None if profile is None else profile.resource("controller", "slurm_partition")),
        **shared(profile, "controller"),
    )
    return send([Controller(command, folder_of(recipes) / "controller.json")], request, cluster, folder_of(recipes))


def submit_packing(
    recipes: Recipes,
    packing: Packing,
    profile: Profile,
    cluster: Cluster,
    *,
    minutes: int | None = None,
    partition: str | None = None,
) -> list[submitit.Job[Any]]:
    """Submit one array with a job for each worker.

    Args:
        minutes: that each job asks for; by default what the profile says of its work, and a third on top.

    Raises:
        StillhouseError: if a job of this run is there already, or the cluster refuses.
    """
    config, stages = recipes.config, packing.stages or ["export"]
    refuse_second(config.run)
    write_resolved(config, resolved_path(config))
    gpu = config.compute.device != "cpu" and any(stage in GPU_STAGES for stage in stages)
    leading = next((stage for stage in stages if stage in GPU_STAGES), stages[0])
    asked = sum(profile.number(stage, "minutes_fixed", 10) for stage in stages)
    asked += max(share.seconds for share in packing.shares) / 60 * 4 / 3
    request = Request(
        name=f"{job_name(config.run)}.compact",
        minutes=minutes or ceil(min(asked, profile.number(leading, "minutes_max", asked))),
        cpus=max(profile.threads(stage) for stage in stages),
        memory_mb=round(max(profile.number(stage, "mem_mb", 16000) for stage in stages)),
        gpu=gpu and (profile.resource(leading, "gpu_model") or True),
        partition=partition or profile.resource(leading, "slurm_partition"),
        at_once=int(profile.setting("jobs") or 64),
        **shared(profile, leading),
    )
    workers = [PackWorker(resolved_path(config), share.classes) for share in packing.shares]
    return send(workers, request, cluster, folder_of(recipes))


def folder_of(recipes: Recipes) -> Path:
    """Return where a run's submitted jobs write what they say, and submitit keeps its files."""
    return recipes.config.results / "logs" / "submit" / recipes.config.run


def shared(profile: Profile | None, stage: str) -> dict[str, Any]:
    """Return what all jobs of a profile have in common."""
    if profile is None:
        return {}
    return {
        "account": profile.resource(stage, "slurm_account"),
        "qos": profile.setting("slurm-qos"),
        "reservation": profile.setting("slurm-reservation"),
    }


def refuse_second(run: str) -> None:
    """Refuse if a job of a run that was submitted in this way is in the queue.

    Raises:
        StillhouseError: naming it.
    """
    name = job_name(run)
    for job in queue() or []:
        if job.name == name or job.name.startswith(f"{name}."):
            raise StillhouseError(
                f"SLURM job {job.id} ({job.name}, {job.state.lower()}) works on run {run} already. "
                f"`stillhouse status --run {run} --watch` shows it; `scancel {job.id}` ends it."
            )


def send(
    calls: Sequence[Callable[[], Any]], request: Request, cluster: Cluster, folder: Path
) -> list[submitit.Job[Any]]:
    """Submit callables with a ``checkpoint``: one job, or one array of jobs.

    Raises:
        StillhouseError: if there is no such cluster, or it refuses.
    """
    if cluster == "debug":
        executor: submitit.Executor = submitit.DebugExecutor(folder)
        return [executor.submit(call) for call in calls]
    if cluster == "local":
        return [_local(folder, request, number).submit(call) for number, call in enumerate(calls)]
    if shutil.which("sbatch") is None:
        raise StillhouseError("there is no SLURM here (no sbatch): take --cluster local for a run on this machine")
    try:
        with submitit.helpers.clean_env():  # jobs inherit nothing from the one that this may run in
            jobs = _slurm(folder, request).submit_array(list(calls))
    except (submitit.core.utils.FailedSubmissionError, submitit.core.utils.FailedJobError) as error:
        raise StillhouseError(
            f"SLURM refuses the job: {_said(error)}. `stillhouse doctor` says what there is."
        ) from None
    return jobs


def _said(error: BaseException) -> str:
    """Return what sbatch said."""
    cause = error.__cause__ or error
    text = cause.output if isinstance(cause, subprocess.CalledProcessError) and cause.output else str(error)
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return " ".join(text.split()).removeprefix("sbatch: error: ")


def _slurm(folder: Path, request: Request) -> submitit.SlurmExecutor:
    executor = submitit.SlurmExecutor(folder / "%j", max_num_timeout=RESTARTS)
    further: dict[str, Any] = {"requeue": True}
    if request.reservation:
        further["reservation"] = request.reservation
    optional = {
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "gpus_per_node": f"{request.gpu}:1" if isinstance(request.gpu, str) else 1 if request.gpu else None,
    }
    executor.update_parameters(
        job_name=request.name,
        time=request.minutes,
        ntasks_per_node=1,
        cpus_per_task=request.cpus,
        mem=f"{request.memory_mb}M",
        signal_delay_s=NOTICE_SECONDS,
        array_parallelism=request.at_once,
        wckey=None,
        stderr_to_stdout=True,
        srun_args=["--open-mode=append"],  # a job that is started again keeps what it said before
        additional_parameters=further,
        **{key: value for key, value in optional.items() if value is not None},
    )
    return executor


def _local(folder: Path, request: Request, number: int) -> submitit.LocalExecutor:
    """Return an executor on this machine, without a time limit; each job that asks for a GPU gets the next one."""
    gpus = gpus_here()
    executor = submitit.LocalExecutor(folder / "%j", max_num_timeout=RESTARTS)
    one = bool(request.gpu) and gpus > 0
    executor.update_parameters(
        timeout_min=60 * 24 * 365,
        stderr_to_stdout=True,
        gpus_per_node=1 if one else gpus,
        visible_gpus=(number % gpus,) if one else tuple(range(gpus)),
    )
    return executor


def gpus_here() -> int:
    """Count this machine's GPUs."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def wait(jobs: Sequence[submitit.Job[Any]], cluster: Cluster) -> None:
    """Run jobs of the debug executor, which has not started them yet, in this process.

    Raises:
        StillhouseError: if one fails.
    """
    if cluster == "debug":
        for job in jobs:
            if (error := job.exception()) is not None:  # result() would start a debugger
                raise error


def describe(jobs: Sequence[submitit.Job[Any]], run: str, cluster: Cluster) -> str:
    """Say what was submitted and where to look."""
    first = str(jobs[0].job_id)
    what = f"job {first}" if len(jobs) == 1 else f"{len(jobs)} jobs, {first} to {jobs[-1].job_id}"
    where = {"slurm": "SLURM ", "local": "local ", "debug": ""}[cluster]
    return f"Submitted {where}{what}. Its log: {jobs[0].paths.stdout}\n`stillhouse status --run {run} --watch` shows progress."


def ask(question: str) -> bool:
    """Ask on the terminal.

    Raises:
        StillhouseError: without a terminal.
    """
    if not sys.stdin.isatty():
        raise StillhouseError("nobody is there to be asked: --yes submits without a question")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
