"""The sketched score: inner products of the projected gradients, the very vectors that a build stores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine
from indexer.encode.engine import GradProjLoraEngine
from tests.indexer.layers.test_ties import SharedModule
from tests.support.models import CAUSAL, causal_vectors, gpt2, llama, next_token_loss_of, settle
from tests.support.oracle import block_errors, naive, relative_error
from tests.support.scoring import (
    BATCH,
    VAL,
    VAL_LAYOUTS,
    agree,
    causal_engine,
    causal_step,
    exact_causal,
    plain_step,
    sum_of_squares,
    val_batch,
)

CONFIGS = {
    "default": ProjectionConfig(),
    "all": ProjectionConfig(layers=("all",)),
    "plain": ProjectionConfig(layers=("all",), rank_total=16),
}


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("config", "layout"),
    [("default", "three batches"), ("all", "three batches"), ("plain", "three batches"), ("plain", "one")],
)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_equals_the_products_of_the_projected_gradients(architecture: str, layout: str, config: str) -> None:
    model, batches = CAUSAL[architecture](), VAL_LAYOUTS[layout]
    val = [example for batch in batches for example in batch]
    engine = GradDotProdEngine(
        model, [val_batch(batch) for batch in batches], projection=CONFIGS[config], groups="each"
    )
    with engine:
        scores = causal_step(engine, model, factor=0.25)
    projection = engine.method.projection  # type: ignore[union-attr]
    expected = naive(model, projection, len(BATCH), next_token_loss_of(BATCH))
    of_val = naive(model, projection, len(val), next_token_loss_of(val))
    agree(scores.groups, expected.vectors @ of_val.vectors.t())
    agree(scores.total, expected.vectors @ of_val.vectors.mean(0))
    assert scores.vectors is not None
    assert scores.vectors.dtype == torch.float32
    assert relative_error(scores.vectors, expected.vectors) <= 1e-5
    assert scores.parameters == {}
    if projection.sketch:
        assert scores.blocks == {}
        return
    assert max(block_errors(scores.vectors, expected).values()) <= 1e-5
    torch.testing.assert_close(torch.stack(list(scores.blocks.values())).sum(0), scores.total, rtol=1e-9, atol=0)
    for name, block in expected.blocks.items():
        exact = block.flatten(1) @ of_val.blocks[name].flatten(1).mean(0)
        size = block.flatten(1).norm(dim=1) * of_val.blocks[name].flatten(1).mean(0).norm()
        assert float((scores.blocks[name] - exact).norm()) <= 1e-5 * float(size.norm()), name


@pytest.mark.thin(3)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_the_vectors_are_those_of_a_build(architecture: str, config: str) -> None:
    model = CAUSAL[architecture]()
    with causal_engine(model, projection=CONFIGS[config]) as engine:
        vectors = causal_step(engine, model).vectors
    assert vectors is not None
    with GradProjLoraEngine(model, projection=engine.method.projection) as build:  # type: ignore[union-attr]
        assert relative_error(vectors, causal_vectors(build, model, BATCH)) <= 1e-5


@pytest.mark.thin(1)
@pytest.mark.parametrize("layers", [("all",), ("mlp", "attn")])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_full_rank_is_the_exact_score_of_those_layers(make: Any, layers: tuple[str, ...]) -> None:
    model = make()
    with causal_engine(model, projection=ProjectionConfig(layers=layers, rank_total="full")) as engine:
        scores = causal_step(engine, model)
    names = {
        name
        for layer in engine.method.projection.plan.layers
        for name in layer.block.parameters  # type: ignore[union-attr]
    }
    agree(scores.total, exact_causal(model, val=VAL[:3]).only(names.__contains__).total().mean(1))


def test_a_module_that_runs_twice_is_one_block() -> None:
    model = settle(SharedModule())
    x, val = (torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    config = ProjectionConfig(layers=("all",), rank_total=9)
    with GradDotProdEngine(model, val, val_losses=sum_of_squares, projection=config) as engine:
        vectors = plain_step(engine, model, x).vectors
    assert vectors is not None

    def loss_of(model: nn.Module, i: int) -> Tensor:
        return sum_of_squares(model, x[i : i + 1]).sum()

    assert relative_error(vectors, naive(model, engine.method.projection, 3, loss_of).vectors) <= 1e-5  # type: ignore[union-attr]


def test_samples_without_targets_have_no_vector() -> None:
    model = gpt2()
    batch = [*BATCH[:3], (BATCH[3][0], torch.full_like(BATCH[3][1], -100))]
    with causal_engine(model, projection=ProjectionConfig()) as engine:
        whole, scores = causal_step(engine, model), causal_step(engine, model, batch)
    assert whole.vectors is not None
    assert scores.vectors is not None
    assert bool(scores.vectors[3].isnan().all())
    assert relative_error(scores.vectors[:3], whole.vectors[:3]) <= 1e-5


def test_bfloat16() -> None:
    model = gpt2().bfloat16()
    with causal_engine(model, VAL, projection=ProjectionConfig()) as engine:
        found = causal_step(engine, model)
    model.float()
    with causal_engine(model, VAL, projection=engine.method.projection) as exact:  # type: ignore[union-attr]
        expected = causal_step(exact, model)
        val = exact.method.val_GD  # type: ignore[union-attr]
    assert expected.vectors is not None
    size = expected.vectors.norm(dim=1) * val.norm()
    assert float((found.total - expected.total).norm()) <= 1e-2 * float(size.norm())
