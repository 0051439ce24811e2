"""The options that name the fields of a row."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from ghoststore.errors import UsageError
from ghoststore.settings.option import check_at_least, option

ContentKind: TypeAlias = Literal["text", "prompt-completion", "messages", "tokens"]
MOST_RECORD_BYTES = 1 << 40
LARGEST_RECORD = 64 << 20
ROLES = ("text", "prompt", "completion", "messages", "id", "domain")
CONTENT_FIELDS: dict[ContentKind, tuple[str, ...]] = {
    "text": ("text",),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
}
"""For each kind of content the fields that a user may name. "tokens" has none."""


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
    domain_parameter: str = option(
        "fields.domain", "The parameter that named the domain, for messages.", "Input", python_only=True
    )

    def __post_init__(self) -> None:
        check_at_least(1, **{"fields.max_record_bytes": self.max_record_bytes})
        if self.max_record_bytes > MOST_RECORD_BYTES:
            raise UsageError(
                f"`fields.max_record_bytes` must be at most {MOST_RECORD_BYTES}, not {self.max_record_bytes}"
            )
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
