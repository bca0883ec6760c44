"""What a SLURM job costs beside its work: from the job's start to its first class, and from its last class to the job's end.

    python tests/benchmarks/bench_slurm.py                 # as root: starts a SLURM of its own, see tests/slurm/lab.py
    python tests/benchmarks/bench_slurm.py --jobs 3

One small job of `encode` after another through ``slurm_profile``, with nothing else to do on the machine.
"""

import argparse
import statistics
import sys
import tempfile
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "slurm"))
import support
from lab import Lab
from places import CLASSES, Place, prepare

SHARD_MINUTES = 40
"""What a job of a real run takes, as the profile sizes its shards."""


def measure(place: Place, jobs: int) -> None:
    """Run and print."""
    controller = place.run("--until", "encode", "--config", f"shards={jobs}", "--jobs", "1")
    if controller.process.returncode:
        sys.exit(controller.said)
    parts: dict[str, list[float]] = {
        "until its program runs": [],
        "until its first class": [],
        "after its last class": [],
    }
    for start in place.events("start"):
        job = place.lab.scontrol("show", "job", start["job"]).split()
        facts = dict(fact.split("=", 1) for fact in job if "=" in fact)
        begin, end = (datetime.fromisoformat(facts[name]).timestamp() for name in ("StartTime", "EndTime"))
        done = [event for event in place.events("done") if event["shard"] == start["shard"]]
        first = min(event["time"] - event["seconds"] for event in done)
        last = max(event["time"] for event in done)
        for name, seconds in zip(parts, (start["time"] - begin, first - start["time"], end - last), strict=True):
            parts[name].append(seconds)
    for name, seconds in parts.items():
        print(f"{name:24} {statistics.median(seconds):6.1f} s")
    whole = statistics.median(map(sum, zip(*parts.values(), strict=True)))
    print(f"{'in all':24} {whole:6.1f} s, {whole / 60 / SHARD_MINUTES:.1%} of a job of {SHARD_MINUTES} minutes")


def main() -> None:
    """Start a cluster, measure, and end it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=len(CLASSES), choices=range(1, len(CLASSES) + 1))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        support.make_folder(folder / "pictures" / "train", CLASSES, 4)
        support.make_folder(folder / "pictures" / "test", CLASSES, 2, offset=100)
        backbone = support.make_backbone(folder / "backbone")
        (folder / "place").mkdir()
        lab = Lab()
        lab.start()
        try:
            place = prepare(folder / "place", folder / "pictures", backbone, lab, folder)
            place.seconds(0)
            measure(place, arguments.jobs)
        finally:
            lab.cancel_all()
            lab.stop()


if __name__ == "__main__":
    main()
