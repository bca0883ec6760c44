"""``stillhouse doctor``: whether this machine and its cluster are fit for a run, and what to set where."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console

from workflow_scripts.config import RunConfig
from workflow_scripts.errors import StillhouseError
from workflow_scripts.recipes import GPU_STAGES, Recipes
from workflow_scripts.stages.common import machine_has_gpu
from workflow_scripts.stages.notice import parse_seconds
from workflow_scripts.store.files import write_atomically

Status = Literal["ok", "warn", "fail"]
Ask = Callable[..., tuple[int, str]]
"""Runs a command and returns its exit status and what it said; 127 if there is no such command."""
PYTHONS = ((3, 11), (3, 13))
# MinJobAge has to be this many times the seconds between two looks of Snakemake at its jobs, or it takes sacct after all.
AGES = 3
FIRST_LOOK = 40


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and what to do about it."""

    check: str
    status: Status
    found: str
    remedy: str = ""


def ask(*command: str) -> tuple[int, str]:
    """Run a command."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return 127, ""
    except (OSError, subprocess.SubprocessError) as error:
        return 1, str(error)
    return ended.returncode, (ended.stdout + ended.stderr).strip()


def examine(read_config: Callable[[], RunConfig], profile: Path, ask: Ask = ask) -> list[Check]:
    """Look at everything that a run needs, the cheapest first."""
    checks = [*_software(), *_gpus(ask)]
    try:
        config = read_config()
        checks += [*_results(config.results, ask)]
        recipes = Recipes(config)
        checks += [*_run(recipes)]
    except StillhouseError as error:
        checks.append(Check("run", "fail", str(error), "mend the configuration: nothing below depends on it"))
        recipes = None
    return checks + list(_slurm(profile, recipes, ask))


def show(checks: list[Check], *, as_json: bool) -> None:
    """Print what was found."""
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in checks]}, indent=1))
        return
    console = Console()
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for check in checks:
        console.print(f"[{colours[check.status]}]{check.status:4}[/] [bold]{check.check}[/]: ", end="")
        console.print(check.found, markup=False, highlight=False, soft_wrap=True)
        if check.remedy:
            console.print(f"       -> {check.remedy}", markup=False, highlight=False, soft_wrap=True)
    counts = {status: sum(check.status == status for check in checks) for status in colours}
    console.print(f"{counts['ok']} ok, {counts['warn']} to know of, {counts['fail']} to mend.")


# ---------------------------------------------------------------- this machine


def _software() -> Iterator[Check]:
    found = ".".join(map(str, sys.version_info[:3]))
    fits = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    remedy = "" if fits else "use Python 3.11 to 3.13, for instance `uv run --python 3.12`"
    yield Check("python", "ok" if fits else "fail", found, remedy)
    packages = ("stillhouse", "snakemake", "snakemake-executor-plugin-slurm", "torch", "zarr")
    yield Check("packages", "ok", ", ".join(f"{package} {version(package)}" for package in packages))


def _gpus(ask: Ask) -> Iterator[Check]:
    import torch

    status, said = ask("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    cards = said.splitlines() if status == 0 else []
    if torch.cuda.is_available():
        yield Check("gpus", "ok", "; ".join(cards) or f"{torch.cuda.device_count()} GPUs")
        bf16 = torch.cuda.is_bf16_supported()
        yield Check(
            "cuda",
            "ok" if bf16 else "warn",
            f"torch for CUDA {torch.version.cuda}{'' if bf16 else ', without bfloat16'}",
            "" if bf16 else "set compute.dtype: float32",
        )
    elif torch.version.cuda is None:
        yield Check(
            "cuda", "warn", "torch without CUDA", "jobs will use CPUs only; install the torch that `uv sync` chooses"
        )
    elif cards or machine_has_gpu():
        found = f"torch for CUDA {torch.version.cuda} cannot use this machine's GPUs ({'; '.join(cards) or said})"
        yield Check("cuda", "fail", found, "update the driver, or install a torch for the CUDA that `nvidia-smi` names")
    else:
        yield Check("cuda", "warn", f"torch for CUDA {torch.version.cuda}; no GPU here", "as on most login nodes")


def _results(results: Path, ask: Ask) -> Iterator[Check]:
    probe = results / "cache" / f"doctor-{os.getpid()}"
    try:
        write_atomically(probe, "")
        probe.unlink()
    except (StillhouseError, OSError) as error:
        yield Check("results", "fail", str(error), "point `results` to a place that can be written")
        return
    kind = _file_system(results)
    usage, inodes = shutil.disk_usage(results), os.statvfs(results)
    free = f"{usage.free / 1e9:.0f} GB free of {usage.total / 1e9:.0f}"
    files = f"{inodes.f_favail} files" if inodes.f_files else "any number of files"
    local = kind in ("tmpfs", "overlay", "ext4", "xfs") and shutil.which("sbatch") is not None
    full = usage.free < 20e9 or (inodes.f_files and inodes.f_favail < 200_000)
    remedy = "free space, or point `results` elsewhere: ImageNet-1K takes about 30 GB and 50 000 files" if full else ""
    if local and not remedy:
        remedy = "on a cluster `results` has to be on a file system that all nodes share; is it?"
    yield Check("results", "warn" if remedy else "ok", f"{results.resolve()} ({kind}): {free}, {files}", remedy)
    quotas = [ask("quota", "-s", "-w")]
    if kind == "lustre":
        quotas.append(ask("lfs", "quota", "-q", "-u", str(os.getuid()), str(results)))
    for status, said in quotas:
        if status == 0 and said:
            yield Check("quota", "ok", " | ".join(line.strip() for line in said.splitlines()))
        elif status not in (0, 127):
            yield Check("quota", "warn", said or "over quota", "free space: a job that exceeds the quota fails")


def _file_system(path: Path) -> str:
    """Return the type of the file system that a path is on."""
    real, best, kind = path.resolve(), -1, "unknown"
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return kind
    for point, found in mounts:
        if real.is_relative_to(point) and len(point) > best:
            best, kind = len(point), found
    return kind


def _run(recipes: Recipes) -> Iterator[Check]:
    """Look at the run's weights and images."""
    try:
        backbone = recipes.backbone
    except StillhouseError as error:
        yield Check("weights", "fail", str(error))
        return
    fitted = recipes.config.backbone.fit is not None
    yield Check("weights", "ok", f"{backbone.path}{' (a job will fit it)' if fitted else ''}")
    try:
        recipes.check()
    except StillhouseError as error:
        yield Check("images", "fail", str(error))
        return
    classes = len(recipes.classes)
    yield Check(
        "images",
        "ok",
        "; ".join(
            [f"{classes} classes", *(f"{split}: {found}" for split, found in recipes.catalog.describe().items())]
        ),
    )


# ---------------------------------------------------------------- the cluster


def _slurm(profile: Path, recipes: Recipes | None, ask: Ask) -> Iterator[Check]:
    commands = {name: ask(name, "--version")[0] != 127 for name in ("sbatch", "squeue", "scontrol", "sinfo", "sacct")}
    if not commands["sbatch"]:
        yield Check("slurm", "warn", "no sbatch here", "runs are local: `uv run snakemake --cores all`")
        return
    if missing := [name for name, there in commands.items() if not there and name != "sacct"]:
        yield Check("slurm", "fail", f"{', '.join(missing)} not found", "load the module or path of all SLURM commands")
        return
    status, said = ask("scontrol", "ping")
    if status:
        yield Check("slurm", "fail", said, "SLURM's controller does not answer: ask whoever runs the cluster")
        return
    yield Check("slurm", "ok", f"{ask('sbatch', '--version')[1]}; {said.splitlines()[0]}")
    settings = _read_profile(profile)
    if isinstance(settings, Check):
        yield settings
        return
    facts = _configuration(ask)
    yield from _status_command(profile, settings, facts, ask)
    yield from _requeue(facts)
    yield from _partitions(profile, settings, recipes, ask)
    yield from _accounts(settings, ask)


def _read_profile(profile: Path) -> dict[str, Any] | Check:
    for name in ("profile.v9+.yaml", "profile.yaml", "config.v9+.yaml", "config.yaml"):
        path = profile / name
        if path.exists():
            try:
                content = yaml.safe_load(path.read_text())
            except (OSError, yaml.YAMLError) as error:
                return Check("profile", "fail", f"{path}: {' '.join(str(error).split())}", "mend the file")
            return content if isinstance(content, dict) else {}
    return Check("profile", "fail", f"{profile}: holds no profile", "name one with --profile; slurm_profile is ours")


def _configuration(ask: Ask) -> dict[str, str]:
    """Return SLURM's own settings."""
    pairs = (line.partition("=") for line in ask("scontrol", "show", "config")[1].splitlines())
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def _status_command(profile: Path, settings: Mapping[str, Any], facts: Mapping[str, str], ask: Ask) -> Iterator[Check]:
    """Find out by which command Snakemake can learn of its jobs."""
    status, said = ask("sacct", "-X", "-n", "--parsable2", "--format=JobIdRaw", "--starttime", "now-1hours")
    works = status == 0 and "disabled" not in said
    wanted = "sacct" if works else "squeue"
    why = (
        "slurmdbd keeps accounts"
        if works
        else f"sacct does not work here ({said.splitlines()[0] if said else 'no such command'})"
    )
    chosen = settings.get("slurm-status-command", "sacct")
    if chosen == wanted or works:  # squeue serves where sacct does, too, but forgets jobs after MinJobAge
        found = f"{chosen}: {why}"
        hint = "" if chosen == wanted else "sacct would tell why jobs fail: slurm-status-command: sacct"
        yield Check("slurm status command", "ok", found, hint)
    else:
        yield Check(
            "slurm status command",
            "fail",
            f"{chosen}, but {why}: Snakemake would wait for its jobs for ever",
            f"set `slurm-status-command: {wanted}` in {profile}",
        )
    age = re.match(r"\d+", facts.get("MinJobAge", ""))
    look = int(settings.get("slurm-init-seconds-before-status-checks", FIRST_LOOK))
    if wanted == "squeue" and age is not None and int(age[0]) < AGES * look:
        yield Check(
            "slurm MinJobAge",
            "fail",
            f"{age[0]} s: Snakemake then takes sacct, which does not work here",
            f"set `slurm-init-seconds-before-status-checks: {max(1, int(age[0]) // AGES)}` in {profile}, "
            "or have MinJobAge raised to 300",
        )


def _requeue(facts: Mapping[str, str]) -> Iterator[Check]:
    mode, requeue = facts.get("PreemptMode", "unknown"), facts.get("JobRequeue", "1")
    cancels = "CANCEL" in mode
    yield Check(
        "slurm preemption",
        "warn" if cancels else "ok",
        f"PreemptMode {mode}, JobRequeue {requeue}, KillWait {facts.get('KillWait', 'unknown')}",
        "preempted jobs are cancelled, not started again: Snakemake may wait for them for ever; run the same command again"
        if cancels
        else "",
    )


@dataclass(frozen=True)
class _Partition:
    seconds: float | None
    nodes: int
    cpus: int
    megabytes: int
    gpus: dict[str, int]


def _read_partitions(ask: Ask) -> dict[str, _Partition]:
    """Return the partitions, each as its largest node says."""
    found: dict[str, _Partition] = {}
    for line in ask("sinfo", "-h", "-o", "%R|%l|%D|%c|%m|%G")[1].splitlines():
        name, limit, nodes, cpus, memory, gres = line.split("|")
        gpus = {kind or "gpu": int(count) for kind, count in re.findall(r"gpu:(?:([A-Za-z0-9_.-]+):)?(\d+)", gres)}
        before = found.get(name, _Partition(None, 0, 0, 0, {}))
        found[name] = _Partition(
            parse_seconds(limit),
            before.nodes + int(nodes),
            max(before.cpus, _number(cpus)),
            max(before.megabytes, _number(memory)),
            {kind: max(gpus.get(kind, 0), before.gpus.get(kind, 0)) for kind in gpus | before.gpus},
        )
    return found


def _number(text: str) -> int:
    digits = re.match(r"\d+", text)
    return int(digits[0]) if digits else 0


def _partitions(profile: Path, settings: Mapping[str, Any], recipes: Recipes | None, ask: Ask) -> Iterator[Check]:
    """Compare what the profile asks for with what there is."""
    there = _read_partitions(ask)
    described = "; ".join(
        f"{name}: {p.nodes} nodes of {p.cpus} CPUs, {p.megabytes // 1000} GB, "
        f"{'no limit' if p.seconds is None else f'{p.seconds / 3600:g} h'}"
        for name, p in there.items()
    )
    yield Check("slurm partitions", "ok" if there else "fail", described or "none", "" if there else "ask for access")
    types = {f"{kind} ({name}: {count} per node)" for name, p in there.items() for kind, count in p.gpus.items()}
    yield Check(
        "slurm gpus",
        "ok" if types else "fail",
        ", ".join(sorted(types)) or "no partition has GPUs (GRES)",
        "" if types else "GPU jobs cannot run here: set compute.device: cpu",
    )
    default = dict(settings.get("default-resources") or {})
    used = {str(default.get("slurm_partition", ""))}
    for rule, own in dict(settings.get("set-resources") or {}).items():
        wanted = default | dict(own)
        name = str(wanted.get("slurm_partition", ""))
        partition = there.get(name)
        used.add(name)
        if partition is None:
            continue
        model = wanted.get("gpu_model")
        if rule in GPU_STAGES and (not partition.gpus or (model is not None and model not in partition.gpus)):
            offered = ", ".join(sorted(partition.gpus)) or "none"
            yield Check(
                f"profile {rule}",
                "fail",
                f"asks for a GPU{f' {model}' if model else ''} in partition {name}, which has {offered}",
                f"set slurm_partition and gpu_model of {rule} in {profile}",
            )
        yield from _per_node(rule, model, name, partition, recipes)
        yield from _minutes(profile, rule, wanted, partition, recipes)
    if unknown := sorted(name for name in used if name and name not in there):
        yield Check(
            "profile partitions",
            "fail",
            f"{', '.join(unknown)}: not on this cluster",
            f"set slurm_partition in {profile} to one of {', '.join(there)}",
        )


def _per_node(
    rule: str, model: str | None, name: str, partition: _Partition, recipes: Recipes | None
) -> Iterator[Check]:
    """Compare the GPUs that share the batches of one of the run's jobs of a rule with those of a node."""
    try:
        jobs = recipes.jobs() if recipes is not None else []
        most = max((job.gpus // job.nodes for job in jobs if job.stage == rule), default=1)
    except StillhouseError:
        return
    there = partition.gpus.get(model, 0) if model else max(partition.gpus.values(), default=0)
    if there < most > 1:
        yield Check(
            f"profile {rule} gpus",
            "fail",
            f"a job shares its batches among {most} GPUs of one node, partition {name} has {there}",
            f"set gpus in backbone.finetune to {there or 1}"
            if rule == "fit_backbone"
            else f"set gpus in evaluation.architectures to {there or 1}, or spread them over several `nodes`",
        )


def _minutes(
    profile: Path, rule: str, wanted: Mapping[str, Any], partition: _Partition, recipes: Recipes | None
) -> Iterator[Check]:
    """Compare the time that the run's largest job of a rule asks for with the partition's limit."""
    if recipes is None or partition.seconds is None:
        return
    try:
        items = max((job.items / job.gpus for job in recipes.jobs() if job.stage == rule), default=0)
        asked = int(wanted.get("minutes_fixed", 0)) + int(wanted.get("seconds_per_item", 0)) * items / 60
    except (StillhouseError, ValueError):
        return
    limit = partition.seconds / 60
    most = float(wanted.get("minutes_max", float("inf")))
    if items and min(asked, most) > limit:
        yield Check(
            f"profile {rule}",
            "fail",
            f"its largest job asks for {min(asked, most):.0f} minutes, the partition allows {limit:.0f}",
            f"raise `shards`, or set `minutes_max: {limit:.0f}` in {profile}: the job then takes several attempts",
        )
    elif items and most > limit:
        yield Check(
            f"profile {rule}",
            "warn",
            f"later attempts ask for more than the {limit:.0f} minutes that the partition allows, and would wait for ever",
            f"set `minutes_max: {limit:.0f}` in {profile}",
        )


def _accounts(settings: Mapping[str, Any], ask: Ask) -> Iterator[Check]:
    status, said = ask("sacctmgr", "-n", "-P", "show", "assoc", f"user={getpass.getuser()}", "format=account,qos")
    if status or "disabled" in said:
        return
    pairs = sorted({line for line in said.splitlines() if line.strip("|")})
    accounts = {pair.split("|")[0] for pair in pairs}
    named = dict(settings.get("default-resources") or {}).get("slurm_account")
    if not pairs:
        yield Check("slurm account", "ok", "none is needed", "slurm-no-account: true saves asking for one")
    elif named in accounts or (named is None and len(accounts) == 1) or settings.get("slurm-no-account"):
        yield Check("slurm account", "ok", ", ".join(pair.replace("|", " with QOS ") for pair in pairs))
    else:
        yield Check(
            "slurm account",
            "warn",
            f"the profile names {named or 'none'}; yours are {', '.join(sorted(accounts))}",
            "set default-resources: slurm_account",
        )
