"""Teachers and stored soft labels as stages: from a configuration to scores, across interruptions, damage and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import Done, Site, run_jobs

from workflow_scripts.errors import ConfigError, DataError
from workflow_scripts.evaluation.soft_labels import SoftLabels
from workflow_scripts.operations.gc import garbage
from workflow_scripts.operations.survey import survey
from workflow_scripts.operations.verify import verify
from workflow_scripts.recipes import Labels, Recipes, SampleSet, Training
from workflow_scripts.stages import relabel, teacher
from workflow_scripts.stages.classifiers import read_teacher
from workflow_scripts.stages.features import real_features
from workflow_scripts.stages.inputs import real_images
from workflow_scripts.stages.notice import NOTICE, Unfinished

FIT = {"epochs": 12, "batch_size": 8, "flip": False, "crop_scale": [0.6, 1.0]}
SOFT: dict[str, Any] = {
    "compare": ["random"],
    "ipc": [3],
    "seeds": [0],
    "evaluation.protocols": ["hard-sgd", "soft-rded", "soft-fkd", "sharp"],
    "evaluation.architectures": [{"name": "convnet_bn", "width": 4}],
    "evaluation.teacher": {"architecture": {"name": "convnet_bn", "width": 8}, "fit": FIT},
    "evaluation.epochs": 3,
    "evaluation.batch_size": 4,
    "evaluation.test_resize": 1.0,
    "evaluation.settings": {"sharp": {"preset": "soft-rded", "temperature": 4.0, "repeats": 2}},
}
FKD = Labels(SampleSet("random", 3, 0), "soft-fkd")


def changed(**more: Any) -> dict[str, Any]:
    return SOFT | {f"evaluation.{key}": value for key, value in more.items()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_backbone: Path) -> tuple[Site, Done]:
    folder = tmp_path_factory.mktemp("soft")
    shutil.copytree(tiny_images, folder, dirs_exist_ok=True)
    site = Site(folder / "train", folder / "test", tiny_backbone, folder / "results")
    return site, run_jobs(site.config(SOFT))


@pytest.fixture
def site(tmp_path: Path, done: tuple[Site, Done]) -> Site:
    shutil.copytree(done[0].results.parent, tmp_path / "site", symlinks=True)
    there = tmp_path / "site"
    return Site(there / "train", there / "test", done[0].backbone, there / "results")


def scores(recipes: Recipes) -> dict[Training, dict[str, Any]]:
    trainings = recipes.trainings("random", 3)
    return {training: json.loads(recipes.training_path(training).read_text()) for training in trainings}


def test_teachers_and_labels_end_in_good_order_and_go_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = Recipes(site.config(SOFT))
    weights, labels = recipes.teacher_weights("soft-rded"), recipes.labels_path(FKD)
    was = load_file(weights), [SoftLabels(labels).epoch(epoch)[1] for epoch in range(3)]
    weights.unlink()
    shutil.rmtree(labels)
    asked = 0

    def due(longest: float) -> bool:
        nonlocal asked
        asked += 1
        return asked == 2

    monkeypatch.setattr(NOTICE, "due", due)
    with pytest.raises(Unfinished, match="after 2 of 12 epochs of the teacher of soft-rded"):
        teacher.work(recipes, "soft-rded")
    assert not weights.exists()
    teacher.work(recipes, "soft-rded")
    assert asked == 2 + 9, "after each epoch but the last"
    for name, value in load_file(weights).items():
        assert torch.equal(value, was[0][name])
    asked = 0
    with pytest.raises(Unfinished, match="after epoch 2 of 3"):
        relabel.work(recipes, FKD.job)
    stored = SoftLabels(labels)
    assert not stored.whole and [stored.has(epoch) for epoch in range(3)] == [True, True, False]
    relabel.work(recipes, FKD.job)
    for epoch, logits in enumerate(was[1]):
        assert torch.equal(SoftLabels(labels).epoch(epoch)[1], logits)


def test_several_protocols_from_images_to_scores(done: tuple[Site, Done]) -> None:
    site, ran = done
    recipes = Recipes(site.config(SOFT))
    later = [job for job in ran.jobs if job[0] in ("teacher", "relabel", "evaluate")]
    assert later == [("teacher", "soft-rded"), ("relabel", FKD.job), ("evaluate", "random-ipc3-000")]
    found = scores(recipes)
    assert [training.protocol for training in found] == ["hard-sgd", "soft-rded", "soft-fkd", "sharp", "sharp"]
    record = json.loads(recipes.teacher_record("sharp").read_text())
    assert record["top1"] > 60 and record["images"] == 12
    for training, score in found.items():
        assert score["protocol"] == training.protocol
        assert score["teacher_top1"] == (None if training.protocol == "hard-sgd" else record["top1"])
        assert score["curve"][-1][1] == score["top1_last"] <= score["top1_best"]
        assert [sum(row) for row in score["confusion"]] == [4, 4, 4]
        assert sum(score["confusion"][k][k] for k in range(3)) / 12 * 100 == pytest.approx(score["top1_last"])
        assert score["class_top1"] == [25 * score["confusion"][k][k] for k in range(3)]
    assert SoftLabels(recipes.labels_path(FKD)).record()["teacher_top1"] == record["top1"]
    assert run_jobs(site.config(SOFT)).jobs == []


def test_sets_are_measured_on_the_first_teacher_s_features(done: tuple[Site, Done]) -> None:
    site, ran = done
    recipes = Recipes(site.config(SOFT))
    assert ("features", "000") in ran.jobs
    assert ran.jobs.index(("teacher", "soft-rded")) < ran.jobs.index(("features", "000"))
    record = json.loads(recipes.measure_path(FKD.set).read_text())
    assert (record["space"], record["dimensions"]) == ("teacher convnet_bn of soft-rded", 8 * 4 * 4)
    assert record["audit"]["copies"] == 9 and record["values"]["precision"] == 1, "chosen real images are themselves"
    network: Any = read_teacher(recipes, "soft-rded", 16, torch.device("cpu"))
    for name in recipes.classes:
        found, keys = real_features(recipes, name)
        inputs = torch.from_numpy(real_images(recipes, name, keys)).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        expected = network[:-1]((inputs - mean) / std).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    page = (site.results / "tiny" / "report" / "index.html").read_text()
    assert "teacher convnet_bn of soft-rded" in page and "Fréchet distance (teacher&#39;s features)" in page
    assert ">FID<" not in page and ">KID<" not in page


def test_what_features_depend_on(done: tuple[Site, Done], tmp_path: Path) -> None:
    site, _ = done

    def identity(**more: Any) -> str:
        recipes = Recipes(site.config(changed(**more)))
        return recipes.real_features("ant").digest

    first = identity()
    others = [*SOFT["evaluation.protocols"]]
    assert identity(temperature=2.0, features="teacher", protocols=others[1:], epochs=5) == first
    assert identity(teacher={**SOFT["evaluation.teacher"], "fit": {**FIT, "epochs": 13}}) != first
    assert identity(resolution=32) != first
    hard = Recipes(site.config(SOFT | {"evaluation.protocols": ["hard-sgd"]}))
    assert hard.real_features("ant").stage == "encode"
    on_latents = Recipes(site.config(changed(features="latents")))
    assert on_latents.measure_recipe(FKD.set) == hard.measure_recipe(FKD.set)
    assert not any(job.stage == "features" for job in on_latents.jobs())
    weights = tmp_path / "mine.safetensors"
    shutil.copy(Recipes(site.config(SOFT)).teacher_weights("soft-rded"), weights)
    (tmp_path / "order.json").write_text(json.dumps(["ant", "bee", "cat"]))
    given = {"architecture": {"name": "convnet_bn", "width": 8}, "weights": str(weights), "fit": None}
    assert identity(teacher=given) == identity(teacher={**given, "classes": str(tmp_path / "order.json")}) != first


def test_features_that_the_run_does_not_have_are_refused(site: Site) -> None:
    with pytest.raises(ConfigError, match=r"features: teacher needs a protocol with soft labels.*among hard-sgd"):
        site.config(changed(protocols=["hard-sgd"], features="teacher"))
    with pytest.raises(ConfigError, match=r"features: inception needs the file"):
        site.config(changed(features="inception"))


def test_the_operator_sees_teachers_and_labels(done: tuple[Site, Done]) -> None:
    site, _ = done
    recipes = Recipes(site.config(SOFT))
    stages = {stage.stage: stage for stage in survey(recipes)}
    assert [item.of for item in stages["teacher"].items] == ["soft-rded"]
    assert [item.of for item in stages["relabel"].items] == ["random IPC 3 seed 0 soft-fkd"]
    assert not any(stage.missing for stage in stages.values())
    assert verify(recipes) == []
    assert garbage(site.results, [recipes]) == []
    plain = Recipes(site.config(SOFT | {"evaluation.protocols": ["hard-sgd"]}))
    plain.jobs()
    stale = {path.parent.name for path in garbage(site.results, [plain])}
    assert {"teachers", "labels"} <= stale


def test_what_labels_and_teachers_depend_on(done: tuple[Site, Done]) -> None:
    site, _ = done

    def digests(**more: Any) -> tuple[str, str]:
        recipes = Recipes(site.config(changed(**more)))
        return recipes.teacher_digest("soft-fkd"), recipes.labels_digest(FKD)

    teacher, labels = digests()
    assert digests(temperature=2.0, learning_rate=0.5, repeats=7, jitter=None) == (teacher, labels)
    for changes in ({"crop_scale": [0.2, 1.0]}, {"batch_size": 5}, {"label_seed": 1}, {"epochs": 4}, {"mixup": 0.0}):
        found = digests(**changes)
        assert found[0] == teacher
        assert (found[1] == labels) == (changes == {"mixup": 0.0}), changes
    fitted = digests(teacher={**SOFT["evaluation.teacher"], "fit": {**FIT, "epochs": 13}})
    assert fitted[0] != teacher and fitted[1] != labels


def test_an_interrupted_relabelling_goes_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = Recipes(site.config(SOFT))
    path = recipes.labels_path(FKD)
    whole = [SoftLabels(path).epoch(number) for number in range(3)]
    shutil.rmtree(path)
    (site.results / recipes.job("relabel", FKD.job).manifest).unlink()
    write, written = SoftLabels.write, list[int]()

    def killed(self: SoftLabels, epoch: int, *content: Any) -> None:
        if epoch == 1:
            raise KeyboardInterrupt
        write(self, epoch, *content)

    def noted(self: SoftLabels, epoch: int, *content: Any) -> None:
        written.append(epoch)
        write(self, epoch, *content)

    monkeypatch.setattr(SoftLabels, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(site.config(SOFT))
    assert not SoftLabels(path).whole and SoftLabels(path).has(0)
    monkeypatch.setattr(SoftLabels, "write", noted)
    assert run_jobs(site.config(SOFT)).jobs == [("relabel", FKD.job)]
    assert written == [1, 2], "what was there is kept"
    for number, (draws, logits) in enumerate(whole):
        again, same = SoftLabels(path).epoch(number)
        assert torch.equal(logits, same) and all(torch.equal(draws[name], again[name]) for name in draws)


def test_damaged_labels_are_made_again(site: Site) -> None:
    recipes = Recipes(site.config(SOFT))
    path = recipes.labels_path(FKD)
    (path / "logits" / "c.1.0.0").write_bytes(b"no logits")
    found = verify(recipes)
    assert any(str(path) in line and "Set aside" in line for line in found)
    assert run_jobs(site.config(SOFT)).jobs == [("relabel", FKD.job)]
    assert verify(recipes) == []


def test_a_file_of_weights_is_checked_before_it_teaches(site: Site, tmp_path: Path) -> None:
    recipes = Recipes(site.config(SOFT))
    weights = tmp_path / "mine.safetensors"
    shutil.copy(recipes.teacher_weights("soft-rded"), weights)
    teacher: dict[str, Any] = {"architecture": {"name": "convnet_bn", "width": 8}, "weights": str(weights), "fit": None}
    ran = run_jobs(site.config(changed(teacher=teacher, protocols=["soft-rded"])))
    assert ran.stages() == {"teacher", "features", "evaluate", "measure", "report"}
    (tmp_path / "order.json").write_text(json.dumps(["bee", "cat", "ant"]))
    wrong = changed(teacher={**teacher, "classes": str(tmp_path / "order.json")}, protocols=["soft-rded"])
    with pytest.raises(
        DataError, match=r"The teacher of soft-rded, .*mine\.safetensors, .*class order is not the run's"
    ):
        run_jobs(site.config(wrong))
    before = Recipes(site.config(changed(teacher=teacher, protocols=["soft-rded"]))).teacher_digest("soft-rded")
    weights.write_bytes(weights.read_bytes() + b" ")
    assert Recipes(site.config(changed(teacher=teacher))).teacher_digest("soft-rded") != before, "known by its content"
    weights.unlink()
    with pytest.raises(ConfigError, match=r"soft-rded.*no file .*mine\.safetensors"):
        Recipes(site.config(changed(teacher=teacher, protocols=["soft-rded"]))).jobs()


def test_a_teacher_that_learned_nothing_stops_the_run(site: Site) -> None:
    lazy = {**SOFT["evaluation.teacher"], "fit": {**FIT, "epochs": 1, "learning_rate": 1e-9}}
    with pytest.raises(DataError, match=r"guessing achieves 33\.3 %|class order"):
        run_jobs(site.config(changed(teacher=lazy, protocols=["soft-rded"])))


def test_an_interrupted_teacher_goes_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = Recipes(site.config(SOFT))
    weights = recipes.teacher_weights("soft-rded")
    whole = weights.read_bytes()
    for path in (
        weights,
        recipes.teacher_record("soft-rded"),
        site.results / recipes.job("teacher", "soft-rded").manifest,
    ):
        path.unlink()
    from workflow_scripts.stages import teacher

    train, options = teacher.train_student, {"checkpoint_seconds": 0}

    def stop(epoch: int, top1: float | None) -> None:
        if epoch == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(teacher, "train_student", lambda *a, **k: train(*a, **k, **options, progress=stop))
    with pytest.raises(KeyboardInterrupt):
        run_jobs(site.config(SOFT))
    begun: list[int] = []
    note = lambda epoch, _: begun.append(epoch)  # noqa: E731
    monkeypatch.setattr(teacher, "train_student", lambda *a, **k: train(*a, **k, **options, progress=note))
    assert run_jobs(site.config(SOFT)).jobs == [("teacher", "soft-rded")]
    assert begun[0] == 5 or begun[0] == 6
    assert weights.read_bytes() == whole


def test_a_soft_protocol_without_a_teacher_is_refused(tmp_path: Path, tiny_images: Path, tiny_backbone: Path) -> None:
    site = Site(tiny_images / "train", tiny_images / "test", tiny_backbone, tmp_path)
    with pytest.raises(ConfigError, match=r"protocol soft-fkd needs a teacher: set teacher\.weights"):
        site.config({"evaluation.protocols": ["soft-fkd"]})
    with pytest.raises(ConfigError, match=r"either weights .* or fit"):
        site.config({"evaluation.protocols": ["soft-fkd"], "evaluation.teacher": {}})
    with pytest.raises(ConfigError, match=r"no protocol named .soft-rde.; did you mean .soft-rded."):
        site.config({"evaluation.protocols": ["soft-rde"]})
    with pytest.raises(ConfigError, match="protocols holds a value twice"):
        site.config({"evaluation.protocols": ["hard-sgd", "hard-sgd"]})
    with pytest.raises(ConfigError, match="deit_ti has one width only"):
        site.config({"evaluation.architectures": [{"name": "deit_ti", "width": 3}]})
    refused = {"alexnet takes 64 pixels": {"architectures": [{"name": "alexnet"}]}, "patches 3 do not": {"patches": 3}}
    for message, changes in refused.items():
        with pytest.raises(ConfigError, match=message):
            Recipes(site.config({f"evaluation.{key}": value for key, value in changes.items()})).check()
