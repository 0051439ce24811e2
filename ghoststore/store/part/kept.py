"""The fields of samples that a part keeps as columns: their types, and how they are stored.

Field i is the array ``field_<i>``; one more array, ``field_null``, says which values are null. The manifest names the
fields (``storage.fields``); a part that keeps none has none of these arrays.

Legend: S rows of a span, F kept fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ghoststore.store.spans.reader import read_span

if TYPE_CHECKING:
    from ghoststore.store.part.part import Part

FieldType = Literal["string", "int", "float", "bool", "date", "timestamp"]
DTYPES: dict[FieldType, Any] = {
    "string": str,
    "int": "<i8",
    "float": "<f8",
    "bool": "|u1",
    "date": "<i4",  # days since 1970-01-01
    "timestamp": "<i8",  # microseconds since 1970-01-01, UTC
}
NULL = "field_null"
MOST_FIELDS = 256
RESERVED = (
    "id",
    "domain",
    "loss",
    "n_tokens",
    "status",
    "source_row",
    "source_file",
    "window_start",
    "text",
    # Columns of an exported table:
    "row",
    "norm",
    "vector",
    "scale",
)
"""Names that a kept field cannot have: conditions and exports use them for columns of every part."""
_EPOCH = datetime(1970, 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptField:
    """A field that a part keeps. ValueError for an unknown type, and for a name that columns of every part have."""

    name: str
    type: FieldType

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or self.type not in get_args(FieldType):
            raise ValueError(f"no field that a part keeps: {self.name!r:.60} of type {self.type!r:.40}")
        if self.name.lower() in RESERVED:
            raise ValueError(f"no part keeps a field {self.name!r:.60}: a column of every part has that name")


def array_name(place: int) -> str:
    """The array of the field at ``place``."""
    return f"field_{place}"


def fields_of(storage: Mapping[str, Any]) -> tuple[KeptField, ...]:
    """The kept fields of a manifest's storage section. KeyError, TypeError or ValueError if it describes none."""
    described = storage.get("fields", ())
    if len(described) > MOST_FIELDS:
        raise ValueError(f"it keeps {len(described)} fields; at most {MOST_FIELDS} can be")
    fields = tuple(KeptField(name=field["name"], type=field["type"]) for field in described)
    if len({field.name.lower() for field in fields}) < len(fields):
        raise ValueError("two of its kept fields have the same name")
    return fields


def dtypes_of(fields: Sequence[KeptField]) -> dict[str, Any]:
    """The dtype of each array of the kept fields, without :data:`NULL`."""
    return {array_name(place): DTYPES[field.type] for place, field in enumerate(fields)}


def stored_fields(fields: Sequence[KeptField], values: Sequence[Sequence[Any]]) -> dict[str, NDArray[Any]]:
    """The arrays of a span. ``values`` has for each row one value a field, None for null."""
    if not fields:
        return {}
    arrays: dict[str, NDArray[Any]] = {
        NULL: np.array([[value is None for value in row] for row in values], dtype=np.uint8).reshape(-1, len(fields))
    }
    for place, field in enumerate(fields):
        blank: Any = "" if field.type == "string" else 0
        column = [blank if row[place] is None else _stored(row[place], field.type) for row in values]
        dtype = DTYPES[field.type]
        arrays[array_name(place)] = np.array(column, dtype=object if dtype is str else dtype)
    return arrays


def _stored(value: Any, kind: FieldType) -> Any:
    if kind == "date":
        return value.toordinal() - _EPOCH.toordinal()
    if kind == "timestamp":
        return (value - _EPOCH) // timedelta(microseconds=1)
    return value


def read_field(part: Part, place: int, span: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """((S,) values as stored, (S,) whether they are null) of the kept field at ``place``, of a committed span.

    CorruptError for a damaged chunk.
    """
    null = read_span(part, NULL, span)[:, place].astype(bool)
    if part.layout.fields[place].type == "string":
        return part.read(array_name(place), *part.layout.span_of(span)), null
    return read_span(part, array_name(place), span).copy(), null


def python_values(values: NDArray[Any], null: NDArray[np.bool_], kind: FieldType) -> NDArray[Any]:
    """(S,) objects: strings, numbers, truth values; dates and timestamps as ISO 8601; None for null."""
    plain: Any = values
    if kind in ("date", "timestamp"):
        plain = np.datetime_as_string(values.astype("datetime64[D]" if kind == "date" else "datetime64[us]"))
    elif kind == "bool":
        plain = values.astype(bool)
    made = np.empty(len(values), dtype=object)
    made[:] = [None if absent else value for value, absent in zip(plain.tolist(), null, strict=True)]
    return made
