"""From samples to rows: tokens, targets, and the treatment of samples that are too long or too short.

Each row gets one vector. A row is a sample, or one window of a long sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ghoststore.checkpoint.load import choose_max_length
from ghoststore.checkpoint.same_model import tokenizer_lines
from ghoststore.checkpoint.token_ids import NO_TOKENIZER, TokenIds
from ghoststore.checkpoint.tokenizer_identity import tokenizer_identity
from ghoststore.corpus import BESIDE_MESSAGES, Messages, PromptCompletion, Sample, Tokenized
from ghoststore.errors import CorpusError, MismatchError, UsageError
from ghoststore.settings.shared import Overlong as Overlong
from ghoststore.store.part.status import Status
from indexer.encode.chat_texts import chat_text, prompted_text
from indexer.encode.template_date import date_for
from indexer.encode.whole_text import WholeTexts

SAMPLES_AT_ONCE = 256
TAKEN = "nothing there says which tokenizer made its ids: the ids are taken for those of the tokenizer that is given"
DEFAULT_MAX_LENGTH = 1024

Tokens = NDArray[np.int32]
NO_TOKENS: Tokens = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSettings:
    """The manifest's ``tokens`` section."""

    max_length: int
    overlong: Overlong = "truncate"
    template_date: str | None = None
    """The date that the chat template writes: see :attr:`Tokenizer.template_date`."""

    def __post_init__(self) -> None:
        if self.overlong not in get_args(Overlong):
            raise UsageError(f"`overlong` {self.overlong!r} is unknown; known: {', '.join(get_args(Overlong))}")
        if self.max_length < 2:
            raise UsageError(f"`max_length` must be at least 2 (one token to predict), not {self.max_length}")

    @property
    def needs_lengths(self) -> bool:
        """Whether the number of rows, or an error, depends on the lengths of the samples."""
        return self.overlong in ("window", "error")


def longest_row(model: Any, wanted: int | None) -> int:
    """``wanted``, or by default the number of the model's positions, at most 1024. UsageError if the model
    has fewer.
    """
    return choose_max_length(wanted, model, DEFAULT_MAX_LENGTH)


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its sample, its window in that sample, its tokens and its status."""

    sample: Sample
    window: int
    """Number of the window in the sample; 0 unless the sample was split."""
    window_start: int
    """First token of the window in the sample."""
    tokens: Tokens
    first_target: int
    """The first token that is a target, at least 1. Those before it are the prompt."""
    status: Status
    source: Tokens | None = None
    """What an encoder reads; None for a causal model. The tokens are then those of the decoder."""
    stop_target: int | None = None
    """One past the last target; None: all that follow the first are."""

    @property
    def length(self) -> int:
        """Number of tokens that the model reads."""
        return len(self.tokens) + (0 if self.source is None else len(self.source))

    @property
    def n_tokens(self) -> int:
        """Number of tokens that a part records: of an encoder-decoder model the targets."""
        return len(self.tokens) if self.source is None else max(0, len(self.tokens) - 1)


def embedding_rows(model: Any) -> int | None:
    """Number of token ids that the input embedding of ``model`` has rows for; None for a model without such
    a method.
    """
    weight = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "weight", None)
    return None if weight is None else int(weight.shape[0])


class Tokenizer:
    """Tokenizes samples with the checkpoint's own tokenizer.

    ``vocabulary`` is the number of ids that the model's embedding has rows for (`embedding_rows`); None if the tokens
    are not for a model. ``note`` gets one message if the chat template leaves out tools or documents. ``of_part`` says
    that the tokenizer is fixed by a part, which changes the advice in errors. ``template_date`` is the date for a chat
    template that writes one (default: today). ``takes_ids`` says that ids whose tokenizer nobody names are taken for
    its own.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        vocabulary: int | None = None,
        note: Callable[[str], None] | None = None,
        of_part: bool = False,
        template_date: str | None = None,
        takes_ids: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.takes_ids = takes_ids or isinstance(tokenizer, TokenIds)
        self.vocabulary = vocabulary
        self.of_part = of_part
        self.template_date = date_for(tokenizer, template_date)
        """The date (ISO 8601) that the chat template writes; None if it writes none."""
        self.note = note
        self._tried: set[str] = set()
        self._whole_texts = WholeTexts(tokenizer)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The identity of the tokenizer: see :func:`ghoststore.checkpoint.tokenizer_identity.tokenizer_identity`."""
        return tokenizer_identity(self.tokenizer)

    @cached_property
    def size(self) -> int:
        """The largest token id plus one."""
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def exceeds(self) -> bool:
        """Whether the tokenizer has ids that the model's embedding lacks. If so, all rows are checked
        before any work.
        """
        return self.vocabulary is not None and self.size > self.vocabulary

    def at(self, template_date: str | None) -> Tokenizer:
        """A copy of this tokenizer whose chat template writes ``template_date``."""
        tokenizer = copy(self)
        tokenizer.template_date = date_for(self.tokenizer, template_date)
        return tokenizer

    def check(self, sample: Sample) -> None:
        """MismatchError for a sample with tokens of another tokenizer, UsageError for a prompt with a completion if the
        tokenizer has no offsets. Notes tools and documents that the chat template leaves out.
        """
        self._refuse_texts(sample)
        self._note_left_out(sample)
        content = sample.content
        if isinstance(content, PromptCompletion) or (isinstance(content, Messages) and content.prompt):
            self._whole_texts.refuse_without_offsets()
        if isinstance(sample.content, Tokenized):
            identity = sample.content.vocabulary.tokenizer_identity
            if not identity:
                self._check_nameless(sample, sample.content)
            elif isinstance(self.tokenizer, TokenIds):
                raise UsageError(
                    f"{sample}: the tokens are of token shards, which have their tokenizer beside them, and the "
                    "checkpoint has none: give it as `tokenizer`, SHARDS/tokenizer"
                )
            elif identity["fingerprint"] != self.identity["fingerprint"]:
                raise MismatchError(
                    f"sample {sample.id!r} comes from token shards of another tokenizer than the checkpoint's:\n"
                    f"{tokenizer_lines(identity, self.identity)}\n"
                    "Tokenize the corpus again with the tokenizer of this checkpoint"
                )

    def _refuse_texts(self, sample: Sample) -> None:
        """UsageError for a sample of text where there is no tokenizer."""
        if isinstance(self.tokenizer, TokenIds) and not isinstance(sample.content, Tokenized | None):
            raise UsageError(f"{sample}: {NO_TOKENIZER}")

    def _check_nameless(self, sample: Sample, content: Tokenized) -> None:
        if not self.takes_ids:
            source = str(sample.place).partition(", ")[0] if sample.place else "PATH"
            raise UsageError(
                f"{sample}: token ids, and nothing says which tokenizer made them: give `tokenizer`; or say it once, "
                f"and use the shards: `ghoststore tokenize --data {source} --tokenizer TOKENIZER --out SHARDS`"
            )
        largest = int(content.ids.max(initial=-1))
        if largest >= self.size:
            other = (
                f"the model takes ids up to {self.size - 1}: it is of another vocabulary"
                if isinstance(self.tokenizer, TokenIds)
                else f"the tokenizer has ids up to {self.size - 1}: it is not the one that made them"
            )
            raise UsageError(f"{sample}: has the token {largest}, and {other}")

    def refuse_beyond(self, tokens: Tokens, sample_id: str, source_row: int) -> None:
        """UsageError if one of ``tokens`` has no row in the model's embedding."""
        if self.vocabulary is None or not len(tokens) or int(tokens.max()) < self.vocabulary:
            return
        token = int(tokens[tokens >= self.vocabulary][0])
        text = self.tokenizer.decode([token])
        advice = (
            "Leave this row out of the val set: the part was built with this tokenizer and this model"
            if self.of_part
            else "Give the tokenizer that belongs to the checkpoint (`tokenizer`), or train rows for the new tokens "
            f"first: model.resize_token_embeddings({self.size}), and save the model"
        )
        raise UsageError(
            f"sample {sample_id!r} (row {source_row}) has the token {token} ({text!r}), but the model's embedding has "
            f"{self.vocabulary:,} rows, ids 0 to {self.vocabulary - 1}; the tokenizer has ids up to {self.size - 1}. "
            f"{advice}"
        )

    def rows(self, samples: list[Sample], settings: TokenSettings) -> list[list[Row]]:
        """The rows of each of ``samples``.

        Raises what :meth:`encode` and :func:`rows_of_sample` raise, and UsageError for a usable row with a token that
        the model's embedding lacks.
        """
        rows = [
            rows_of_sample(sample, tokens, first_target, settings)
            for sample, (tokens, first_target) in zip(samples, self.encode(samples), strict=True)
        ]
        for row in chain.from_iterable(rows):
            if row.status.usable:
                self.refuse_beyond(row.tokens, row.sample.id, row.sample.source_row)
        return rows

    def encode(self, samples: list[Sample]) -> list[tuple[Tokens, int]]:
        """(tokens, first target) of each sample. The whole text of a sample is tokenized at once.

        Texts, and prompts with completions, get the special tokens that the tokenizer adds by default. Messages go
        through the chat template, which writes its own special tokens. Samples that are tokenized already stay as they
        are.

        Raises CorpusError for messages without a chat template, and for messages that the template refuses;
        MismatchError for tokens of another tokenizer; UsageError for prompts with completions if the tokenizer has no
        offsets.
        """
        encoded = [(NO_TOKENS, 1)] * len(samples)
        texts: dict[int, str] = {}
        chats: dict[int, str] = {}
        pairs: dict[int, PromptCompletion] = {}
        prompted: dict[int, PromptCompletion] = {}
        for place, sample in enumerate(samples):
            content = sample.content
            self._refuse_texts(sample)
            if isinstance(content, Tokenized):
                self.check(sample)
                encoded[place] = (content.ids, content.first_target)
            elif content is None or not any(sample.texts()):
                continue
            elif isinstance(content, PromptCompletion):
                pairs[place] = content
            elif isinstance(content, str):
                texts[place] = content
            elif content.prompt:
                prompted[place] = prompted_text(self.tokenizer, sample, content, self.template_date)
            else:
                self._note_left_out(sample)
                chats[place] = self._chat(sample)
        for few, special in ((texts, True), (chats, False)):
            for place, ids in zip(few, self._ids(list(few.values()), special=special), strict=True):
                encoded[place] = (ids, 1)
        for some, special in ((pairs, True), (prompted, False)):
            cut = self._whole_texts.encode(list(some.values()), special=special) if some else []
            for place, (ids, first) in zip(some, cut, strict=True):
                encoded[place] = (ids, max(1, first))
        return encoded

    def _ids(self, texts: list[str], *, special: bool) -> list[Tokens]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def _note_left_out(self, sample: Sample) -> None:
        """Note if tools or documents change nothing in the text. Only the first sample that has any is tried."""
        content = sample.content
        if self.note is None or not isinstance(content, Messages):
            return
        for name in BESIDE_MESSAGES:
            if name not in self._tried and getattr(content, name):
                self._tried.add(name)
                lacking: dict[str, Any] = {name: None}
                if self._chat(sample, replace(content, **lacking)) == self._chat(sample):
                    self.note(
                        f"sample {sample.id!r} has {name}, and the tokenizer's chat template leaves them out: they are "
                        f"in no text. Give the tokenizer a template that prints {name}"
                    )

    def _chat(self, sample: Sample, conversation: Messages | None = None) -> str:
        """The text of the conversation of ``sample``, or of another one in its place."""
        conversation = conversation or sample.content  # type: ignore[assignment]
        assert conversation is not None
        return chat_text(self.tokenizer, sample, conversation, self.template_date)


def windows(length: int, max_length: int) -> list[tuple[int, int]]:
    """(start, stop) of each window of a sample of ``length`` tokens.

    Neighbouring windows share one token, so that every token except the first is a target exactly once.
    """
    if length <= max_length:
        return [(0, length)]
    return [(start, min(start + max_length, length)) for start in range(0, length - 1, max_length - 1)]


def rows_of_sample(sample: Sample, tokens: Tokens, first_target: int, settings: TokenSettings) -> list[Row]:
    """The rows of one sample: one, or one for each window. CorpusError for a long sample if ``overlong`` is
    ``error``.
    """
    length, limit = len(tokens), settings.max_length
    if length > limit and settings.overlong == "error":
        raise CorpusError(
            f"sample {sample.id!r} (row {sample.source_row}) has {length} tokens; `max_length` is {limit} and "
            "`overlong` is error"
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
            damage = error  # raised later, after the rows before it
        yield from chain.from_iterable(tokenizer.rows(batch, settings) if batch else ())
        if damage is not None:
            raise damage
        if not batch:
            return
