"""Each layer type alone, at drawn shapes and projections, equals autograd a sample at a time.

A rank-1 projection can nearly cancel a gradient; errors are therefore relative to the gradient's norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from ghoststore.settings.projection import ProjectionConfig
from indexer.encode.engine import GradProjLoraEngine
from indexer.projection.draws import KINDS
from indexer.projection.matrices import Projection
from tests.support.models import settle
from tests.support.oracle import naive, relative_error

TOLERANCE = 1e-5

quickly = settings(deadline=None)
width = st.integers(2, 12)
batches = st.integers(1, 4)
positions = st.lists(st.integers(1, 5), max_size=2)
"""The axes between the first and the last: none, one or two."""


class Alone(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@st.composite
def configs(draw: st.DrawFn, numbers: int) -> ProjectionConfig:
    """Any projection that a layer of ``numbers`` numbers allows."""
    chosen: dict[str, Any] = {"rank_total": draw(st.one_of(st.just("full"), st.integers(1, numbers)))}
    if draw(st.booleans()) and chosen["rank_total"] == "full":
        chosen["compress"] = draw(st.integers(1, max(1, numbers - 1)))
    return ProjectionConfig(
        layers=("all",), kind=draw(st.sampled_from(sorted(KINDS))), seed=draw(st.integers(0, 5)), **chosen
    )


def check(layer: nn.Module, x: Tensor, config: ProjectionConfig) -> None:
    """The engine's vectors of ``layer`` on ``x`` are the oracle's, and its outputs untouched."""
    model = settle(Alone(layer))
    projection = Projection.for_model(model, config)

    def losses_of(model: nn.Module, x: Tensor) -> Tensor:
        y = model(x)
        weight = torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(3))
        return (torch.tanh(0.5 * y) * weight).flatten(1).sum(1) + 0.1 * y.square().flatten(1).sum(1)

    expected = naive(model, projection, len(x), lambda model, i: losses_of(model, x[i : i + 1]).sum())
    with GradProjLoraEngine(model, projection=projection) as engine:
        engine.prepare(len(x))
        vectors = engine.collect(losses_of(model, x))
    assert vectors.dtype == torch.float32
    assert relative_error(vectors, expected.vectors, expected.whole_norm()) <= TOLERANCE


def drawn(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix_layer(make: Callable[[int, int, bool], nn.Module], data: st.DataObject) -> None:
    n_in, n_out, bias = data.draw(width), data.draw(width), data.draw(st.booleans())
    shape = [data.draw(batches), *data.draw(positions), n_in]
    check(make(n_in, n_out, bias), drawn(shape, 1), data.draw(configs(n_out * (n_in + bias))))


@quickly
@given(st.data())
def test_linear(data: st.DataObject) -> None:
    matrix_layer(lambda n_in, n_out, bias: nn.Linear(n_in, n_out, bias=bias), data)


@quickly
@given(st.data())
def test_conv1d(data: st.DataObject) -> None:
    n_in, n_out = data.draw(width), data.draw(width)
    shape = [data.draw(batches), *data.draw(positions), n_in]
    check(Conv1D(n_out, n_in), drawn(shape, 1), data.draw(configs(n_out * (n_in + 1))))


@quickly
@given(st.data())
def test_embedding(data: st.DataObject) -> None:
    entries, n_out = data.draw(width), data.draw(width)
    padding = data.draw(st.one_of(st.none(), st.integers(0, entries - 1)))
    shape = [data.draw(batches), *(data.draw(positions) or [3])]
    ids = torch.randint(entries, shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 50))))
    sparse = data.draw(st.booleans())
    layer = nn.Embedding(entries, n_out, padding_idx=padding, sparse=sparse)
    check(layer, ids, data.draw(configs(entries * n_out)))


def norm_layer(layer: nn.Module, n: int, numbers: int, data: st.DataObject) -> None:
    shape = [data.draw(batches), *data.draw(positions), n]
    check(layer, 3 * drawn(shape, 1) + 0.5, data.draw(configs(numbers)))


@quickly
@given(st.data())
def test_layer_norm(data: st.DataObject) -> None:
    n, bias = data.draw(width), data.draw(st.booleans())
    layer = nn.LayerNorm(n, eps=data.draw(st.sampled_from([1e-5, 1e-2])), bias=bias)
    norm_layer(layer, n, n * (1 + bias), data)


@quickly
@given(st.data())
def test_rms_norm_of_torch(data: st.DataObject) -> None:
    n = data.draw(width)
    norm_layer(nn.RMSNorm(n, eps=data.draw(st.sampled_from([None, 1e-6, 1e-2]))), n, n, data)


@quickly
@given(st.data())
def test_rms_norm_of_llama(data: st.DataObject) -> None:
    n = data.draw(width)
    norm_layer(LlamaRMSNorm(n, eps=data.draw(st.sampled_from([1e-6, 1e-2]))), n, n, data)


@quickly
@given(st.data())
def test_rms_norm_of_gemma_with_its_weight_around_zero(data: st.DataObject) -> None:
    n = data.draw(width)
    norm_layer(GemmaRMSNorm(n, eps=data.draw(st.sampled_from([1e-6, 1e-2]))), n, n, data)
