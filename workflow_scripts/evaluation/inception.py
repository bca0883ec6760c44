"""Features of Inception-v3, from a local file of weights: the space of FID and KID, if the weights are FID's.

FID's network (Heusel et al. 2017) is the one of TensorFlow's 2015 graph. It differs from torchvision's in its pooling, its
1008 logits and its resize, and the differences show in the third digit of an FID: this follows torch-fidelity's port.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from workflow_scripts.errors import ConfigError

SIDE = 299
WIDTH = 2048
LOGITS = {1008: "inception", 1000: "inception-torchvision"}
"""By the number of logits: the name of the features. Only the first gives what the literature calls FID and KID."""


class Inception:
    """Inception-v3 up to its last pooling.

    Attributes:
        name: ``inception`` with FID's weights, or ``inception-torchvision``.
    """

    def __init__(self, path: Path, device: torch.device):
        """Load a state dict: FID's as torch-fidelity and pytorch-fid distribute it, or torchvision's ``inception_v3``.

        Raises:
            ConfigError: the file is neither.
        """
        weights = _read(path)
        logits = len(weights["fc.weight"]) if isinstance(weights.get("fc.weight"), torch.Tensor) else None
        if logits not in LOGITS:
            raise ConfigError(f"evaluation.inception: {path} has no Inception-v3 with 1008 or 1000 logits")
        self.name = LOGITS[logits]
        network = build(original=logits == 1008)
        kept = {k: v for k, v in weights.items() if not k.startswith(("fc.", "AuxLogits."))}
        try:
            network.load_state_dict(kept)
        except RuntimeError as error:
            raise ConfigError(f"evaluation.inception: {path} does not fit Inception-v3 ({error})") from None
        self._network = network.to(device).eval().requires_grad_(False)
        self._device = device

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return features (n, 2048) float32 of uint8 images (n, H, W, 3)."""
        images = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2).float()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            if self.name == "inception":
                images = (resize_as_tensorflow(images, SIDE) - 128) / 128
            else:
                images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True) / 127.5 - 1
            features: np.ndarray = self._network(images).cpu().numpy()
        return features


def build(*, original: bool) -> nn.Module:
    """Return Inception-v3 with its last pooling (n, 2048) as output; ``original`` pools as TensorFlow's graph of 2015 does."""
    from torchvision.models import inception as tv

    blocks: list[Any] = [
        tv.BasicConv2d, tv.InceptionA, tv.InceptionB, tv.InceptionC, tv.InceptionD, tv.InceptionE, tv.InceptionAux
    ]  # fmt: skip
    if original:
        blocks = [_pooling(b, mean_inside) if b in (tv.InceptionA, tv.InceptionC, tv.InceptionE) else b for b in blocks]
    network: Any = tv.Inception3(aux_logits=False, init_weights=False, inception_blocks=blocks)
    if original:
        network.Mixed_7c = _pooling(tv.InceptionE, lambda x: F.max_pool2d(x, 3, stride=1, padding=1))(2048)
    network.fc = nn.Identity()
    return network


def mean_inside(x: torch.Tensor) -> torch.Tensor:
    """Average over 3x3 pixels; at the border over those that there are."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _pooling(block: Any, pool: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a block like torchvision's, but with another pooling before its last branch."""

    class Pooling(block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            *branches, _ = self._forward(x)
            return torch.cat([*branches, self.branch_pool(pool(x))], 1)

    return Pooling


def resize_as_tensorflow(images: torch.Tensor, side: int) -> torch.Tensor:
    """Scale (n, c, H, W) to (n, c, side, side) as TensorFlow 1 did: bilinear, corner on corner, without antialiasing."""
    rows, columns = (_interpolation(size, side, images) for size in images.shape[2:])
    return rows @ images @ columns.T


def _interpolation(size: int, side: int, like: torch.Tensor) -> torch.Tensor:
    """The matrix (side, size) of linear interpolation at the places 0, size/side, 2 size/side, ..."""
    place = torch.arange(side, dtype=torch.float64) * (size / side)
    low = place.floor().long().clamp(max=size - 1)
    share = place - low
    matrix = torch.zeros(side, size, dtype=torch.float64)
    matrix.scatter_add_(1, low[:, None], (1 - share)[:, None])
    matrix.scatter_add_(1, (low + 1).clamp(max=size - 1)[:, None], share[:, None])
    return matrix.to(like)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"evaluation.inception: {path} cannot be read as weights ({error})") from None
    return content if isinstance(content, dict) else {}
