"""Trainings that two processes share, as torchrun starts them, against those of one."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from safetensors.torch import load_file, save_file
from test_training import SIDE, Opinion, Replay, recipe, stripes
from torch import nn

from workflow_scripts.evaluation.batch_norm import share_statistics
from workflow_scripts.evaluation.training import (
    Recipe,
    Score,
    Stopped,
    Students,
    batches,
    train_student,
    train_students,
)
from workflow_scripts.team import Team, team

CPU = torch.device("cpu")
TRAIN, TEST = (
    stripes(3, seed=0),
    stripes(5, seed=1),
)  # of 9 images: batches of 4, 4 and 1, which is fewer than processes
GENTLE = {"epochs": 3, "evaluations": 3, "learning_rate": 0.01}

CASES = {
    "instance norm": recipe(**GENTLE),
    "batch norm": recipe(**GENTLE, architecture="convnet_bn", ema=0.9, published_quirks=("double-batchnorm",)),
    "odd batches": recipe(**GENTLE, architecture="convnet_bn", batch_size=3, cutmix=0.0, mixup=1.0),
    "dsa": recipe(**GENTLE, dsa=("color", "crop", "cutout", "flip", "scale", "rotate"), patches=2, cutmix=0.5),
    "teacher": recipe(**GENTLE, architecture="convnet_bn", target="teacher", temperature=4.0),
    "stored": recipe(**GENTLE, target="stored", temperature=4.0),
    "half": recipe(**GENTLE, architecture="convnet_bn", dtype="bfloat16"),
}


def trained(chosen: Recipe, **options: Any) -> tuple[Score, dict[str, torch.Tensor]]:
    kept: list[nn.Module] = []
    soft = {
        "teacher": Opinion() if chosen.target == "teacher" else None,
        "soft": Replay(chosen, TRAIN) if chosen.target == "stored" else None,
    }
    score = train_student(chosen, TRAIN, TEST, device=CPU, keep=kept.append, **soft, **options)
    return score, {name: value.clone() for name, value in kept[0].state_dict().items()}


def after(epochs: int) -> Callable[[float], bool]:
    """Be told to stop once so many epochs are over."""
    asked = 0

    def stop(longest: float) -> bool:
        nonlocal asked
        asked += 1
        assert longest > 0
        return asked == epochs

    return stop


def go_together(target: Callable[..., None], programs: support.Programs, folder: Path) -> list[support.Ended]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [programs.start(as_member, target, rank, port, folder) for rank in (0, 1)]
    return [process.wait(300) for process in started]


def as_member(target: Callable[[Team, Path], None], rank: int, port: int, folder: Path) -> None:
    """Be a process that torchrun started."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with team(CPU) as members:
        target(members, folder)


# ---------------------------------------------------------------- the same as alone


def train_all(members: Team, folder: Path) -> None:
    for name, chosen in CASES.items():
        score, weights = trained(chosen, team=members)
        save_file(weights, folder / f"{name}.{members.rank}.safetensors")
        (folder / f"{name}.{members.rank}.json").write_text(json.dumps(dataclasses.asdict(score)))
    students = Students([CASES["batch norm"]], CPU, team=members)
    losses = []
    for batch in batches([CASES["batch norm"]], [TRAIN], 0, team=members):
        loss = students.step(batch, None)
        members.add_up([loss])
        losses.append(loss.item())
    (folder / f"losses.{members.rank}.json").write_text(json.dumps(losses))
    go_on(members, folder)


def go_on(members: Team, folder: Path) -> None:
    """Stop when the second process says so; go on from what was written by one process."""
    chosen = CASES["batch norm"]
    told = after(2) if members.rank == 1 else lambda _: False
    with pytest.raises(Stopped, match="after 2 of 3 epochs"):
        trained(chosen, team=members, checkpoint=folder / "of two.safetensors", stop=told)
    _, weights = trained(chosen, team=members, checkpoint=folder / "of one.safetensors")
    save_file(weights, folder / f"resumed.{members.rank}.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, programs: support.Programs) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with pytest.raises(Stopped, match="after 1 of 3 epochs"):
        trained(CASES["batch norm"], checkpoint=folder / "of one.safetensors", stop=after(1))
    for ended in go_together(train_all, programs, folder):
        assert ended.code == 0, ended.stderr
    return folder


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == two.keys()
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_the_student_of_one(made: Path, name: str) -> None:
    score, weights = trained(CASES[name])
    found = [load_file(made / f"{name}.{rank}.safetensors") for rank in (0, 1)]
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key
    assert_close(found[0], weights, 0.02 if name == "half" else 2e-5)
    scores = [json.loads((made / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]
    wanted = json.loads(json.dumps(dataclasses.asdict(score)))
    for one in scores:
        assert {**one, "seconds": 0} == {**scores[0], "seconds": 0}
        assert one["images_seen"] == wanted["images_seen"] and one["epochs"] == wanted["epochs"]
        assert sum(map(sum, one["confusion"])) == len(TEST[1]), "every test image once"
        if name != "half":
            assert {**one, "seconds": 0} == {**wanted, "seconds": 0}


def test_the_losses_of_two_processes_add_up_to_that_of_the_batch(made: Path) -> None:
    chosen = CASES["batch norm"]
    students = Students([chosen], CPU)
    alone = [students.step(batch, None).item() for batch in batches([chosen], [TRAIN], 0)]
    assert len(alone) == 3
    for rank in (0, 1):
        assert json.loads((made / f"losses.{rank}.json").read_text()) == pytest.approx(alone, abs=1e-5)


def test_any_number_of_processes_goes_on_from_a_checkpoint(made: Path) -> None:
    _, whole = trained(CASES["batch norm"])
    assert_close(load_file(made / "resumed.0.safetensors"), whole, 2e-5)
    _, weights = trained(CASES["batch norm"], checkpoint=made / "of two.safetensors")
    assert_close(weights, whole, 2e-5)


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_the_batch_in_order_and_almost_equal(size: int) -> None:
    for begin, end in ((0, 9), (4, 8), (8, 9), (3, 3)):
        shares = [Team(CPU, rank, size).share(begin, end) for rank in range(size)]
        assert [row for low, high in shares for row in range(low, high)] == list(range(begin, end))
        counts = [high - low for low, high in shares]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("pixels", [1, 2**20])
def test_shares_of_batches_are_those_of_the_whole_batches(pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workflow_scripts.evaluation.training.AUGMENTED_PIXELS", {"cpu": pixels})
    chosen = recipe(dsa=("color", "rotate"), patches=2, cutmix=1.0)
    for whole, *parts in zip(
        batches([chosen], [TRAIN], 1),
        *(batches([chosen], [TRAIN], 1, team=Team(CPU, rank, 3)) for rank in range(3)),
        strict=True,
    ):
        torch.testing.assert_close(torch.cat([part.images for part in parts], 1), whole.images, atol=1e-5, rtol=1e-5)
        assert torch.equal(torch.cat([part.labels for part in parts], 1), whole.labels)
        partners = [part.partner_labels for part in parts]
        assert whole.partner_labels is not None
        assert torch.equal(torch.cat(partners, 1), whole.partner_labels)  # type: ignore[arg-type]
        assert {part.whole for part in parts} == {len(whole.labels[0])}


def test_several_students_are_not_shared() -> None:
    chosen = recipe()
    with pytest.raises(ValueError, match="one student at a time"):
        train_students(
            [chosen, dataclasses.replace(chosen, seed=2)], [TRAIN] * 2, TEST, device=CPU, team=Team(CPU, 0, 2)
        )


# ---------------------------------------------------------------- batch norm


def test_shared_batch_norm_of_one_process_is_torchs() -> None:
    draw = torch.Generator().manual_seed(0)
    networks = [nn.Sequential(nn.BatchNorm2d(5, eps=1e-3, momentum=0.3)) for _ in range(2)]
    with torch.no_grad():
        for network in networks:
            network[0].weight.copy_(torch.linspace(0.5, 2, 5))
    plain, shared = networks
    share_statistics(shared, Team(CPU))
    assert type(shared[0]) is not type(plain[0])
    images, weight = torch.randn(2, 4, 5, SIDE, SIDE, generator=draw)
    images = (100 + images).requires_grad_()  # far from zero, where a mean of squares would lose digits
    results = []
    for network in networks:
        out = network(images)
        results.append([out, *torch.autograd.grad((out * weight).sum(), [images, *network.parameters()])])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value)
    torch.testing.assert_close(shared.eval()(images), plain.eval()(images))
