import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from workflow_scripts.errors import DataError
from workflow_scripts.evaluation.architectures import build
from workflow_scripts.evaluation.teacher import TeacherCheck, TeacherFeatures, check_teacher, load_teacher, read_weights

CLASSES = ("ant", "bee", "cat")


def weights(classes: int = 3) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build("convnet_bn", classes=classes, resolution=16, width=4).state_dict()


@pytest.fixture(params=["w.safetensors", "w.pth"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return written(tmp_path / request.param, weights())


def written(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def load(path: Path, **options: Any) -> nn.Module:
    options = {"classes": CLASSES, **options}
    return load_teacher(path, "convnet_bn", 4, 16, options.pop("classes"), **options)


def logits(network: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return network(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)))


def test_a_teacher_has_its_weights_and_is_frozen(file: Path) -> None:
    teacher = load(file)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    expected = build("convnet_bn", classes=3, resolution=16, width=4)
    expected.load_state_dict(weights())
    assert torch.equal(logits(teacher), logits(expected.eval()))


@pytest.mark.parametrize("outputs", [CLASSES, ("bee", "cat", "ant")])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [16, 24])
def test_features_are_what_the_last_layer_takes(file: Path, outputs: Any, resample: Any, side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, side, side, 3), dtype=np.uint8)
    found = TeacherFeatures(load(file, outputs=outputs), 16, resample)(pixels)
    plain: Any = build("convnet_bn", classes=3, resolution=16, width=4)
    plain.load_state_dict(weights())
    scale = Image.Resampling[resample.upper()]
    resized = np.stack([np.asarray(Image.fromarray(one).resize((16, 16), scale)) for one in pixels])
    inputs = (resized / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    with torch.inference_mode():
        expected = plain.eval()[:-1](torch.from_numpy(inputs).permute(0, 3, 1, 2).float()).numpy()
    assert found.shape == (5, 64) and found.dtype == np.float32
    rounded = 1e-5 if side == 16 else 2e-2  # Pillow rounds what it has scaled to whole grey levels
    np.testing.assert_allclose(found, expected, atol=rounded * np.abs(expected).max())


def test_features_are_computed_by_cudnn_in_full_precision(file: Path) -> None:
    teacher, seen = load(file), []
    teacher.register_forward_hook(
        lambda *_: seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
    )
    TeacherFeatures(teacher, 16, "bilinear")(np.zeros((1, 16, 16, 3), np.uint8))
    assert seen == [(True, False)]


def test_weights_in_a_wrapper_are_found(tmp_path: Path) -> None:
    plain = written(tmp_path / "plain.pth", weights())
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in weights().items()}}
    assert torch.equal(logits(load(plain)), logits(load(written(tmp_path / "wrapped.pth", wrapped))))


def test_outputs_are_put_in_the_run_s_order(file: Path) -> None:
    plain = logits(load(file))
    assert torch.equal(logits(load(file, outputs=["bee", "cat", "ant"])), plain[:, [2, 0, 1]])
    assert torch.equal(logits(load(file, classes=("cat", "ant"), outputs=["ant", "bee", "cat"])), plain[:, [2, 0]])
    assert torch.equal(logits(load(file, classes=("cat", "ant"), imagenet=CLASSES)), plain[:, [2, 0]]), "of ImageNet's"


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    file = written(tmp_path / "w.safetensors", weights())
    with pytest.raises(
        DataError, match=r"w\.safetensors: has 3 outputs, but stands for 2 classes\. .*teacher\.classes"
    ):
        load(file, classes=("ant", "bee"))
    with pytest.raises(DataError, match="knows no class dog"):
        load(file, classes=("ant", "dog"), outputs=list(CLASSES))
    with pytest.raises(DataError, match="does not fit convnet_bn at 16 px"):
        load_teacher(file, "convnet_bn", 8, 16, CLASSES)
    with pytest.raises(DataError, match=r"does not fit resnet18_bn \(it has no fc\.weight"):
        load_teacher(file, "resnet18_bn", None, 16, CLASSES)
    (tmp_path / "damaged.pth").write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"damaged\.pth"):
        read_weights(tmp_path / "damaged.pth")
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "pickled.pth")
    with pytest.raises(DataError, match="holds more than tensors"):
        read_weights(tmp_path / "pickled.pth")
    (tmp_path / "text.safetensors").write_text(json.dumps({}))
    with pytest.raises(DataError, match="cannot be read as a checkpoint"):
        read_weights(tmp_path / "text.safetensors")


# ---------------------------------------------------------------- how good it is


class Oracle(nn.Module):
    """Knows the class from the first pixel, and answers in its own order."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = (x[:, 0, 0, 0] * 0.229 + 0.485).mul(255).round().long()
        return torch.eye(len(self.order))[torch.tensor(self.order)[seen]]


def check(order: list[int], images: int = 300) -> TeacherCheck:
    labels = torch.arange(images) % len(order)
    pixels = labels.to(torch.uint8)[:, None, None, None].expand(images, 3, 2, 2)
    return check_teacher(Oracle(order), pixels, labels, len(order))


def test_a_good_teacher_passes() -> None:
    found = check(list(range(10)))
    assert (found.top1, found.matched, found.chance, found.images, found.fault) == (100, 100, 10, 300, None)


def test_a_wrong_class_order_is_recognised() -> None:
    for order in ([1, 2, 3, 4, 5, 6, 7, 8, 9, 0], [0, 1, 2, 4, 5, 6, 7, 8, 9, 3]):
        fault = check(order).fault
        assert fault is not None and "class order is not the run's" in fault and "100.0 %" in fault
        assert "teacher.classes" in fault


def test_a_teacher_at_chance_is_refused() -> None:
    fault = check([3] * 10).fault
    assert fault is not None and "10.0 % of 300" in fault and "guessing achieves 10.0 %" in fault


@pytest.mark.parametrize(
    ("top1", "matched", "good"),
    [(69.8, 69.8, True), (30, 31, True), (30, 55, True), (30, 61, False), (0.2, 0.4, False)],
)
def test_what_is_believed_at_a_thousand_classes(top1: float, matched: float, good: bool) -> None:
    assert (TeacherCheck(top1, 0.1, matched, 50_000).fault is None) == good
