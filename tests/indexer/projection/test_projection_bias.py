"""Inner products of whole projected vectors are, on average over seeds, those of the exact gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghoststore.settings.projection import ProjectionConfig
from indexer.encode.engine import GradProjLoraEngine
from indexer.projection.matrices import Projection
from tests.support.models import perceptron
from tests.support.oracle import exact_dots, naive


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "orthonormal"])
@pytest.mark.parametrize(
    ("settings", "seeds"),
    [({"rank_total": 9}, 150), ({"rank_total": 16, "compress": 12}, 300)],
    ids=["plain", "sketched"],
)
def test_unbiased(kind: str, settings: dict[str, Any], seeds: int) -> None:
    model = perceptron()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 7, generator=generator)
    y = torch.tensor([1, 1])

    def loss_of(model: nn.Module, sample: int) -> Tensor:
        return F.cross_entropy(model(x[sample : sample + 1]), y[sample : sample + 1])

    def projected(seed: int) -> Tensor:
        config = ProjectionConfig(layers=("all",), kind=kind, seed=seed, **settings)
        with GradProjLoraEngine(model, config) as engine:
            engine.prepare(2)
            vectors = engine.collect(F.cross_entropy(model(x), y, reduction="none")).double()
        return (vectors @ vectors.t())[[0, 1, 0], [0, 1, 1]]

    full = Projection.for_model(model, ProjectionConfig(layers=("all",), rank_total="full"))
    exact = exact_dots(naive(model, full, 2, loss_of), [name for name, _ in model.named_parameters()])
    expected = exact[[0, 1, 0], [0, 1, 1]]
    # Fixed seeds: an error of 4 standard errors is a bias, not bad luck.
    found = torch.stack([projected(seed) for seed in range(seeds)])
    error = found.std(0) / math.sqrt(seeds)
    assert bool(((found.mean(0) - expected).abs() <= 4 * error).all()), (found.mean(0), expected, error)
    # And the error is small enough to see a missing factor such as √(n/k).
    assert bool((error <= 0.15 * expected.abs()).all()), (error, expected)
