"""The processes of one training run: one, or those that ``torchrun`` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ghoststore.errors import UsageError

LONGEST_WAIT = timedelta(hours=12)
"""While one rank tokenizes or writes, the others wait."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every rank is here."""
        if self.count > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over ranks, on every rank."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def stacked(self, values: Tensor) -> Tensor:
        """(ranks, …): the values of every rank, on every rank."""
        if self.count == 1:
            return values.unsqueeze(0)
        found = [torch.empty_like(values) for _ in range(self.count)]
        dist.all_gather(found, values.contiguous())
        return torch.stack(found)


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, str]]:
    """(ranks, this rank's device): under ``torchrun`` a process group (gloo on a CPU, nccl on CUDA), else alone.

    A process group that exists already is used and left.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size()), _own(device)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Ranks(), device
        return
    own = _own(device)
    kind = torch.device(own).type
    if kind == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=LONGEST_WAIT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()), own
    finally:
        dist.destroy_process_group()


def _own(device: str) -> str:
    """Each rank of a machine takes a CUDA device of its own."""
    if torch.device(device).type != "cuda":
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise UsageError(f"rank {local} of this machine has no CUDA device: there are {torch.cuda.device_count()}")
    return f"cuda:{local}"
