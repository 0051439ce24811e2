"""The options that name the fields of a row."""

import codecs
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from ghoststore.errors import UsageError
from ghoststore.settings.option import check_at_least, check_own_types, option

ContentKind: TypeAlias = Literal["text", "prompt-completion", "messages", "chat-completion", "tokens"]
IdsDtype: TypeAlias = Literal["uint16", "uint32"]
MOST_RECORD_BYTES = 1 << 40
LARGEST_RECORD = 64 << 20
ROLES = ("text", "prompt", "completion", "messages", "id", "domain")
CONTENT_FIELDS: dict[ContentKind, tuple[str, ...]] = {
    "text": ("text",),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
}
"""For each kind of content the fields that a user may name. "tokens" has none, and
"chat-completion" is that of a prompt and a completion that are lists of messages.
"""


def check_text_options(encoding: object, delimiter: object) -> None:
    """UsageError for an encoding that Python does not know, and for a delimiter that is not one character."""
    if encoding is not None:
        try:
            codec = codecs.lookup(str(encoding))
        except (LookupError, ValueError):
            raise UsageError(f"`fields.encoding` {encoding!r} is unknown; known: utf-8, utf-16, cp1252, …") from None
        if not codec._is_text_encoding:  # rot13, base64 and the like
            raise UsageError(f"`fields.encoding` {encoding!r} is no encoding of text")
    if delimiter is not None and not (isinstance(delimiter, str) and len(delimiter) == 1 and delimiter not in '"\r\n'):
        raise UsageError(f"`fields.delimiter` must be one character, not {delimiter!r}")


def check_ids_options(dtype: object, window: object, document_end: object) -> None:
    """UsageError for ways to read token ids that do not go together, or that are none."""
    if dtype is not None and dtype not in get_args(IdsDtype):
        raise UsageError(f"`fields.ids_dtype` must be one of {', '.join(get_args(IdsDtype))}, not {dtype!r}")
    for name, value, least in (("ids_window", window, 2), ("ids_document_end", document_end, 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise UsageError(f"`fields.{name}` must be a whole number, at least {least}, not {value!r}")
    if window is not None and document_end is not None:
        raise UsageError("`fields.ids_window` and `fields.ids_document_end` are two ways to cut a stream: give one")


def delimiter_word(word: str) -> str:
    """The delimiter that a word of the command line means."""
    return {"tab": "\t", "\\t": "\t"}.get(word, word)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """Names of the fields of a row. A field that is None is looked for under its conventional name, in the first row.

    Raises UsageError for a prompt without a completion, and for more than one kind of content.
    """

    text: str | None = option(
        None,
        "Field with the text (default: 'text', else prompt and completion, else messages).",
        "Input",
        flag="--text-field",
    )
    prompt: str | None = option(None, "Field with the prompt, which is no target.", "Input", flag="--prompt-field")
    completion: str | None = option(
        None, "Field with the completion: the only targets of a row with a prompt.", "Input", flag="--completion-field"
    )
    messages: str | None = option(
        None,
        "Field with chat messages, which go through the tokenizer's chat template.",
        "Input",
        flag="--messages-field",
    )
    id: str | None = option(
        None, "Field with the id (default: 'id' where rows have it, else the row number).", "Input", flag="--id-field"
    )
    domain: str | None = option(
        None, "Field with the domain (default: 'domain' where rows have it).", "Input", flag="--domain-field"
    )
    max_record_bytes: int = option(
        LARGEST_RECORD, "Largest line, CSV record or row of a table; a larger one is refused.", "Advanced"
    )
    encoding: str | None = option(
        None, "Encoding of text files, such as cp1252 (default: that of the byte order mark, else UTF-8).", "Input"
    )
    delimiter: str | None = option(
        None,
        "Character between the cells of csv files, or the word tab (default: a comma; of .tsv a tab).",
        "Input",
        parse=delimiter_word,
    )
    ids_dtype: IdsDtype | None = option(
        None, "Numbers in a file of token ids alone, such as nanoGPT's train.bin (default: uint16).", "Advanced"
    )
    ids_window: int | None = option(
        None,
        "Tokens of a row of such a file, which begins with the last of the row before (default: the longest row).",
        "Advanced",
        metavar="TOKENS",
    )
    ids_document_end: int | None = option(
        None, "Rows of such a file are documents, which end with this token (50256 in GPT-2).", "Advanced", metavar="ID"
    )
    domain_parameter: str = option(
        "fields.domain", "The parameter that named the domain, for messages.", "Input", python_only=True
    )

    def __post_init__(self) -> None:
        check_own_types(self, "fields.")
        check_at_least(1, **{"fields.max_record_bytes": self.max_record_bytes})
        if self.max_record_bytes > MOST_RECORD_BYTES:
            raise UsageError(
                f"`fields.max_record_bytes` must be at most {MOST_RECORD_BYTES}, not {self.max_record_bytes}"
            )
        check_text_options(self.encoding, self.delimiter)
        check_ids_options(self.ids_dtype, self.ids_window, self.ids_document_end)
        kinds = [kind for kind, names in CONTENT_FIELDS.items() if any(getattr(self, n) is not None for n in names)]
        if len(kinds) > 1:
            roles = [role for kind in kinds for role in CONTENT_FIELDS[kind]]
            named = [f"`fields.{role}`" for role in roles if getattr(self, role) is not None]
            raise UsageError(
                f"{', '.join(named)} name different kinds of content: give `fields.text` alone, or `fields.prompt` and "
                "`fields.completion`, or `fields.messages` alone"
            )
        if (self.prompt is None) != (self.completion is None):
            raise UsageError("`fields.prompt` and `fields.completion` must be given together")
