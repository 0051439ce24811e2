"""Models whose loss is not, or not visibly, the mean next-token loss: what the tests of held losses share.

Legend: B samples, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    MarianConfig,
    MarianForCausalLM,
    MBartConfig,
    MBartForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PLBartConfig,
    PLBartForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from indexer.encode.losses import IGNORED
from tests.support.models import VOCABULARY, gpt2, settle
from tests.support.oracle import LossOf
from tests.support.scoring import BATCH

EXPERTS = ("model.layers.*.mlp",)
"""Routers and experts, which no layer type handles."""

_EXPERTS_OF: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 4}),
    "qwen2-moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
}


def mixture(kind: str, **settings: Any) -> Any:
    """A mixture of experts: ``mixtral``, ``olmoe`` or ``qwen2-moe``."""
    model, config, own = _EXPERTS_OF[kind]
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return settle(model(config(**shape, **own, **settings)))


DECODERS: dict[str, tuple[Any, Any]] = {
    "bart": (BartForCausalLM, BartConfig),
    "mbart": (MBartForCausalLM, MBartConfig),
    "marian": (MarianForCausalLM, MarianConfig),
    "plbart": (PLBartForCausalLM, PLBartConfig),
}
"""Their ``.loss`` is not shifted."""

DECODER_LEFT_OUT = ("embed_tokens", "embed_positions", "encoder_attn", "encoder_attn_layer_norm")


def decoder(kind: str, **settings: Any) -> Any:
    """A decoder of Bart's family, as it is made: its weights are small, so that every loss is about log V."""
    model, config = DECODERS[kind]
    shape = {
        "vocab_size": VOCABULARY,
        "d_model": 24,
        "encoder_layers": 2,
        "encoder_attention_heads": 3,
        "encoder_ffn_dim": 40,
        "decoder_layers": 2,
        "decoder_attention_heads": 3,
        "decoder_ffn_dim": 40,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "decoder_start_token_id": 0,
    }
    torch.manual_seed(0)
    return model(config(**shape, **settings)).eval()


def own_place_loss_of(model: nn.Module, sample: int) -> Tensor:
    """For the oracle: the loss of one sample of ``BATCH`` at the labels' own places."""
    ids, labels = BATCH[sample]
    logits = model(input_ids=ids.unsqueeze(0)).logits[0]
    return F.cross_entropy(logits, labels, ignore_index=IGNORED)


class Chunked(nn.Module):
    """A fused head: with labels the loss alone, a few places at a time; without, the logits."""

    def __init__(
        self, *, shift: bool = True, logits: bool = True, smoothing: float = 0.0, inner: Callable[..., Any] = gpt2
    ) -> None:
        super().__init__()
        self.inner = inner()
        self.shift, self.gives_logits, self.smoothing = shift, logits, smoothing
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        self.calls += 1
        hidden = self.inner.transformer(input_ids=input_ids, attention_mask=attention_mask)[0]
        if labels is None:
            return SimpleNamespace(logits=self.inner.lm_head(hidden) if self.gives_logits else None)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if self.shift else labels
        total = hidden.new_zeros(())
        for start in range(0, hidden.shape[1], 7):
            part = slice(start, start + 7)
            total = total + F.cross_entropy(
                self.inner.lm_head(hidden[:, part]).transpose(1, 2),
                targets[:, part],
                ignore_index=IGNORED,
                reduction="sum",
                label_smoothing=self.smoothing,
            )
        return {"loss": total / (targets != IGNORED).sum()}


class Nano(nn.Module):
    """As nanoGPT: ``(logits, loss)`` of targets that are shifted already."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt2()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.inner(input_ids=idx).logits
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=IGNORED)
        return logits, loss


class Bare(nn.Module):
    """A model whose output is the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt2()

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids=ids).logits
        return logits


class AddsAuxiliaryLoss(torch.autograd.Function):
    """Passes its input on, and adds a gradient in the backward pass: the value of the loss does not show it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, extra: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], torch.ones(())


class WithTerm(nn.Module):
    """GPT-2 whose loss has a small second term, or whose backward pass has."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = gpt2(), kind

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Any:
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        logits, term = output.logits, self.inner.transformer.ln_f.weight.square().mean()
        if self.kind == "hidden":
            logits = AddsAuxiliaryLoss.apply(logits, term)
        loss = mean_loss(logits, labels)
        if self.kind == "penalty":
            loss = loss + 1e-5 * term
        elif self.kind == "named":
            return {"loss": loss + 1e-5 * term, "logits": logits, "ln_penalty": term}
        return {"loss": loss, "logits": logits}


def mean_loss(logits: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    """The mean next-token loss over all targets, as a loop computes it."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, **settings)


def losses_of_logits(logits_of: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    """A val_losses for a model of any output."""

    def losses(model: Any, batch: Any) -> Tensor:
        labels = batch["labels"]
        each = F.cross_entropy(
            logits_of(model, batch["input_ids"])[:, :-1].transpose(1, 2),
            labels[:, 1:],
            ignore_index=IGNORED,
            reduction="none",
        )
        return each.sum(1) / (labels[:, 1:] != IGNORED).sum(1)

    return losses


def smoothed_losses(epsilon: float) -> Callable[[Any, Any], Tensor]:
    """A val_losses with label smoothing."""

    def losses(model: Any, batch: Any) -> Tensor:
        logits, labels = model(input_ids=batch["input_ids"]).logits, batch["labels"]
        each = F.cross_entropy(
            logits[:, :-1].transpose(1, 2),
            labels[:, 1:],
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=epsilon,
        )
        return each.sum(1) / (labels[:, 1:] != IGNORED).sum(1)

    return losses


def smoothed_loss_of(epsilon: float, batch: list[Any]) -> LossOf:
    """For the oracle."""

    def loss_of(model: nn.Module, sample: int) -> Tensor:
        ids, labels = batch[sample]
        logits = model(input_ids=ids.unsqueeze(0)).logits[0]
        return F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED, label_smoothing=epsilon)

    return loss_of


def chunked_losses(model: Any, batch: Any) -> Tensor:
    """A val_losses for :class:`Chunked`."""
    hidden = model.inner.transformer(input_ids=batch["input_ids"])[0]
    return losses_of_logits(lambda model, ids: model.inner.lm_head(hidden))(model, batch)
