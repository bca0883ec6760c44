"""A SLURM cluster for the tests here, and places with images, a backbone and results from which runs are sent to it.

Where the cluster cannot be started the tests are skipped, or fail if STILLHOUSE_SLURM=required.
"""

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
from lab import Lab, LabUnavailable, leave_namespace
from places import CLASSES, Place, configuration, prepare, run_config, started

Once = Callable[[str, Callable[[Path], object]], Path]
LONGEST = ["test_run.py", "test_controllers.py", "test_stops.py", "test_failures.py", "test_disturbances.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test here, and let them go first, because they take longest; each module goes to one process."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.slurm)
    place = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (item not in here, place.get(item.path.name, len(place))))
    if here:
        with contextlib.suppress(LabUnavailable):
            leave_namespace()  # now, because a thread that runs already, such as Zarr's, would stay behind


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A cluster without slurmdbd."""
    yield from started(accounting=False)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Once:
    """Makes a folder once for all of pytest's processes, and returns it."""
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def pictures(once: Once) -> Path:
    """``train`` and ``test`` with CLASSES; results depend on when the files were written."""

    def make(folder: Path) -> None:
        support.make_folder(folder / "train", CLASSES, 4)
        support.make_folder(folder / "test", CLASSES, 2, offset=100)

    return once("pictures", make)


@pytest.fixture(scope="session")
def undisturbed(once: Once, pictures: Path, tiny_backbone: Path) -> Path:
    """The results of the run on one machine, in one shard."""
    run = configuration(pictures / "train", pictures / "test", tiny_backbone)
    return once("undisturbed", lambda folder: support.run_jobs(run_config(run, folder)))


@pytest.fixture
def place(tmp_path: Path, lab: Lab, pictures: Path, tiny_backbone: Path, undisturbed: Path) -> Iterator[Place]:
    """A test's own place, in one shard."""
    made = prepare(tmp_path, pictures, tiny_backbone, lab, undisturbed)
    yield made
    made.release()
    for controller in made.controllers:
        if controller.process.poll() is None:
            controller.process.kill()
            controller.process.wait()
    lab.cancel_all()
