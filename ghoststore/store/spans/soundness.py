"""Checks of spans: lost records, wrong records, files of another size, and whole files against their checksums.

The protocol (``docs/format.md``) moves a span's chunks into place only while its intent or its record exists. So chunks
in place with neither show that a record was lost. A span without chunks has not been written yet, or, in a run, its
writer left it out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ghoststore.errors import CorruptError, StorageError
from ghoststore.store.base.object_path import ObjectPath, at_once
from ghoststore.store.base.objects import side_by_side
from ghoststore.store.base.opening import is_other, names_in
from ghoststore.store.base.records import MISSING
from ghoststore.store.base.writers import FOLDER as WRITERS
from ghoststore.store.spans.checksum import check_crc
from ghoststore.store.spans.commits import Commit, commit_path, committed, read_commit
from ghoststore.store.spans.committing import decided_spans
from ghoststore.store.spans.layout import CRC_BYTES, SpanLayout, chunk_keys, first_row
from ghoststore.store.spans.withdrawn import taken_out

if TYPE_CHECKING:
    from ghoststore.progress import Task
    from ghoststore.store.spans.group import Spanned

Checked: TypeAlias = tuple[str, int, str | None]
"""(file, its bytes, what is wrong with it or None if nothing is)."""
THREADS = 4
NAMED = 3
"""Most damaged files that a message names; `ghoststore verify` lists all."""
LOST = "missing, though the chunks of its span are in place"
TAKEN_OUT = "taken out by a repair that was cut short, and not computed again"
_NUMBER = re.compile(r"[0-9]{1,12}")


def record_problem(layout: SpanLayout, commit: Commit) -> str | None:
    """Why ``commit`` cannot be the record of its span; None if it can."""
    start, stop = layout.span_of(commit.span)
    if (commit.start, commit.stop) != (start, stop):
        return f"it says {commit.start} to {commit.stop} of span {commit.span}, which is {start} to {stop}"
    expected = {key: spec for spec in layout.arrays() for key in chunk_keys(spec, start, stop)}
    lacking, foreign = sorted(expected.keys() - commit.files.keys()), sorted(commit.files.keys() - expected.keys())
    if lacking:
        return f"it does not name {lacking[0]} and {len(lacking) - 1} more of the {len(expected)} files of its span"
    if foreign:
        return f"it names {foreign[0]!r:.80}, which is no file of span {commit.span}"
    for key, spec in expected.items():
        if spec.dtype is not str and commit.files[key].bytes != spec.chunk_bytes + CRC_BYTES:
            return f"it gives {key} {commit.files[key].bytes} bytes; a chunk has {spec.chunk_bytes + CRC_BYTES}"
    return None


def exact_commit(folder: Path, layout: SpanLayout, span: int) -> Commit:
    """Read the record of ``span`` of the part or run at ``folder``. CorruptError unless it can be that record."""
    commit = read_commit(folder, span)
    if problem := record_problem(layout, commit):
        raise CorruptError(
            f"{commit_path(folder, span)} is not the record of its span: {problem}; `ghoststore verify` lists what is "
            "damaged"
        )
    return commit


def lost_spans(source: Spanned[Any]) -> list[int]:
    """Spans that lost their record: chunks are in place, and there is no intent, or a mark says there was a record.

    Cost: one listing of each array, none if every span has its record.
    """
    if len(source.spans) == source.layout.spans:
        return []
    suspects = _spans_with_chunks(source)
    if not suspects:
        return []
    # In this order: a writer makes the intent before it moves a chunk, and removes it after the record exists.
    suspects -= undecided(source.path)
    return sorted(suspects.difference(committed(source.path)))


def missing_records(source: Spanned[Any]) -> list[tuple[str, str]]:
    """(path, why it should exist) of each missing record of rows or steps that were committed."""
    lost = [(record_name(span), LOST) for span in lost_spans(source)]
    lost_names = {name for name, _ in lost}
    return [*lost, *((name, TAKEN_OUT) for name in map(record_name, taken_out(source)) if name not in lost_names)]


def undecided(folder: Path) -> set[int]:
    """Spans that are decided and may never have had a record: they have an intent and no mark."""
    intents, marks = decided_spans(folder)
    return intents.keys() - marks


def _spans_with_chunks(source: Spanned[Any]) -> set[int]:
    """Spans that have a chunk in place and were not committed when ``source`` was opened."""
    layout, present = source.layout, set(source.spans)
    spans: set[int] = set()
    for spec in layout.arrays():
        try:
            names = names_in(source.path / spec.name / "c")
        except StorageError:
            raise
        except OSError:  # no chunk yet; `verify` names a folder that cannot be listed
            continue
        for name in names:
            first = first_row(spec, int(name)) if _NUMBER.fullmatch(name) else layout.length
            span = first // layout.span_length
            if first >= layout.length or span in present or span in spans:
                continue
            # A folder may exist before its chunk.
            if (source.path / chunk_keys(spec, first, first + 1)[0]).is_file():
                spans.add(span)
    return spans


def refuse_lost(source: Spanned[Any]) -> None:
    """CorruptError if ``source`` has lost records: the remaining spans would pass for all."""
    missing = missing_records(source)
    if missing:
        raise damaged(source, missing)


def record_name(span: int) -> str:
    """The path of a record in its part or run."""
    return commit_path(Path(), span).as_posix()


def quick_damage(source: Spanned[Any]) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it) by records, metadata and sizes of files. No chunk is read."""
    for name in source.files:
        if name.endswith("zarr.json"):
            try:
                source.check_file(name)
            except CorruptError as error:
                yield name, str(error)
        elif not (source.path / name).is_file():
            yield name, MISSING
    if (problem := writers_problem(source.path)) is not None:
        yield WRITERS, problem
    yield from missing_records(source)
    # One listing tells a thousand sizes. What it lacks is asked for: it may lag behind.
    listed = dict(source.path.below()) if isinstance(source.path, ObjectPath) else {}

    def read(span: int) -> Commit | str:
        try:
            return exact_commit(source.path, source.layout, span)
        except CorruptError as error:
            return str(error)

    for span, commit in zip(source.spans, side_by_side(read, source.spans, at_once(source.path)), strict=True):
        if isinstance(commit, str):
            yield record_name(span), commit
            continue
        for key, record in commit.files.items():
            try:
                size = listed.get(key, source.path / key).lstat().st_size
            except StorageError:
                raise
            except OSError as error:
                yield key, MISSING if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
                continue
            if size != record.bytes:
                yield key, f"{size} bytes; {record.bytes} were written"


def checked_span(source: Spanned[Any], span: int) -> Iterator[Checked]:
    """Check each file of a committed span, read whole. The record is listed only if it is damaged.

    Without a readable record a chunk is checked by its own crc32c.
    """
    folder = source.path
    try:
        commit = read_commit(folder, span)
    except CorruptError as error:
        yield record_name(span), 0, str(error)
        yield from ((file, 0, problem) for file, problem in unrecorded_damage(source, span))
        return
    if problem := record_problem(source.layout, commit):
        yield record_name(span), 0, problem
    # A record may come from anywhere: files that are not of its span are not read.
    for key in source.layout.span_keys(span):
        if (record := commit.files.get(key)) is not None:
            problem = record.damage(folder / key, folder)
            yield key, record.bytes, f"{problem} (span {span})" if problem else None


def unrecorded_damage(source: Spanned[Any], span: int) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it) of each damaged chunk of a span without a readable record."""
    for key in source.layout.span_keys(span):
        try:
            check_crc(source.path / key, source.path)
        except CorruptError as error:
            yield key, str(error)


def checked_spans(source: Spanned[Any], spans: Iterable[int], task: Task | None = None) -> Iterator[Checked]:
    """Check ``spans`` as :func:`checked_span`, in their order, some of them at a time."""
    with ThreadPoolExecutor(max(THREADS, at_once(source.path))) as pool:
        for checked in pool.map(lambda span: list(checked_span(source, span)), spans):
            if task is not None:
                task.advance(1)
            yield from checked


def refuse_damaged_spans(source: Spanned[Any], spans: Iterable[int], task: Task | None = None) -> None:
    """CorruptError naming the damage that :func:`checked_span` finds in ``spans``."""
    checked = checked_spans(source, spans, task)
    damage = [(file, problem) for file, _, problem in checked if problem is not None]
    if damage:
        raise damaged(source, damage)


def writers_problem(folder: Path) -> str | None:
    """What prevents writing in a part or run: something else has the name of the folder of writers; None if nothing."""
    no_folder = is_other(folder / WRITERS, folder=True)
    return "no folder; that of the records of who writes belongs there" if no_folder else None


def refuse_damaged(source: Spanned[Any]) -> None:
    """CorruptError naming the damage that :func:`quick_damage` finds: a damaged part or run is not written further."""
    damage = list(quick_damage(source))
    if damage:
        raise damaged(source, damage)


def damaged(source: Spanned[Any], damage: list[tuple[str, str]]) -> CorruptError:
    """The error for damaged files of a part or run, with the command that mends them."""
    store, kind = source.path.parent.parent, source.kind.name
    files = "; ".join(f"{file}: {problem}" for file, problem in damage[:NAMED])
    more = f"; and {len(damage) - NAMED} more" if len(damage) > NAMED else ""
    return CorruptError(
        f"{kind} {source.name!r} of {store} is damaged ({files}{more}). `ghoststore repair --store {store} --{kind} "
        f"{source.name}` mends it"
    )
