"""Narrow dtypes: a score is as good as autograd's own in that dtype.

The truth is batch-of-one autograd in float32 with the model's (rounded) weights. An inner product of long gradients
that nearly cancel has, in any narrow arithmetic, an error that goes with their lengths; so the error of a batch (as a
norm) must be below 1 % of ‖∇ℓ_i‖·‖∇L_val‖, and below twice that of batch-of-one autograd in the narrow dtype itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from indexer.dotprod import GradDotProdEngine, language_model_losses
from indexer.dotprod.exact import Route
from tests.support.models import gpt2, llama, neox
from tests.support.oracle import relative_error
from tests.support.scoring import BATCH, VAL, causal_engine, causal_step, exact_causal, val_batch

MAKES = {"gpt2": gpt2, "llama": llama, "neox": neox}
ROUTES: tuple[Route, ...] = ("direct", "gram")


@dataclass(frozen=True)
class Truth:
    """Of a model with the weights that the narrow one has."""

    total: Tensor
    pairs: Tensor
    size: Tensor
    """(B,): ‖∇ℓ_i‖·‖∇L_val‖."""
    narrow: Tensor
    """(B,): the scores of batch-of-one autograd in the narrow dtype."""

    def check(self, found: Tensor) -> None:
        assert found.dtype == torch.float64
        error, own = float((found - self.total).norm()), float((self.narrow - self.total).norm())
        assert error <= 1e-2 * float(self.size.norm())
        assert error <= 2 * own


@cache
def truth_of(make: str, dtype: torch.dtype, autocast: bool) -> Truth:
    narrow, wide = MAKES[make](), MAKES[make]()
    if not autocast:
        narrow, wide = narrow.to(dtype), wide.to(dtype).float()
    with torch.autocast("cpu", dtype=dtype) if autocast else nullcontext():
        own = exact_causal(narrow).total().mean(1)
    pairs = exact_causal(wide, val=BATCH).total()
    val_size = exact_causal(wide, VAL).total().mean().sqrt()
    return Truth(exact_causal(wide).total().mean(1), pairs, pairs.diagonal().sqrt() * val_size, own)


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-2) -> None:
    assert found.dtype == torch.float64
    assert relative_error(found.unsqueeze(0), expected.unsqueeze(0)) <= tolerance


@pytest.mark.thin(2)
@pytest.mark.parametrize("groups", [None, "each"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("make", MAKES)
def test_bfloat16_model(make: str, route: Route, groups: Any) -> None:
    truth = truth_of(make, torch.bfloat16, autocast=False)
    model = MAKES[make]().bfloat16()
    with causal_engine(model, VAL, route=route, groups=groups, pairs=True) as engine:
        scores = causal_step(engine, model)
    truth.check(scores.total)
    assert scores.pairs is not None
    near(scores.pairs, truth.pairs)


def autocast_losses(dtype: torch.dtype) -> Callable[[Any, Any], Tensor]:
    def losses(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return language_model_losses(model, batch)

    return losses


@pytest.mark.thin(2)
@pytest.mark.parametrize("val", ["bfloat16", "float32", "around prepare"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("make", MAKES)
def test_autocast(make: str, route: Route, val: str) -> None:
    model = MAKES[make]()
    settings: dict[str, Any] = {"val_losses": autocast_losses(torch.bfloat16)} if val == "bfloat16" else {}
    batch = val_batch(BATCH)
    with causal_engine(model, VAL, route=route, **settings) as engine:
        if val != "around prepare":
            engine.prepare(4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if val == "around prepare":
                engine.prepare(4)
            loss = model(**batch).loss
            engine.watch(loss, labels=batch["labels"])
        loss.backward()
        truth_of(make, torch.bfloat16, autocast=True).check(engine.collect().total)


@pytest.mark.thin(1)
@pytest.mark.parametrize("losses", [autocast_losses(torch.float16), None], ids=["val autocast", "val in float32"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("route", ROUTES)
def test_float16_autocast_with_a_loss_scaler(route: Route, accumulation: int, losses: Any) -> None:
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = []
    with causal_engine(model, VAL, route=route, val_losses=losses, optimizer=optimizer) as engine:
        for place in range(0, 4, 4 // accumulation):
            batch = val_batch(BATCH[place : place + 4 // accumulation])
            engine.prepare(len(batch["labels"]), loss_scale=scaler.get_scale())
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(**batch).loss
            engine.watch(loss, labels=batch["labels"])
            scaler.scale(loss / accumulation).backward()
            found.append(engine.collect().total)
        scaler.step(optimizer)
        scaler.update()
    near(torch.cat(found), truth_of("gpt2", torch.float16, autocast=True).total)


def too_large_for_float16() -> tuple[torch.nn.Module, Tensor, Callable[[Any, Any], Tensor]]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

    def losses(model: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return 300 * model(x).float().square().sum(1)

    return model, x, losses


@pytest.mark.parametrize("route", ROUTES)
def test_overflow_in_the_val_pass_lowers_the_scale(route: Route) -> None:
    model, x, losses = too_large_for_float16()
    totals = []
    for scale in (1.0, 65536.0):
        calls = []

        def counted(model: Any, x: Tensor, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return losses(model, x)

        with GradDotProdEngine(model, x, val_losses=counted, route=route) as engine:
            engine.examine()
            del calls[:]
            engine.prepare(5, loss_scale=scale)
            loss = losses(model, x).mean()
            engine.watch(loss)
            loss.backward()
            totals.append(engine.collect().total)
        assert (len(calls) == 1) == (scale == 1.0)
    near(totals[1], totals[0])


def test_overflow_in_a_train_batch_is_for_the_scaler_and_the_next_batch_is_checked() -> None:
    model, x, losses = too_large_for_float16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-24)
    found = []
    with GradDotProdEngine(model, x, val_losses=losses, optimizer=optimizer) as engine:
        for _ in range(2):
            engine.prepare(5)
            loss = losses(model, x).mean()
            engine.watch(loss)
            scaler.scale(loss).backward()
            found.append(engine.collect())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert not bool(torch.isfinite(found[0].total).all())
    assert bool(torch.isfinite(found[1].total).all())
    assert found[1].val_age == 0, "the scaler skipped the optimizer's step"


@pytest.mark.thin(1)
@pytest.mark.parametrize("make", ["gpt2", "llama"])
def test_float64(make: str) -> None:
    """As exact as autograd in float64 is."""
    model = MAKES[make]().double()
    exact = exact_causal(model)
    with causal_engine(model, VAL) as engine:
        scores = causal_step(engine, model)
    assert relative_error(scores.total.unsqueeze(0), exact.total().mean(1).unsqueeze(0)) <= 1e-6
