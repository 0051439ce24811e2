"""From samples to rows: tokens, targets, and what becomes of samples that are too long or too short.

A row is what gets one vector: a sample, or one window of a long one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ghoststore.checkpoint import choose_max_length
from ghoststore.corpus import Messages, PromptCompletion, Sample, Tokenized
from ghoststore.errors import CorpusError, MismatchError, UsageError
from ghoststore.same_model import tokenizer_lines
from ghoststore.store.status import Status
from ghoststore.tokenizer_identity import tokenizer_identity

Overlong = Literal["truncate", "window", "skip", "error"]
SAMPLES_AT_ONCE = 256
DEFAULT_MAX_LENGTH = 1024

Tokens = NDArray[np.int32]
NO_TOKENS: Tokens = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSettings:
    """The manifest's ``tokens`` section."""

    max_length: int
    overlong: Overlong = "truncate"

    def __post_init__(self) -> None:
        if self.overlong not in get_args(Overlong):
            raise UsageError(f"--overlong {self.overlong!r} is unknown; known: {', '.join(get_args(Overlong))}")
        if self.max_length < 2:
            raise UsageError(f"--max-length must be at least 2 (one token to predict), not {self.max_length}")

    @property
    def needs_lengths(self) -> bool:
        """Whether the number of rows, or the refusal of the corpus, depends on the lengths of its samples."""
        return self.overlong in ("window", "error")


def longest_row(model: Any, asked: int | None) -> int:
    """``--max-length``, by default the model's positions, at most 1024; UsageError for more than the model takes."""
    return choose_max_length(asked, model, DEFAULT_MAX_LENGTH)


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its sample, the first token of its window in that sample, its tokens and its fate."""

    sample: Sample
    window: int
    """0 unless the sample was split."""
    window_start: int
    tokens: Tokens
    first_target: int
    """Tokens before this one are no targets (the prompt); the first token never is."""
    status: Status


class Tokenizer:
    """Samples to tokens through the checkpoint's own tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See :func:`ghoststore.tokenizer_identity.tokenizer_identity`."""
        return tokenizer_identity(self.tokenizer)

    def check(self, sample: Sample) -> None:
        """MismatchError for a sample that another tokenizer made tokens of."""
        if isinstance(sample.content, Tokenized):
            theirs = sample.content.vocabulary.tokenizer_identity
            if theirs["fingerprint"] != self.identity["fingerprint"]:
                raise MismatchError(
                    f"sample {sample.id!r} comes from token shards of another tokenizer than the checkpoint's:\n"
                    f"{tokenizer_lines(theirs, self.identity)}\n"
                    "Tokenize the corpus again with --tokenizer of this checkpoint"
                )

    def encode(self, samples: list[Sample]) -> list[tuple[Tokens, int]]:
        """(tokens, first target) of each sample. Text gets the special tokens that the tokenizer adds by
        default; a completion gets none; messages go through the chat template, which writes its own. What was
        tokenized before is taken as it is.

        Raises CorpusError for messages without a chat template, and for messages the template refuses;
        MismatchError for tokens of another tokenizer.
        """
        kinds = {type(sample.content) for sample in samples}
        if Tokenized in kinds:
            return [self._given(sample) for sample in samples]
        if PromptCompletion in kinds:
            pairs = [
                s.content if isinstance(s.content, PromptCompletion) else PromptCompletion("", "") for s in samples
            ]
            prompts = self._ids([pair.prompt for pair in pairs], special=True)
            completions = self._ids([pair.completion for pair in pairs], special=False)
            encoded = [
                (np.concatenate([prompt, completion]), max(1, len(prompt)))
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
        elif Messages in kinds:
            encoded = [(ids, 1) for ids in self._ids([self._chat(sample) for sample in samples], special=False)]
        else:
            texts = [sample.content if isinstance(sample.content, str) else "" for sample in samples]
            encoded = [(ids, 1) for ids in self._ids(texts, special=True)]
        return [
            (NO_TOKENS, 1) if sample.content is None or not any(sample.texts()) else pair
            for sample, pair in zip(samples, encoded, strict=True)
        ]

    def _given(self, sample: Sample) -> tuple[Tokens, int]:
        self.check(sample)
        content = sample.content
        return (content.ids, content.first_target) if isinstance(content, Tokenized) else (NO_TOKENS, 1)

    def _ids(self, texts: list[str], *, special: bool) -> list[Tokens]:
        encoded = self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def _chat(self, sample: Sample) -> str:
        if not isinstance(sample.content, Messages):
            return ""
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise CorpusError(
                f"sample {sample.id!r} is a list of messages, but the tokenizer has no chat template; set "
                "tokenizer.chat_template and save it, or give --text-field"
            )
        import jinja2

        try:
            return str(self.tokenizer.apply_chat_template(sample.content.messages, tokenize=False))
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise CorpusError(f"sample {sample.id!r}: the chat template refuses its messages: {error}") from error


def windows(length: int, max_length: int) -> list[tuple[int, int]]:
    """(start, stop) of the windows of a sample of ``length`` tokens.

    Neighbours share one token, so that every token but the first is a target exactly once.
    """
    if length <= max_length:
        return [(0, length)]
    return [(start, min(start + max_length, length)) for start in range(0, length - 1, max_length - 1)]


def rows_of_sample(sample: Sample, tokens: Tokens, first_target: int, settings: TokenSettings) -> list[Row]:
    """The rows of one sample: one, or one a window. CorpusError under ``overlong="error"``."""
    length, limit = len(tokens), settings.max_length
    if length > limit and settings.overlong == "error":
        raise CorpusError(
            f"sample {sample.id!r} (row {sample.source_row}) has {length} tokens; --max-length is {limit} and "
            "--overlong is error"
        )
    if length > limit and settings.overlong == "skip":
        return [Row(sample, 0, 0, tokens[:limit], first_target, Status.TOO_LONG)]
    if length > limit and settings.overlong == "truncate":
        return [_row(sample, 0, 0, tokens[:limit], first_target, Status.TRUNCATED)]
    return [
        _row(sample, index, start, tokens[start:stop], first_target - start, Status.OK)
        for index, (start, stop) in enumerate(windows(length, limit))
    ]


def _row(sample: Sample, window: int, start: int, tokens: Tokens, first_target: int, status: Status) -> Row:
    first_target = max(1, first_target)
    if len(tokens) == 0:
        status = Status.EMPTY
    elif len(tokens) == 1:
        status = Status.TOO_SHORT
    elif first_target >= len(tokens):
        status = Status.NO_TARGETS
    return Row(sample, window, start, tokens, first_target, status)


def rows_of(samples: Iterable[Sample], tokenizer: Tokenizer, settings: TokenSettings) -> Iterator[Row]:
    """The rows of ``samples``, in order, tokenized some hundred at a time."""
    samples = iter(samples)
    while True:
        batch: list[Sample] = []
        damage: CorpusError | MismatchError | None = None
        try:
            batch.extend(islice(samples, SAMPLES_AT_ONCE))
        except (CorpusError, MismatchError) as error:
            damage = error  # raised in its place, after the rows before it
        for sample, (tokens, first_target) in zip(batch, tokenizer.encode(batch) if batch else [], strict=True):
            yield from rows_of_sample(sample, tokens, first_target, settings)
        if damage is not None:
            raise damage
        if not batch:
            return
