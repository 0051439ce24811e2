"""Mixing that is little more than rounding: what is allowed is measured, with company that mixes nothing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError
from indexer.dotprod import GradDotProdEngine
from tests.support.models import CAUSAL, settle
from tests.support.scoring import plain_step, sum_of_squares


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class MixedBefore(nn.Module):
    """A share of the batch's mean comes to each sample before the first layer: gradients at outputs stay apart."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x + self.share * (x.mean(0) - x))))


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float32, 5e-4), (torch.bfloat16, 0.03), (torch.float16, 5e-3)], ids=str
)
def test_is_refused(dtype: torch.dtype, share: float) -> None:
    model = settle(MixedBefore(share)).to(dtype)
    x, val = random(4, 5, 64).to(dtype), random(3, 5, 64, seed=1).to(dtype)
    with (
        GradDotProdEngine(model, val, val_losses=sum_of_squares) as engine,
        pytest.raises(CaptureError, match="a: its input does not follow the samples"),
    ):
        plain_step(engine, model, x)


class MixedAfter(MixedBefore):
    """The same after the last layer: inputs of layers stay apart."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.tanh(self.a(x)))
        return y + self.share * (y.mean(0) - y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_after_the_last_layer_is_refused(dtype: torch.dtype) -> None:
    model = settle(MixedAfter(0.01)).to(dtype)
    with (
        GradDotProdEngine(model, random(3, 5, 64, seed=1).to(dtype), val_losses=sum_of_squares) as engine,
        pytest.raises(CaptureError, match="reaches the rows of others"),
    ):
        engine.prepare(4)


@pytest.mark.thin(3)
@pytest.mark.parametrize("cast", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("architecture", ["gpt2-tied", "llama"])
def test_rounding_is_not(architecture: str, cast: str) -> None:
    model: Any = CAUSAL[architecture]()
    model = model.bfloat16() if cast == "bfloat16" else model
    ids = torch.randint(0, model.config.vocab_size, (9, 16), generator=torch.Generator().manual_seed(0))
    val = {"input_ids": ids[:3], "labels": ids[:3]}
    autocast: Any = torch.autocast("cpu", dtype=torch.bfloat16) if cast == "autocast" else nullcontext()
    with GradDotProdEngine(model, val) as engine, autocast:
        engine.prepare(len(ids))
        loss = model(input_ids=ids, labels=ids).loss
        engine.watch(loss, labels=ids)
        loss.backward()
        assert bool(engine.collect().total.isfinite().all())
