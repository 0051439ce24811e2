"""Exact scores with projected gradients beside: neither changes the other, and a batch that wants none has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ghoststore.errors import UsageError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod.keeping import KeepingMethod
from tests.support.models import CAUSAL, gpt2, next_token_loss_of
from tests.support.oracle import naive, relative_error
from tests.support.scoring import BATCH, VAL, causal_engine, causal_step

CONFIGS = {
    "default": ProjectionConfig(),
    "all": ProjectionConfig(layers=("all",), rank_total=16),
}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.thin(1)
@pytest.mark.parametrize("route", ["auto", "gram"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_scores_and_vectors_are_those_of_either_alone(architecture: str, config: str, route: Any) -> None:
    """Bit for bit the scores of an engine that keeps nothing; the vectors those of the oracle."""
    plain = CAUSAL[architecture]()
    with causal_engine(plain, route=route) as engine:
        expected = causal_step(engine, plain)
    model = CAUSAL[architecture]()
    with causal_engine(model, route=route, keep=CONFIGS[config]) as engine:
        scores = causal_step(engine, model)
        projection = engine.method.projection
    assert torch.equal(scores.total, expected.total)
    assert scores.blocks.keys() == expected.blocks.keys()
    assert all(torch.equal(g, gradients(plain)[name]) for name, g in gradients(model).items())
    assert projection is not None
    wanted = naive(model, projection, len(BATCH), next_token_loss_of(BATCH)).vectors
    of_val = naive(model, projection, 3, next_token_loss_of(VAL[:3])).vectors.mean(0)
    assert scores.vectors is not None
    assert scores.val_vector is not None
    assert relative_error(scores.vectors, wanted) <= 1e-5
    assert relative_error(scores.val_vector[None], of_val[None]) <= 1e-5


def test_layers_that_the_score_leaves_out_are_projected_all_the_same() -> None:
    model = gpt2()
    with causal_engine(model, exclude_layers=("mlp",), keep=ProjectionConfig(layers=("mlp",))) as engine:
        scores = causal_step(engine, model)
        assert engine.method.projection is not None
        wanted = naive(model, engine.method.projection, len(BATCH), next_token_loss_of(BATCH)).vectors
    assert scores.vectors is not None
    assert relative_error(scores.vectors, wanted) <= 1e-5
    with causal_engine(model, exclude_layers=("mlp",)) as engine:
        assert torch.equal(causal_step(engine, model).total, scores.total)


def test_only_wanted_batches_have_vectors() -> None:
    """The val gradient's is made in the val pass, if a batch that wants one may come before the next."""
    model = gpt2()
    with causal_engine(model, val_refresh_interval=3, keep=CONFIGS["default"]) as engine:
        method = engine.method
        assert isinstance(method, KeepingMethod)
        found = []
        for step in range(6):
            method.wanted, method.wanted_val = step in (1, 3), step == 0
            scores = causal_step(engine, model)
            found.append((scores.vectors is not None, scores.val_vector is not None))
            engine.stepped()
    assert found == [(False, False), (True, True), (False, False), (True, False), (False, False), (False, False)]


def test_vectors_of_two_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match="`projection` gives vectors already"):
        causal_engine(gpt2(), projection=ProjectionConfig(), keep=ProjectionConfig())
