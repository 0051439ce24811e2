"""Stored rows of parts, read and handed out unit by unit, and threads that each take a span at a time.

A thread reads a unit into memory that it uses over and over, checks it and multiplies it, while it is in the
processor's cache: one pass. Threads divide the spans; within a thread torch computes on that thread alone.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.store import Part
from ghoststore.store.base.object_path import ObjectPath
from ghoststore.store.base.objects import IN_FLIGHT
from ghoststore.store.spans.layout import CRC_BYTES
from ghoststore.store.spans.reader import ReadAhead, chunk_numbers, chunks_of, read_chunk
from query.search.products import Products
from query.search.vectors import Scales, StoredRows

UNIT_BYTES = 4 << 20
"""Bytes of stored rows to aim for in a unit; at least one chunk."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows ``start`` to ``stop`` of each part, on the CPU. Valid until the thread that read it takes the next."""

    start: int
    stop: int
    rows: list[StoredRows]
    products: list[Tensor]
    """(R, Q) float32 for each part, if products were asked for."""


class Units:
    """Reads the same rows of one or more ``parts``, whose spans are the same, and multiplies them with ``products``,
    one for each part, if there are any. Threads may share it.
    """

    def __init__(self, parts: Sequence[Part], products: Sequence[Products] = ()) -> None:
        self._parts, self._products = parts, products
        self._groups = [part.groups for part in parts]
        self._specs = [part.spec("vectors") for part in parts]
        # Chunks of every part end where a unit ends: their rows divide those of a span.
        least = math.lcm(*(spec.chunk_rows for spec in self._specs))
        widest = max(spec.chunk_bytes // spec.chunk_rows for spec in self._specs)
        self._rows = least * max(1, UNIT_BYTES // (least * widest))
        self._own = threading.local()
        self._members: dict[str, Units] = {}
        if len(parts[0].members) > 1:  # of every part as many, which may be cut into other chunks
            for same in zip(*(part.members for part in parts), strict=True):
                self._members[same[0].name] = Units(same, products)

    def of_span(self, span: int) -> Iterator[Unit]:
        """The units of a committed span, in order. CorruptError for a damaged chunk."""
        first, last = self._parts[0].layout.span_of(span)
        if self._members:
            part, own = self._parts[0].home(span)
            shift = first - part.layout.span_of(own)[0]
            for unit in self._members[part.name].of_span(own):
                yield replace(unit, start=unit.start + shift, stop=unit.stop + shift)
            return
        for start in range(first, last, self._rows):
            stop = min(start + self._rows, last)
            read = [self._read(place, start, stop) for place in range(len(self._parts))]
            products = [products_RQ for _, products_RQ in read if products_RQ is not None]
            yield Unit(start, stop, [rows for rows, _ in read], products)

    def announced(self, spans: Sequence[int]) -> Iterator[int]:
        """``spans``, each after the system was told that its chunks are read soon: a disk reads them meanwhile.

        Those of an object store are asked for some spans before: as many as keep all its requests under way.
        """
        if any(isinstance(part.path, ObjectPath) for part in self._parts):
            yield from self._requested(spans)
            return
        for span in spans:
            if self._members:
                home, own = self._parts[0].home(span)
                deque(self._members[home.name].announced([own]), maxlen=0)
                yield span
                continue
            for part, spec in zip(self._parts, self._specs, strict=True):
                for path, _, _ in chunks_of(part, spec, [span]):
                    _announce(path)
            yield span

    def _requested(self, spans: Sequence[int]) -> Iterator[int]:
        """:meth:`announced` of an object store."""
        waiting: deque[tuple[int, int]] = deque()
        chunks, complete, ahead = 0, False, ReadAhead(self._parts[0].warm)
        try:
            for span in spans:
                before = chunks
                for united in self._parts:
                    part, own = united.home(span)
                    part.ahead = ahead
                    for name in ("status", "norm", *["scale"] * part.encoding.scaled, "vectors"):
                        spec = part.spec(name)
                        for path, _, _ in chunks_of(part, spec, [own]):
                            ahead.announce(path, spec.chunk_bytes + CRC_BYTES, part.path)
                            chunks += name == "vectors"
                waiting.append((span, chunks - before))
                while chunks >= IN_FLIGHT:
                    done, count = waiting.popleft()
                    chunks -= count
                    yield done
            yield from (span for span, _ in waiting)
            complete = True
        finally:
            ahead.close(taken=complete)

    def _read(self, place: int, start: int, stop: int) -> tuple[StoredRows, Tensor | None]:
        """The rows of the part at ``place``, in this thread's memory, and their products."""
        part, spec = self._parts[place], self._specs[place]
        size = spec.chunk_bytes
        span = start // part.layout.span_rows
        files = [path for path, begin, _ in chunks_of(part, spec, [span]) if start <= begin < stop]
        memory, scales = self._own_of(place, len(files) * size + CRC_BYTES)
        numbers = torch.from_numpy(chunk_numbers(memory, spec, stop - start))
        rows = StoredRows(part.layout.dtype, numbers, scales(start, stop), self._groups[place])
        products = self._products[place] if self._products else None
        at_once = spec.chunk_rows * max(1, products.bytes_at_once // size if products else len(files))
        multiplied: list[Tensor] = []
        read = read_chunk if part.ahead is None else part.ahead.take
        for number, path in enumerate(files):
            # Chunks come to lie one after the other: each overwrites the checksum of the one before it.
            read(path, size + CRC_BYTES, memory[number * size : (number + 1) * size + CRC_BYTES], part.path)
            there = min((number + 1) * spec.chunk_rows, len(rows))
            first = len(multiplied) * at_once
            if products and (there - first >= at_once or there == len(rows)):  # while they are in the cache
                multiplied.append(products.of(rows.between(first, there)))
        return rows, torch.cat(multiplied) if products else None

    def _own_of(self, place: int, size: int) -> tuple[NDArray[np.uint8], Scales]:
        """This thread's memory, of at least ``size`` bytes, and reader of scales for the part at ``place``."""
        own: dict[int, tuple[NDArray[np.uint8], Scales]] = self._own.__dict__.setdefault("by_place", {})
        if place not in own:
            own[place] = np.empty(size, dtype=np.uint8), Scales(self._parts[place])
        if len(own[place][0]) < size:
            own[place] = np.empty(size, dtype=np.uint8), own[place][1]
        memory, scales = own[place]
        return memory[:size], scales


def _announce(path: Path) -> None:
    """Ask the system to read a file ahead. Where it cannot, nothing happens: reading says what is wrong."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)


def on_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``work(item)`` of each item, in order, on as many threads as torch has; each computes on one.

    An error of ``work`` is raised here. Few results wait to be taken: memory does not grow with ``items``.
    """
    threads = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, "ghoststore-search", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # threads to come start with what was set last, on whichever thread
