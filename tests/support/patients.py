"""Models for the doctor: healthy ones are those of ``tests.indexer.models``; each sick one has one planted defect."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from tests.support.models import POSITIONS, VOCABULARY, bert_masked, gpt2, llama


class Words:
    """A tokenizer that gives each word an id of its own, never 0."""

    def __call__(self, texts: list[str], **settings: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1 + zlib.crc32(w.encode()) % (VOCABULARY - 1) for w in t.split()] for t in texts]}


class Around(nn.Module):
    """A causal language model inside another module."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.logits(input_ids, attention_mask))

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError


class IgnoresPadding(Around):
    """Attention over every token that there is, padding too."""

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.inner(input_ids=ids).logits


class PositionsFromTheEnd(Around):
    """As a left-padded model counts: the last place of the batch has the last position."""

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(POSITIONS - ids.shape[1], POSITIONS)
        return self.inner(input_ids=ids, attention_mask=mask, position_ids=positions.unsqueeze(0)).logits


class MixesTheBatch(Around):
    """Logits centred over the batch."""

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        found = self.inner(input_ids=ids, attention_mask=mask).logits
        return found - 0.1 * found.mean(0)


class DropoutInForward(Around):
    """``F.dropout`` that no mode turns off."""

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.inner.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.inner.lm_head(F.dropout(hidden, 0.1))


class SuppressesByFloat32Minimum(Around):
    """Token 0 may not be said. The least float32 rounds to -inf in bfloat16, and 0 × -inf is NaN."""

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        found = self.inner(input_ids=ids, attention_mask=mask).logits
        blocked = (torch.arange(found.shape[-1]) == 0).to(found.dtype)
        return found + blocked * torch.tensor(torch.finfo(torch.float32).min, dtype=found.dtype)


class WeightUsedTwice(GPT2MLP):
    """The first weight once as a layer, and once as a matrix."""

    def forward(self, hidden_states: Any) -> Any:
        shortcut = hidden_states @ self.c_fc.weight
        return self.c_proj(self.act(self.c_fc(hidden_states)) + 0.1 * shortcut)


class CalledPastItsHooks(GPT2MLP):
    """The first layer twice, once through its ``forward``, which runs no hook."""

    def forward(self, hidden_states: Any) -> Any:
        return self.c_proj(self.act(self.c_fc(hidden_states) + 0.1 * self.c_fc.forward(hidden_states)))


def with_mlp(kind: type[GPT2MLP]) -> Any:
    """A GPT-2 whose second block has another feed-forward."""
    model = gpt2()
    model.transformer.h[1].mlp.__class__ = kind
    return model


def leaky_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> Any:
    """Causal attention in which every token sees the last place of the batch, padding or not."""
    places = query.shape[2]
    seen = torch.ones(places, places, dtype=torch.bool).tril()
    seen[:, -1] = True
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2), None


AttentionInterface.register("leaky", leaky_attention)

SICK: dict[str, tuple[Callable[[], Any], str, str]] = {
    "attention over padding": (lambda: IgnoresPadding(bert_masked()), "invariance", "padding .*attention"),
    "positions from the end": (lambda: PositionsFromTheEnd(gpt2()), "invariance", "padding .*wpe"),
    "a mean over the batch": (lambda: MixesTheBatch(gpt2()), "invariance", "batch mates"),
    "a look ahead": (bert_masked, "causality", "logits before it"),
    "a weight used twice": (lambda: with_mlp(WeightUsedTwice), "exactness", r": transformer\.h\.1\.mlp\.c_fc \("),
    "a call past the hooks": (lambda: with_mlp(CalledPastItsHooks), "exactness", r"transformer\.h\.1\.mlp\.c_fc \("),
    "dropout left on": (lambda: gpt2().train(), "randomness", r"transformer\.drop .*p=0\.1"),
    "attention dropout left on": (lambda: llama(attention_dropout=0.1).train(), "randomness", "attention_dropout=0.1"),
    "dropout in the forward pass": (lambda: DropoutInForward(gpt2()), "randomness", "in the output of inner.lm_head"),
}
"""Defect to a model that has it, the check that finds it, and what it says."""
