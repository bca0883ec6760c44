"""The processes that share every batch of a training, each with a GPU of its own, as torchrun starts them.

All of them draw the same batches and keep the same weights; each computes its share of the rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

STALL = timedelta(hours=1)
"""How long a process waits in a step for the others, which may still read images, or write a checkpoint."""
IDLE = timedelta(days=30)
"""How long it waits for the first to say what comes next."""


@dataclass(frozen=True)
class Team:
    """The processes that share a batch, of which this is one.

    Attributes:
        rank: this process's number; the first, 0, leads.
        words: group of the processes on the CPU, for what the leader says.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    words: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, begin: int, end: int) -> tuple[int, int]:
        """Return where this process's part of the rows from ``begin`` to ``end`` begins and ends; it may have none."""
        count = end - begin
        return begin + count * self.rank // self.size, begin + count * (self.rank + 1) // self.size

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors of one type by their sums over all processes, in one exchange."""
        if self.size > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.all_reduce(flat)
            for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(total.view(tensor.shape))

    def any(self, flag: bool) -> bool:
        """Say whether a flag is up in any process."""
        if self.size > 1:
            raised = torch.tensor(float(flag), device=self.device)
            dist.all_reduce(raised)
            return bool(raised)
        return flag

    def word(self, number: int = 0) -> int:
        """Return the number that the leader gives here, when it does."""
        if self.size > 1:
            said = torch.tensor(number)
            dist.broadcast(said, 0, group=self.words)
            return int(said)
        return number


@contextmanager
def team(device: torch.device) -> Iterator[Team]:
    """Join the processes that torchrun started, each with a GPU of its own; without torchrun there is one.

    If this fails in one process, torchrun ends the others.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Team(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=STALL)
    words: Any = dist.new_group(backend="gloo", timeout=IDLE)
    yield Team(device, dist.get_rank(), size, words)
    # Not after a failure, when it would wait for what the others cannot end.
    dist.barrier(words)
    dist.destroy_process_group()
