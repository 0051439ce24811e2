"""Tiny models of each architecture, and batches for them. All fp32, in eval mode, seeded.

Legend: B samples, T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from indexer.encode.engine import GradProjLoraEngine
from indexer.encode.losses import IGNORED, Reduction, next_token_losses
from tests.support.oracle import LossOf

VOCABULARY = 101
POSITIONS = 32

Example = tuple[Tensor, Tensor]
"""(ids, labels) of one sample, each (t,), unpadded; labels are the ids, or -100."""


def settle(model: Any, seed: int = 0) -> Any:
    """``model`` in eval mode, its vectors (biases, γ, β) no longer at 0 or 1, its matrices not tiny."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(parameter.round() + 0.2 * noise)  # torch draws biases of Linear at random
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def gpt2(*, tied: bool = True, layers: int = 2, **settings: Any) -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=24,
        n_layer=layers,
        n_head=3,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        **settings,
    )
    return settle(GPT2LMHeadModel(config))


def llama(*, layers: int = 2, **settings: Any) -> Any:
    """RMSNorm, grouped queries, gated feed-forward, no biases, an untied head."""
    config = LlamaConfig(
        vocab_size=settings.pop("vocab_size", VOCABULARY),
        hidden_size=settings.pop("hidden_size", 24),
        intermediate_size=settings.pop("intermediate_size", 40),
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        **settings,
    )
    return settle(LlamaForCausalLM(config))


def neox(**settings: Any) -> Any:
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=POSITIONS,
        **settings,
    )
    return settle(GPTNeoXForCausalLM(config))


def _bert_config(**settings: Any) -> Any:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=POSITIONS,
        **settings,
    )


def bert_masked(**settings: Any) -> Any:
    """A bidirectional model whose decoder is tied to the embedding and has a bias."""
    return settle(BertForMaskedLM(_bert_config(**settings)))


def bert_causal(**settings: Any) -> Any:
    return settle(BertLMHeadModel(_bert_config(is_decoder=True, **settings)))


CAUSAL: dict[str, Callable[[], Any]] = {
    "gpt2-tied": gpt2,
    "gpt2-untied": lambda: gpt2(tied=False),
    "llama": llama,
    "neox": neox,
    "bert-causal": bert_causal,
}


class Placed(nn.Module):
    """So small that it is compiled in a moment: tokens, and positions that are looked up once for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.last = nn.Embedding(9, 4), nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, ids_BT: Tensor) -> Tensor:
        places_1T = torch.arange(ids_BT.shape[1]).unsqueeze(0)
        return self.last(torch.tanh(self.tokens(ids_BT) + self.places(places_1T)))  # type: ignore[no-any-return]


def perceptron() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 12, bias=False), nn.Tanh(), nn.Linear(12, 5))
    return settle(model)


def examples(lengths: Sequence[int] = (24, 3, 11, 17), *, masked: bool = True, seed: int = 0) -> list[Example]:
    """Samples of very different lengths; where ``masked``, one has a prompt without targets and one has
    tokens in its middle that are none.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for place, length in enumerate(lengths):
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        if masked and length > 8:
            if place % 2:
                labels[4:6] = IGNORED
            else:
                labels[:5] = IGNORED
        found.append((ids, labels))
    return found


def pad(batch: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, labels, mask), each (B, T), padded on the right."""
    length = max(len(ids) for ids, _ in batch)
    ids, mask = (torch.zeros(len(batch), length, dtype=torch.int64) for _ in range(2))
    labels = torch.full((len(batch), length), IGNORED)
    for place, (own_ids, own_labels) in enumerate(batch):
        ids[place, : len(own_ids)], labels[place, : len(own_ids)] = own_ids, own_labels
        mask[place, : len(own_ids)] = 1
    return ids, labels, mask


def next_token_loss_of(batch: Sequence[Example], reduction: Reduction = "mean") -> LossOf:
    """For the oracle: the next-token loss of one sample, alone and unpadded."""

    def loss_of(model: nn.Module, sample: int) -> Tensor:
        ids, labels = batch[sample]
        logits = model(input_ids=ids.unsqueeze(0)).logits[0]
        return F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=IGNORED, reduction=reduction)

    return loss_of


def causal_vectors(
    engine: GradProjLoraEngine, model: Any, batch: Sequence[Example], reduction: Reduction = "mean"
) -> Tensor:
    """The vectors of a padded batch through an attached engine."""
    ids, labels, mask = pad(batch)
    engine.prepare(len(batch))
    logits = model(input_ids=ids, attention_mask=mask).logits
    losses, _ = next_token_losses(logits, labels, reduction=reduction)
    return engine.collect(losses)
