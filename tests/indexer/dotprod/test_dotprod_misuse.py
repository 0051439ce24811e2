"""Calls in a wrong order or with wrong arguments: an error that says what to call, and no harm to the next batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ghoststore.errors import CaptureError, GhostStoreError, UsageError
from indexer.dotprod import GradDotProdEngine
from tests.support.models import settle
from tests.support.scoring import check, exact_plain, plain_step, sum_of_squares

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
VAL = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))

Call = Callable[[GradDotProdEngine, nn.Module], Any]


def loss_of(model: nn.Module) -> torch.Tensor:
    return sum_of_squares(model, X).mean()


def opened(then: Call) -> Call:
    def call(engine: GradDotProdEngine, model: nn.Module) -> Any:
        engine.prepare(3)
        return then(engine, model)

    return call


def watched(then: Call) -> Call:
    def call(engine: GradDotProdEngine, model: nn.Module) -> Any:
        loss = loss_of(model)
        engine.watch(loss)
        engine.loss = loss  # type: ignore[attr-defined] - for the call that follows
        return then(engine, model)

    return opened(call)


def backward_twice(engine: GradDotProdEngine, model: nn.Module) -> None:
    engine.loss.backward(retain_graph=True)  # type: ignore[attr-defined]
    engine.loss.backward()  # type: ignore[attr-defined]
    engine.collect()


def unfreeze(engine: GradDotProdEngine, model: nn.Module) -> None:
    parameter = next(model.parameters())
    parameter.requires_grad_(False)
    try:
        engine.prepare(3)
    finally:
        parameter.requires_grad_(True)


def without_gradients(engine: GradDotProdEngine, model: nn.Module) -> None:
    with torch.no_grad():
        engine.watch(loss_of(model))


LABELS = torch.zeros(2, 5, dtype=torch.int64)

MISUSES: dict[str, tuple[Call, type[GhostStoreError], str]] = {
    "attach twice": (lambda e, m: e.attach(), UsageError, r"attached already; call detach\(\)"),
    "no samples": (lambda e, m: e.prepare(0), UsageError, "at least one sample, not 0"),
    "prepare twice": (opened(lambda e, m: e.prepare(3)), UsageError, r"not collected; call collect\(\).*discard\(\)"),
    "watch without prepare": (lambda e, m: e.watch(loss_of(m)), UsageError, r"call prepare\(\)"),
    "collect without prepare": (lambda e, m: e.collect(), UsageError, r"call prepare\(\)"),
    "collect without watch": (opened(lambda e, m: e.collect()), UsageError, r"call watch\(loss\)"),
    "watch twice": (watched(lambda e, m: e.watch(loss_of(m))), UsageError, "a watched loss already"),
    "no backward": (watched(lambda e, m: e.collect()), CaptureError, r"call backward\(\)"),
    "backward twice": (watched(backward_twice), CaptureError, "more than once"),
    "refresh in a batch": (opened(lambda e, m: e.refresh()), UsageError, r"before refresh\(\)"),
    "no gradient": (opened(without_gradients), CaptureError, "carries no gradient"),
    "losses of samples": (opened(lambda e, m: e.watch(sum_of_squares(m, X))), UsageError, r"shape \(3,\)"),
    "wrong weights": (
        opened(lambda e, m: e.watch(loss_of(m), weights=torch.ones(2))),
        UsageError,
        r"\(2,\) samples, but .* has 3",
    ),
    "wrong labels": (opened(lambda e, m: e.watch(loss_of(m), labels=LABELS)), UsageError, r"\(2, 5\).* 3 samples"),
    "labels of classes": (
        opened(lambda e, m: e.watch(loss_of(m), labels=LABELS[0, :3])),
        UsageError,
        r"of tokens.* shape \(3,\)",
    ),
    "weights and wrong labels": (
        opened(lambda e, m: e.watch(loss_of(m), weights=torch.ones(3), labels=LABELS)),
        UsageError,
        r"\(2, 5\)",
    ),
    "unfreezing": (unfreeze, UsageError, "frozen or unfrozen since the engine was made"),
    "another batch": (opened(lambda e, m: m(X[:2])), CaptureError, r"shape \(2, 6\).*3 samples"),
}


@pytest.mark.parametrize("kind", MISUSES)
def test_misuse_is_named_and_the_next_batch_is_scored(kind: str) -> None:
    call, error, message = MISUSES[kind]
    model = settle(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)))
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares) as engine:
        with pytest.raises(error, match=message):
            call(engine, model)
        engine.discard()
        model.zero_grad()
        check(plain_step(engine, model, X), exact_plain(model, X, VAL))


@pytest.mark.parametrize("call", [lambda e: e.prepare(3), lambda e: e.refresh()])
def test_a_detached_engine_does_nothing(call: Callable[[GradDotProdEngine], None]) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    engine = GradDotProdEngine(model, VAL, val_losses=sum_of_squares)
    with pytest.raises(UsageError, match=r"not attached; call attach\(\)"):
        call(engine)
    engine.detach()  # harmless
    with engine:
        pass
    with pytest.raises(UsageError, match="not attached"):
        call(engine)


def test_unfreezing_between_making_and_attaching() -> None:
    # The new one would be missing from the score.
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    model[0].requires_grad_(False)
    engine = GradDotProdEngine(model, VAL, val_losses=sum_of_squares)
    model[0].requires_grad_(True)
    with engine, pytest.raises(UsageError, match="make a new engine"):
        engine.prepare(3)


def test_no_open_batch_means_no_taps() -> None:
    model = settle(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)))
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares) as engine:
        plain_step(engine, model, X)
        y = model(X[:2])  # any batch size
        assert "Tap" not in type(y.grad_fn).__name__
        y.sum().backward()
