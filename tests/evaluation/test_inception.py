"""Inception-v3 for FID, with random weights: the shapes, the pooling and the resize that make its numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from workflow_scripts.errors import ConfigError
from workflow_scripts.evaluation import inception
from workflow_scripts.evaluation.inception import Inception, build, mean_inside, resize_as_tensorflow


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like FID's: 1008 logits."""
    torch.manual_seed(0)
    state = {**build(original=True).state_dict(), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(state, path)
    return path


def test_features_of_both_kinds_of_weights(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "SIDE", 75)  # the least that the network takes
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 24, 3), dtype=np.uint8)
    fid = Inception(weights, torch.device("cpu"))
    found = fid(pixels)
    assert (fid.name, found.shape, found.dtype) == ("inception", (2, 2048), np.float32)
    np.testing.assert_allclose(fid(pixels[1:]), found[1:], rtol=1e-4, atol=1e-6)
    state = torch.load(weights, weights_only=True)
    state |= {
        "fc.weight": torch.zeros(1000, 2048),
        "fc.bias": torch.zeros(1000),
        "AuxLogits.fc.bias": torch.zeros(1000),
    }
    torch.save(state, tmp_path / "inception_v3.pth")
    other = Inception(tmp_path / "inception_v3.pth", torch.device("cpu"))
    assert other.name == "inception-torchvision"
    assert not np.allclose(other(pixels), found, rtol=1e-2), "another pooling and another resize"


def test_the_original_pools_over_what_there_is() -> None:
    ones = torch.ones(1, 1, 5, 5)
    torch.testing.assert_close(mean_inside(ones), ones)
    network = build(original=True)
    x = torch.randn(1, 192, 6, 6)
    block = network.Mixed_5b.eval()
    torch.testing.assert_close(block(x)[:, -32:], block.branch_pool(mean_inside(x)))
    torch.testing.assert_close(block(x)[:, :64], block.branch1x1(x))
    last = network.Mixed_7c.eval()
    y = torch.randn(1, 2048, 3, 3)
    torch.testing.assert_close(last(y)[:, -192:], last.branch_pool(F.max_pool2d(y, 3, stride=1, padding=1)))
    plain = build(original=False).Mixed_5b.eval()
    torch.testing.assert_close(plain(x)[:, -32:], plain.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1)))


def test_resize_as_tensorflow_starts_at_the_corner() -> None:
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    wide = resize_as_tensorflow(ramp, 8)
    torch.testing.assert_close(wide[0, 0, 0], torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3]))
    torch.testing.assert_close(resize_as_tensorflow(ramp, 4), ramp)
    torch.testing.assert_close(resize_as_tensorflow(ramp, 2)[0, 0, 0], torch.tensor([0.0, 2]))  # no antialiasing
    tall = torch.arange(3.0)[:, None].expand(1, 1, 3, 2)
    torch.testing.assert_close(resize_as_tensorflow(tall, 6)[0, 0, :, 0], torch.tensor([0, 0.5, 1, 1.5, 2, 2]))


def test_files_that_are_not_inception_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    for content in (b"no weights", b""):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be read as weights"):
            Inception(path, torch.device("cpu"))
    torch.save({"fc.weight": torch.zeros(10, 2048)}, path)
    with pytest.raises(ConfigError, match="1008 or 1000 logits"):
        Inception(path, torch.device("cpu"))
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, path)
    with pytest.raises(ConfigError, match="does not fit"):
        Inception(path, torch.device("cpu"))


def test_nothing_is_unpickled_but_tensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": Path("evil")}, path)
    with pytest.raises(ConfigError, match="cannot be read as weights"):
        Inception(path, torch.device("cpu"))
