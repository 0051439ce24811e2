"""What a sample of a corpus is: a text, a prompt with its completion, a conversation, or tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

BESIDE_MESSAGES = ("tools", "documents")
"""Fields that go to the chat template with the messages. A row may lack them, which is the same as null."""


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
    prompt: int = 0
    """Number of messages at the beginning that are the prompt, which is not learnt; 0 for a conversation without one,
    of which all is learnt.
    """

    @property
    def beside(self) -> dict[str, object]:
        """``tools`` and ``documents`` if there are any."""
        beside = {"tools": self.tools, "documents": self.documents}
        return {name: value for name, value in beside.items() if value is not None}

    def canonical(self) -> dict[str, object]:
        """What fingerprints cover. The keys of each message are sorted, because they are looked up by name."""
        prompt = {"prompt": self.prompt} if self.prompt else {}
        return sorted_keys({**self.beside, **prompt, "messages": [sorted_keys(message) for message in self.messages]})


def sorted_keys(value: dict[str, object]) -> dict[str, object]:
    """``value`` with its own keys sorted. Keys inside its values keep their order."""
    return dict(sorted(value.items()))


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
