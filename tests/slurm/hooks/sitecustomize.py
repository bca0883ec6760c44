"""What the tests of the cluster do to programs in their jobs, by way of PYTHONPATH: slow, hold or poison classes of ``encode``.

The folder that STILLHOUSE_LAB names says what: ``hold/CLASS`` lets the class wait as long as it is there, ``poison/CLASS`` lets
it fail, ``seconds`` is how long every class takes. A class that begins leaves ``began/CLASS.<pid>``, with its node and GPUs.
Every stage computes with one thread, as in the run on one machine: sums of floats depend on their number.
"""

import os
import sys
from pathlib import Path

LAB = os.environ.get("STILLHOUSE_LAB")


def _encode(lab: Path) -> None:
    import time

    sys.path.insert(0, os.fspath(Path.cwd()))
    from workflow_scripts.data import preprocess

    original = preprocess.load_squares

    def load_squares(source, class_name, *arguments, **options):  # type: ignore[no-untyped-def]
        began = lab / "began" / f"{class_name}.{os.getpid()}"
        began.write_text(f"{os.environ.get('SLURMD_NODENAME')} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
        while (lab / "hold" / class_name).exists():
            time.sleep(0.05)
        if (lab / "poison" / class_name).exists():
            raise ArithmeticError(f"{class_name} is poisoned")
        time.sleep(float((lab / "seconds").read_text()))
        return original(source, class_name, *arguments, **options)

    preprocess.load_squares = load_squares


def _controller() -> None:
    """Ask for the jobs' states every second; the plugin asks ever more rarely."""
    from snakemake_executor_plugin_slurm import Executor

    Executor.next_seconds_between_status_checks = property(lambda self: 1, lambda self, seconds: None)


if LAB and any(argument.startswith("workflow_scripts.stages.") for argument in sys.orig_argv):
    os.environ["OMP_NUM_THREADS"] = "1"
if LAB and "workflow_scripts.stages.encode" in sys.orig_argv:
    _encode(Path(LAB))
elif LAB and "--workflow-profile" in sys.orig_argv:
    _controller()
