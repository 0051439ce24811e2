"""The vectors of a part as float32 tensors on a device, whatever their stored encoding.

Legend: R rows of a chunk, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import UsageError
from ghoststore.store import Part
from ghoststore.store.part.encoding import Groups, multiply
from ghoststore.store.spans.layout import CRC_BYTES
from ghoststore.store.spans.reader import Chunk, chunk_numbers, read_chunk, stream

DECODED_BYTES = 32 << 20
"""Most bytes of rows that are decoded at once: a chunk of one-bit rows has 32 times its own bytes as float32."""
DECODED_ON_GPU = 16 * DECODED_BYTES
"""The same on a GPU, which waits for the host between one lot and the next."""


@dataclass(frozen=True, slots=True)
class VectorChunk:
    """Rows ``start`` to ``stop`` of a part. Valid only until the stream gives the next chunk, which reuses
    the memory.
    """

    start: int
    stop: int
    rows_RD: Tensor
    """(R, D) float32, on the device."""


def _as_stored(stored: Tensor) -> Tensor:
    return stored


def _bfloat16(bits: Tensor) -> Tensor:
    return bits.view(torch.bfloat16)


def _signs(bits: Tensor) -> Tensor:
    """(R, columns) uint8 to (R, 8 · columns) int8: 1 for a bit, -1 for none, the lowest bit first."""
    if not bits.is_cuda:
        signs: NDArray[np.int8] = np.unpackbits(bits.numpy(), axis=1, bitorder="little").view(np.int8)
        signs *= 2
        signs -= 1
        return torch.from_numpy(signs)
    byte = np.arange(256, dtype=np.uint8)[:, None]
    table = (np.unpackbits(byte, axis=1, bitorder="little").astype(np.int8) * 2 - 1).view(np.int64)
    eights = torch.from_numpy(table.ravel()).to(bits.device).index_select(0, bits.flatten().int())
    return eights.view(torch.int8).view(len(bits), -1)


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": _as_stored,
    "float16": _as_stored,
    "bfloat16": _bfloat16,
    "int8": _as_stored,
    "onebit": _signs,
}
"""For each encoding, what ``Encoding.numbers`` does, on the device: stored numbers to (R, D or more) in a dtype that
float32 holds exactly."""


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows of a part as they lie in the store, on a device."""

    dtype: str
    """The name of their encoding."""
    stored: Tensor
    """(R, columns)."""
    scale_RG: Tensor | None
    """(R, G) float32; None in encodings without scales."""
    groups: Groups

    def __len__(self) -> int:
        return len(self.stored)

    def between(self, first: int, last: int) -> StoredRows:
        """The rows from ``first`` to ``last``, as a view."""
        scale_RG = None if self.scale_RG is None else self.scale_RG[first:last]
        return StoredRows(self.dtype, self.stored[first:last], scale_RG, self.groups)

    def decoded(self, chosen: slice | Tensor, spare: Tensor | None = None) -> Tensor:
        """(rows, D) float32: the ``chosen`` rows, the same bits everywhere. A view of those that are float32.

        Others are written into the first rows of ``spare``, or into new memory.
        """
        rows_RD = NUMBERS[self.dtype](self.stored[chosen])
        if rows_RD.dtype != torch.float32:
            shape = (len(rows_RD), self.groups[-1][2])
            target = torch.empty(shape, device=rows_RD.device) if spare is None else spare[: shape[0]]
            rows_RD = target.copy_(rows_RD[:, : shape[1]])
        if self.scale_RG is not None:
            scale_RG, width = self.scale_RG[chosen].to(rows_RD.device), self.groups[0][2]
            if all(stop - start == width for _, start, stop in self.groups):  # as usual: all at once
                rows_RD.view(len(rows_RD), -1, width).mul_(scale_RG.unsqueeze(2))
            else:
                multiply(rows_RD, scale_RG, self.groups)
        return rows_RD


class PartVectors:
    """Reads the vectors of ``part`` as float32 tensors on ``device``, and checks every checksum."""

    def __init__(self, part: Part, device: str | torch.device = "cpu") -> None:
        self.part = part
        self.device = torch.device(device)

    def stream(self, spans: list[int] | None = None) -> Iterator[VectorChunk]:
        """The chunks of ``spans`` (default: all committed ones), in order. Memory does not depend on the part's size.

        CorruptError for a damaged chunk.
        """
        layout, scale_of = self.part.layout, Scales(self.part)
        most = max(1, (DECODED_ON_GPU if self.device.type == "cuda" else DECODED_BYTES) // (4 * layout.dimension))
        spare = torch.empty(0)
        for chunk, stored in self._chunks(spans):
            rows = StoredRows(layout.dtype, stored, scale_of(chunk.start, chunk.stop), self.part.groups)
            # Stored as float32, a chunk is the rows: it is not cut.
            step = len(stored) if stored.dtype == torch.float32 else min(most, len(stored))
            if stored.dtype != torch.float32 and not spare.numel():
                spare = torch.empty(min(most, layout.chunk_rows), layout.dimension, device=self.device)
            for first in range(0, len(stored), max(1, step)):
                rows_RD = rows.decoded(slice(first, first + step), spare)
                start = chunk.start + first
                yield VectorChunk(start, start + len(rows_RD), rows_RD)

    def _chunks(self, spans: list[int] | None) -> Iterator[tuple[Chunk, Tensor]]:
        """Chunks with their stored numbers on the device."""
        chunks = stream(self.part, "vectors", spans)
        if self.device.type == "cuda":
            return on_device(chunks, self.device)
        return ((chunk, torch.from_numpy(chunk.data)) for chunk in chunks)

    def gather(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """(rows, D) float32 on the device, in the order of ``rows``, which may repeat. Reads whole spans.

        UsageError for a row that is not committed, CorruptError for a damaged chunk.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        vectors_RD = torch.empty(len(wanted), self.part.layout.dimension, device=self.device)
        span_of = wanted // self.part.layout.span_rows
        spans = [int(span) for span in np.unique(span_of)]
        missing = sorted(set(spans) - set(self.part.spans))
        if missing:
            raise UsageError(f"rows of span {missing[0]} of part {self.part.name!r} are not committed")
        for chunk in self.stream(spans):
            (places,) = np.nonzero((wanted >= chunk.start) & (wanted < chunk.stop))
            if len(places):
                vectors_RD[torch.from_numpy(places)] = chunk.rows_RD[torch.from_numpy(wanted[places] - chunk.start)]
        return vectors_RD


class SpanColumn:
    """An array of a part with one chunk a span, read span by span. It is described once: a part makes the descriptions
    of all its arrays anew whenever one is asked for.
    """

    def __init__(self, part: Part, name: str) -> None:
        self._part, self._spec = part, part.spec(name)
        members = part.members if len(part.members) > 1 else ()
        self._of_members = {member.name: SpanColumn(member, name) for member in members}

    def __call__(self, span: int) -> NDArray[Any]:
        """The rows of a committed span, checked, in the stored dtype. CorruptError for a damaged chunk."""
        if self._of_members:
            part, own = self._part.home(span)
            return self._part.seen(self._spec.name, span, self._of_members[part.name](own))
        start, stop = self._part.layout.span_of(span)
        (key,) = self._part.layout.chunk_keys(self._spec, span)
        path = self._part.path / key
        return chunk_numbers(
            read_chunk(path, self._spec.chunk_bytes + CRC_BYTES, within=self._part.path), self._spec, stop - start
        )


class Scales:
    """The scales of rows. Holds one span at a time."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._read = SpanColumn(part, "scale") if part.encoding.scaled else None
        self._span = -1
        self._scale: NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)

    def __call__(self, start: int, stop: int) -> Tensor | None:
        """(R, G): the scales of the rows ``start`` to ``stop``, of one span; None in encodings without scales."""
        if self._read is None:
            return None
        span = start // self._part.layout.span_rows
        if span != self._span:
            self._span, self._scale = span, self._read(span)
        first, _ = self._part.layout.span_of(span)
        return torch.from_numpy(self._scale[start - first : stop - first])


def side_by_side(sources: Sequence[PartVectors], spans: list[int]) -> Iterator[list[VectorChunk]]:
    """Chunks of several parts that have the same rows, cut so that the chunks of one step cover the same rows."""
    streams = [source.stream(spans) for source in sources]
    current: list[VectorChunk] = []
    try:
        for first in streams[0]:
            current[:1] = [first]
            start = first.start
            while start < first.stop:
                for place, chunks in enumerate(streams[1:], 1):
                    if place >= len(current):
                        current.append(next(chunks))
                    elif current[place].stop <= start:
                        current[place] = next(chunks)
                stop = min(chunk.stop for chunk in current)
                yield [
                    VectorChunk(start, stop, chunk.rows_RD[start - chunk.start : stop - chunk.start])
                    for chunk in current
                ]
                start = stop
    finally:
        for stream_of_part in streams:
            stream_of_part.close()  # type: ignore[attr-defined]


@dataclass(slots=True)
class _Slot:
    """One of the two buffers on the device, with the pinned memory that feeds it."""

    host: Tensor = field(default_factory=lambda: torch.empty(0))
    device: Tensor = field(default_factory=lambda: torch.empty(0))
    copied: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    """Fires when the copy has ended: the host buffer is free, the device buffer is filled."""
    used: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    """Fires when the computation that reads the device buffer has ended."""

    def fit(self, data: Tensor, device: torch.device) -> None:
        """Allocate buffers for chunks like ``data``, unless those that exist fit. The first chunk is the largest."""
        if self.host.dtype != data.dtype or self.host.shape[1:] != data.shape[1:] or len(self.host) < len(data):
            self.host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
            self.device = torch.empty(data.shape, dtype=data.dtype, device=device)


def on_device(chunks: Iterable[Chunk], device: torch.device) -> Iterator[tuple[Chunk, Tensor]]:
    """Each chunk with its numbers on a CUDA ``device``. They are valid until the next chunk is taken.

    A chunk is copied while the one before it is in use, so copying costs no extra time, and a part may be larger than
    the memory of the GPU. ``chunk.data``, on the host, must not be used any more.
    """
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    slots = (_Slot(), _Slot())
    waiting: tuple[Chunk, Tensor, _Slot] | None = None
    for number, chunk in enumerate(chunks):
        slot = slots[number % 2]
        data = torch.from_numpy(chunk.data)
        slot.copied.synchronize()
        slot.fit(data, device)
        slot.host[: len(data)].copy_(data)
        copies.wait_event(slot.used)
        with torch.cuda.stream(copies):
            numbers = slot.device[: len(data)].copy_(slot.host[: len(data)], non_blocking=True)
            slot.copied.record(copies)
        if waiting is not None:
            yield from _while_in_use(*waiting, device)
        waiting = (chunk, numbers, slot)
    if waiting is not None:
        yield from _while_in_use(*waiting, device)


def _while_in_use(chunk: Chunk, numbers: Tensor, slot: _Slot, device: torch.device) -> Iterator[tuple[Chunk, Tensor]]:
    current = torch.cuda.current_stream(device)
    current.wait_event(slot.copied)
    yield chunk, numbers
    slot.used.record(current)
