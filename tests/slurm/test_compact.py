"""A compact array in place of a controller."""

import support
from places import STAGES, Place


def test_scattered_classes_in_one_array(place: Place) -> None:
    """Of six classes in six shards two change; two workers make them, and Snakemake finds the evaluation and the report."""
    place.shards = 6
    support.run_jobs(place.recipes().config)
    for name in ("bee", "fox"):
        support.draw(1, 50).save(place.folder / "train" / name / "new.png")
    before = set(support.stored(place.results))
    said = place.stillhouse(
        "submit", "--configfile", "tiny.yaml", "--set", "shards=6", "--yes", "--compact", "--workers", "2"
    )
    assert said.returncode == 0, said.stderr
    assert "8 missing results of 2 classes, which are in 8 jobs of snakemake, go to 2 workers" in said.stdout
    place.lab.wait(lambda: not place.lab.jobs(), "the array ends", 400)
    made = set(support.stored(place.results)) - before
    assert support.tally(made) == {stage: {"bee": 1, "fox": 1} for stage in STAGES}
    starts = place.events("start")
    assert len({event["job"] for event in starts}) == 2, "two workers"
    assert all(event["deadline"] is not None for event in starts), "which know when their time is up"
    dry = place.run("--config", "shards=6", "-n").said
    assert "evaluate" in dry and "report" in dry
    assert not any(f"rule {stage}:" in dry for stage in (*STAGES, "export")), dry
