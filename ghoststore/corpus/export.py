"""Rows of a corpus written to a new file or folder: in the form that they have, or as jsonl, parquet or a dataset."""

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

COMMON = ("jsonl", "parquet", "dataset")
"""Forms that hold the rows of any corpus."""
TABLES = ("parquet", "dataset")
GROUP_BYTES = 64 << 20
"""Of a parquet row group, about, before it is encoded."""


def form_wanted(out: Path) -> str:
    """The form that ``out`` asks for, by its suffix: without one, a folder of ``save_to_disk``. UsageError for another
    suffix.
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
    """UsageError unless rows of the corpus ``source``, of ``form``, can be written to ``out``."""
    have, wanted = form.partition(".")[0], form_wanted(out)
    if have == "token-shards":
        raise UsageError(
            f"{source} holds token shards: tokens, and not the rows that they were made of. Build a part of the corpus "
            "itself (`ghoststore build --data …`) and choose from that"
        )
    if wanted != have and wanted not in COMMON:
        names = ".jsonl, .parquet or a folder" + (f", or .{have}" if have not in COMMON else "")
        raise UsageError(f"`out={out}`: rows of {source} ({form}) cannot be written as {wanted}; give {names}")


def write_export(source: SourceRows, out: Path, order: Sequence[int] | None) -> None:
    """Write ``source`` to ``out``, which appears whole or not at all: see `check_export`.

    In the order of the corpus, streamed; or with ``order`` (place in the corpus's order of the first to be written, of
    the second, …), which holds all rows in memory, as does every change of form to parquet or a dataset. Lines of a
    text form keep their bytes; parquet keeps schema and metadata, a dataset its features.

    Raises MismatchError for a row that has changed, UsageError for values that the form cannot hold, StorageError if
    the disk refuses.
    """
    form = form_wanted(out)
    if form == "dataset":
        with new_files(out) as (folder,):
            _save_dataset(source, folder, order)
        return
    with new_file(out) as temporary:
        if form == "parquet":
            _write_parquet(source, temporary, order)
        else:
            same = form == source.form
            header = source.header() if same else b""
            lines = source.lines() if same else map(_as_json, source.rows())
            with _packed(temporary, out.suffix.lower()) as file:
                file.write(header)
                for line in _ordered(lines, order):
                    file.write(line)


def _ordered(items: Iterable[T], order: Sequence[int] | None) -> Iterable[T]:
    if order is None:
        return items
    held = list(items)
    return [held[place] for place in order]


def _as_json(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"a row holds a value that JSON lacks ({error}): give `out` a .parquet file") from None


@contextmanager
def _packed(path: Path, suffix: str) -> Iterator[IO[bytes]]:
    """A new file, compressed where ``suffix`` says so; the same bytes for the same content."""
    with open(path, "wb") as file:
        if suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
                yield packed  # type: ignore[misc]
        elif suffix == ".zst":
            with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as writer:
                yield writer
        else:
            yield file


def _write_parquet(source: SourceRows, path: Path, order: Sequence[int] | None) -> None:
    import pyarrow.parquet

    if source.form in TABLES and order is None:
        with pyarrow.parquet.ParquetWriter(path, source.schema()) as writer:
            for table in _gathered(source.tables()):
                writer.write_table(table)
    else:
        pyarrow.parquet.write_table(_table(source, order), path)


def _gathered(tables: Iterable[Any]) -> Iterator[Any]:
    """Small tables joined to row groups of a common size: few rows are chosen out of each group of the source."""
    import pyarrow

    held: list[Any] = []
    for table in tables:
        held.append(table)
        if sum(piece.nbytes for piece in held) >= GROUP_BYTES:
            yield pyarrow.concat_tables(held)
            held = []
    if held:
        yield pyarrow.concat_tables(held)


def _table(source: SourceRows, order: Sequence[int] | None) -> Any:
    """All rows as one Arrow table."""
    import pyarrow

    if source.form in TABLES:
        table = pyarrow.concat_tables(source.tables()).cast(source.schema())
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
    """Without the progress bars of ``datasets``."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
