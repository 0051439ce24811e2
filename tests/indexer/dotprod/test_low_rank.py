"""The low-rank route: as near to a val gradient as its singular values allow, and the whole gradient where they do not.

A val gradient of few tokens has no more directions than it has tokens: then the route is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ghoststore.errors import CaptureError
from indexer.dotprod import exact, low_rank
from indexer.dotprod.low_rank import LowRank, low_rank_dots
from indexer.layers.factors import Outer
from tests.support.models import gpt2, llama
from tests.support.scoring import VAL, causal_engine, causal_step, check, exact_causal

SHORT = [(ids[:5], labels[:5]) for ids, labels in VAL[1:2]]
"""A val set of five tokens."""


@pytest.fixture(autouse=True)
def few_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that the matrices of a tiny model have more."""
    for module in (low_rank, exact):
        monkeypatch.setattr(module, "DIRECTIONS", 8)


def matrix(rows: int, columns: int, singular: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(1, rows, columns) with these singular values."""
    generator = torch.Generator().manual_seed(rows + columns)
    sides = [
        torch.linalg.qr(torch.randn(size, len(singular), generator=generator, dtype=torch.float64)).Q
        for size in (rows, columns)
    ]
    return ((sides[0] * singular) @ sides[1].t()).to(dtype).unsqueeze(0)


def share(short: LowRank | None, gradient_GRC: Tensor) -> float:
    """What is left out of the first gradient."""
    assert short is not None
    return float((short.dense() - gradient_GRC)[0].square().sum() / gradient_GRC[0].square().sum())


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (33, 33)])
@pytest.mark.parametrize("fall", [0.6, 0.3, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_near_the_best_of_its_rank(shape: tuple[int, int], fall: float, dtype: torch.dtype) -> None:
    singular = fall ** torch.arange(20, dtype=torch.float64)
    gradient = matrix(*shape, singular, dtype)
    (short,) = low_rank.low_rank([gradient])
    best = float(singular[8:].square().sum() / singular.square().sum())
    assert share(short, gradient) <= 4 * best + 1e-6


def test_many_parameters_and_groups_at_once_are_those_alone() -> None:
    steep, flat = 0.5 ** torch.arange(20, dtype=torch.float64), torch.ones(20, dtype=torch.float64)
    of_groups = torch.cat([matrix(40, 30, steep), matrix(40, 30, steep.flip(0)), torch.zeros(1, 40, 30)])
    gradients = [of_groups, matrix(30, 50, flat), matrix(30, 50, steep), torch.cat([of_groups, matrix(40, 30, flat)])]
    together = low_rank.low_rank(gradients)
    assert [short is None for short in together] == [False, True, False, True]
    for gradient, short in zip(gradients, together, strict=True):
        (alone,) = low_rank.low_rank([gradient])
        assert (alone is None) == (short is None)
        if short is not None and alone is not None:
            torch.testing.assert_close(short.dense(), alone.dense())
            torch.testing.assert_close(short.dense(), gradient, atol=0.02, rtol=0)


def test_a_gradient_that_is_not_finite_is_not_shortened() -> None:
    broken = matrix(40, 30, torch.ones(3, dtype=torch.float64))
    broken[0, 3, 4] = torch.nan
    assert low_rank.low_rank([broken]) == [None]


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_dots(batch: int, positions: int, groups: int, lookup: bool) -> None:
    generator = torch.Generator().manual_seed(batch + positions)
    val = LowRank(torch.randn(groups, 9, 3, generator=generator), torch.randn(groups, 7, 3, generator=generator))
    columns = torch.randn(batch, positions, 7, generator=generator)
    dense = torch.randn(batch, positions, 9, generator=generator)
    rows = torch.randint(9, (batch, positions), generator=generator) if lookup else dense
    one_hot = torch.nn.functional.one_hot(rows, 9).float() if lookup else dense
    expected = torch.einsum("bmr,grc,bmc->bg", one_hot, val.dense(), columns)
    torch.testing.assert_close(low_rank_dots(Outer(rows, columns), val), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.thin
@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("score_layers", ["all", "blocks"])
@pytest.mark.parametrize("groups", [None, "each"])
def test_scores_of_few_val_tokens_are_exact(make: Callable[[], Any], score_layers: str, groups: str | None) -> None:
    model = make()
    with causal_engine(model, SHORT, route="low-rank", score_layers=score_layers, groups=groups) as engine:
        scores = causal_step(engine, model)
        routes = engine.method.routes
    assert [name for name, route in routes.items() if route == "low-rank"]
    expected = exact_causal(model, val=SHORT)
    if score_layers == "blocks":
        expected = expected.only(lambda name: name in scores.parameters)
    check(scores, expected)


def test_where_the_directions_hold_too_little_the_whole_gradient_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "LEFT_OUT", -1.0)
    model = gpt2()
    with causal_engine(model, VAL, route="low-rank") as engine:
        check(causal_step(engine, model), exact_causal(model))
        assert set(engine.method.routes.values()) == {"direct"}


@pytest.mark.parametrize("metric", ["sgd", "adam"])
def test_the_check_holds_the_scores_against_the_gradient_that_is_used(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "LEFT_OUT", 1.0)
    monkeypatch.setattr(low_rank, "DIRECTIONS", 2)
    model = gpt2(layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=torch.arange(12).view(2, 6), labels=torch.arange(12).view(2, 6)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with causal_engine(model, VAL, route="low-rank", score_metric=metric, optimizer=optimizer) as engine:
        found = causal_step(engine, model).total
    with causal_engine(model, VAL, route="direct", score_metric=metric, optimizer=optimizer) as engine:
        whole = causal_step(engine, model).total
    assert not torch.allclose(found, whole, rtol=1e-6), "two directions are not all"
    dots = low_rank.low_rank_dots
    monkeypatch.setattr(exact, "low_rank_dots", lambda factors, val: 100 * dots(factors, val))
    with (
        causal_engine(model, VAL, route="low-rank", score_metric=metric, optimizer=optimizer) as engine,
        pytest.raises(CaptureError, match="its score differs from autograd's"),
    ):
        causal_step(engine, model)


def test_the_same_bits_after_another_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "LEFT_OUT", 1.0)
    model, totals = gpt2(layers=1), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with causal_engine(model, VAL, route="low-rank") as engine:
            totals.append(causal_step(engine, model).total)
        assert "low-rank" in engine.method.routes.values()
    assert torch.equal(*totals)


def test_auto_takes_it_where_it_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "LEFT_OUT", 1.0)
    model = gpt2()
    width = min(model.transformer.h[0].mlp.c_fc.weight.shape)
    for directions, route in ((1, "low-rank"), (width - 1, "direct"), (width, "direct")):
        for module in (low_rank, exact):
            monkeypatch.setattr(module, "DIRECTIONS", directions)
        with causal_engine(model, VAL * 2, val_refresh_interval=50) as engine:
            causal_step(engine, model)
            assert engine.method.routes["transformer.h.0.mlp.c_fc.weight"] == route
