"""A prompt and its completion as tokens: the whole text is tokenized once, and offsets tell where the latter begins.

Tokenizing the two apart and joining the tokens would put an end-of-text token, a begin-of-text token or a dummy space
between them, and cut words in two that the model sees as one.
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
"""Characters before the boundary that may become one with the first after it; more than any script stacks."""


class WholeTexts:
    """Tokenizes prompts with their completions by one tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def refuse_without_offsets(self) -> None:
        """UsageError for a tokenizer that does not tell which characters a token stands for."""
        if not getattr(self._tokenizer, "is_fast", False):
            raise UsageError(
                f"the corpus has prompts with completions, and this tokenizer ({type(self._tokenizer).__name__}) does "
                "not tell where in the tokens of the whole text the completion begins: it is none of the tokenizers "
                "library. Save it as a tokenizer.json, or give whole texts (`fields.text`) or `fields.messages`"
            )

    def encode(self, pairs: Sequence[PromptCompletion]) -> list[tuple[NDArray[np.int32], int]]:
        """(tokens of prompt + completion with the special tokens that the tokenizer adds, first target) of each pair;
        see `first_target`. UsageError for a tokenizer without offsets.
        """
        self.refuse_without_offsets()
        texts = [pair.prompt + pair.completion for pair in pairs]
        encoded = self._tokenizer(
            texts,
            add_special_tokens=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        added = [np.asarray(mask, dtype=bool) for mask in encoded["special_tokens_mask"]]
        offsets = [_offsets(offsets_of)[~of] for offsets_of, of in zip(encoded["offset_mapping"], added, strict=True)]
        if self._untrimmed is not None:
            offsets = [_offsets(one.offsets) for one in self._untrimmed.encode_batch(texts, add_special_tokens=False)]
        return [
            (np.asarray(ids, dtype=np.int32), first_target(offsets_of, of, pair.prompt, pair.completion))
            for ids, offsets_of, of, pair in zip(encoded["input_ids"], offsets, added, pairs, strict=True)
        ]

    @cached_property
    def _untrimmed(self) -> Any:
        """A copy of the tokenizer whose offsets cover every character of a token; None where they do anyway.

        A post-processor with ``trim_offsets`` leaves the spaces of a token out: it would hide that a token that ends
        in spaces spans the boundary.
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
    """The first token of the completion among the tokens of ``prompt + completion``; their number where it has none.

    ``added`` marks the special tokens that the template adds to the text; ``offsets_T2`` are (first character, one past
    the last) of each of the others. A token that spans the boundary counts to the completion, so that all of it is
    learnt. Special tokens after the text are targets with it; those before it never are.
    """
    if not completion:
        return len(added)
    (beyond,) = np.nonzero(offsets_T2[:, 1] > _boundary(offsets_T2, prompt, completion))
    return int(np.flatnonzero(~added)[beyond[0]]) if len(beyond) else len(added)


def _boundary(offsets_T2: NDArray[np.int64], prompt: str, completion: str) -> int:
    """The length of the prompt; where a normalizer composed its last character with the first of the completion (an e
    and an accent), the place where that character begins: its offsets cover its first part alone.
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
    """Whether a post-processor of tokenizer.json, or one inside it, trims offsets."""
    if processor is None:
        return False
    return bool(processor.get("trim_offsets")) or any(map(_trims, processor.get("processors", ())))
