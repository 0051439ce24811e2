"""A batch of a loop, its size, and the loop's rank in a mapping of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import UsageError
from indexer.dotprod.segments import Segments
from indexer.session.ranks import Ranks


def first_tensor(batch: Any) -> Tensor:
    """The first tensor of a batch, whose first axis is the samples. UsageError if it has none."""
    first = batch
    while not isinstance(first, Tensor):
        if isinstance(first, Mapping) and first:
            first = next(iter(first.values()))
        elif isinstance(first, (list, tuple)) and first:
            first = first[0]
        else:
            raise UsageError(f"a batch holds tensors whose first axis is the samples; found a {type(batch).__name__}")
    if not first.dim():
        raise UsageError("a batch holds tensors whose first axis is the samples; found one number")
    return first


def size_of(batch: Any) -> int:
    """Samples of a batch."""
    return len(first_tensor(batch))


def tokens_of(batch: Any) -> int:
    """Positions of a batch of token ids; 0 for anything else."""
    first = first_tensor(batch)
    return 0 if first.is_floating_point() or first.dim() != 2 else first.numel()


def ranks_of(info: Mapping[str, Any] | None) -> Ranks:
    """This rank among those of ``info`` (``rank`` and ``world_size``, or ``ddp_rank`` and ``ddp_world_size``).

    UsageError unless torch.distributed says the same.
    """
    here = Ranks.here()
    if info is None:
        return here
    if not info.get("ddp", True):
        stated = Ranks()
    else:
        forms = (("rank", "world_size"), ("ddp_rank", "ddp_world_size"))
        names = next((form for form in forms if set(form) <= set(info)), None)
        if names is None:
            raise UsageError(f"`ddp_info` needs rank and world_size; it has {sorted(map(str, info))}")
        stated = Ranks(int(info[names[0]]), int(info[names[1]]))
    if stated != here:
        raise UsageError(
            f"`ddp_info` says rank {stated.rank} of {stated.count}; torch.distributed says rank {here.rank} of "
            f"{here.count}" + ("" if here.count > 1 else " (init_process_group() comes first)")
        )
    return stated


@dataclass(slots=True)
class AttachedBatch:
    """The micro-batch that comes next, before its forward pass is prepared."""

    size: int
    """Samples."""
    rows: int
    """Rows of the forward pass: fewer where they are packed."""
    tokens: int
    segments: Segments | None
    places: NDArray[np.int64] | None = None
    """(size,): of its samples in the training set."""

    @classmethod
    def of(cls, batch: Any, sample_RT: Tensor | None) -> AttachedBatch:
        """That of ``batch``; ``sample_RT`` is the number of the sample of each position of packed rows."""
        segments = None if sample_RT is None else Segments.of(sample_RT, int(sample_RT.max()) + 1)
        rows = size_of(batch)
        if segments is not None and segments.rows != rows:
            raise UsageError(f"`segments` are of {segments.rows} packed rows; the batch has {rows}")
        return cls(rows if segments is None else segments.count, rows, tokens_of(batch), segments)
