"""The values of a row: found by their names, and checked."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from decimal import Decimal
from math import isfinite

import numpy as np

EXACT = 1 << 53
"""Up to here a float64 holds every integer."""


class RowError(ValueError):
    """An error in one row. `Corpus` adds the file and the line, and raises `CorpusError`."""


def check_object(row: object) -> dict[str, object]:
    """``row``, if it is a JSON object; else RowError."""
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {shown(row)}")
    return row


def plain_row(item: object) -> dict[str, object]:
    """The row that a text or a dictionary is. RowError for anything else."""
    if item is None or isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, Mapping):
        raise RowError(f"expected a text or a dict, found {item!r:.80} ({type(item).__name__})")
    return {name: _plain(name, value) for name, value in item.items()}


def _plain(name: object, value: object) -> object:
    """``value`` as JSON would give it back. Nested values are checked where they are used."""
    if isinstance(value, np.generic) and not isinstance(value, str):
        value = value.item()
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"field {name!r}: half a surrogate pair at character {error.start}") from None
    return value


def value_at(row: Mapping[str, object], name: str) -> object:
    """The value of the field ``name``. ``meta.source`` is the field "source" of the object in "meta", unless the row
    has a field of the whole name; None if "meta" is null. KeyError if there is none.
    """
    if name in row:
        return row[name]
    for head, rest in _cuts(name):
        if head in row:
            value = row[head]
            if value is None:
                return None
            if isinstance(value, Mapping):
                try:
                    return value_at(value, rest)
                except KeyError:
                    continue
    raise KeyError(name)


def has_value(row: Mapping[str, object], name: str) -> bool:
    """Whether `value_at` finds the field ``name``."""
    try:
        value_at(row, name)
    except KeyError:
        return False
    return True


def column_of(name: str, columns: Container[str]) -> str | None:
    """That of ``columns`` in which the field ``name`` lies, see `value_at`; None if none does."""
    return name if name in columns else next((head for head, _ in _cuts(name) if head in columns), None)


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """(before, after) each dot of a name, from the last to the first."""
    end = len(name)
    while (end := name.rfind(".", 0, end)) >= 0:
        yield name[:end], name[end + 1 :]


def text_of(row: Mapping[str, object], field: str) -> str | None:
    """The text in a field; None for null. RowError for another value, KeyError for a row without the field."""
    value = row[field] if field in row else value_at(row, field)
    if value is None or isinstance(value, str):
        return value
    raise RowError(f"field {field!r}: expected a string or null, found {shown(value)}")


def label_of(row: Mapping[str, object], field: str) -> str | None:
    """An id or a domain as text; None for null. RowError for another value, KeyError for a row without the field.

    Tables make floats of integers where some are missing: 3.0 is 3. A larger one may have lost digits, and is refused.
    """
    value = row[field] if field in row else value_at(row, field)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Decimal) and value.is_finite():
        return str(int(value)) if value == value.to_integral_value() else str(value)
    if isinstance(value, float) and isfinite(value):
        if abs(value) < EXACT:
            return str(int(value)) if value.is_integer() else repr(value)
        raise RowError(
            f"field {field!r}: {value!r} is a float of more than 2**53, which may have lost digits of the number that "
            "it was made of: write such ids as strings or integers"
        )
    raise RowError(f"field {field!r}: expected a string, a number or null, found {shown(value)}")


def shown(value: object) -> str:
    """A value and its type for messages, cut."""
    if value is None:
        return "null"
    try:
        return f"{value!r:.80} ({type(value).__name__})"
    except RecursionError:
        return f"a {type(value).__name__} that is nested hundreds deep"


def quoted(names: Iterable[str]) -> str:
    """Names for messages."""
    return ", ".join(repr(name) for name in names) or "none"


def no_field(row: Mapping[str, object], name: str) -> str:
    """That a row has no field ``name``, in words, with the fields that it has."""
    inside = row.get(column_of(name, row) or "")
    of = f"; in {column_of(name, row)!r}: {quoted(inside)}" if isinstance(inside, Mapping) else ""
    return f"fields found: {quoted(row)}{of}"
