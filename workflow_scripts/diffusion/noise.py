"""Random streams that belong to an image, not to a batch.

Every draw for image ``index`` of a class comes from a stream keyed by (seed, class, index, purpose) alone, so that what is
generated depends neither on the batch, the shard, the order nor the number of devices. The streams are NumPy's Philox,
whose 128-bit key leaves no room for collisions (torch's CPU generator keeps 32 bits of its seed).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def stream(seed: int, class_name: str, index: int, purpose: str) -> np.random.Generator:
    """Return the random stream of one image for one purpose."""
    key = hashlib.sha256(f"{seed}/{class_name}/{index}/{purpose}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))


def batch_noise(streams: Sequence[np.random.Generator], *shape: int) -> torch.Tensor:
    """Draw one block of standard normals per stream, (len(streams), *shape), float32."""
    return torch.from_numpy(np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in streams]))


def seed_for(seed: int, class_name: str, index: int, purpose: str) -> int:
    """Return a 31-bit seed for a library that takes nothing better."""
    return int(stream(seed, class_name, index, purpose).integers(2**31))


def normals(generator: np.random.Generator, *shape: int) -> torch.Tensor:
    """Draw standard normals in float32."""
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
