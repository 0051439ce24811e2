"""The journal of an open span: a file of its save intervals, one after the other, until the span is full.

An entry is a header, the numbers of its steps array by array, and a trailer. The trailer is written when all before it
is on the disk. So an entry without a trailer was never committed, and one with a trailer is committed, or damaged.
``docs/format.md`` specifies every byte.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import CorruptError
from ghoststore.store.base.object_path import ObjectPath
from ghoststore.store.base.opening import names_in
from ghoststore.store.base.records import json_digest
from ghoststore.store.run.journal_files import JournalBytes, append, opened
from ghoststore.store.run.layout import RunLayout
from ghoststore.store.run.ranges import Steps, merged, without
from ghoststore.store.run.skipped import SKIPPED
from ghoststore.store.spans.commits import commit_path
from ghoststore.store.spans.layout import ArraySpec
from ghoststore.store.spans.soundness import damaged

if TYPE_CHECKING:
    from ghoststore.store.run.run import Run

FOLDER = "journal"
_NAME = re.compile(r"(\d{8})\.log", re.ASCII)
MAGIC = b"gs-steps"
HEADER = struct.Struct("<8s7q32sI")
"""MAGIC; first step, one past the last, bytes of the entry, tokens, and the samples that are scored, unscored, not
finite; the trailer of the entry before; crc32c of all this."""
STATUSES = ("scored", "unscored", "not_finite")
TRAILER_BYTES = 32
"""SHA-256 of the header and the arrays."""
CRC_BYTES = 4
ADVICE = "`ghoststore verify` lists what is damaged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A committed save interval of a journal."""

    start: int
    stop: int
    offset: int
    """Byte of the file at which the entry begins."""
    size: int
    """Bytes of the entry, with header and trailer."""
    tokens: int
    statuses: dict[str, int]
    digest: bytes
    """The trailer of the entry."""


@dataclass(slots=True, kw_only=True)
class Journal:
    """The committed entries of a span's journal, by their headers. The arrays are checked when they are read."""

    path: Path
    span: int
    entries: list[Entry] = field(default_factory=list)
    """In the order in which they were appended."""
    starts: set[int] = field(default_factory=set)
    """First steps of the entries."""
    length: int = 0
    """Number of steps of all entries."""
    problem: str | None = None
    """What is damaged after the entries; None if nothing is."""

    def add(self, entry: Entry) -> None:
        """Append an entry that was read or written."""
        self.entries.append(entry)
        self.starts.add(entry.start)
        self.length += entry.stop - entry.start

    @property
    def end(self) -> int:
        """One past the last committed byte."""
        return self.entries[-1].offset + self.entries[-1].size if self.entries else 0

    @property
    def steps(self) -> list[Steps]:
        """The steps of its entries."""
        return merged((entry.start, entry.stop) for entry in self.entries)

    def check(self) -> None:
        """CorruptError if something is damaged after the entries."""
        if self.problem is not None:
            raise self.damaged(self.problem)

    def damaged(self, problem: str) -> CorruptError:
        """The error for a damaged journal."""
        return CorruptError(f"{self.path} is damaged: {problem}; {ADVICE}")


def journal_path(folder: Path, span: int) -> Path:
    """The path of the journal of ``span``."""
    return folder / FOLDER / f"{span:08d}.log"


def first_link(run: Run, span: int) -> bytes:
    """The link of the first entry, in place of an earlier trailer: it ties a journal to one span of one run."""
    return hashlib.sha256(f"{json_digest(run.manifest)}:{span}".encode()).digest()


def entry_size(layout: RunLayout, steps: int) -> int:
    """Bytes of an entry of ``steps`` steps."""
    arrays = sum(spec.count(steps) * spec.width * int(spec.dtype.itemsize) + CRC_BYTES for spec in layout.arrays())
    return HEADER.size + arrays + TRAILER_BYTES


# Reading.


def read_journals(run: Run, known: Mapping[int, Journal] | None = None) -> dict[int, Journal]:
    """Read the journals of a run, by span, from where those of ``known`` end. Damage is in their ``problem``."""
    if run.layout.save_steps is None:
        return {}
    journals = {}
    for span in _journal_spans(run):
        journal = Journal(path=journal_path(run.path, span), span=span)
        for entry in known[span].entries if known is not None and span in known else ():
            journal.add(entry)
        if _read_on(run, journal):
            journals[span] = journal
    return journals


def _journal_spans(run: Run) -> list[int]:
    """As :func:`journal_spans`. CorruptError for a span that the run does not have."""
    try:
        spans = journal_spans(run.path)
    except (FileNotFoundError, NotADirectoryError):
        raise damaged(run, [(FOLDER, f"there is no {FOLDER} folder")]) from None
    if spans and spans[-1] >= run.layout.spans:
        file = journal_path(Path(), spans[-1]).as_posix()
        raise damaged(run, [(file, f"a journal of span {spans[-1]}, but there are {run.layout.spans} spans")])
    return spans


def journal_spans(folder: Path) -> list[int]:
    """The spans that have a journal in the run at ``folder`` now, in order."""
    try:
        names = names_in(folder / FOLDER)
    except FileNotFoundError:
        if isinstance(folder, ObjectPath):  # where a folder without objects does not exist
            return []
        raise
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def _read_on(run: Run, journal: Journal) -> bool:
    """Read further entries. Returns False if the journal was removed meanwhile: its span is committed."""
    try:
        with opened(journal.path) as handle:
            while (entry := _next_entry(run, journal, handle, handle.size)) is not None:
                journal.add(entry)
    except FileNotFoundError:
        return False
    except CorruptError as error:
        journal.problem = str(error)
    except OSError as error:
        journal.problem = f"it cannot be read ({error.strerror})"
    return True


def _next_entry(run: Run, journal: Journal, handle: JournalBytes, size: int) -> Entry | None:
    """Read the next entry. None if no more were committed, or if one is damaged: ``problem`` is set then."""
    layout, offset = run.layout, journal.end
    fields = header_at(handle, offset)
    if fields is None:
        # The entry was being written, unless it is finished.
        if size > offset if handle.whole else _is_any_finished(layout, journal.span, handle, offset, size):
            journal.problem = f"the header at byte {offset:,} is not what was written"
        return None
    _, start, stop, length, *_, previous, _ = fields
    entry_words = f"the entry at byte {offset:,}, of steps {start} to {stop}"
    if not 0 <= start < layout.steps or start % layout.interval or stop != min(start + layout.interval, layout.steps):
        journal.problem = f"{entry_words}, is no save interval"
    elif start // layout.span_steps != journal.span or start in journal.starts:
        journal.problem = f"{entry_words}, does not belong there"
    elif length != entry_size(layout, stop - start):
        journal.problem = f"{entry_words}, says that it has {length} bytes"
    elif not is_finished(handle, offset, length, size):
        if not handle.whole:
            return None
        journal.problem = f"{entry_words}, is not whole"
    elif previous != (journal.entries[-1].digest if journal.entries else first_link(run, journal.span)):
        journal.problem = f"{entry_words}, is not linked to what stands before it"
    if journal.problem is not None:
        return None
    return entry_of(handle, offset, fields)


def header_at(handle: JournalBytes, offset: int) -> tuple[Any, ...] | None:
    """The fields of the header at ``offset``; None if there is no intact header."""
    header = handle.read(HEADER.size, offset)
    if len(header) < HEADER.size or google_crc32c.value(header[:-CRC_BYTES]) != HEADER.unpack(header)[-1]:
        return None
    fields = HEADER.unpack(header)
    return fields if fields[0] == MAGIC else None


def entry_of(handle: JournalBytes, offset: int, fields: Sequence[Any]) -> Entry:
    """The entry at ``offset`` whose header has these ``fields``."""
    _, start, stop, length, tokens, *counts, _, _ = fields
    return Entry(
        start=start,
        stop=stop,
        offset=offset,
        size=length,
        tokens=tokens,
        statuses=dict(zip(STATUSES, counts, strict=True)),
        digest=handle.read(TRAILER_BYTES, offset + length - TRAILER_BYTES),
    )


def is_finished(handle: JournalBytes, offset: int, length: int, size: int) -> bool:
    """Whether the entry of ``length`` bytes at ``offset`` was committed: it has a trailer, or bytes follow it.

    After a power cut, bytes that were not flushed may read as zeros; no trailer is all zeros.
    """
    if size > offset + length:
        return True  # this entry was flushed before the next was written
    trailer = handle.read(TRAILER_BYTES, offset + length - TRAILER_BYTES)
    return len(trailer) == TRAILER_BYTES and any(trailer) and not _is_half(handle, offset, length, trailer)


def _is_half(handle: JournalBytes, offset: int, length: int, trailer: bytes) -> bool:
    """Whether ``trailer`` is the beginning or the end of the right trailer, and zeros otherwise.

    That happens if it lies across two blocks, and the power fails when one of them is on the disk. The entry itself was
    flushed before, and is whole. If only one bit differs, it is a flipped bit, not a power cut.
    """
    if trailer[0] and trailer[-1]:
        return False
    right = hashlib.sha256(handle.read(length - TRAILER_BYTES, offset)).digest()
    half = right.startswith(trailer.rstrip(b"\0")) or right.endswith(trailer.lstrip(b"\0"))
    return half and sum((a ^ b).bit_count() for a, b in zip(trailer, right, strict=True)) > 1


def _is_any_finished(layout: RunLayout, span: int, handle: JournalBytes, offset: int, size: int) -> bool:
    """Whether an entry at ``offset`` was committed, of whichever steps."""
    first, last = layout.span_of(span)
    full = entry_size(layout, min(layout.interval, last - first))
    rest = entry_size(layout, (last - 1) % layout.interval + 1)  # of the interval in which the run ends
    return is_finished(handle, offset, full, size) or (
        size == offset + rest and is_finished(handle, offset, rest, size)
    )


def read_arrays(
    handle: JournalBytes, journal: Journal, entry: Entry, layout: RunLayout, names: Collection[str]
) -> dict[str, NDArray[Any]]:
    """Read the arrays ``names`` of an entry, each (steps, …). CorruptError if one is damaged."""
    arrays: dict[str, NDArray[Any]] = {}
    offset, steps = entry.offset + HEADER.size, entry.stop - entry.start
    for spec in layout.arrays():
        size = spec.count(steps) * spec.width * spec.dtype.itemsize
        if spec.name in names:
            data = handle.read(size + CRC_BYTES, offset)
            numbers = data[:size]
            if len(data) != size + CRC_BYTES or google_crc32c.value(numbers) != int.from_bytes(data[size:], "little"):
                raise CorruptError(
                    f"{journal.path} is damaged: {spec.name!r} of steps {entry.start} to {entry.stop} is not what was "
                    f"written; {ADVICE}"
                )
            arrays[spec.name] = np.frombuffer(numbers, dtype=spec.dtype).reshape(spec.count(steps), *spec.columns)
        offset += size + CRC_BYTES
    return arrays


def entries_of(journal: Journal) -> Iterator[bytes]:
    """Read and check the bytes of each entry. FileNotFoundError if the journal is gone, CorruptError for damage."""
    with opened(journal.path) as handle:
        for entry in journal.entries:
            data = handle.read(entry.size, entry.offset)
            if hashlib.sha256(data[:-TRAILER_BYTES]).digest() != entry.digest:
                raise journal.damaged(f"steps {entry.start} to {entry.stop} are not what was written")
            yield data


# Writing.


def append_entry(run: Run, journal: Journal, start: int, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Commit one save interval: ``arrays`` of its steps, in stored dtypes. OSError if the disk refuses."""
    stop = start + len(arrays["sample"])
    statuses, tokens = run.summarize(arrays)
    size, begin = entry_size(run.layout, stop - start), journal.end
    link = journal.entries[-1].digest if journal.entries else first_link(run, journal.span)
    counts = (statuses[name] for name in STATUSES)
    header = HEADER.pack(MAGIC, start, stop, size, tokens, *counts, link, 0)[:-CRC_BYTES]
    digest = hashlib.sha256()

    def pieces() -> Iterator[memoryview]:
        for numbers in (np.frombuffer(header, np.uint8), *(_bytes(arrays[s.name], s) for s in run.layout.arrays())):
            crc = google_crc32c.value(numbers).to_bytes(CRC_BYTES, "little")  # value() takes arrays, but no memoryview
            for data in (numbers.data, memoryview(crc)):
                digest.update(data)
                yield data
        yield memoryview(digest.digest())

    append(journal.path, len(journal.entries), begin, pieces())
    journal.add(
        Entry(
            start=start,
            stop=stop,
            offset=begin,
            size=size,
            tokens=tokens,
            statuses=statuses,
            digest=digest.digest(),
        )
    )


def _bytes(values: NDArray[Any], spec: ArraySpec) -> NDArray[np.uint8]:
    """The stored bytes of ``values``, without a copy."""
    return np.ascontiguousarray(values, dtype=spec.dtype).reshape(-1).view(np.uint8)


# Checking.


def journal_damage(run: Run) -> list[tuple[str, str]]:
    """(file, what is wrong with it) of damage in a run's journals, and of missing steps before the last committed one.

    The unfinished end of a journal is no damage. Reads the journals whole, an entry at a time.
    """
    damage: list[tuple[str, str]] = []
    for journal in run.journals.values():
        file = str(journal.path.relative_to(run.path))
        damage += [(file, problem) for problem in problems_of(journal)]
    if run.skipped_problem is not None:
        damage.append((SKIPPED, run.skipped_problem))
    if run.layout.save_steps is not None and not damage:
        damage += [(file, f"steps {start} to {stop} are missing") for file, start, stop in _missing_steps(run)]
    return damage


def problems_of(journal: Journal) -> list[str]:
    """What is damaged in a journal, read whole; nothing if its span was committed meanwhile."""
    problems = []
    try:
        with opened(journal.path) as handle:
            problems += [
                f"steps {entry.start} to {entry.stop} are not what was written"
                for entry in journal.entries
                if not intact(handle, entry)
            ]
    except FileNotFoundError:
        return []
    except OSError as error:
        if journal.problem is None:
            problems.append(f"it cannot be read: {error}")
    return problems if journal.problem is None else [*problems, journal.problem]


def intact(handle: JournalBytes, entry: Entry) -> bool:
    """Whether all bytes of an entry are as they were written."""
    data = handle.read(entry.size, entry.offset)
    return hashlib.sha256(data[:-TRAILER_BYTES]).digest() == entry.digest


def _missing_steps(run: Run) -> Iterator[tuple[str, int, int]]:
    """(file that should have them, first step, one past the last) of missing steps before the last committed one.

    Steps that the writer gave up are not missing.
    """
    present = merged([*run.ranges, *run.skipped])
    for start, stop in without([(0, run.ranges[-1][1] if run.ranges else 0)], present):
        while start < stop:
            span = start // run.layout.span_steps
            end = min(stop, run.layout.span_of(span)[1])
            path = journal_path(run.path, span) if span in run.journals else commit_path(run.path, span)
            yield str(path.relative_to(run.path)), start, end
            start = end
