"""The conversation in a row: messages with tools and documents, in the layouts in which people keep them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, TypeAlias

import orjson

from ghoststore.corpus.content import BESIDE_MESSAGES, Messages
from ghoststore.corpus.values import RowError, shown, value_at

_Objects: TypeAlias = list[dict[str, object]] | None
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""The role of each ``from`` of ShareGPT's turns (``{"from": "human", "value": "…"}``)."""


def conversation(row: dict[str, object], field: str, adds_nulls: bool) -> Messages | None:
    """The messages in ``field`` of a row, with tools and documents; None if the field is null.

    RowError for other values, KeyError for a row without the field. ``adds_nulls`` is that of the row's form.
    """
    messages = _messages(row, field, adds_nulls)
    return None if messages is None else Messages(messages, *_beside(row, adds_nulls), prompt=0)


def prompted(row: dict[str, object], prompt: str, completion: str, adds_nulls: bool) -> Messages | None:
    """The conversation whose beginning is in the field ``prompt``, and whose end, which is learnt, in ``completion``.
    None if one of the two is null. Raises as `conversation`.
    """
    before, after = _messages(row, prompt, adds_nulls), _messages(row, completion, adds_nulls)
    if before is None or after is None:
        return None
    return Messages([*before, *after], *_beside(row, adds_nulls), prompt=len(before))


def _messages(row: dict[str, object], field: str, adds_nulls: bool) -> list[dict[str, object]] | None:
    value = value_at(row, field)
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise RowError(f"field {field!r}: expected a non-empty list of messages, found {shown(value)}")
    messages = []
    for number, given in enumerate(value, start=1):
        message = _of_sharegpt(given, field, number)
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and _is_complete(message)):
            raise RowError(
                f"field {field!r}, message {number}: expected an object with a 'role' and a 'content', "
                f"found {shown(message)}"
            )
        messages.append(message)
    _check_json(messages, field, "a message")
    return [_normal_message(message, adds_nulls) for message in messages]


def _of_sharegpt(message: object, field: str, number: int) -> object:
    """A turn of ShareGPT as a message; anything else as it is. RowError for a speaker without a role."""
    if not (isinstance(message, dict) and "from" in message and "value" in message) or message.get("role") is not None:
        return message
    speaker = message["from"]
    if speaker not in SPEAKERS:
        raise RowError(
            f"field {field!r}, message {number}: 'from' is {shown(speaker)}, which is none of {', '.join(SPEAKERS)}: "
            "give the turn a 'role' and a 'content' in the file"
        )
    others = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
    return {"role": SPEAKERS[speaker], "content": message["value"], **others}


def _is_complete(message: dict[str, object]) -> bool:
    """Whether a message has content, or calls tools: a message of a model that only calls tools may lack
    the content.
    """
    return "content" in message or message.get("tool_calls") is not None


def _normal_message(message: dict[str, object], adds_nulls: bool) -> dict[str, object]:
    kept_keys = {key: value for key, value in message.items() if value is not None or key == "content"}
    if adds_nulls:
        kept_keys = {key: _without_nulls(value) for key, value in kept_keys.items()}
    return kept_keys if "content" in kept_keys else {"role": kept_keys.pop("role"), "content": None, **kept_keys}


def _beside(row: dict[str, object], adds_nulls: bool) -> tuple[_Objects, _Objects]:
    tools, documents = (_objects(row, name, adds_nulls) for name in BESIDE_MESSAGES)
    return tools, documents


def _objects(row: dict[str, object], field: str, adds_nulls: bool) -> list[dict[str, object]] | None:
    """The value of ``tools`` or ``documents``; None if the row has none."""
    value = row.get(field)
    if isinstance(value, str):
        adds_nulls = False  # nulls in a JSON string are part of the data
        with suppress(orjson.JSONDecodeError):  # other strings are refused below
            value = orjson.loads(value) if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(
            f"field {field!r}: expected a list of objects for the chat template, a JSON string of one, or null, found "
            f"{shown(value)}; rename the field if it is something else"
        )
    _check_json(value, field, "it")
    return [_without_nulls(item) for item in value] if adds_nulls else value


def _check_json(value: object, field: str, what: str) -> None:
    """RowError for values that JSON lacks, and for very deep nesting, which no template needs."""
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise RowError(f"field {field!r}: {what} holds a value that JSON lacks ({error})") from None


def _without_nulls(value: Any) -> Any:
    """``value`` without those keys of objects, at any depth, whose value is null."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
