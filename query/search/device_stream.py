"""Chunks on a CUDA device, each copied there while the one before is in use: the copy costs no time of its own, and a
part may be larger than the card.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghoststore.store.spans.reader import Chunk


@dataclass(slots=True)
class _Slot:
    """One of the two buffers on the device, with the pinned memory that feeds it."""

    host: Tensor = field(default_factory=lambda: torch.empty(0))
    device: Tensor = field(default_factory=lambda: torch.empty(0))
    copied: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    """The copy has ended: the host buffer is free, the device buffer is filled."""
    used: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    """What was computed from the device buffer has ended."""

    def fit(self, data: Tensor, device: torch.device) -> None:
        """Buffers for chunks like ``data``; the first is the largest."""
        if self.host.dtype != data.dtype or self.host.shape[1:] != data.shape[1:] or len(self.host) < len(data):
            self.host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
            self.device = torch.empty(data.shape, dtype=data.dtype, device=device)


def on_device(chunks: Iterable[Chunk], device: torch.device) -> Iterator[tuple[Chunk, Tensor]]:
    """Each chunk with its numbers on ``device``, valid until the next is asked for. The chunk's own are not."""
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
            there = slot.device[: len(data)].copy_(slot.host[: len(data)], non_blocking=True)
            slot.copied.record(copies)
        if waiting is not None:
            yield from _in_use(*waiting, device)
        waiting = (chunk, there, slot)
    if waiting is not None:
        yield from _in_use(*waiting, device)


def _in_use(chunk: Chunk, there: Tensor, slot: _Slot, device: torch.device) -> Iterator[tuple[Chunk, Tensor]]:
    current = torch.cuda.current_stream(device)
    current.wait_event(slot.copied)
    yield chunk, there
    slot.used.record(current)
