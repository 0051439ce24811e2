"""Tokenizing a prompt with its completion: the whole text at once, with offsets to find where the completion begins.

Tokenizing the two separately and joining the tokens would put an end-of-text token, a begin-of-text token or a dummy
space between them, and would split words that cross the boundary.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.corpus import PromptCompletion
from ghoststore.errors import UsageError

COMPOSED = 16
"""Number of characters before the boundary that a normalizer may compose with the first character after it. No script
combines more."""


class WholeTexts:
    """Tokenizes prompts with their completions, with one tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def refuse_without_offsets(self) -> None:
        """UsageError for a tokenizer without offsets: the characters that each token stands for."""
        if not getattr(self._tokenizer, "is_fast", False):
            raise UsageError(
                f"the corpus has prompts with completions, and this tokenizer ({type(self._tokenizer).__name__}) does "
                "not tell where in the tokens of the whole text the completion begins: it is none of the tokenizers "
                "library. Save it as a tokenizer.json, or give whole texts (`fields.text`) or `fields.messages`"
            )

    def encode(self, pairs: Sequence[PromptCompletion], *, special: bool = True) -> list[tuple[NDArray[np.int32], int]]:
        """(tokens of prompt + completion, `first_target`) of each pair, with the special tokens that the tokenizer
        adds, if ``special``.

        UsageError for a tokenizer without offsets.
        """
        self.refuse_without_offsets()
        texts = [pair.prompt + pair.completion for pair in pairs]
        encoded = self._tokenizer(
            texts,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        added = [np.asarray(mask, dtype=bool) for mask in encoded["special_tokens_mask"]]
        offsets = [_offsets(offsets_of)[~of] for offsets_of, of in zip(encoded["offset_mapping"], added, strict=True)]
        if self._untrimmed is not None:
            untrimmed = self._untrimmed.encode_batch(texts, add_special_tokens=False)
            offsets = [_offsets(encoding.offsets) for encoding in untrimmed]
        return [
            (np.asarray(ids, dtype=np.int32), first_target(offsets_of, of, pair.prompt, pair.completion))
            for ids, offsets_of, of, pair in zip(encoded["input_ids"], offsets, added, pairs, strict=True)
        ]

    @cached_property
    def _untrimmed(self) -> Any:
        """A copy of the tokenizer whose offsets cover every character of a token; None if its own offsets do so.

        A post-processor with ``trim_offsets`` leaves out the spaces of a token. So it would hide that a token with
        spaces at its end crosses the boundary.
        """
        from tokenizers import Tokenizer

        own = self._tokenizer.backend_tokenizer
        state = json.loads(own.to_str())
        if not _trims(state["post_processor"]):
            return None
        copy = Tokenizer.from_str(json.dumps({**state, "post_processor": None, "truncation": None, "padding": None}))
        copy.encode_special_tokens = own.encode_special_tokens
        return copy


def first_target(offsets_T2: NDArray[np.int64], added: NDArray[np.bool_], prompt: str, completion: str) -> int:
    """The place of the completion's first token among those of ``prompt + completion``; their number if it has none.

    ``added`` is true for the special tokens that the tokenizer adds. ``offsets_T2`` are (first character, one past the
    last) of each of the other tokens. A token that crosses the boundary belongs to the completion, so that the whole
    completion is a target. Special tokens after the completion are targets, too; those before it are not.
    """
    if not completion:
        return len(added)
    (beyond,) = np.nonzero(offsets_T2[:, 1] > _boundary(offsets_T2, prompt, completion))
    return int(np.flatnonzero(~added)[beyond[0]]) if len(beyond) else len(added)


def _boundary(offsets_T2: NDArray[np.int64], prompt: str, completion: str) -> int:
    """The character at which the completion begins: the length of the prompt, in most cases.

    If a normalizer composed the prompt's last character with the completion's first (an e and an accent), it is where
    the composed character begins, because the offsets of that cover only its first part.
    """
    end = len(prompt)
    if completion[0].isascii() or not _composes(prompt[-COMPOSED:], completion[0]):
        return end
    if ((offsets_T2[:, 0] <= end) & (offsets_T2[:, 1] > end)).any():
        return end  # the completion's part has tokens of its own
    (before,) = np.nonzero(offsets_T2[:, 1] <= end)
    return int(offsets_T2[before[-1], 0]) if len(before) else end


def _composes(before: str, character: str) -> bool:
    def length(text: str) -> int:
        return len(unicodedata.normalize("NFKC", text))

    return length(before + character) <= length(before)


def _offsets(pairs: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    return np.asarray(pairs, dtype=np.int64).reshape(-1, 2)


def _trims(processor: Any) -> bool:
    """Whether a post-processor of a tokenizer.json, or one inside it, trims offsets."""
    if processor is None:
        return False
    return bool(processor.get("trim_offsets")) or any(map(_trims, processor.get("processors", ())))
