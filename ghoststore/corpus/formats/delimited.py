"""Tables in text: csv, tsv, and files with another delimiter."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from ghoststore.corpus.formats.base import KeyedRow
from ghoststore.corpus.formats.text import Lines, decode
from ghoststore.errors import CorpusError

USUAL = (",", ";", "\t", "|")


def records(lines: Lines) -> Iterator[tuple[int, list[str]]]:
    """(offset, cells) of each record (RFC 4180, with the form's delimiter). A record may span several lines."""
    csv.field_size_limit((1 << 31) - 1)
    begin = lines.offset
    blank = -1

    def decoded() -> Iterator[str]:
        for line in lines:
            lines.check(begin)  # an open quote may continue over many lines
            yield decode(line, lines)

    # csv.reader takes one line at a time, and none after its record, so the next record begins at lines.offset.
    reader = csv.reader(decoded(), strict=True, delimiter=lines.form.delimiter or ",")
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = other_delimiter(_header(lines) if begin else [], lines.form.delimiter)
            raise CorpusError(f"{lines.place(begin)}: invalid {lines.form.name[:3].upper()}: {error}{hint}") from None
        if not cells:
            blank = begin if blank < 0 else blank
        elif blank >= 0:
            raise CorpusError(f"{lines.place(blank)}: expected a CSV record, found a blank line")
        else:
            yield begin, cells
        begin = lines.offset


def table_rows(lines: Lines) -> Iterator[KeyedRow]:
    """Rows as dictionaries. If ``lines`` is past the header, that is read from the file again.

    CorpusError for a header that names a column twice, and for a row that has more or fewer cells.
    """
    if lines.offset:
        header = _header(lines)
    else:
        _, header = next(records(lines), (0, []))
        if len(set(header)) < len(header):
            raise CorpusError(f"{lines.path}, line 1: the header names a column twice: {header}")
    for begin, cells in records(lines):
        if len(cells) != len(header):
            raise CorpusError(
                f"{lines.place(begin)}: expected {len(header)} cells as in the header, found {len(cells)}"
                f"{other_delimiter(header, lines.form.delimiter)}"
            )
        yield begin, dict(zip(header, cells, strict=True))


def _header(lines: Lines) -> list[str]:
    """The first record of the file that ``lines`` are of."""
    if lines.header is None:
        with lines.form.open(lines.path) as stream:
            lines.header = next(records(Lines(lines.path, stream, lines.form)), (0, []))[1]
    return lines.header


def other_delimiter(header: list[str], used: str | None) -> str:
    """The advice for a header whose only cell looks like several with another delimiter; else ""."""
    for delimiter in USUAL:
        if len(header) == 1 and delimiter != used and delimiter in header[0]:
            return f"; the header {header[0]!r:.80} has {delimiter!r}: if cells end there, give `fields.delimiter`"
    return ""
