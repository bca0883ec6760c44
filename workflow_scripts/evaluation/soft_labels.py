"""Soft labels stored once and replayed: a teacher's logits with the draws of the views that it saw (FKD, as in SRe2L).

A Zarr group with one array per kind of draw and one of fp16 logits (epochs, N, K), each chunked by epoch. An epoch is there
when its chunk of logits is, the whole group when its own metadata is: it is written last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workflow_scripts.errors import StoreError
from workflow_scripts.evaluation.augment import Draws
from workflow_scripts.store.files import explain_full_disk, write_atomically

RECORD = "zarr.json"
LOGITS = "logits"
_STORED = {torch.int64: np.int32, torch.float32: np.float32, torch.bool: np.bool_}


class SoftLabels:
    """The soft labels at a path, whether or not they are whole."""

    def __init__(self, path: Path):
        self.path = path
        self._arrays: dict[str, Any] = {}

    @property
    def whole(self) -> bool:
        """Whether all epochs are there."""
        return (self.path / RECORD).exists()

    def has(self, epoch: int) -> bool:
        """Whether an epoch is there."""
        return (self.path / LOGITS / f"c.{epoch}.0.0").exists()

    def write(self, epoch: int, epochs: int, draws: Draws, logits: torch.Tensor) -> None:
        """Write an epoch, its logits (N, K) last; epochs that are there are overwritten."""
        content: dict[str, np.ndarray] = {
            name: value.numpy().astype(_STORED[value.dtype]) for name, value in draws.items()
        }
        content[LOGITS] = logits.to(torch.float16).cpu().numpy()
        with explain_full_disk(self.path):
            for name, value in content.items():
                self._array(name, (epochs, *value.shape), value.dtype)[epoch] = value

    def finish(self, record: Mapping[str, Any]) -> None:
        """Declare the labels whole.

        Args:
            record: JSON-serialisable facts about them.
        """
        arrays = sorted(path.name for path in self.path.iterdir() if path.is_dir())
        content = {"zarr_format": 3, "node_type": "group", "attributes": {**record, "arrays": arrays}}
        write_atomically(self.path / RECORD, json.dumps(content))

    def record(self) -> dict[str, Any]:
        """Return what ``finish`` was given, and the names of the arrays."""
        attributes: dict[str, Any] = json.loads((self.path / RECORD).read_text())["attributes"]
        return attributes

    def epoch(self, epoch: int) -> tuple[Draws, torch.Tensor]:
        """Return an epoch's draws and the teacher's logits (N, K) float16, by position.

        Raises:
            StoreError: it is not there or damaged.
        """
        import zarr

        try:
            if not self._arrays:
                names = self.record()["arrays"]
                self._arrays = {name: zarr.open_array(str(self.path / name), mode="r") for name in names}
            if not self.has(epoch):
                raise ValueError("the epoch is missing")
            content = {name: torch.from_numpy(np.asarray(array[epoch])) for name, array in self._arrays.items()}
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise StoreError(
                f"{self.path}: epoch {epoch} of the labels cannot be read ({error!r}). Run `stillhouse verify`, which sets "
                "damaged results aside, then run the same command again."
            ) from error
        logits = content.pop(LOGITS)
        return {k: v.to(torch.int64) if v.dtype == torch.int32 else v for k, v in content.items()}, logits

    def _array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        import zarr

        if name not in self._arrays:
            path = self.path / name
            if (path / RECORD).exists():
                self._arrays[name] = zarr.open_array(str(path), mode="r+")
            else:
                self._arrays[name] = zarr.create_array(
                    str(path),
                    shape=shape,
                    dtype=dtype,
                    chunks=(1, *shape[1:]),
                    compressors=[zarr.codecs.Crc32cCodec()],
                    fill_value=np.nan if dtype.kind == "f" else 0,
                    chunk_key_encoding={"name": "default", "separator": "."},
                    config={"write_empty_chunks": True},
                )
        return self._arrays[name]
