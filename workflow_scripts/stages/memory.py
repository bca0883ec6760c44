"""Batches that become smaller when the GPU's memory does not suffice. No result depends on the size of a batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from tqdm import tqdm

Out = TypeVar("Out")


class Batch:
    """The size of the batches of one job: as configured, and halved whenever memory runs out.

    Attributes:
        size: rows per batch.
    """

    def __init__(self, size: int):
        self.size = size

    def shrink(self, rows: int) -> None:
        """Take smaller batches than one of so many rows from now on, and give unused memory back to the GPU."""
        self.size = (rows + 1) // 2
        tqdm.write(f"Out of GPU memory with a batch of {rows}: going on with {self.size}.", file=sys.stderr)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def over(self, rows: Any, function: Callable[[Any], Out]) -> Iterator[Out]:
        """Apply a function to batches of rows, and yield what it returns, in order.

        Raises:
            torch.OutOfMemoryError: if memory does not suffice for one row.
        """
        start = 0
        while start < len(rows):
            part = rows[start : start + self.size]
            try:
                made = function(part)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
            else:
                start += len(part)
                yield made
                continue
            self.shrink(len(part))  # here, where the error no longer keeps the tensors of its frames
