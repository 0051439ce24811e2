"""Parsing one JSON value of a corpus, and saying why bytes are none."""

from __future__ import annotations

import json
from typing import Any

import orjson

from ghoststore.corpus.formats.encoded import NAME_IT

DEEPEST = 1024
"""Most levels of objects and lists in a row: those that orjson reads."""
_EXACT = float(1 << 63)


def loads(data: bytes | bytearray) -> object:
    """The value of a JSON text. orjson.JSONDecodeError if it is none.

    orjson makes a float of an integer beyond 64 bits. Where such a number is a field of a row, or of an object in one,
    the row has the integer, which may be an id.
    """
    row: object = orjson.loads(data)
    if isinstance(row, dict):
        for value in row.values():
            kind = type(value)
            if kind is float:
                if abs(value) >= _EXACT:
                    return _with_integers(row, data)
            elif kind is dict:
                for inner in value.values():
                    if isinstance(inner, float) and abs(inner) >= _EXACT:
                        return _with_integers(row, data)
    return row


def _with_integers(row: dict[str, Any], data: bytes | bytearray) -> dict[str, Any]:
    """``row`` with the integers that stand in its JSON text where orjson made large floats of them."""
    try:
        exact = json.loads(data, parse_constant=str)
    except (RecursionError, ValueError):  # as of an integer of more digits than Python converts
        return row
    for field, value in row.items():
        if isinstance(value, dict):
            value.update({key: exact[field][key] for key, inner in value.items() if _large(inner)})
        elif _large(value):
            row[field] = exact[field]
    return row


def _large(value: object) -> bool:
    return isinstance(value, float) and abs(value) >= _EXACT


def why_invalid(data: bytes | bytearray, error: orjson.JSONDecodeError) -> str:
    """Why ``data`` is no JSON, in words: what does not belong there, and what to do about it."""
    try:
        text = bytes(data).decode()
    except UnicodeDecodeError as wrong:
        return not_utf8(data, wrong)
    literals: list[str] = []
    try:
        json.loads(text, parse_constant=literals.append)
    except (RecursionError, ValueError):
        literals = []
    if literals:
        return (
            f"invalid JSON: {literals[0]} is a literal of Python's json, and no value of JSON: write null for a value "
            "that is missing (pandas' to_json does; json.dumps with allow_nan=False refuses it)"
        )
    return f"invalid JSON at column {error.colno}: {error.msg}"


def not_utf8(data: bytes | bytearray, error: UnicodeDecodeError) -> str:
    """That ``data`` is not UTF-8, in words."""
    return f"expected UTF-8, found byte 0x{data[error.start]:02x}: {NAME_IT}"
