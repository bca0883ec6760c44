"""The console command ``stillhouse``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from workflow_scripts.config import Compute, load, read_document
from workflow_scripts.data.preprocess import Resample
from workflow_scripts.errors import StillhouseError
from workflow_scripts.formats import Format
from workflow_scripts.operations.flops import ARCHITECTURES
from workflow_scripts.operations.rehearse import FOLDER, rehearse
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import add_config_arguments, read_config

if TYPE_CHECKING:
    from workflow_scripts.operations.progress import Progress


def main() -> None:
    """Run a subcommand; an error that a user can mend is one message and exit status 1."""
    arguments = _parser().parse_args()
    try:
        sys.exit(arguments.command(arguments))
    except StillhouseError as error:
        print(f"stillhouse: {error}", file=sys.stderr)
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stillhouse", description="Distil image datasets with latent diffusion models."
    )
    parser.add_argument("--version", action="version", version=version("stillhouse"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plan = commands.add_parser(
        "plan", help="what of a run is valid, what is missing and why, and what it will cost in hours, bytes and money"
    )
    plan.add_argument("--verbose", action="store_true", help="name every missing result")
    plan.add_argument("--json", action="store_true", help="print JSON")
    _add_look(plan)
    plan.set_defaults(command=_plan)

    bench = commands.add_parser(
        "bench", help="how fast this machine does a run's work; plan reckons with what is measured"
    )
    bench.add_argument(
        "--architecture",
        metavar="NAME",
        help=f"measure random weights in place of the run's backbone: {', '.join(ARCHITECTURES)}",
    )
    bench.add_argument("--quick", action="store_true", help="measure everything once, on a CPU with small batches")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.set_defaults(command=_bench)

    status = commands.add_parser("status", help="how far a run is, how fast it goes, and which jobs work on it")
    status.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=10.0,
        metavar="SECONDS",
        help="look again every so many seconds (default: 10) until the run is finished",
    )
    status.add_argument("--json", action="store_true", help="print JSON; with --watch, one line for each look")
    status.add_argument(
        "--html",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FILE",
        help="also write a page that reloads itself (default: results/RUN/status.html)",
    )
    status.set_defaults(command=_status)

    submit = commands.add_parser(
        "submit",
        help="send a run to a cluster: its controller as a small job, or what it misses as one array",
        description="Show the plan and its cost, ask, and submit the controller (snakemake) as a job of its own, which goes on "
        "after preemption and time limits.",
    )
    submit.add_argument(
        "--compact",
        action="store_true",
        help="in place of the controller, one array of workers over all classes that miss something, whichever shards they "
        "are in; then snakemake finds only the evaluation and the report left",
    )
    submit.add_argument(
        "--workers", type=int, metavar="N", help="with --compact: how many (default: by the work there is)"
    )
    submit.add_argument(
        "--cluster",
        choices=("slurm", "local", "debug"),
        default="slurm",
        help="local: processes of this machine; debug: this process (default: slurm)",
    )
    submit.add_argument(
        "--profile",
        type=Path,
        help="Snakemake profile (default: slurm_profile; the controller on this machine takes none)",
    )
    submit.add_argument("--partition", help="for what is submitted now (default: the profile's)")
    submit.add_argument(
        "--minutes",
        type=int,
        help="time limit, after which it goes on in a new job (default: a day, or by the work there is)",
    )
    submit.add_argument("--watch", action="store_true", help="show progress afterwards")
    submit.add_argument("--yes", action="store_true", help="do not ask")
    submit.add_argument("snakemake", nargs="*", metavar="-- OPTION", help="after --: further options of snakemake")
    submit.set_defaults(command=_submit)

    methods = commands.add_parser("methods", help="the methods, their papers and their options")
    methods.add_argument("names", nargs="*", metavar="NAME", help="show every option of these methods")
    methods.add_argument("--options", action="store_true", help="show every option of all methods")
    methods.add_argument("--json", action="store_true", help="print JSON, with every option")
    methods.set_defaults(command=_methods)

    protocols = commands.add_parser("protocols", help="the evaluation protocols, their papers and every value")
    protocols.add_argument("names", nargs="*", metavar="NAME", help="show these alone")
    protocols.add_argument("--json", action="store_true", help="print JSON")
    protocols.set_defaults(command=_protocols)

    ranking = commands.add_parser(
        "dd-ranking", help="DD-Ranking's label-robust and augmentation-robust scores of a run"
    )
    ranking.add_argument("--last", action="store_true", help="of the last epoch, not of the best as DD-Ranking has it")
    ranking.add_argument("--json", action="store_true", help="print JSON")
    ranking.set_defaults(command=_dd_ranking)

    verify = commands.add_parser(
        "verify", help="re-read what a run has stored; set damaged results aside, to be made again"
    )
    _add_look(verify)
    verify.set_defaults(command=_verify)

    again = commands.add_parser("retry", help="let classes that failed so often that they are set aside be tried again")
    again.add_argument("classes", nargs="*", metavar="CLASS", help="these classes only")
    again.set_defaults(command=_retry)

    examine = commands.add_parser(
        "doctor", help="whether this machine and its cluster are fit for a run, and what to set"
    )
    examine.add_argument("--profile", type=Path, default=Path("slurm_profile"), help="Snakemake profile to look at")
    examine.add_argument("--json", action="store_true", help="print JSON")
    examine.set_defaults(command=_doctor)

    collect = commands.add_parser("gc", help="list what no configured run refers to")
    collect.add_argument("--delete", action="store_true", help="remove it")
    collect.add_argument(
        "--keep",
        action="append",
        metavar="RUN",
        help="runs whose results to keep (default: all of the configuration file)",
    )
    collect.set_defaults(command=_gc)

    export = commands.add_parser(
        "export",
        help="write finished sets for use elsewhere: ImageFolder, WebDataset, Hugging Face, safetensors",
        description="Write finished sets of a run for use elsewhere, each with a dataset card.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EXPORT_FORMATS,
    )
    for option, kind in (("method", str), ("ipc", int), ("seed", int)):
        export.add_argument(f"--{option}", type=kind, help="default: all that the run has")
    _add_format(export)
    export.set_defaults(command=_export)

    _add_regenerate(
        commands.add_parser("regenerate", help="keep class Gaussians alone, and make any IPC from them later")
    )
    trial = commands.add_parser(
        "rehearse",
        help="write tiny images and a random backbone, to try the run rehearsal-1k before ImageNet is touched",
    )
    trial.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=FOLDER,
        metavar="DIR",
        help="where to (default: %(default)s, where the run looks by itself)",
    )
    trial.add_argument("--classes", type=int, default=1000, help="how many (default: %(default)s)")
    trial.add_argument("--images", type=int, default=6, help="training images per class (default: %(default)s)")
    trial.set_defaults(command=_rehearse)

    lock = commands.add_parser(
        "lock-recipes", help="for developers: acknowledge the code that each stage's recipe number stands for"
    )
    lock.set_defaults(command=_lock_recipes)

    for command in (plan, bench, status, submit, methods, protocols, ranking, verify, again, examine, collect, export):
        add_config_arguments(command)
    return parser


_EXPORT_FORMATS = """\
formats:
  imagefolder   CLASS/0000.png; for torchvision, timm and most trainers
  webdataset    train-000000.tar, ...: shuffled shards of 1000 images with label and class name
  huggingface   train/CLASS/0000.png and metadata.jsonl, to load with `datasets` or to upload to the hub
  safetensors   one file: images uint8 (n, 3, side, side) and labels int64 (n,)

With --method, --ipc and --seed, the set is --to itself; without one of them, every set that fits is written
to a folder of its own below --to. What is there already is not written again.

examples:
  stillhouse export --run imagenette --method d3hr --ipc 10 --seed 0 --format imagefolder --size 224 --to d3hr-ipc10
  stillhouse export --run imagenette --format webdataset --to shards
"""


def _add_format(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a set is written, and where."""
    parser.add_argument("--format", choices=get_args(Format), default="imagefolder", help="default: imagefolder")
    parser.add_argument(
        "--size", type=_positive, metavar="PIXELS", help="scale images to this side (default: as they are)"
    )
    parser.add_argument("--resample", choices=get_args(Resample), default="lanczos", help="with this filter (lanczos)")
    parser.add_argument(
        "--folders",
        choices=("class", "label"),
        default="class",
        help="how class folders are called: after the class, or label first, so that their sorted order is the labels'",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="PLACE", help="folder, or file for safetensors")


def _add_regenerate(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of regenerate."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = """\
D3HR's images follow from one Gaussian per class. `pack` keeps those of a run in one file (33 MB for ImageNet-1K,
16 MB with --half); `images` makes a set of any IPC from the file and the backbone: no real images, no store.
"""
    parser.epilog = """\
examples:
  stillhouse regenerate pack --run imagenet1k --method d3hr --to d3hr.safetensors
  stillhouse regenerate show d3hr.safetensors
  stillhouse regenerate images d3hr.safetensors --ipc 50 --format webdataset --to d3hr-ipc50

several GPUs, then one call that writes the set:
  for k in 1 2 3 4; do
    CUDA_VISIBLE_DEVICES=$((k - 1)) stillhouse regenerate images d3hr.safetensors --ipc 50 --to d3hr-ipc50 --part $k/4 &
  done; wait
  stillhouse regenerate images d3hr.safetensors --ipc 50 --to d3hr-ipc50
"""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    pack = actions.add_parser("pack", help="write a run's class Gaussians to one file")
    pack.add_argument("--method", help="default: the only one of the run that starts from class Gaussians")
    pack.add_argument("--half", action="store_true", help="round to 16 bits: half the size, slightly other images")
    pack.add_argument("--to", type=Path, required=True, metavar="FILE", help="file to write, .safetensors")
    add_config_arguments(pack)
    pack.set_defaults(command=_pack)

    show = actions.add_parser("show", help="say what a file holds")
    show.set_defaults(command=_show_packed)

    images = actions.add_parser(
        "images",
        help="make a set from a file and the backbone",
        description="Make a set of any IPC and seed. A killed call goes on where it was.",
    )
    images.add_argument("--ipc", type=_positive, required=True, help="images per class")
    images.add_argument("--seed", type=int, default=0, help="default: 0")
    images.add_argument("--classes", nargs="+", metavar="CLASS", help="only these (default: all)")
    images.add_argument("--backbone", metavar="PATH", help="where the backbone is (default: where the run had it)")
    images.add_argument("--vae", metavar="PATH", help="its autoencoder, if the run had another one than the backbone's")
    images.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    images.add_argument("--batch", type=_positive, default=128, help="images sampled at once (128)")
    images.add_argument("--compile", action="store_true", help="use torch.compile")
    images.add_argument(
        "--part", type=_part, metavar="K/N", help="only make the K-th of N parts of the classes, for now"
    )
    _add_format(images)
    images.set_defaults(command=_regenerate)
    for action in (show, images):
        action.add_argument("file", type=Path, metavar="FILE", help="written by `stillhouse regenerate pack`")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text}: write K/N with K from 1 to N, such as 3/8")
    return int(part), int(parts)


def _add_look(parser: argparse.ArgumentParser) -> None:
    """Add the options that look closer at the real images than their folders' times of change."""
    look = parser.add_mutually_exclusive_group()
    look.add_argument(
        "--rescan",
        dest="look",
        action="store_const",
        const="rescan",
        default="noted",
        help="ask every image for its size and time of change: finds images that were edited in place",
    )
    look.add_argument(
        "--deep",
        dest="look",
        action="store_const",
        const="deep",
        help="besides, hash every image, and name those whose bytes changed though size and time did not",
    )


def _recipes(arguments: argparse.Namespace) -> Recipes:
    recipes = Recipes(read_config(arguments), getattr(arguments, "look", "noted"))
    recipes.check()
    return recipes


def _plan(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.show import plan

    recipes = _recipes(arguments)
    plan(recipes, verbose=arguments.verbose, as_json=arguments.json)
    return _tell_changed(recipes) if arguments.look == "deep" else 0


def _bench(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.bench import bench

    config = read_config(arguments)
    bench(config, architecture=arguments.architecture, quick=arguments.quick, as_json=arguments.json)
    return 0


def _tell_changed(recipes: Recipes) -> int:
    """Name the images whose bytes changed unseen."""
    for place in (changed := recipes.catalog.changed_bytes()):
        print(f"{place}: its bytes changed, though its size and time did not.", file=sys.stderr)
    if changed and recipes.config.dataset.fingerprint == "stat":
        print("Put them back, or `touch` them, or set dataset.fingerprint: content.", file=sys.stderr)
    return 1 if changed else 0


def _status(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.status import status

    recipes = _recipes(arguments)
    config = recipes.config
    page = config.results / config.run / "status.html" if arguments.html == Path() else arguments.html
    with contextlib.suppress(KeyboardInterrupt):  # the end of watching
        status(_progress(recipes), every=arguments.watch, as_json=arguments.json, page=page)
    return 0


def _progress(recipes: Recipes) -> Progress:
    """Look at how far a run is, against the GPU-hours that it was planned to take."""
    from workflow_scripts.operations.cost import cost
    from workflow_scripts.operations.progress import Progress
    from workflow_scripts.operations.survey import survey

    planned = cost(recipes, survey(recipes))
    return Progress(recipes, planned_gpu_hours=planned.whole.hours if planned.speeds.on_gpu else None)


def _submit(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations import compact
    from workflow_scripts.operations.show import plan
    from workflow_scripts.operations.site_profile import Profile
    from workflow_scripts.operations.status import status
    from workflow_scripts.operations.submit import ask, describe, gpus_here, submit_controller, submit_packing, wait

    if arguments.compact and arguments.snakemake:
        raise StillhouseError("--compact starts no snakemake that could take further options")
    recipes, cluster = _recipes(arguments), arguments.cluster
    on_cluster = cluster == "slurm" or arguments.compact or arguments.profile is not None
    profile = Profile.read(arguments.profile or Path("slurm_profile")) if on_cluster else None
    plan(recipes, verbose=False, as_json=False)
    if all((recipes.config.results / job.manifest).exists() for job in recipes.jobs()):
        return 0
    if arguments.compact:
        assert profile is not None
        seconds = compact.seconds_per_result(_progress(recipes).look(), profile)
        most = int(profile.setting("jobs") or 64) if cluster == "slurm" else gpus_here() or 1
        packing = compact.pack(recipes, seconds, most, arguments.workers)
        print(compact.describe(packing))
    if not (arguments.yes or ask("Submit?")):
        return 1
    if arguments.compact:
        assert profile is not None
        jobs = submit_packing(
            recipes, packing, profile, cluster, minutes=arguments.minutes, partition=arguments.partition
        )
    else:
        jobs = submit_controller(
            recipes,
            profile,
            cluster,
            minutes=arguments.minutes,
            partition=arguments.partition,
            extra=arguments.snakemake,
        )
    print(describe(jobs, recipes.config.run, cluster), flush=True)
    wait(jobs, cluster)
    if arguments.watch:
        with contextlib.suppress(KeyboardInterrupt):
            status(_progress(recipes), every=10.0, as_json=False, page=None)
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.methods import methods

    methods(read_config(arguments), arguments.names, options=arguments.options, as_json=arguments.json)
    return 0


def _protocols(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.protocols import protocols

    protocols(read_config(arguments), arguments.names, as_json=arguments.json)
    return 0


def _dd_ranking(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.dd_ranking import dd_ranking

    dd_ranking(_recipes(arguments), last=arguments.last, as_json=arguments.json)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.verify import verify

    recipes = _recipes(arguments)
    found = verify(recipes)
    print("\n".join(found) if found else "Everything that is there is whole.")
    changed = _tell_changed(recipes) if arguments.look == "deep" else 0
    return 1 if found else changed


def _retry(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.retry import explain, retry

    for one in (found := retry(_recipes(arguments), arguments.classes)):
        print(explain(one))
    print(f"{len(found)} will be tried again: run the same snakemake command." if found else "Nothing has failed.")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.doctor import examine, show

    checks = examine(lambda: read_config(arguments), arguments.profile)
    show(checks, as_json=arguments.json)
    return 1 if any(check.status == "fail" for check in checks) else 0


def _gc(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.gc import delete, garbage, size

    results = read_config(arguments).results
    runs = []
    for name in arguments.keep or read_document(arguments.config, arguments.configfile).get("runs", {}):
        try:
            config = load(arguments.config, name, arguments.set, arguments.configfile)
            if config.results.resolve() == results.resolve():
                runs.append(Recipes(config))
                runs[-1].jobs()
        except StillhouseError as error:
            raise StillhouseError(
                f"run {name} cannot be planned, so what it needs is not known ({error}). "
                "Name the runs to keep: --keep RUN --keep RUN."
            ) from error
    found = garbage(results, runs)
    kinds = Counter(path.relative_to(results).parts[:2] for path in found)
    for kind, count in sorted(kinds.items()):
        total = sum(size(path) for path in found if path.relative_to(results).parts[:2] == kind)
        print(f"{'/'.join(kind):40} {count:8} items {total / 1e6:12.1f} MB")
    if arguments.delete:
        delete(found)
    print(
        f"{len(found)} items {'deleted' if arguments.delete else 'that no run refers to; --delete removes them'}."
        if found
        else "Nothing to collect."
    )
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.export import export

    places = export(
        _recipes(arguments),
        arguments.to,
        arguments.format,
        method=arguments.method,
        ipc=arguments.ipc,
        seed=arguments.seed,
        size=arguments.size,
        resample=arguments.resample,
        label_folders=arguments.folders == "label",
    )
    print("\n".join(map(str, places)))
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.regenerate import pack, show

    print(show(pack(_recipes(arguments), arguments.to, arguments.method, half=arguments.half)))
    return 0


def _show_packed(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.regenerate import read, show

    print(show(read(arguments.file)))
    return 0


def _regenerate(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.regenerate import images, read

    place = images(
        read(arguments.file),
        arguments.to,
        arguments.format,
        ipc=arguments.ipc,
        seed=arguments.seed,
        backbone=arguments.backbone,
        vae=arguments.vae,
        classes=arguments.classes,
        part=arguments.part,
        size=arguments.size,
        resample=arguments.resample,
        label_folders=arguments.folders == "label",
        compute=Compute(device=arguments.device, sample_batch=arguments.batch, compile=arguments.compile),
    )
    print(place or f"Part {arguments.part[0]} of {arguments.part[1]} is made. Without --part, the set is written.")
    return 0


def _rehearse(arguments: argparse.Namespace) -> int:
    options = " ".join(rehearse(arguments.folder, arguments.classes, arguments.images))
    print(f"{arguments.folder}: {arguments.classes} classes of {arguments.images} images, and a backbone. Go on with")
    print(f"  stillhouse plan {options}")
    print(f"  snakemake --cores all {options.replace('--run ', '--config run=')}")
    return 0


def _lock_recipes(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.recipe_lock import LOCK, write

    write()
    print(f"Wrote {LOCK.name}.")
    return 0


if __name__ == "__main__":
    main()
