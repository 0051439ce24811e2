"""One sample of a part: its text, its fields, and what became of each of its rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from ghoststore.progress import Progress
from ghoststore.settings.shared import Data
from ghoststore.store import Part, Status, Store
from ghoststore.store.part.kept import python_values, read_field
from query.common.texts import texts_of


def sample(store: str, name: str, source_row: int, data: Data | None, progress: Progress) -> dict[str, Any] | None:
    """The sample at ``source_row`` of the corpus that part ``name`` was made of; None if the part has no row of it.

    ``rows`` are its windows, by their number in the part. ``text`` is None where the corpus is gone or has changed.
    Raises UsageError if there is no such part, CorruptError for damaged rows.
    """
    part = Store.open(store).part(name)
    rows = part.row_numbers[part.column("source_row") == source_row]
    if not len(rows):
        return None
    columns = ("sample_id", "domain", "status", "n_tokens", "loss", "window_start")
    ids, domains, statuses, tokens, losses, starts = (part.read_rows(column, rows) for column in columns)
    return {
        "part": part.name,
        "source_row": source_row,
        "id": str(ids[0]),
        "domain": part.domains[domains[0]] if domains[0] >= 0 else None,
        "text": texts_of(part, [int(rows[0])], progress, data)[0],
        "fields": _fields(part, int(rows[0])),
        "rows": [
            {
                "row": int(row),
                "status": Status(int(status)).name.lower(),
                "n_tokens": int(count),
                "loss": float(loss) if np.isfinite(loss) else None,
                "window_start": int(start),
            }
            for row, status, count, loss, start in zip(rows, statuses, tokens, losses, starts, strict=True)
        ],
    }


def _fields(part: Part, row: int) -> dict[str, Any]:
    """The kept fields of ``row``, by name; None for null."""
    span, place = divmod(row, part.layout.span_rows)
    values = {}
    for number, field in enumerate(part.layout.fields):
        stored, null = read_field(part, number, span)
        values[field.name] = python_values(stored, null, field.type)[place]
    return values
