"""The journal of an open span: its save intervals, one behind the other in one file, until the span is full.

An entry is a header, the numbers of its steps array by array, and a trailer. The trailer is written when all before it
is on the disk: an entry without it was never committed, and an entry that has it is what was committed or is damaged.
``docs/format.md`` specifies every byte.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import CorruptError
from ghoststore.store.base.disk import flush
from ghoststore.store.base.opening import open_regular
from ghoststore.store.base.records import json_digest
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
    """One committed save interval of a journal."""

    start: int
    stop: int
    place: int
    """Byte of the file at which it begins."""
    size: int
    """Its bytes, header and trailer among them."""
    tokens: int
    statuses: dict[str, int]
    digest: bytes
    """Its trailer."""


@dataclass(slots=True, kw_only=True)
class Journal:
    """What is committed in the journal of a span, as its headers say; the arrays are checked when they are read."""

    path: Path
    span: int
    entries: list[Entry] = field(default_factory=list)
    """In the order in which they were appended."""
    starts: set[int] = field(default_factory=set)
    """Their first steps."""
    length: int = 0
    """Steps of all of them."""
    problem: str | None = None
    """What is damaged behind them."""

    def add(self, entry: Entry) -> None:
        """Take in the entry that follows."""
        self.entries.append(entry)
        self.starts.add(entry.start)
        self.length += entry.stop - entry.start

    @property
    def end(self) -> int:
        """One past the last byte that is committed."""
        return self.entries[-1].place + self.entries[-1].size if self.entries else 0

    @property
    def steps(self) -> list[Steps]:
        """The steps of its entries."""
        return merged((entry.start, entry.stop) for entry in self.entries)

    def check(self) -> None:
        """CorruptError if something is damaged behind the entries."""
        if self.problem is not None:
            raise self.damaged(self.problem)

    def damaged(self, problem: str) -> CorruptError:
        """The error that says so."""
        return CorruptError(f"{self.path} is damaged: {problem}; {ADVICE}")


def journal_path(folder: Path, span: int) -> Path:
    """Where the journal of ``span`` stands."""
    return folder / FOLDER / f"{span:08d}.log"


def first_link(run: Run, span: int) -> bytes:
    """What the first entry of a journal has in the place of the trailer before it: a journal belongs to one span of one
    run.
    """
    return hashlib.sha256(f"{json_digest(run.manifest)}:{span}".encode()).digest()


def entry_size(layout: RunLayout, steps: int) -> int:
    """Bytes of an entry of so many steps."""
    arrays = sum(spec.count(steps) * spec.width * int(spec.dtype.itemsize) + CRC_BYTES for spec in layout.arrays())
    return HEADER.size + arrays + TRAILER_BYTES


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A handle to read a journal. FileNotFoundError if it is gone, CorruptError if it is no regular file."""
    with open_regular(path, path.parent.parent) as file:
        yield file.fileno()


@contextmanager
def _writing(path: Path, flags: int = 0) -> Iterator[int]:
    """A handle to write a journal. No link is followed, and no pipe waited for."""
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


# Reading.


def read_journals(run: Run, known: Mapping[int, Journal] | None = None) -> dict[int, Journal]:
    """The journals of a run by span, read on from where those of ``known`` ended. What is damaged is in their
    ``problem``.
    """
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
    """Those of :func:`journal_spans`; CorruptError for one that cannot be."""
    try:
        spans = journal_spans(run.path)
    except (FileNotFoundError, NotADirectoryError):
        raise damaged(run, [(FOLDER, f"there is no {FOLDER} folder")]) from None
    if spans and spans[-1] >= run.layout.spans:
        file = journal_path(Path(), spans[-1]).as_posix()
        raise damaged(run, [(file, f"a journal of span {spans[-1]}, but there are {run.layout.spans} spans")])
    return spans


def journal_spans(folder: Path) -> list[int]:
    """The spans that have a journal in the run at ``folder`` at this moment, in order."""
    return sorted(int(match[1]) for name in os.listdir(folder / FOLDER) if (match := _NAME.fullmatch(name)))


def _read_on(run: Run, journal: Journal) -> bool:
    """Take in the entries behind those that are known; False if the journal was just removed: its span is committed."""
    try:
        with opened(journal.path) as handle:
            size = os.fstat(handle).st_size
            while (entry := _next_entry(run, journal, handle, size)) is not None:
                journal.add(entry)
    except FileNotFoundError:
        return False
    except CorruptError as error:
        journal.problem = str(error)
    except OSError as error:
        journal.problem = f"it cannot be read ({error.strerror})"
    return True


def _next_entry(run: Run, journal: Journal, handle: int, size: int) -> Entry | None:
    """The entry behind those that were read; None where no more were committed, or with the ``problem`` set."""
    layout, place = run.layout, journal.end
    fields = header_at(handle, place)
    if fields is None:
        # One that was being written, unless its entry is finished.
        if _any_finished(layout, journal.span, handle, place, size):
            journal.problem = f"the header at byte {place:,} is not what was written"
        return None
    _, start, stop, length, *_, previous, _ = fields
    what = f"the entry at byte {place:,}, of steps {start} to {stop}"
    if not 0 <= start < layout.steps or start % layout.interval or stop != min(start + layout.interval, layout.steps):
        journal.problem = f"{what}, is no save interval"
    elif start // layout.span_steps != journal.span or start in journal.starts:
        journal.problem = f"{what}, does not belong there"
    elif length != entry_size(layout, stop - start):
        journal.problem = f"{what}, says that it has {length} bytes"
    elif not is_finished(handle, place, length, size):
        return None
    elif previous != (journal.entries[-1].digest if journal.entries else first_link(run, journal.span)):
        journal.problem = f"{what}, is not linked to what stands before it"
    if journal.problem is not None:
        return None
    return entry_of(handle, place, fields)


def header_at(handle: int, place: int) -> tuple[Any, ...] | None:
    """The fields of the header at ``place``; None where none is that holds."""
    header = os.pread(handle, HEADER.size, place)
    if len(header) < HEADER.size or google_crc32c.value(header[:-CRC_BYTES]) != HEADER.unpack(header)[-1]:
        return None
    fields = HEADER.unpack(header)
    return fields if fields[0] == MAGIC else None


def entry_of(handle: int, place: int, fields: Sequence[Any]) -> Entry:
    """The entry at ``place`` whose header has these ``fields``."""
    _, start, stop, length, tokens, *counts, _, _ = fields
    return Entry(
        start=start,
        stop=stop,
        place=place,
        size=length,
        tokens=tokens,
        statuses=dict(zip(STATUSES, counts, strict=True)),
        digest=os.pread(handle, TRAILER_BYTES, place + length - TRAILER_BYTES),
    )


def is_finished(handle: int, place: int, length: int, size: int) -> bool:
    """Whether the entry of ``length`` bytes at ``place`` was committed: its trailer is there, or something behind it.

    After a power cut there may be zeros where something was not flushed; no trailer is zeros.
    """
    if size > place + length:
        return True  # whoever wrote that had flushed this
    trailer = os.pread(handle, TRAILER_BYTES, place + length - TRAILER_BYTES)
    return len(trailer) == TRAILER_BYTES and any(trailer) and not _is_half(handle, place, length, trailer)


def _is_half(handle: int, place: int, length: int, trailer: bytes) -> bool:
    """Whether ``trailer`` is the beginning or the end of the right one, and zeros else: it lay over the end of a block,
    and the power went when one block was on the disk. Its entry was flushed before, and is whole.

    One bit that differs is a flipped bit, which may leave such a trailer, too.
    """
    if trailer[0] and trailer[-1]:
        return False
    right = hashlib.sha256(_read(handle, length - TRAILER_BYTES, place)).digest()
    half = right.startswith(trailer.rstrip(b"\0")) or right.endswith(trailer.lstrip(b"\0"))
    return half and sum((a ^ b).bit_count() for a, b in zip(trailer, right, strict=True)) > 1


def _any_finished(layout: RunLayout, span: int, handle: int, place: int, size: int) -> bool:
    """Whether an entry at ``place`` was committed, whatever steps it is of."""
    first, last = layout.span_of(span)
    whole = entry_size(layout, min(layout.interval, last - first))
    rest = entry_size(layout, (last - 1) % layout.interval + 1)  # of the interval in which the run ends
    return is_finished(handle, place, whole, size) or (size == place + rest and is_finished(handle, place, rest, size))


def read_arrays(
    handle: int, journal: Journal, entry: Entry, layout: RunLayout, names: Collection[str]
) -> dict[str, NDArray[Any]]:
    """The arrays ``names`` of one entry, each (steps, …). CorruptError if one is not what was written."""
    arrays: dict[str, NDArray[Any]] = {}
    place, steps = entry.place + HEADER.size, entry.stop - entry.start
    for spec in layout.arrays():
        size = spec.count(steps) * spec.width * spec.dtype.itemsize
        if spec.name in names:
            data = _read(handle, size + CRC_BYTES, place)
            numbers = data[:size]
            if len(data) != size + CRC_BYTES or google_crc32c.value(numbers) != int.from_bytes(data[size:], "little"):
                raise CorruptError(
                    f"{journal.path} is damaged: {spec.name!r} of steps {entry.start} to {entry.stop} is not what was "
                    f"written; {ADVICE}"
                )
            arrays[spec.name] = np.frombuffer(numbers, dtype=spec.dtype).reshape(spec.count(steps), *spec.columns)
        place += size + CRC_BYTES
    return arrays


def entries_of(journal: Journal) -> Iterator[bytes]:
    """The bytes of each entry, checked. FileNotFoundError if the journal is gone, CorruptError if one is damaged."""
    with opened(journal.path) as handle:
        for entry in journal.entries:
            data = _read(handle, entry.size, entry.place)
            if hashlib.sha256(data[:-TRAILER_BYTES]).digest() != entry.digest:
                raise journal.damaged(f"steps {entry.start} to {entry.stop} are not what was written")
            yield data


def _read(handle: int, size: int, place: int) -> bytes:
    """``size`` bytes, or what there is: the system may give less at a time."""
    data = os.pread(handle, size, place)
    while len(data) < size and (more := os.pread(handle, size - len(data), place + len(data))):
        data += more
    return data


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
    with _writing(journal.path, os.O_CREAT) as handle:
        place = begin
        for numbers in (np.frombuffer(header, np.uint8), *(_bytes(arrays[s.name], s) for s in run.layout.arrays())):
            crc = google_crc32c.value(numbers).to_bytes(CRC_BYTES, "little")  # takes arrays, and no memoryview
            for data in (numbers.data, memoryview(crc)):
                digest.update(data)
                place = _write(handle, data, place)
        os.fsync(handle)
        # Only now that all of it is on the disk: a trailer is never there without its entry.
        _write(handle, memoryview(digest.digest()), place)
        os.fsync(handle)
    if not begin:
        flush(journal.path.parent)
    journal.add(
        Entry(
            start=start,
            stop=stop,
            place=begin,
            size=size,
            tokens=tokens,
            statuses=statuses,
            digest=digest.digest(),
        )
    )


def _bytes(values: NDArray[Any], spec: ArraySpec) -> NDArray[np.uint8]:
    """The stored bytes of some steps of one array, not copied."""
    return np.ascontiguousarray(values, dtype=spec.dtype).reshape(-1).view(np.uint8)


def _write(handle: int, data: memoryview, place: int) -> int:
    """Write all of ``data``; the byte behind it. The system may take less at a time."""
    while data:
        written = os.pwrite(handle, data, place)
        data, place = data[written:], place + written
    return place


def cut(journal: Journal) -> None:
    """Remove what a writer that died had begun behind the last entry."""
    with _writing(journal.path) as handle:
        if os.fstat(handle).st_size > journal.end:
            os.ftruncate(handle, journal.end)
            os.fsync(handle)


def remove(journal: Journal) -> None:
    """Remove the journal of a span that is committed."""
    journal.path.unlink(missing_ok=True)
    flush(journal.path.parent)


# Checking.


def journal_damage(run: Run) -> list[tuple[str, str]]:
    """(file, what is wrong with it) for everything in a run's journals that is not what was committed, and for steps
    that are missing below the last committed one. The end of a journal that a writer had not finished is no damage.

    Reads the journals whole, an entry at a time.
    """
    damage: list[tuple[str, str]] = []
    for journal in run.journals.values():
        file = str(journal.path.relative_to(run.path))
        damage += [(file, problem) for problem in problems_of(journal)]
    if run.skipped_problem is not None:
        damage.append((SKIPPED, run.skipped_problem))
    if run.layout.save_steps is not None and not damage:
        damage += [(file, f"steps {start} to {stop} are missing") for file, start, stop in _holes(run)]
    return damage


def problems_of(journal: Journal) -> list[str]:
    """What is damaged in one journal, read whole; nothing where its span was committed meanwhile."""
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


def intact(handle: int, entry: Entry) -> bool:
    """Whether an entry is, whole, what was written."""
    data = _read(handle, entry.size, entry.place)
    return hashlib.sha256(data[:-TRAILER_BYTES]).digest() == entry.digest


def _holes(run: Run) -> Iterator[tuple[str, int, int]]:
    """(the file that should have them, first step, one past the last) of steps that neither record nor journal has,
    though later ones are there, and of which the writer has not said that they will not come.
    """
    present = merged([*run.ranges, *run.skipped])
    for start, stop in without([(0, run.ranges[-1][1] if run.ranges else 0)], present):
        while start < stop:
            span = start // run.layout.span_steps
            end = min(stop, run.layout.span_of(span)[1])
            path = journal_path(run.path, span) if span in run.journals else commit_path(run.path, span)
            yield str(path.relative_to(run.path)), start, end
            start = end
