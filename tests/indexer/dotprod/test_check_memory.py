"""The first batch is checked with no more memory than the step: logits are never copied whole to float64.

Legend: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from indexer.dotprod import GradDotProdEngine
from indexer.dotprod.loss_forms import CHUNK_NUMBERS, WatchedLoss, explain, is_explained, next_tokens
from tests.support.models import settle


class Largest(TorchDispatchMode):
    """Numbers of the largest float64 tensor that is made, and of the largest of any dtype, views left out."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.float64 = self.any = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.any = max(self.any, tensor.numel())
                self.float64 = max(self.float64, tensor.numel() if tensor.dtype == torch.float64 else 0)
        return made


def test_outputs_are_not_copied_to_float64() -> None:
    vocabulary, samples, length = 16384, 4, 128
    config = GPT2Config(vocab_size=vocabulary, n_layer=1, n_embd=8, n_head=2, n_positions=length)
    model = settle(GPT2LMHeadModel(config))
    ids = torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))
    logits = samples * length * vocabulary
    assert logits >= 2 * CHUNK_NUMBERS
    with GradDotProdEngine(model, {"input_ids": ids, "labels": ids}) as engine, Largest() as largest:
        engine.prepare(samples)
        loss = model(input_ids=ids, labels=ids).loss
        engine.watch(loss, labels=ids)
        loss.backward()
        engine.collect()
    assert largest.any >= logits  # it does look
    assert 0 < largest.float64 <= CHUNK_NUMBERS


@pytest.mark.slow
def test_what_a_loss_is_instead_is_found_in_pieces() -> None:
    samples, length, vocabulary = 4, 300, 8192
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(samples, length, vocabulary, generator=generator).requires_grad_()
    labels = torch.randint(0, vocabulary, (samples, length), generator=generator)
    targets = next_tokens(logits, labels)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    weights = torch.full((samples,), 1 / samples, dtype=torch.float64)
    watched = WatchedLoss(float(loss.detach()), logits.detach(), targets, weights, gradient, 1.0)
    assert logits.numel() > 2 * CHUNK_NUMBERS
    with Largest(logits, gradient) as largest:
        assert is_explained(watched, labels, 1e-4)
    assert largest.any <= CHUNK_NUMBERS
    assert "label smoothing 0.1" in explain(watched, labels, 1e-4)
