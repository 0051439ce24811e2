"""From a row to a sample: the fields of a row, and their meaning.

A row is a mapping from field names to values; every form of file gives such rows. The meaning of fields is decided
once, on the first row (`resolve`). Every later row must fit that decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import date, datetime
from typing import Any, Protocol, TypeAlias, get_args

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from ghoststore.errors import CorpusError, UsageError
from ghoststore.settings.fields import CONTENT_FIELDS, ROLES, ContentKind, Fields

BESIDE_MESSAGES = ("tools", "documents")
"""Fields that go to the chat template with the messages. A row may lack them, which is the same as null."""
WELL_KNOWN = (
    "text",
    "prompt",
    "completion",
    "messages",
    "conversations",
    *BESIDE_MESSAGES,
    "functions",
    "system",
    "system_prompt",
    "instruction",
    "instructions",
    "input",
    "inputs",
    "output",
    "outputs",
    "target",
    "targets",
    "context",
    "passage",
    "passages",
    "article",
    "document",
    "history",
    "query",
    "question",
    "problem",
    "choices",
    "options",
    "answer",
    "answers",
    "response",
    "solution",
    "rationale",
    "explanation",
    "summary",
    "premise",
    "hypothesis",
    "chosen",
    "rejected",
)
"""Fields in which common layouts keep a part of a sample's text."""

CANONICAL = orjson.OPT_SERIALIZE_NUMPY


class RowError(ValueError):
    """An error in one row. `Corpus` adds the file and the line, and raises `CorpusError`."""


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A prompt, whose tokens are not targets, and its completion."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Messages:
    """A conversation for the chat template, with at least one message. Every message has a "role" (str) and a
    "content".

    Other keys of a message are left out if their value is null, as transformers does. A null inside a value, in tools
    or in documents stays, except in forms of file whose schema gives every object every key: there it is left out.
    """

    messages: list[dict[str, object]]
    tools: list[dict[str, object]] | None = None
    """JSON schemas of the tools that the model may call; None if the row has none."""
    documents: list[dict[str, object]] | None = None

    def to_json(self) -> dict[str, object]:
        """``messages``, and ``tools`` and ``documents`` if there are any."""
        beside = {"tools": self.tools, "documents": self.documents}
        return {"messages": self.messages, **{name: value for name, value in beside.items() if value is not None}}


class Vocabulary(Protocol):
    """The tokenizer that made tokens: its identity, and decoding."""

    @property
    def tokenizer_identity(self) -> dict[str, Any]: ...

    def decode(self, ids: NDArray[np.int32]) -> str: ...


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The tokens of a sample from token shards. ``data`` are the ids as little-endian int32. Tokens before
    ``first_target`` (at least 1) are not targets.
    """

    data: bytes
    first_target: int
    vocabulary: Vocabulary = field(compare=False, repr=False)

    @property
    def ids(self) -> NDArray[np.int32]:
        """(tokens,) int32: a copy of the ids."""
        return np.frombuffer(self.data, dtype="<i4").astype(np.int32)


Content: TypeAlias = str | PromptCompletion | Messages | Tokenized
Kept: TypeAlias = str | bool | int | float | date | datetime | None
"""The value of a field that a part keeps. A time is in UTC, without a zone."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a corpus.

    ``source_row`` is its place in the corpus, counted from 0. ``id`` is the id field, or that place in decimal.
    ``content`` is None if the field is null: such a sample is not usable, but keeps its row. ``file`` is an index into
    `Corpus.files`. ``offset`` is the byte at which the record begins in that file (after decompression of .gz and
    .zst), or -1 in forms without offsets.
    """

    source_row: int
    id: str
    domain: str | None
    content: Content | None
    offset: int
    file: int
    kept: tuple[Kept, ...] = ()
    """The values of the fields in `Corpus.keep`. They are no part of `canonical`."""

    def canonical(self) -> bytes:
        """The bytes that fingerprints cover: JSON of content, domain and id, without the sample's place.

        The keys of the row, the content and each message are sorted, because they are looked up by name. Keys inside
        the values of a message, in tools and in documents keep their order, because a chat template prints them in that
        order; nulls there stay, too. So a row has the same bytes in every form of file that keeps order and nulls.
        """
        plain: object = self.content
        if isinstance(plain, PromptCompletion):
            plain = {"completion": plain.completion, "prompt": plain.prompt}
        elif isinstance(plain, Messages):
            plain = _sorted({**plain.to_json(), "messages": [_sorted(message) for message in plain.messages]})
        elif isinstance(plain, Tokenized):
            plain = {"first_target": plain.first_target, "tokens": np.ascontiguousarray(plain.ids)}
        return orjson.dumps({"content": plain, "domain": self.domain, "id": self.id}, option=CANONICAL)

    def digest(self) -> int:
        """The xxh3_64 hash of `canonical`, in [0, 2**64)."""
        return xxhash.xxh3_64_intdigest(self.canonical())

    def texts(self) -> list[str]:
        """The texts of the content, in order; none for tokens. Values of a message that are not strings (parts, tool
        calls) are shown as JSON. Tools and documents beside the messages are left out.
        """
        match self.content:
            case None | Tokenized():
                return []
            case PromptCompletion(prompt, completion):
                return [prompt, completion]
            case Messages(messages=messages):
                return [_message_text(message) for message in messages]
            case text:
                return [text]

    def preview(self) -> str:
        """The whole content as readable text. Tokens are decoded. "" for a sample without content."""
        if not isinstance(self.content, Messages):
            return self.own_text()
        beside = {name: value for name, value in self.content.to_json().items() if name != "messages"}
        return "\n".join([*(f"{name}: {_json(value)}" for name, value in beside.items()), self.own_text()])

    def own_text(self) -> str:
        """The text of `preview` without tools and documents, which are often the same for many samples."""
        if isinstance(self.content, Tokenized):
            return self.content.vocabulary.decode(self.content.ids)
        if isinstance(self.content, Messages):
            roles = [message["role"] for message in self.content.messages]
            return "\n".join(f"{role}: {text}" for role, text in zip(roles, self.texts(), strict=True))
        return "".join(self.texts())


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedFields:
    """The fields of a corpus after the decision. Of the content fields exactly those of its ``kind`` are set.

    Raises UsageError if names do not fit the kind, as in a manifest that was changed by hand.
    """

    kind: ContentKind
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    id: str | None = None
    domain: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(ContentKind):
            raise UsageError(f"kind of content: expected one of {get_args(ContentKind)}, found {self.kind!r}")
        for role in ROLES:
            name = getattr(self, role)
            wanted = role in CONTENT_FIELDS.get(self.kind, ())
            if name is None and not wanted:
                continue
            if not isinstance(name, str) or not (wanted or role in ("id", "domain")):
                expected = "a field name" if wanted else "no field"
                raise UsageError(f"{role} field of {self.kind} content: expected {expected}, found {name!r}")

    def to_json(self) -> dict[str, str | None]:
        """A dictionary of JSON values, from which `from_json` makes the same fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> ResolvedFields:
        """The inverse of `to_json`. UsageError for any other value."""
        names = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or sorted(value) != sorted(names):
            raise UsageError(f"resolved fields: expected an object of {names}, found {value!r:.200}")
        return cls(**value)  # type: ignore[arg-type]

    def columns(self) -> list[str]:
        """The names of all fields to read, each once. A row may lack those of BESIDE_MESSAGES."""
        beside = BESIDE_MESSAGES if self.kind == "messages" else ()
        return list(dict.fromkeys([*(n for role in ROLES if (n := getattr(self, role)) is not None), *beside]))

    def left_out(self) -> set[str]:
        """The names of fields that are not read, although they hold a part of a sample's text in common layouts."""
        return set() if self.kind == "tokens" else set(WELL_KNOWN) - set(self.columns())

    def sample(self, row: object, *, source_row: int, file: int, offset: int, adds_nulls: bool = False) -> Sample:
        """The sample of a row. RowError for a missing field or a value of a wrong type.

        ``adds_nulls`` says that the form of file gives every object all keys of a schema, with null for missing ones.
        """
        row = check_object(row)
        try:
            content = _text(row, self.text) if self.text is not None else self._structured(row, adds_nulls)
            name = str(source_row) if self.id is None else _label(row, self.id)
            domain = None
            if self.domain is not None and row[self.domain] is not None:
                domain = _label(row, self.domain)
        except KeyError as error:
            raise RowError(f"no field {error.args[0]!r}; fields found: {_quoted(row)}") from None
        return Sample(source_row, name, domain, content, offset, file)

    def _structured(self, row: dict[str, object], adds_nulls: bool) -> Content | None:
        if self.kind == "tokens":
            tokens = row["tokens"]
            if not isinstance(tokens, Tokenized):
                raise RowError(f"field 'tokens': expected a sample of token shards, found {_shown(tokens)}")
            return tokens
        if self.messages is not None:
            return _conversation(row, self.messages, adds_nulls)
        assert self.prompt is not None
        assert self.completion is not None
        prompt, completion = _text(row, self.prompt), _text(row, self.completion)
        if prompt is None or completion is None:
            return None
        return PromptCompletion(prompt, completion)


def resolve(fields: Fields, first_row: Mapping[str, object], where: str) -> ResolvedFields:
    """Decide which fields to read, from the options ``fields`` and the first row. ``where`` names that row in errors.

    The content is in the given fields; otherwise in "text", in "prompt" and "completion", or in "messages", whichever
    comes first. Raises CorpusError for a given name that the row lacks, and if there is no content field.
    """
    if isinstance(first_row.get("tokens"), Tokenized):
        named_fields = [f"`fields.{role}`" for role in ROLES if getattr(fields, role) is not None]
        if named_fields:
            raise UsageError(f"{where}: token shards have no fields to name; leave out {', '.join(named_fields)}")
        return ResolvedFields(kind="tokens", id="id", domain="domain")
    found_fields = f"fields found: {_quoted(first_row)}"
    for role in ROLES:
        name = getattr(fields, role)
        if name is not None and name not in first_row:
            parameter = fields.domain_parameter if role == "domain" else f"fields.{role}"
            raise CorpusError(f"{where}: no field {name!r} (from `{parameter}`); {found_fields}")
    labels = {
        label: label if name is None and label in first_row else name
        for label, name in (("id", fields.id), ("domain", fields.domain))
    }
    for kind, roles in CONTENT_FIELDS.items():
        if getattr(fields, roles[0]) is not None:
            names = {role: getattr(fields, role) for role in roles}
            return ResolvedFields(kind=kind, **names, **labels)
    for kind, roles in CONTENT_FIELDS.items():
        if all(role in first_row for role in roles):
            return ResolvedFields(kind=kind, **{role: role for role in roles}, **labels)
    raise CorpusError(
        f"{where}: no field 'text', 'prompt' with 'completion', or 'messages'; {found_fields}. "
        "Name the fields with `fields.text`, `fields.prompt` and `fields.completion`, or `fields.messages`"
    )


def check_object(row: object) -> dict[str, object]:
    """``row``, if it is a JSON object; else RowError."""
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {_shown(row)}")
    return row


def _text(row: dict[str, object], field: str) -> str | None:
    value = row[field]
    if value is None or isinstance(value, str):
        return value
    raise RowError(f"field {field!r}: expected a string or null, found {_shown(value)}")


def _label(row: dict[str, object], field: str) -> str:
    value = row[field]
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"field {field!r}: expected a string or an integer, found {_shown(value)}")


def _conversation(row: dict[str, object], field: str, adds_nulls: bool) -> Messages | None:
    """The messages in ``field`` of a row, with tools and documents; None if the field is null. RowError for other
    values.
    """
    value = row[field]
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise RowError(f"field {field!r}: expected a non-empty list of messages, found {_shown(value)}")
    for number, message in enumerate(value, start=1):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and _is_complete(message)):
            raise RowError(
                f"field {field!r}, message {number}: expected an object with a 'role' and a 'content', "
                f"found {_shown(message)}"
            )
    _check_json(value, field, "a message")
    tools, documents = (_objects(row, name, adds_nulls) for name in BESIDE_MESSAGES)
    return Messages([_normal_message(message, adds_nulls) for message in value], tools, documents)


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
            f"{_shown(value)}; rename the field if it is something else"
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


def _sorted(value: dict[str, object]) -> dict[str, object]:
    """``value`` with its own keys sorted. Keys inside its values keep their order."""
    return dict(sorted(value.items()))


def _message_text(message: dict[str, object]) -> str:
    """The content of a message, and after it its other keys (tool calls, names) as JSON."""
    content = message["content"]
    other_keys = {key: value for key, value in message.items() if key not in ("role", "content")}
    texts = [content if isinstance(content, str) else "" if content is None else _json(content)]
    return " ".join(filter(None, [*texts, _json(other_keys) if other_keys else ""]))


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


def _shown(value: object) -> str:
    if value is None:
        return "null"
    try:
        return f"{value!r:.80} ({type(value).__name__})"
    except RecursionError:
        return f"a {type(value).__name__} that is nested hundreds deep"


def _quoted(names: Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
