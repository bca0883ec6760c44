"""A cluster with slurmdbd on MariaDB: the same run, watched through ``sacct``."""

import json
from collections.abc import Iterator

import pytest
from lab import Lab
from places import ONCE, Place, started


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A cluster with slurmdbd."""
    yield from started(accounting=True)


def test_a_run_that_sacct_watches(place: Place) -> None:
    """A class fails at first, so that a job's failure, too, is learnt from sacct."""
    poison = place.folder / "lab" / "poison" / "cat"
    poison.touch()
    controller = place.run("--until", "encode", "--retries", "0", "--slurm-status-command", "sacct")
    assert controller.process.returncode == 1
    assert "SLURM status is: 'FAILED'" in controller.said
    poison.unlink()
    assert place.stillhouse("retry", "--configfile", "tiny.yaml").returncode == 0
    again = place.run("--until", "encode", "--slurm-status-command", "sacct")
    assert again.process.returncode == 0, again.said
    place.expect_undisturbed("encode")
    assert place.computed() == ONCE

    found = place.stillhouse("doctor", "--configfile", "tiny.yaml", "--json")
    lines = {line["check"]: line for line in json.loads(found.stdout)["checks"]}
    assert "slurmdbd keeps accounts" in lines["slurm status command"]["found"]
    assert "lab" in lines["slurm account"]["found"]
