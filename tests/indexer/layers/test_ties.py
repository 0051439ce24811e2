"""A parameter that is used more than once is one block, the sum of its uses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghoststore.errors import LayerError
from ghoststore.settings.projection import ProjectionConfig
from indexer.encode.engine import GradProjLoraEngine
from indexer.projection.matrices import Projection
from tests.support.models import VOCABULARY, settle
from tests.support.oracle import naive, relative_error

TOLERANCE = 1e-5
BATCH, LENGTH = 3, 5


class SharedModule(nn.Module):
    """One Linear object, run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class SharedWeight(nn.Module):
    """Two Linear objects of one weight, each with its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.other(torch.tanh(self.one(x)))))


class SharedWeightAndBias(SharedWeight):
    def __init__(self) -> None:
        super().__init__()
        self.other.bias = self.one.bias


class SharedBias(SharedWeight):
    """Two weights, one bias: it belongs to two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.other.weight = nn.Parameter(torch.zeros(6, 6))
        self.other.bias = self.one.bias


@pytest.mark.parametrize("rank_total", ["full", 9])
@pytest.mark.parametrize("make", [SharedModule, SharedWeight, SharedWeightAndBias])
def test_shared_linears(make: Callable[[], nn.Module], rank_total: int) -> None:
    model = settle(make())
    x = torch.randn(BATCH, LENGTH, 6, generator=torch.Generator().manual_seed(0))

    def loss_of(model: nn.Module, sample: int) -> Tensor:
        return model(x[sample : sample + 1]).square().sum()

    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total=rank_total)) as engine:
        engine.prepare(BATCH)
        vectors = engine.collect(model(x).square().sum((1, 2)))
    expected = naive(model, engine.projection, BATCH, loss_of)
    assert relative_error(vectors, expected.vectors) <= TOLERANCE


def test_a_bias_that_two_weights_share_is_refused() -> None:
    # Each of the two blocks would hold its own use's share: the sum over uses, and so the cross terms of
    # an inner product, would be missing.
    with pytest.raises(LayerError, match="bias"):
        Projection.for_model(SharedBias(), ProjectionConfig(layers=("all",), rank_total="full"))


class TiedLanguageModel(nn.Module):
    """Embedding (with a padding index) and head of one weight; the head may come first and have a bias."""

    def __init__(self, *, head_first: bool, bias: bool, padding: int | None) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(8, VOCABULARY, bias=bias)
        self.embedding = nn.Embedding(VOCABULARY, 8, padding_idx=padding)
        self.middle = nn.Linear(8, 8)
        if not head_first:
            self.head = nn.Linear(8, VOCABULARY, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embedding(ids))))


@pytest.mark.thin
@pytest.mark.parametrize("rank_total", ["full", 9])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_head(head_first: bool, bias: bool, padding: int | None, rank_total: int) -> None:
    model = settle(TiedLanguageModel(head_first=head_first, bias=bias, padding=padding))
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, 2] = 3

    def loss_of(model: nn.Module, sample: int) -> Tensor:
        return F.cross_entropy(model(ids[sample : sample + 1])[0], ids[sample])

    config = ProjectionConfig(layers=("all",), rank_total=rank_total)
    assert len(Projection.for_model(model, config).plan.layers) == 2
    with GradProjLoraEngine(model, config) as engine:
        engine.prepare(BATCH)
        losses = F.cross_entropy(model(ids).transpose(1, 2), ids, reduction="none").mean(1)
        vectors = engine.collect(losses)
    expected = naive(model, engine.projection, BATCH, loss_of)
    assert relative_error(vectors, expected.vectors) <= TOLERANCE
