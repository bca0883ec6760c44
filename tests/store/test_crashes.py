"""A commit that is interrupted anywhere, raced by another, or refused by a full disk."""

import json
import os
import resource
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import support

from workflow_scripts.errors import StoreError
from workflow_scripts.store.files import TEMPORARY, write_atomically
from workflow_scripts.store.results import Result, Store

ARRAYS = {"mean": np.linspace(0, 1, 60, dtype=np.float16).reshape(3, 20), "count": np.arange(5)}


def result(number: int = 0) -> Result:
    return Result("encode", "ant", {"stage": "encode", "class": "ant", "number": number})


def intact(store: Store, wanted: Result) -> None:
    arrays = store.read(wanted).arrays
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)


def folders(store: Store) -> list[str]:
    return sorted(path.name for path in (store.root / "encode.zarr" / "ant").glob("*"))


def steps_of_a_commit(store: Store) -> int:
    """How many steps a commit into a class that has results can be interrupted at."""
    store.commit(result(98), ARRAYS, {})
    last = 0

    def notice(number: int) -> None:
        nonlocal last
        last = number

    stop = support.count_writes(notice)
    store.commit(result(99), ARRAYS, {})
    stop()
    return last


class Crash(BaseException):
    """What no one catches."""


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), Crash()], ids=["error", "interrupt"])
def test_an_error_at_any_step_leaves_nothing_or_the_whole(error: BaseException, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    steps = steps_of_a_commit(store)
    assert steps > 10
    before = folders(store)
    for step in range(1, steps + 1):

        def notice(number: int, step: int = step) -> None:
            if number == step:
                raise error

        wanted = result(step)
        stop = support.count_writes(notice)
        told = False
        try:
            store.commit(wanted, ARRAYS, {})
        except type(error):
            told = True
        finally:
            stop()
        assert not support.leftovers(store.root), f"step {step} of {steps}"
        if store.exists(wanted):
            intact(store, wanted)
        else:
            assert told, f"step {step} of {steps}"
            assert not store.path(wanted).exists()
        assert set(before) <= set(folders(store))
        store.commit(wanted, ARRAYS, {})
        intact(store, wanted)


def commit_and_die(root: str, first: int, count: int) -> None:
    """Commit with death at steps ``first`` and up, one child per step."""
    for step in range(first, first + count):
        child = os.fork()
        if child == 0:
            support.count_writes(lambda number, step=step: os._exit(9) if number == step else None)
            Store(Path(root)).commit(result(step), ARRAYS, {})
            os._exit(0)
        print(step, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def test_death_at_any_step_leaves_nothing_or_the_whole(tmp_path: Path, programs: support.Programs) -> None:
    store = Store(tmp_path / "store")
    steps = steps_of_a_commit(store)
    ended = programs.call(commit_and_die, str(store.root), 1, steps)
    assert ended.code == 0, ended.stderr
    assert [line.split() for line in ended.stdout.splitlines()] == [[str(step), "9"] for step in range(1, steps + 1)]
    whole = []
    for step in range(1, steps + 1):
        wanted = result(step)
        if store.exists(wanted):
            intact(store, wanted)
            whole.append(step)
        else:
            assert not store.path(wanted).exists(), f"step {step} of {steps}"
        store.commit(wanted, ARRAYS, {})
        intact(store, wanted)
    assert whole == list(range(whole[0], steps + 1)), "from the rename on, and not before"
    assert len(whole) < steps / 2
    assert support.leftovers(store.root), "what the dead left behind"
    assert all(
        path.name.startswith(TEMPORARY)
        for path in store.root.glob("encode.zarr/ant/*")
        if path.name not in place_names(steps)
    )


def place_names(steps: int) -> set[str]:
    return {Path(result(number).place).name for number in (*range(1, steps + 1), 98, 99)}


def commit_together(root: str, barrier: Barrier, rounds: int) -> None:
    store = Store(Path(root))
    for number in range(rounds):
        barrier.wait(30)
        store.commit(result(number), ARRAYS, {"host": str(os.getpid())})


def test_commits_of_the_same_result_at_once_do_no_harm(tmp_path: Path, programs: support.Programs) -> None:
    rounds, workers = 30, 3
    root = tmp_path / "store"
    barrier = programs.context.Barrier(workers)
    started = [programs.start(commit_together, str(root), barrier, rounds) for _ in range(workers)]
    for worker in started:
        ended = worker.wait()
        assert ended.code == 0, ended.stderr
    store = Store(root)
    for number in range(rounds):
        intact(store, result(number))
    assert len(folders(store)) == rounds
    assert not support.leftovers(root)


# ---------------------------------------------------------------- a full disk


def commit_with_small_files(root: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    store = Store(Path(root))
    store.commit(result(2), ARRAYS, {})
    for wanted, size in ((result(3), 50_000), (result(4), 5_000)):
        try:
            store.commit(wanted, {**ARRAYS, "big": np.ones(size, np.float32)}, {})
        except StoreError as error:
            print(error)
    try:
        write_atomically(Path(root) / "score.json", "x" * 50_000)
    except StoreError as error:
        print(error)


def test_a_file_size_limit_is_explained_and_harms_nothing(tmp_path: Path, programs: support.Programs) -> None:
    store = Store(tmp_path / "store")
    store.commit(result(1), ARRAYS, {})
    ended = programs.call(commit_with_small_files, str(store.root))
    assert ended.code == 0, ended.stderr
    refused, score = ended.stdout.splitlines()
    assert refused.startswith(f"{store.path(result(3))}: cannot be written (File too large).")
    assert "stillhouse gc" in refused
    assert score.startswith(f"{store.root}/score.json: cannot be written (File too large).")
    for number in (1, 2, 4):
        assert store.exists(result(number))
    intact(store, result(1))
    intact(store, result(2))
    assert not store.path(result(3)).exists()
    assert not (store.root / "score.json").exists()
    assert not support.leftovers(store.root)


def commit_on_small_disk(root: str) -> None:
    support.mount_small_disk(root, 400_000)
    store = Store(Path(root) / "store")
    stored, message = [], ""
    for number in range(100):
        try:
            store.commit(result(number), {**ARRAYS, "big": np.ones(5_000, np.float32)}, {})
        except StoreError as error:
            message = str(error)
            break
        stored.append(number)
    sound = [len(store.read(result(number)).arrays) for number in stored]
    rest = [str(path) for path in support.leftovers(Path(root))]
    state = {"stored": stored, "sound": sound, "leftovers": rest, "folders": len(folders(store)), "message": message}
    import shutil

    shutil.rmtree(store.path(result(0)))
    shutil.rmtree(store.path(result(1)))
    store.commit(result(len(stored)), {**ARRAYS, "big": np.ones(5_000, np.float32)}, {})
    print(json.dumps(state))


def test_a_full_disk_is_explained_and_harms_nothing(tmp_path: Path, programs: support.Programs) -> None:
    ended = programs.call(commit_on_small_disk, str(tmp_path))
    if ended.code == support.NO_MOUNT:
        pytest.skip("this machine does not let a process mount a file system of its own")
    assert ended.code == 0, ended.stderr
    state = json.loads(ended.stdout)
    assert 3 < len(state["stored"]) < 100
    assert state["sound"] == [3] * len(state["stored"])
    assert state["folders"] == len(state["stored"])
    assert not state["leftovers"]
    assert "cannot be written (No space left on device)" in state["message"]
    assert "stillhouse gc" in state["message"]


def test_a_commit_takes_a_moment_only(tmp_path: Path) -> None:
    """Thousands of classes are committed one by one."""
    store = Store(tmp_path / "store")
    store.commit(result(0), ARRAYS, {})
    began = time.perf_counter()
    for number in range(1, 11):
        store.commit(result(number), ARRAYS, {})
    assert (time.perf_counter() - began) / 10 < 1
