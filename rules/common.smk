# What the rules share: the validated configuration, the plan of the run, and functions of the plan.

import sys
from math import ceil
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.settings.enums import RerunTrigger

from workflow_scripts.config import load_resolved, resolve
from workflow_scripts.errors import StillhouseError
from workflow_scripts.operations.retry import explain, set_aside
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import launcher, machine_has_gpu, resolved_path, write_resolved
from workflow_scripts.stages.publish import publish

try:
    RUN = load_resolved(Path(config["resolved"])) if "resolved" in config else resolve(config)
    PLAN = Recipes(RUN)
    PLAN.check()
    JOBS = PLAN.jobs()
except StillhouseError as error:
    print(f"stillhouse: {error}", file=sys.stderr)
    sys.exit(1)

RESULTS = RUN.results
RESOLVED = resolved_path(RUN)

# The digests in the manifests' paths say what is valid. Snakemake's other triggers compare records in .snakemake with
# code, parameters and input lists. A job that they start finds nothing to do, and hides what else is missing: Snakemake does
# not look at a target again whose input is such a job's output and `ancient`. The settings are not there yet when this is read.
type(workflow).rerun_triggers = frozenset({RerunTrigger.MTIME})

# Jobs that use a GPU claim one, and locally one at a time may have it unless --resources gpu=N says otherwise. The executor
# is not known yet when this is read, but only one that submits jobs has a limit of them; in a job, the execution is remote.
SUBMITS = workflow.resource_settings.nodes is not None
ON_CLUSTER = SUBMITS or workflow.remote_exec
HAS_GPU = RUN.compute.device != "cpu" and (ON_CLUSTER or machine_has_gpu())
if HAS_GPU and not ON_CLUSTER and "gpu" not in workflow.global_resources:
    workflow.global_resources["gpu"] = 1

DEFAULT_RESOURCES = workflow.resource_settings.default_resources or {}


wildcard_constraints:
    shard=r"[A-Za-z0-9_-]+",
    digest=r"[0-9a-f]{16}",


def manifest(stage):
    """Path pattern of a stage's manifests."""
    return f"{RESULTS}/manifests/{stage}/{{shard}}.{{digest}}.json"


def log_file(stage):
    """Path pattern of a stage's logs."""
    return f"{RESULTS}/logs/{stage}/{{shard}}.{{digest}}.log"


def benchmark_file(stage):
    """Path pattern of a stage's benchmarks."""
    return f"{RESULTS}/benchmarks/{stage}/{{shard}}.{{digest}}.tsv"


def get_all_manifests():
    """Every manifest of the run."""
    return [ancient(RESULTS / job.manifest) for job in JOBS]


def get_needed(stage):
    """Input function: the manifests of the jobs whose results a job of this stage reads."""

    def needed(wildcards):
        job = PLAN.job(stage, wildcards.shard)
        return [ancient(RESULTS / PLAN.job(*other).manifest) for other in job.needs]

    return needed


def get_resolved(wildcards, input):
    """The file that holds the complete configuration, for the stage's program."""
    return RESOLVED


def get_gpu(wildcards):
    """One GPU, if there are any."""
    return 1 if HAS_GPU else 0


def get_gpus(stage):
    """Resource function: the GPUs that a job shares its batches among, if there are any."""
    return lambda wildcards: get_gpu(wildcards) * PLAN.job(stage, wildcards.shard).gpus


def get_nodes(stage):
    """Resource function: the nodes that those GPUs are spread over; one outside of a cluster."""
    return lambda wildcards: PLAN.job(stage, wildcards.shard).nodes if HAS_GPU and ON_CLUSTER else 1


def get_processes(stage, wildcards):
    """How many processes a job has on each node, one for each GPU."""
    return max(1, get_gpus(stage)(wildcards) // get_nodes(stage)(wildcards))


def get_gpus_per_node(stage, wildcards):
    """SLURM's option for as many GPUs on each node; without it their sum would be enough for it."""
    model = from_profile(stage, "gpu_model", None, kind=str)
    return f"--gpus-per-node={f'{model}:' if model else ''}{get_processes(stage, wildcards)}"


def over_nodes(stage, get):
    """Resource function: what a function of stage and wildcards says, for jobs on several nodes; unset for others."""
    return lambda wildcards: get(stage, wildcards) if get_nodes(stage)(wildcards) > 1 else None


def get_launcher(stage):
    """Input function: what starts a job's program, one process for each of its GPUs."""
    return lambda wildcards: launcher(get_processes(stage, wildcards), get_nodes(stage)(wildcards))


def get_cpus(stage):
    """Resource function: CPUs for a job's one task, which starts several processes; unset if a process is a task."""

    def cpus(wildcards, threads):
        processes = get_processes(stage, wildcards)
        return threads * processes if processes > 1 and get_nodes(stage)(wildcards) == 1 else None

    return cpus


def from_profile(stage, name, default, fallback=(), kind=int):
    """What a profile sets for a rule's resource functions, for all rules in ``fallback``, or the default."""
    own = workflow.resource_settings.overwrite_resources.get(stage, {})
    return next((kind(of[name].raw) for of in (own, fallback) if name in of), default)


def get_memory(stage, megabytes):
    """Resource function: megabytes for a node's processes, growing with each attempt; a profile may set those for each."""
    megabytes = from_profile(stage, "mem_mb_per_gpu", megabytes)
    return lambda wildcards, attempt: attempt * megabytes * get_processes(stage, wildcards)


def get_fit_memory(wildcards, attempt):
    """Megabytes for a fit: a checkpoint of all weights of DiT-XL/2, averages and moments included, has 11 GB."""
    tune = RUN.backbone.finetune
    return attempt * (32000 if tune is None else 40000 + 8000 * tune.gpus)


def get_minutes(stage, minutes, seconds_per_item):
    """Resource function: minutes for a job by its items per GPU, growing with each attempt; a profile may set both parts."""
    minutes = from_profile(stage, "minutes_fixed", minutes)
    seconds_per_item = from_profile(stage, "seconds_per_item", seconds_per_item)
    most = from_profile(stage, "minutes_max", None, fallback=DEFAULT_RESOURCES)

    def runtime(wildcards, attempt):
        job = PLAN.job(stage, wildcards.shard)
        asked = ceil((minutes + seconds_per_item * job.items / job.gpus / 60) * attempt)
        return asked if most is None else min(asked, most)

    return runtime


def announce_report():
    """Point results/<run>/report to the report of this configuration, and say where it is."""
    page = publish(RUN, PLAN.job("report", "report"))
    if page is not None:
        print(f"\nReport: {page}\n", file=sys.stderr)


def announce_failures():
    """Name what is set aside after too many failures, and what lets it be tried again."""
    if aside := set_aside(PLAN):
        print("\nSet aside; all that does not need these was made:", file=sys.stderr)
        print(*(f"  {explain(one)}" for one in aside), sep="\n", file=sys.stderr)
        print("`stillhouse retry` lets them be tried again.\n", file=sys.stderr)


if workflow.is_main_process:
    write_resolved(RUN, RESOLVED)
    announce_report()
