"""The values of fields that a part keeps beside its samples."""

from __future__ import annotations

from datetime import UTC, date, datetime

from ghoststore.corpus.fields import Kept
from ghoststore.corpus.values import RowError, check_object, value_at


def kept_value(row: object, field: str) -> Kept:
    """The value of a field that is kept beside the sample; None where the row lacks it.

    RowError for a value that no column holds: an object, a list, bytes, an integer beyond 64 bits.
    """
    try:
        value = value_at(check_object(row), field)
    except KeyError:
        return None
    if isinstance(value, datetime):
        return value if value.tzinfo is None else value.astimezone(UTC).replace(tzinfo=None)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise RowError(f"field {field!r}: {value} does not fit in 64 bits, so `keep_fields` cannot keep it as a number")
    if value is None or isinstance(value, str | int | float | date):
        return value
    raise RowError(
        f"field {field!r}: a field that `keep_fields` keeps holds text, a number, true or false, a date or null; found "
        f"{value!r:.80} ({type(value).__name__}). Put what you filter by in a field of its own in the corpus"
    )
