"""The console command ``stillhouse``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from importlib.metadata import version

from workflow_scripts.config import load, read_document
from workflow_scripts.errors import StillhouseError
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages.common import add_config_arguments, read_config


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

    plan = commands.add_parser("plan", help="what of a run is valid, what is missing, and why")
    plan.add_argument("--verbose", action="store_true", help="name every missing result")
    plan.add_argument("--json", action="store_true", help="print JSON")
    _add_look(plan)
    plan.set_defaults(command=_plan)

    status = commands.add_parser("status", help="how far a run is")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(command=_status)

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

    collect = commands.add_parser("gc", help="list what no configured run refers to")
    collect.add_argument("--delete", action="store_true", help="remove it")
    collect.add_argument(
        "--keep",
        action="append",
        metavar="RUN",
        help="runs whose results to keep (default: all of the configuration file)",
    )
    collect.set_defaults(command=_gc)

    lock = commands.add_parser(
        "lock-recipes", help="for developers: acknowledge the code that each stage's recipe number stands for"
    )
    lock.set_defaults(command=_lock_recipes)

    for command in (plan, status, methods, protocols, ranking, verify, collect):
        add_config_arguments(command)
    return parser


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


def _tell_changed(recipes: Recipes) -> int:
    """Name the images whose bytes changed unseen."""
    for place in (changed := recipes.catalog.changed_bytes()):
        print(f"{place}: its bytes changed, though its size and time did not.", file=sys.stderr)
    if changed and recipes.config.dataset.fingerprint == "stat":
        print("Put them back, or `touch` them, or set dataset.fingerprint: content.", file=sys.stderr)
    return 1 if changed else 0


def _status(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.show import status

    status(_recipes(arguments), as_json=arguments.json)
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


def _lock_recipes(arguments: argparse.Namespace) -> int:
    from workflow_scripts.operations.recipe_lock import LOCK, write

    write()
    print(f"Wrote {LOCK.name}.")
    return 0


if __name__ == "__main__":
    main()
