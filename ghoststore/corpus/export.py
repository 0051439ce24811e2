"""Writing rows of a corpus to a new file or folder: in their own form, or as jsonl, parquet or a dataset."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import zstandard

from ghoststore.corpus.formats import FORMS, form_of
from ghoststore.corpus.source_rows import SourceRows
from ghoststore.errors import UsageError
from ghoststore.store.base.new_files import new_file, new_files

T = TypeVar("T")

COMMON = ("jsonl", "json", "parquet", "arrow", "dataset")
"""Forms that hold the rows of any corpus."""
TABLES = ("parquet", "arrow", "dataset")
GROUP_BYTES = 64 << 20
"""Approximate bytes of a parquet row group, before encoding."""


def form_wanted(out: Path) -> str:
    """The form that the suffix of ``out`` means; without a suffix, a folder of ``save_to_disk``. UsageError for an
    unknown suffix.
    """
    if not out.suffix:
        return "dataset"
    form = form_of(out)
    if form is None:
        raise UsageError(
            f"`out={out}`: expected a name that ends in {', '.join(FORMS)}, or a folder's name without any"
        )
    return form.name.partition(".")[0]


def check_export(source: str, form: str, out: Path) -> None:
    """UsageError unless rows of the corpus ``source``, which has the form ``form``, can be written to ``out``."""
    have, wanted = form.partition(".")[0], form_wanted(out)
    if have in ("token-shards", "megatron", "token-stream"):
        raise UsageError(
            f"{source} holds {have.replace('-', ' ')}: tokens, and not the rows that they were made of. Build a part "
            "of the corpus itself (`ghoststore build --data …`) and choose from that"
        )
    if wanted != have and wanted not in COMMON:
        names = ".jsonl, .parquet or a folder" + (f", or .{have}" if have not in COMMON else "")
        raise UsageError(f"`out={out}`: rows of {source} ({form}) cannot be written as {wanted}; give {names}")


def write_export(source: SourceRows, out: Path, order: Sequence[int] | None) -> None:
    """Write ``source`` to ``out``, which appears whole or not at all. Call `check_export` first.

    Rows are streamed in the order of the corpus. With ``order`` (the places, in that order, of the rows to write) all
    rows are held in memory, and so they are for a change of form to parquet or a dataset. Lines of a text form keep
    their bytes, parquet keeps its schema and metadata, and a dataset its features.

    Raises MismatchError for a row that has changed, UsageError for values that the form cannot hold, StorageError if
    the disk refuses.
    """
    form = form_wanted(out)
    if form == "dataset":
        with new_files(out) as (folder,):
            _save_dataset(source, folder, order)
        return
    with new_file(out) as temporary:
        if form in TABLES:
            _write_table(source, temporary, order, out.suffix.lower())
        else:
            same = form == source.form
            header = source.header() if same else b""
            lines = source.lines() if same else map(_as_json, source.rows())
            with _packed(temporary, out.suffix.lower()) as file:
                if form == "json":
                    _write_array(file, _ordered(lines, order))
                    return
                file.write(header)
                for line in _ordered(lines, order):
                    file.write(line)


def _write_array(file: IO[bytes], rows: Iterable[bytes]) -> None:
    """Write a document that is one array of ``rows``, one a line where they have no line endings of their own."""
    before = b"[\n"
    for row in rows:
        file.write(before + row.removesuffix(b"\n"))
        before = b",\n"
    file.write(b"\n]\n" if before == b",\n" else b"[]\n")


def _ordered(items: Iterable[T], order: Sequence[int] | None) -> Iterable[T]:
    if order is None:
        return items
    in_order = list(items)
    return [in_order[place] for place in order]


def _as_json(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"a row holds a value that JSON lacks ({error}): give `out` a .parquet file") from None


@contextmanager
def _packed(path: Path, suffix: str) -> Iterator[IO[bytes]]:
    """A new file, compressed if ``suffix`` says so. Equal content gives equal bytes."""
    with open(path, "wb") as file:
        if suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
                yield packed  # type: ignore[misc]
        elif suffix == ".zst":
            with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as writer:
                yield writer
        else:
            yield file


def _write_table(source: SourceRows, path: Path, order: Sequence[int] | None, suffix: str) -> None:
    import pyarrow.parquet

    streamed = source.form in TABLES and order is None
    tables = _gathered(source.tables()) if streamed else iter([_table(source, order)])
    first = None if streamed else next(tables)
    schema = source.schema() if first is None else first.schema
    open_writer = {
        ".parquet": pyarrow.parquet.ParquetWriter,
        ".arrow": pyarrow.ipc.new_stream,  # as datasets writes and reads it
    }.get(suffix, pyarrow.ipc.new_file)
    with open_writer(str(path), schema) as writer:
        for table in tables if first is None else [first]:
            writer.write_table(table)


def _gathered(tables: Iterable[Any]) -> Iterator[Any]:
    """Joins small tables to row groups of a usual size, because only few rows may come from each group of
    the source.
    """
    import pyarrow

    pending: list[Any] = []
    for table in tables:
        pending.append(table)
        if sum(piece.nbytes for piece in pending) >= GROUP_BYTES:
            yield pyarrow.concat_tables(pending)
            pending = []
    if pending:
        yield pyarrow.concat_tables(pending)


def _table(source: SourceRows, order: Sequence[int] | None) -> Any:
    """All rows as one Arrow table."""
    import pyarrow

    if source.form in TABLES:
        schema = source.schema()  # first: it refuses files that no table can hold
        table = pyarrow.concat_tables(source.tables()).cast(schema)
    else:
        rows = list(source.rows())
        names = list(dict.fromkeys(name for row in rows for name in row))
        try:
            table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
        except (pyarrow.ArrowException, OverflowError) as error:
            raise UsageError(
                f"the rows do not fit a table, whose columns have one type each ({error}): give `out` a .jsonl file"
            ) from None
    return table if order is None else table.take(list(order))


def _save_dataset(source: SourceRows, folder: Path, order: Sequence[int] | None) -> None:
    import datasets

    if source.form == "dataset":
        chosen = source.dataset()
        chosen = chosen if order is None else chosen.select(list(order))
    else:
        chosen = datasets.Dataset(datasets.table.InMemoryTable(_table(source, order)))
    with _quietly(datasets):
        chosen.save_to_disk(str(folder))


@contextmanager
def _quietly(datasets: Any) -> Iterator[None]:
    """While open, ``datasets`` shows no progress bars."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
