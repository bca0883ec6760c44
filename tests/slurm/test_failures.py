"""A class that cannot be made and a disk that is full, through ``slurm_profile`` on a real SLURM.

After each, the results equal those of a run on one machine that nothing disturbed.
"""

import json
import os
import subprocess

import pytest
from places import CLASSES, IN_HAND, Place, resumes


def test_a_poisoned_class(place: Place) -> None:
    poison = place.folder / "lab" / "poison" / IN_HAND
    poison.touch()
    controller = place.run("--until", "encode", "--retries", "1")
    assert controller.process.returncode == 1
    assert "class cat is set aside after 3 failed attempts: ArithmeticError: cat is poisoned" in controller.said
    assert "stillhouse retry" in controller.said
    assert place.computed() == {name: 1 for name in CLASSES if name != IN_HAND}
    assert len(place.began(IN_HAND)) == 1, "one process made all three attempts; the next job only says so"
    assert len(controller.submitted()) == 2

    status = json.loads(place.stillhouse("status", "--configfile", "tiny.yaml", "--json").stdout)
    (aside,) = status["set_aside"]
    assert (aside["stage"], aside["of"], aside["failures"]) == ("encode", "cat", 3)
    assert "ArithmeticError: cat is poisoned" in aside["error"]

    poison.unlink()
    cleared = place.stillhouse("retry", "--configfile", "tiny.yaml")
    assert cleared.returncode == 0, cleared.stderr
    assert "cat failed 3 times" in cleared.stdout
    place.start("--until", "encode")
    resumes(place)


def test_a_full_disk(place: Place) -> None:
    store = place.results / "store"
    store.mkdir(parents=True)
    files = [path for path in (place.undisturbed / "store" / "encode.zarr").rglob("*") if path.is_file()]
    half = sum(-(-path.stat().st_size // 4096) for path in files) * 4096 // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={half}", "tmpfs", str(store)]
    if subprocess.run(mount, capture_output=True).returncode:
        if os.environ.get("STILLHOUSE_SLURM") == "required":
            pytest.fail("a small disk cannot be mounted here")
        pytest.skip("a small disk cannot be mounted here")
    try:
        controller = place.run("--until", "encode", "--retries", "0")
        assert controller.process.returncode == 1
        assert "Nothing already stored is harmed: free some space" in controller.said
        assert not place.events("failed"), "a full disk is no class's fault"
        assert len(place.computed()) < len(CLASSES)
        subprocess.run(["mount", "-o", "remount,size=50m", str(store)], check=True)
        place.start("--until", "encode")
        resumes(place)
    finally:
        subprocess.run(["umount", "--lazy", str(store)], check=True)
