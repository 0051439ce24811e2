"""In the place of a tokenizer, where a checkpoint has none: a corpus of token ids needs none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from ghoststore.errors import UsageError


class TokenIds:
    """Takes the ids of a vocabulary as they are, and has no texts. It stands where a tokenizer of transformers does."""

    is_fast = False
    chat_template = None
    truncation_side = "right"

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __str__(self) -> str:
        return f"no tokenizer, ids 0 to {self.vocabulary - 1}"

    def get_vocab(self) -> dict[str, int]:
        """The largest id, by its text."""
        return {str(self.vocabulary - 1): self.vocabulary - 1}

    def identity(self) -> dict[str, Any]:
        """In the place of :func:`ghoststore.checkpoint.tokenizer_identity.tokenizer_identity`."""
        return {"fingerprint": f"none:{self.vocabulary}", "class": "TokenIds", "special_tokens": {}}

    def decode(self, ids: Sequence[int] | int, **_: Any) -> str:
        """The ids themselves."""
        return str(ids) if isinstance(ids, int) else " ".join(map(str, ids))

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """UsageError: there is a text."""
        raise UsageError(NO_TOKENIZER)


NO_TOKENIZER = (
    "a text, and the checkpoint has no tokenizer: give `tokenizer`, a folder that save_pretrained wrote. For GPT-2's "
    'tokens AutoTokenizer.from_pretrained("gpt2").save_pretrained(folder) writes it; for the characters of a meta.pkl '
    "docs/nanogpt.md has the lines. Token ids (nanoGPT's .bin) need none"
)
