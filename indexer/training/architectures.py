"""GPT-2 in its published sizes (Radford et al. 2019, table 2), and a small one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ghoststore.errors import UsageError


class Shape(NamedTuple):
    """Layers, width, heads."""

    layers: int
    width: int
    heads: int


ARCHITECTURES = {
    "GPT2-Tiny": Shape(4, 128, 4),
    "GPT2-Small": Shape(12, 768, 12),
    "GPT2-Medium": Shape(24, 1024, 16),
    "GPT2-Large": Shape(36, 1280, 20),
}
POSITIONS = 1024


def architecture(name: str, tokenizer: Any, *, dropout: float = 0.0) -> GPT2Config:
    """The configuration called ``name`` for the vocabulary of ``tokenizer``; UsageError with the known names."""
    known = {key.lower(): shape for key, shape in ARCHITECTURES.items()}
    shape = known.get(name.lower())
    if shape is None:
        raise UsageError(f"`architecture` {name!r} is unknown; known: {', '.join(ARCHITECTURES)}")
    vocabulary = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=0) + 1)
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_model(config: GPT2Config, *, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 with weights drawn from ``seed``; torch's own generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what transformers takes anyway, after a warning
    return model
