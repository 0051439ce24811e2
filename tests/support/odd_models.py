"""Causal language models that do one thing otherwise, saved and loaded by transformers like any other.

Legend: B samples, T tokens, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

LONG = 20


class OddConfig(PretrainedConfig):
    model_type = "odd"

    def __init__(self, quirk: str = "none", vocab_size: int = 290, hidden_size: int = 12, **settings: Any) -> None:
        super().__init__(**{"tie_word_embeddings": False, **settings})
        self.quirk, self.vocab_size, self.hidden_size = quirk, vocab_size, hidden_size
        self.max_position_embeddings = 32


class OddMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(torch.tanh(self.c_fc(x)))


class OddForCausalLM(PreTrainedModel):
    """A token knows the mean of those before it. ``quirk`` says what is odd."""

    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.wte = nn.Embedding(config.vocab_size, width)
        self.wpe = nn.Embedding(config.max_position_embeddings, width)
        self.mlp, self.attn = OddMLP(width), nn.Linear(width, width)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **options: Any
    ) -> CausalLMOutput:
        quirk, length = self.config.quirk, input_ids.shape[1]
        places = torch.arange(length).unsqueeze(0)
        x = self.wte(input_ids) + self.wpe(places.flip(1) if quirk == "positions from the end" else places)
        counts = torch.arange(1, length + 1).view(1, -1, 1)
        x = x + self.attn(x.cumsum(1) / counts)
        if quirk == "sequence first":
            x = x + self.mlp(x.transpose(0, 1)).transpose(0, 1)
        elif quirk == "flat":
            x = x + self.mlp(x.flatten(0, 1)).view_as(x)
        elif quirk == "another sample's place":
            x = x + self.mlp(x.flip(0)).flip(0)
        else:
            x = x + self.mlp(x)
        if quirk == "used behind the back":
            x = x + F.linear(torch.tanh(x), self.attn.weight)
        if quirk == "mean of the batch":
            x = x - 0.5 * x.mean(0)
        if quirk == "another thing when long" and length > LONG:
            x = x * 0.5
        logits = self.lm_head(x)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register("odd", OddConfig)
AutoModelForCausalLM.register(OddConfig, OddForCausalLM)


def odd(quirk: str = "none", seed: int = 0) -> OddForCausalLM:
    """The model in eval mode, weights of a size at which everything matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = OddForCausalLM(OddConfig(quirk))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def save_odd(folder: Path, quirk: str = "none") -> Path:
    """The model and the lab's tokenizer, saved."""
    from query.demo.tokenizer import train_tokenizer
    from tests.conftest import sentences

    tokenizer = train_tokenizer(sentences(50), 290)
    model = odd(quirk)
    assert len(tokenizer) <= model.config.vocab_size
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
