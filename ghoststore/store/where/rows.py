"""The rows of a part, or of a run's row table, that match a condition; read in bounded memory.

A column is read only where the condition names it. Legend: N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import CorruptError, UsageError
from ghoststore.store.part.kept import FieldType, read_field
from ghoststore.store.part.part import Part
from ghoststore.store.part.status import FIRST_UNUSABLE, Status
from ghoststore.store.run.run import Run
from ghoststore.store.spans.reader import read_span
from ghoststore.store.where.condition import Condition

ROWS_AT_ONCE = 1 << 16
SHOWN_DOMAINS = 12
SAMPLE_TYPES = {
    "id": "VARCHAR",
    "domain": "VARCHAR",
    "n_tokens": "INTEGER",
    "source_row": "BIGINT",
    "source_file": "INTEGER",
    "window_start": "INTEGER",
}
"""Columns of parts and of runs."""
KEPT_TYPES: dict[FieldType, str] = {
    "string": "VARCHAR",
    "int": "BIGINT",
    "float": "DOUBLE",
    "bool": "BOOLEAN",
    "date": "DATE",
    "timestamp": "TIMESTAMP",
}


@dataclass(frozen=True, slots=True)
class Matches:
    """The rows that match ``where``."""

    sql: str
    mask: NDArray[np.bool_]
    """(N,): of all rows of the part or the row table; False for rows that are not committed."""
    columns: str
    """The columns that there are, for messages."""

    def among(self, source: Part | Run, candidates: NDArray[np.bool_], what: str) -> int:
        """How many of the ``candidates`` match, a mask of the committed rows of ``source``, or of its row table.

        UsageError, which calls them ``what``, if none does.
        """
        mask = self.mask[source.row_numbers] if isinstance(source, Part) else self.mask
        count, domains = int((mask & candidates).sum()), source.domains
        if not count:
            named = ", ".join(map(repr, domains[:SHOWN_DOMAINS])) + (" …" if len(domains) > SHOWN_DOMAINS else "")
            raise UsageError(
                f"`where` {self.sql!r} matches none of the {int(candidates.sum()):,} {what} of {source.kind.name} "
                f"{source.name!r}. The columns {self.columns}"
                + (f"; the domains: {named}" if domains and "domain" in self.sql.lower() else "")
            )
        return count


@dataclass(frozen=True, slots=True)
class Chosen:
    """What may rank, where a question has a condition: rows of parts, or samples of a run."""

    sql: str
    mask: NDArray[np.bool_]
    """Of all rows of the part, or of the samples of the run."""
    count: int

    def settings(self) -> dict[str, Any]:
        """What the settings of a result say about it."""
        return {"where": self.sql, "rows_matching": self.count}


def part_matches(part: Part, sql: str) -> Matches:
    """The committed rows of ``part`` that match. UsageError for what is no condition on its columns, CorruptError for a
    damaged column.

    The columns are id, domain, n_tokens, loss (null without a vector), source_row, source_file (a number),
    window_start, status (by name), text where the part keeps it, and the fields that it keeps.
    """
    types = {**SAMPLE_TYPES, "loss": "FLOAT", "status": "VARCHAR"}
    missing = {}
    if part.layout.store_text:
        types["text"] = "VARCHAR"
    else:
        missing["text"] = "it does not keep texts, `ghoststore build --store-text` does"
    types |= {field.name: KEPT_TYPES[field.type] for field in part.layout.fields}
    condition = Condition(sql, types, f"part {part.name!r}", missing)
    part.refuse_hollow()
    mask = np.zeros(part.layout.rows, dtype=bool)
    for spans in _together(part):
        columns = [_of_span(part, span, condition.names) for span in spans]
        matches = condition.mask(
            sum(stop - start for start, stop in map(part.layout.span_of, spans)),
            {name: _joined([column[name] for column in columns]) for name in condition.names},
        )
        read = 0
        for start, stop in map(part.layout.span_of, spans):
            mask[start:stop] = matches[read : read + stop - start]
            read += stop - start
    return Matches(sql, mask, condition.columns)


def run_matches(run: Run, sql: str) -> Matches:
    """The rows of the row table of ``run`` that match, by :data:`SAMPLE_TYPES`; see :func:`part_matches`."""
    missing = {"text": "a run keeps no texts", "loss": "a run has it of each step, not of each row"}
    condition = Condition(sql, SAMPLE_TYPES, f"run {run.name!r}", missing)
    rows = len(run.rows)
    run.rows.bear_out()
    mask = np.zeros(rows, dtype=bool)
    for start in range(0, rows, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, rows)
        read = _reader(partial(run.rows.read, start=start, stop=stop), run.domains)
        mask[start:stop] = condition.mask(stop - start, {name: read(name) for name in condition.names})
    return Matches(sql, mask, condition.columns)


def _together(part: Part) -> Iterator[list[int]]:
    """The committed spans, some at a time: about :data:`ROWS_AT_ONCE` rows."""
    at_once = max(1, ROWS_AT_ONCE // part.layout.span_rows)
    for first in range(0, len(part.spans), at_once):
        yield part.spans[first : first + at_once]


def _joined(arrays: list[Any]) -> Any:
    import pyarrow

    return pyarrow.chunked_array(arrays)


def _of_span(part: Part, span: int, names: Sequence[str]) -> dict[str, Any]:
    """The columns ``names`` of one span, as Arrow arrays."""
    part, span = part.home(span)  # a union has the columns that its parts have
    start, stop = part.layout.span_of(span)

    def stored(name: str) -> NDArray[Any]:
        return part.read(name, start, stop) if part.spec(name).dtype is str else read_span(part, name, span).copy()

    read = _reader(stored, part.domains)
    places = {field.name: place for place, field in enumerate(part.layout.fields)}
    return {name: _kept(part, places[name], span) if name in places else read(name) for name in names}


def _reader(stored: Callable[[str], NDArray[Any]], domains: Sequence[str]) -> Callable[[str], Any]:
    """A function that reads a column, one that is no kept field, as an Arrow array. ``stored`` reads an array."""
    import pyarrow

    def read(name: str) -> Any:
        if name == "id":
            return pyarrow.array(stored("sample_id").tolist(), type=pyarrow.string())
        if name == "text":
            return pyarrow.array(stored("text").tolist(), type=pyarrow.string())
        if name == "domain":
            return _words([*domains, None], stored("domain"))
        if name == "status":
            return _words([_status_name(code) for code in range(256)], stored("status"))
        if name == "loss":
            return pyarrow.array(stored("loss"), mask=stored("status") >= FIRST_UNUSABLE)
        return pyarrow.array(stored(name))

    return read


def _words(names: Sequence[str | None], codes: NDArray[Any]) -> Any:
    """An Arrow array of the names at ``codes``; -1 is the last. CorruptError for a code without a name."""
    import pyarrow

    if len(codes) and not -1 <= int(codes.min()) <= int(codes.max()) < len(names):
        raise CorruptError(f"a row has the code {int(codes.max())}, of {len(names)} names: it was not written so")
    return pyarrow.array(np.array(names, dtype=object)[codes], type=pyarrow.string())


def _status_name(code: int) -> str:
    return Status(code).name.lower() if code in set(Status) else str(code)


def _kept(part: Part, place: int, span: int) -> Any:
    import pyarrow

    values, null = read_field(part, place, span)
    kind = part.layout.fields[place].type
    if kind == "string":
        return pyarrow.array(values.tolist(), type=pyarrow.string(), mask=null)
    if kind == "bool":
        return pyarrow.array(values.astype(bool), mask=null)
    array = pyarrow.array(values, mask=null)
    cast = {"date": pyarrow.date32(), "timestamp": pyarrow.timestamp("us")}
    return array.cast(cast[kind]) if kind in cast else array
