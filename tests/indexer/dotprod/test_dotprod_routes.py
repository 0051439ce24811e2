"""Every route to an inner product equals the gradients themselves, formed; and so it does however small the tiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from indexer.dotprod import exact, routes
from indexer.dotprod.exact import Route
from indexer.dotprod.routes import add_gradients, direct, gram, pairs
from indexer.layers.factors import Factors, Outer, Vector
from tests.support.models import gpt2, llama
from tests.support.oracle import relative_error
from tests.support.scoring import BATCH, VAL, agree, causal_engine, causal_step, check, exact_causal

TILES = (1, 7, 100, 1 << 23)

sizes = st.integers(1, 5)
dtypes = st.sampled_from([torch.float32, torch.float64])


@st.composite
def factors_of(draw: st.DrawFn, shape: torch.Size, dtype: torch.dtype) -> Factors:
    """A batch's gradients of a parameter of ``shape``, of any kind."""
    batch, positions = draw(sizes), draw(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if len(shape) == 1:
        return Vector(torch.randn(batch, *shape, generator=generator, dtype=dtype))
    columns = torch.randn(batch, positions, shape[1], generator=generator, dtype=dtype)
    if draw(st.booleans()):
        return Outer(torch.randint(shape[0], (batch, positions), generator=generator), columns)
    return Outer(torch.randn(batch, positions, shape[0], generator=generator, dtype=dtype), columns)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Size, int, list[Factors]]:
    """A parameter's shape, a tile, and two batches' gradients of it."""
    shape = torch.Size(draw(st.lists(sizes, min_size=1, max_size=2)))
    dtype = draw(dtypes)
    return shape, draw(st.sampled_from(TILES)), [draw(factors_of(shape, dtype)) for _ in range(2)]


def flat(factors: Factors, shape: torch.Size) -> Tensor:
    """(B, N) float64: every sample's gradient, formed. The slow, obvious version that the routes must equal."""
    if isinstance(factors, Vector):
        return factors.values.double()
    columns = factors.columns.double()
    if not factors.is_lookup:
        return (factors.rows.double().transpose(1, 2) @ columns).flatten(1)
    formed = columns.new_zeros(len(columns), *shape)
    for sample, (places, values) in enumerate(zip(factors.rows, columns, strict=True)):
        formed[sample].index_add_(0, places, values)
    return formed.flatten(1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def with_tile(tile: int, call: Callable[[], Tensor]) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "TILE", tile)
        return call()


@settings(deadline=None)
@given(cases(), st.integers(1, 3))
def test_direct(case: tuple[torch.Size, int, list[Factors]], groups: int) -> None:
    shape, tile, (factors, _) = case
    dtype = factors.values.dtype if isinstance(factors, Vector) else factors.columns.dtype
    val = torch.randn(groups, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    close(with_tile(tile, lambda: direct(factors, val)), flat(factors, shape) @ val.double().flatten(1).t())


@settings(deadline=None)
@given(cases())
def test_gram(case: tuple[torch.Size, int, list[Factors]]) -> None:
    shape, tile, (train, val) = case
    close(with_tile(tile, lambda: gram(train, val)), flat(train, shape) @ flat(val, shape).t())


@settings(deadline=None)
@given(cases(), st.integers(1, 3))
def test_pairs_of_a_parameter_with_one_to_three_uses(case: tuple[torch.Size, int, list[Factors]], uses: int) -> None:
    shape, tile, (one, other) = case
    batch = min(len(factors.values if isinstance(factors, Vector) else factors.columns) for factors in (one, other))
    of_uses = [factors.of(slice(batch)) for factors in (one, other, one)[:uses]]
    whole = torch.stack([flat(factors, shape) for factors in of_uses]).sum(0)
    close(with_tile(tile, lambda: pairs(of_uses, shape)), whole @ whole.t())


@settings(deadline=None)
@given(cases(), st.data())
def test_add_gradients(case: tuple[torch.Size, int, list[Factors]], data: st.DataObject) -> None:
    shape, _, (factors, _) = case
    whole = flat(factors, shape)
    groups = data.draw(sizes)
    group_V = torch.tensor([data.draw(st.integers(0, groups - 1)) for _ in whole])
    into = torch.ones(groups, *shape)
    add_gradients(factors, group_V, into)
    close(into.flatten(1), torch.ones(groups, whole.shape[1], dtype=torch.float64).index_add(0, group_V, whole))


@pytest.mark.parametrize("positions", [1, 40])
def test_both_ways_to_all_pairs_agree(positions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size((5, 6))
    factors = Outer(
        torch.randn(3, positions, 5, generator=generator), torch.randn(3, positions, 6, generator=generator)
    )
    assert routes.pairs_by_tiles([factors], shape) == (positions == 40)
    close(pairs([factors], shape), flat(factors, shape) @ flat(factors, shape).t())


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_float16_has_the_range_of_float32(scale: float) -> None:
    # A val gradient below float16's smallest number, and products of scaled factors beyond its largest.
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(3, 4, 8, generator=generator) for _ in range(2))
    factors = Outer((rows * scale).half(), columns.half())
    shape = torch.Size((8, 8))
    val = 1e-8 * torch.randn(2, *shape, generator=generator)
    for gradients in (val[:1], val):
        expected = flat(factors, shape) @ gradients.double().flatten(1).t()
        assert relative_error(direct(factors, gradients), expected) <= 1e-5
    expected = flat(factors, shape) @ flat(factors, shape).t()
    assert relative_error(gram(factors, factors), expected) <= 1e-5
    assert relative_error(pairs([factors], shape), expected) <= 1e-5


@pytest.mark.thin
@pytest.mark.parametrize("groups", [None, "each"])
@pytest.mark.parametrize("route", ["direct", "gram"])
@pytest.mark.parametrize("tile", [1, 500])
def test_a_model_in_tiny_tiles(tile: int, route: Route, groups: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "TILE", tile)
    model = gpt2(layers=1)
    batch, val = (
        [(ids[:6], labels[:6]) for ids, labels in BATCH[1:3]],
        [(ids[:7], labels[:7]) for ids, labels in VAL[:2]],
    )
    with causal_engine(model, val, route=route, groups=groups, pairs=True) as engine:
        scores = causal_step(engine, model, batch)
    exact = exact_causal(model, batch, val)
    check(scores, exact)
    assert scores.pairs is not None
    agree(scores.pairs, exact_causal(model, batch, batch).total())


def test_auto_takes_the_cheaper_one_and_each_parameter_its_own() -> None:
    # A long train batch and one short val sample: Gram for the matrices, direct for vectors and lookups.
    model = llama()
    with causal_engine(model, [(ids[:2], ids[:2]) for ids, _ in VAL[:1]]) as engine:
        causal_step(engine, model)
        chosen = engine.method.routes
    assert chosen["model.layers.0.mlp.up_proj.weight"] == "gram"
    assert chosen["model.embed_tokens.weight"] == "direct"
    assert chosen["model.norm.weight"] == "direct"
    with causal_engine(model, VAL * 4) as engine:
        causal_step(engine, model)
        assert set(engine.method.routes.values()) == {"direct"}


def test_auto_forms_no_val_gradients_beyond_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "LARGEST_VAL_GRADIENTS", 100)
    model = gpt2()
    with causal_engine(model, VAL) as engine:
        check(causal_step(engine, model), exact_causal(model))
        for name, parameter in model.named_parameters():
            assert engine.method.routes[name] == ("gram" if parameter.dim() == 2 else "direct")
