"""Checkpoints that are loaded: short ones, and what cannot be learnt from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf

from ghoststore.checkpoint.load import find_checkpoint, load_model, max_positions
from ghoststore.errors import CheckpointError, UsageError
from tests.support.models import llama


@pytest.mark.parametrize("positions", [1, 2, 4, 6, 8])
def test_models_of_few_positions(positions: int, tmp_path: Path) -> None:
    config = tf.GPT2Config(vocab_size=20, n_positions=positions, n_embd=8, n_layer=1, n_head=2)
    tf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_model(find_checkpoint(tmp_path))
    assert max_positions(model) == positions
    ids = torch.zeros(1, positions, dtype=torch.long)
    assert model(input_ids=ids).logits.shape == (1, positions, 20)


@pytest.mark.parametrize("positions", [2, 4, 6, 16])
def test_models_of_few_positions_that_see_ahead(positions: int, tmp_path: Path) -> None:
    config = tf.BertConfig(
        vocab_size=20,
        max_position_embeddings=positions,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        initializer_range=0.5,
        is_decoder=False,
    )
    tf.BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is not causal"):
        load_model(find_checkpoint(tmp_path))


def test_a_kernel_without_a_backward_pass_here(tmp_path: Path) -> None:
    """It was torch's NotImplementedError, in the first batch."""
    llama(layers=1).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="'flex_attention' has no backward pass on a CPU"):
        load_model(find_checkpoint(tmp_path), attn_implementation="flex_attention")
    assert load_model(find_checkpoint(tmp_path), attn_implementation="sdpa").config._attn_implementation == "sdpa"
