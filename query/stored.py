"""The vectors of a part as tensors on a device, whatever they are stored as.

Legend: R rows of a chunk, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import UsageError
from ghoststore.store import Part
from ghoststore.store.reader import stream


@dataclass(frozen=True, slots=True)
class Vectors:
    """Rows ``start`` to ``stop`` of a part. Valid until the next are asked for."""

    start: int
    stop: int
    rows_RD: Tensor
    """(R, D) float32, on the device."""


def as_tensor(data: NDArray[Any], dtype: str) -> Tensor:
    """Stored numbers as a tensor that shares their memory; ``dtype`` is the manifest's."""
    if dtype == "bfloat16":
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)


class StoredRows:
    """Reads the vectors of ``part`` as float32 tensors on ``device``, every checksum checked."""

    def __init__(self, part: Part, device: str | torch.device = "cpu") -> None:
        self.part = part
        self.device = torch.device(device)

    def stream(self, spans: list[int] | None = None) -> Iterator[Vectors]:
        """Chunks of ``spans`` (default: every committed one), in order; memory does not depend on the part's size."""
        spare = torch.empty(0)
        for chunk in stream(self.part, "vectors", spans):
            stored_RD = as_tensor(chunk.data, self.part.layout.dtype).to(self.device)
            if stored_RD.dtype != torch.float32:
                if not spare.numel():
                    spare = torch.empty(self.part.layout.chunk_rows, self.part.layout.dimension, device=self.device)
                stored_RD = spare[: len(stored_RD)].copy_(stored_RD)
            yield Vectors(chunk.start, chunk.stop, stored_RD)

    def gather(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """(rows, D) float32 on the device, in the order of ``rows``, which may repeat. Reads the spans they lie in.

        UsageError for a row that is not committed, CorruptError for a damaged chunk.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        found = torch.empty(len(wanted), self.part.layout.dimension, device=self.device)
        span_of = wanted // self.part.layout.span_rows
        spans = [int(span) for span in np.unique(span_of)]
        missing = sorted(set(spans) - set(self.part.spans))
        if missing:
            raise UsageError(f"rows of span {missing[0]} of part {self.part.name!r} are not committed")
        for chunk in self.stream(spans):
            (mine,) = np.nonzero((wanted >= chunk.start) & (wanted < chunk.stop))
            if len(mine):
                found[torch.from_numpy(mine)] = chunk.rows_RD[torch.from_numpy(wanted[mine] - chunk.start)]
        return found


def side_by_side(sources: Sequence[StoredRows], spans: list[int]) -> Iterator[list[Vectors]]:
    """Chunks of several parts of the same rows, cut so that each piece has the same rows of all of them."""
    streams = [source.stream(spans) for source in sources]
    held: list[Vectors] = []
    try:
        for first in streams[0]:
            held[:1] = [first]
            start = first.start
            while start < first.stop:
                for place, other in enumerate(streams[1:], 1):
                    if place >= len(held):
                        held.append(next(other))
                    elif held[place].stop <= start:
                        held[place] = next(other)
                stop = min(one.stop for one in held)
                yield [Vectors(start, stop, one.rows_RD[start - one.start : stop - one.start]) for one in held]
                start = stop
    finally:
        for stream_of_part in streams:
            stream_of_part.close()  # type: ignore[attr-defined]
