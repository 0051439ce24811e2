"""Rows of encoder-decoder models: the prompt goes to the encoder, the completion to the decoder.

The decoder reads its start token and the completion, and at each place predicts the next token. So the tokens of a row
are those, the first of them no target, as in rows of causal models. The start token is what the model itself puts
before labels, in ``prepare_decoder_input_ids_from_labels`` (mBart: the language, which ends them).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ghoststore.checkpoint.load import is_encoder_decoder
from ghoststore.corpus import PromptCompletion, Sample
from ghoststore.errors import CheckpointError, CorpusError, UsageError
from ghoststore.store.part.status import Status
from indexer.encode.tokens import NO_TOKENS, Row, Tokenizer, Tokens, TokenSettings, embedding_rows

CAUSAL_LOSS = "next-token cross-entropy of each sample's own targets"
PAIR_LOSS = "cross-entropy of the tokens of each sample's completion, given its prompt in the encoder"


def tokenizer_for(model: Any, tokenizer: Any, **options: Any) -> Tokenizer:
    """The :class:`Tokenizer` for rows of ``model``, with the ``options`` of that."""
    kind = PairTokenizer if is_encoder_decoder(model) else Tokenizer
    made = kind(tokenizer, vocabulary=embedding_rows(model), **options)
    if isinstance(made, PairTokenizer):
        made.model = model
    return made


def loss_definition(model: Any) -> str:
    """What a manifest says of the loss of ``model``."""
    return PAIR_LOSS if is_encoder_decoder(model) else CAUSAL_LOSS


class PairTokenizer(Tokenizer):
    """Tokenizes prompts with their completions for an encoder-decoder model, each with the special tokens that the
    tokenizer adds: to prompts as texts, to completions as targets (``text_target``).
    """

    model: Any

    def check(self, sample: Sample) -> None:
        """UsageError for a sample that is no prompt with its completion."""
        if not isinstance(sample.content, PromptCompletion | None):
            raise UsageError(
                f"{sample}: {type(self.model).__name__} reads a prompt in its encoder and learns a completion in its "
                "decoder, and the row is no such pair: give rows with two texts, `fields.prompt` and "
                "`fields.completion`"
            )

    def rows(self, samples: list[Sample], settings: TokenSettings) -> list[list[Row]]:
        """One row of each of ``samples``. At most ``max_length`` tokens go to the encoder, and to the decoder with its
        start token.

        Raises what :meth:`check` raises; UsageError for ``overlong=window`` and for a token that the model's embedding
        lacks; CorpusError for a long sample under ``overlong=error``.
        """
        if settings.overlong == "window":
            raise UsageError(
                "`overlong=window`: a prompt with its completion cannot be cut into windows; give truncate, skip or "
                "error"
            )
        for sample in samples:
            self.check(sample)
        pairs = {place: s.content for place, s in enumerate(samples) if isinstance(s.content, PromptCompletion)}
        sources = self._encoded([pair.prompt for pair in pairs.values()], "text")
        targets = self._encoded([pair.completion for pair in pairs.values()], "text_target")
        rows = [[Row(sample, 0, 0, NO_TOKENS, 1, Status.EMPTY, NO_TOKENS)] for sample in samples]
        for place, source, target in zip(pairs, sources, targets, strict=True):
            rows[place] = [self._row(samples[place], source, target, settings)]
        return rows

    def _encoded(self, texts: list[str], role: str) -> list[Tokens]:
        if not texts:
            return []
        encoded = self.tokenizer(**{role: texts}, return_attention_mask=False, verbose=False)
        return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def _row(self, sample: Sample, source: Tokens, target: Tokens, settings: TokenSettings) -> Row:
        assert isinstance(sample.content, PromptCompletion)
        limit, status = settings.max_length, Status.OK
        if len(source) > limit or len(target) > limit - 1:
            if settings.overlong == "error":
                raise CorpusError(
                    f"sample {sample.id!r} (row {sample.source_row}) has {len(source)} tokens in its prompt and "
                    f"{len(target)} in its completion; `max_length` is {limit}, with the start token of the decoder, "
                    "and `overlong` is error"
                )
            status = Status.TOO_LONG if settings.overlong == "skip" else Status.TRUNCATED
        start = self._start(target) if len(target) else NO_TOKENS  # of all of it: its end may say the start (mBart)
        source, target = source[:limit], target[: limit - 1]
        if not len(source):
            status = Status.EMPTY
        elif not len(target) or not sample.content.completion:
            status = Status.NO_TARGETS
        if status.usable:
            for tokens in (source, target):
                self.refuse_beyond(tokens, sample.id, sample.source_row)
        return Row(sample, 0, 0, np.concatenate([start, target]), 1, status, source)

    def _start(self, target: Tokens) -> Tokens:
        """(1,): the token that the decoder reads before ``target``. CheckpointError for a model that does not read
        ``target`` behind it.
        """
        labels = torch.from_numpy(target).long().unsqueeze(0)
        read = self.model.prepare_decoder_input_ids_from_labels(labels=labels)[0].int().numpy()
        if not np.array_equal(read[1:], target[:-1]):
            raise CheckpointError(
                f"{type(self.model).__name__} does not read its labels shifted by one token, so what a sample's loss "
                "is cannot be told"
            )
        return np.asarray(read[:1], dtype=np.int32)
