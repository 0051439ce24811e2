"""From a row to a sample: the fields of a row, and their meaning.

A row is a mapping from field names to values; every form of file gives such rows. The meaning of fields is decided
once, on the first row (`resolve`). Every later row must fit that decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import date, datetime
from typing import Any, TypeAlias, get_args

import numpy as np
import orjson
import xxhash

from ghoststore.corpus.content import BESIDE_MESSAGES, Content, Messages, PromptCompletion, Tokenized
from ghoststore.corpus.conversations import conversation, prompted
from ghoststore.corpus.values import (
    RowError,
    check_object,
    has_value,
    label_of,
    no_field,
    quoted,
    shown,
    text_of,
    value_at,
)
from ghoststore.errors import CorpusError, UsageError
from ghoststore.settings.fields import (
    CONTENT_FIELDS,
    ROLES,
    ContentKind,
    Fields,
    IdsDtype,
    check_ids_options,
    check_text_options,
)

WELL_KNOWN = (
    "text",
    "prompt",
    "completion",
    "messages",
    "conversations",
    "conversation",
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

ROLES_OF: dict[ContentKind, tuple[str, ...]] = {**CONTENT_FIELDS, "chat-completion": ("prompt", "completion")}
"""The content fields of each kind. A prompt and a completion that are lists of messages are a kind of their own."""
CONVERSATIONS = ("messages", "conversations", "conversation")
"""Fields in which conversations are looked for."""
READING = ("encoding", "delimiter", "ids_dtype", "ids_window", "ids_document_end")
"""Options of how to read a file of text or of token ids, which resolved fields keep."""
CANONICAL = orjson.OPT_SERIALIZE_NUMPY


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
    place: object = field(default=None, compare=False, repr=False)
    """The file and the line or row, as text for messages; None if the sample was not read in order."""

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
            plain = plain.canonical()
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
        beside = [f"{name}: {_json(value)}" for name, value in self.content.beside.items()]
        return "\n".join([*beside, self.own_text()])

    def own_text(self) -> str:
        """The text of `preview` without tools and documents, which are often the same for many samples."""
        if isinstance(self.content, Tokenized):
            return self.content.vocabulary.decode(self.content.ids)
        if isinstance(self.content, Messages):
            roles = [message["role"] for message in self.content.messages]
            return "\n".join(f"{role}: {text}" for role, text in zip(roles, self.texts(), strict=True))
        return "".join(self.texts())

    def __str__(self) -> str:
        """What messages call the sample: its id, and where it stands if that is known."""
        return f"sample {self.id!r}" if self.place is None else f"{self.place}: sample {self.id!r}"


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
    encoding: str | None = None
    """The encoding of text files that was given; None for UTF-8, or what a file says by its byte order mark."""
    delimiter: str | None = None
    """The delimiter of cells that was given; None for that of the form."""
    ids_dtype: IdsDtype | None = None
    """The numbers in a file of token ids that were given; None for what it says, else uint16."""
    ids_window: int | None = None
    """Tokens of a window of a stream of token ids; None for other forms."""
    ids_document_end: int | None = None
    """The token that ends a document of such a stream; None for windows."""

    def __post_init__(self) -> None:
        check_text_options(self.encoding, self.delimiter)
        check_ids_options(self.ids_dtype, self.ids_window, self.ids_document_end)
        if self.kind not in get_args(ContentKind):
            raise UsageError(f"kind of content: expected one of {get_args(ContentKind)}, found {self.kind!r}")
        for role in ROLES:
            name = getattr(self, role)
            wanted = role in ROLES_OF.get(self.kind, ())
            if name is None and not wanted:
                continue
            if not isinstance(name, str) or not (wanted or role in ("id", "domain")):
                expected = "a field name" if wanted else "no field"
                raise UsageError(f"{role} field of {self.kind} content: expected {expected}, found {name!r}")

    def to_json(self) -> dict[str, str | int | None]:
        """A dictionary of JSON values, from which `from_json` makes the same fields. How to read a file is in it if it
        was given.
        """
        return {name: value for name, value in asdict(self).items() if value is not None or name not in READING}

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> ResolvedFields:
        """The inverse of `to_json`. UsageError for any other value."""
        names = [field.name for field in fields(cls) if field.name not in READING]
        if not isinstance(value, Mapping) or sorted(set(value) - set(READING)) != sorted(names):
            raise UsageError(f"resolved fields: expected an object of {names}, found {value!r:.200}")
        return cls(**value)  # type: ignore[arg-type]

    def columns(self) -> list[str]:
        """The names of all fields to read, each once. A row may lack those of BESIDE_MESSAGES."""
        beside = BESIDE_MESSAGES if self.kind in ("messages", "chat-completion") else ()
        return list(dict.fromkeys([*(n for role in ROLES if (n := getattr(self, role)) is not None), *beside]))

    def left_out(self) -> set[str]:
        """The names of fields that are not read, although they hold a part of a sample's text in common layouts."""
        return set() if self.kind == "tokens" else set(WELL_KNOWN) - set(self.columns())

    def sample(
        self, row: object, *, source_row: int, file: int, offset: int, adds_nulls: bool = False, place: object = None
    ) -> Sample:
        """The sample of a row. RowError for a missing field or a value of a wrong type.

        ``adds_nulls`` says that the form of file gives every object all keys of a schema, with null for missing ones.
        A row whose id is null is called by its number, as one without an id field.
        """
        row = check_object(row)
        try:
            content = text_of(row, self.text) if self.text is not None else self._structured(row, adds_nulls)
            name = None if self.id is None else label_of(row, self.id)
            domain = None if self.domain is None else label_of(row, self.domain)
        except KeyError as error:
            raise RowError(f"no field {error.args[0]!r}; {no_field(row, error.args[0])}") from None
        return Sample(source_row, str(source_row) if name is None else name, domain, content, offset, file, (), place)

    def _structured(self, row: dict[str, object], adds_nulls: bool) -> Content | None:
        if self.kind == "tokens":
            tokens = row["tokens"]
            if not isinstance(tokens, Tokenized):
                raise RowError(f"field 'tokens': expected a sample of token shards, found {shown(tokens)}")
            return tokens
        if self.messages is not None:
            return conversation(row, self.messages, adds_nulls)
        assert self.prompt is not None
        assert self.completion is not None
        if self.kind == "chat-completion":
            return prompted(row, self.prompt, self.completion, adds_nulls)
        prompt, completion = text_of(row, self.prompt), text_of(row, self.completion)
        if prompt is None or completion is None:
            return None
        return PromptCompletion(prompt, completion)


def resolve(fields: Fields, first_row: Mapping[str, object], where: str) -> ResolvedFields:
    """Decide which fields to read, from the options ``fields`` and the first row. ``where`` names that row in errors.

    The content is in the given fields; otherwise in "text", in "prompt" and "completion", or in one of CONVERSATIONS,
    whichever comes first. Raises CorpusError for a given name that the row lacks, and if there is no content field.
    """
    reading: dict[str, Any] = {name: getattr(fields, name) for name in READING}
    if isinstance(first_row.get("tokens"), Tokenized):
        named_fields = [f"`fields.{role}`" for role in ROLES if getattr(fields, role) is not None]
        if named_fields:
            raise UsageError(f"{where}: token shards have no fields to name; leave out {', '.join(named_fields)}")
        return ResolvedFields(kind="tokens", id="id", domain="domain", **reading)
    for role in ROLES:
        name = getattr(fields, role)
        if name is not None and not has_value(first_row, name):
            parameter = fields.domain_parameter if role == "domain" else f"fields.{role}"
            raise CorpusError(f"{where}: no field {name!r} (from `{parameter}`); {no_field(first_row, name)}")
    labels = {
        label: label if name is None and label in first_row else name
        for label, name in (("id", fields.id), ("domain", fields.domain))
    }
    kind = next((kind for kind, roles in CONTENT_FIELDS.items() if getattr(fields, roles[0]) is not None), None)
    if kind is None:
        kind, names = _conventional(first_row, where)
    else:
        names = {role: getattr(fields, role) for role in CONTENT_FIELDS[kind]}
    if kind == "prompt-completion" and any(isinstance(value_at(first_row, name), list) for name in names.values()):
        kind = "chat-completion"
    return ResolvedFields(kind=kind, **{**reading, **names, **labels})


def _conventional(first_row: Mapping[str, object], where: str) -> tuple[ContentKind, dict[str, str]]:
    """(kind, the names of its fields by role) of a row whose fields have their conventional names."""
    for kind, roles in CONTENT_FIELDS.items():
        if all(role in first_row for role in roles):
            return kind, {role: role for role in roles}
    for name in CONVERSATIONS:
        if isinstance(first_row.get(name), list):
            return "messages", {"messages": name}
    raise CorpusError(
        f"{where}: no field 'text', 'prompt' with 'completion', 'messages' or 'conversations'; fields found: "
        f"{quoted(first_row)}. Name the fields with `fields.text`, `fields.prompt` and `fields.completion`, or "
        "`fields.messages`; one inside an object is `meta.name`"
    )


def _message_text(message: dict[str, object]) -> str:
    """The content of a message, and after it its other keys (tool calls, names) as JSON."""
    content = message["content"]
    other_keys = {key: value for key, value in message.items() if key not in ("role", "content")}
    texts = [content if isinstance(content, str) else "" if content is None else _json(content)]
    return " ".join(filter(None, [*texts, _json(other_keys) if other_keys else ""]))


def _json(value: object) -> str:
    return orjson.dumps(value).decode()
