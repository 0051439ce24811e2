"""Streams committed steps of a run in order, from the chunks of its spans and the journals of open spans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import CorruptError
from ghoststore.store.run.journal import Journal, read_arrays
from ghoststore.store.run.journal_files import opened
from ghoststore.store.run.ranges import Steps, inside
from ghoststore.store.spans.commits import commit_path
from ghoststore.store.spans.layout import CRC_BYTES, ArraySpec, chunk_keys
from ghoststore.store.spans.reader import NOTHING, chunk_numbers, read_chunk

if TYPE_CHECKING:
    from ghoststore.store.run.run import Run

PIECE_BYTES = 1 << 20
"""Most bytes of the widest array of a piece, unless one step has more."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Steps ``start`` to ``stop`` of several arrays, by name; of an array of some steps only, those among them.

    Valid until the next piece is read.
    """

    start: int
    stop: int
    data: dict[str, NDArray[Any]]


def side_by_side(run: Run, names: Sequence[str], ranges: Sequence[Steps]) -> Iterator[Pieces]:
    """Stream several arrays over ``ranges`` of committed steps, in order. Every checksum is checked.

    Memory: one chunk of each array, or one save interval, whatever the length of the run. ``ranges`` may begin and end
    anywhere, also for an array of some steps only.
    """
    specs = [run.spec(name) for name in dict.fromkeys(names)]
    committed = set(run.spans)
    for start, stop in ranges:
        while start < stop:
            span = start // run.layout.span_steps
            end = min(stop, run.layout.span_of(span)[1])
            if span in committed:
                yield from _of_chunks(run, specs, (start, end))
            else:
                yield from _of_journal(run, run.journals[span], specs, (start, end))
            start = end


def _of_chunks(run: Run, specs: Sequence[ArraySpec], steps: Steps) -> Iterator[Pieces]:
    """Stream steps of one committed span."""
    start, stop = steps
    buffers = {spec.name: NOTHING for spec in specs}  # made when the size of a chunk is checked
    chunks: dict[str, tuple[int, NDArray[Any]]] = {}
    most = _steps_of_a_piece(specs)
    while start < stop:
        for spec in specs:
            covered = spec.chunk_rows * spec.every
            if spec.name in chunks and chunks[spec.name][0] + covered > start:
                continue
            first = start - start % covered
            path = run.path / chunk_keys(spec, first, first + 1)[0]
            buffer = read_chunk(path, spec.chunk_bytes + CRC_BYTES, buffers[spec.name], run.path)
            buffers[spec.name] = buffer
            chunks[spec.name] = (first, chunk_numbers(buffer, spec, min(spec.chunk_rows, spec.count(stop - first))))
        ends = (chunks[spec.name][0] + spec.chunk_rows * spec.every for spec in specs)
        end = min(start + most, stop, *ends)
        yield Pieces(start, end, {spec.name: _cut(spec, *chunks[spec.name], start, end) for spec in specs})
        start = end


def _cut(spec: ArraySpec, first: int, data: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
    """Steps ``start`` to ``stop`` of ``data``, which begins with step ``first``."""
    return data[slice(*spec.entries(start - first, stop - first))]


def _of_journal(run: Run, journal: Journal, specs: Sequence[ArraySpec], steps: Steps) -> Iterator[Pieces]:
    """Stream steps of a span that was open when the run was opened.

    Its journal is removed when it is committed, in an object store entry by entry, maybe while it is read: the steps
    that are left are in chunks then.
    """
    names, left = {spec.name for spec in specs}, steps[0]
    entries = sorted(
        (entry for entry in journal.entries if inside([(entry.start, entry.stop)], steps)), key=lambda e: e.start
    )
    try:
        with opened(journal.path) as handle:
            for batch in _batches(entries, _steps_of_a_piece(specs)):
                parts = [read_arrays(handle, journal, entry, run.layout, names) for entry in batch]
                data = {name: np.concatenate([arrays[name] for arrays in parts]) for name in names}
                start, stop = max(batch[0].start, steps[0]), min(batch[-1].stop, steps[1])
                piece = {spec.name: _cut(spec, batch[0].start, data[spec.name], start, stop) for spec in specs}
                yield Pieces(start, stop, piece)
                left = stop
    except (FileNotFoundError, CorruptError) as error:  # of some entries alone the bytes are not those of the journal
        if not commit_path(run.path, journal.span).exists():
            if isinstance(error, CorruptError):
                raise
            raise CorruptError(f"{journal.path} is missing, and its span is not committed") from None
        yield from _of_chunks(run, specs, (left, steps[1]))


def _batches(entries: Sequence[Any], most: int) -> Iterator[list[Any]]:
    """Batches of adjacent entries, of at most about ``most`` steps."""
    batch: list[Any] = []
    for entry in entries:
        if batch and (batch[-1].stop != entry.start or entry.stop - batch[0].start > most):
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def _steps_of_a_piece(specs: Sequence[ArraySpec]) -> int:
    return max(1, min(PIECE_BYTES * spec.every // (spec.width * int(spec.dtype.itemsize)) for spec in specs))


def check_rows(run: Run, piece: Pieces) -> None:
    """CorruptError if ``piece`` names a row that the row table does not have."""
    sample = piece.data["sample"]
    if sample.size and int(sample.max()) >= run.layout.rows:
        raise CorruptError(
            f"{run.path / 'sample'}: steps {piece.start} to {piece.stop} name row {int(sample.max())}; the row table "
            f"has {run.layout.rows}"
        )
