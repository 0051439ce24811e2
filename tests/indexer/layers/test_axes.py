"""Sides that are left as they are (an axis in the place of a matrix) against plain autograd, for every layer type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from ghoststore.errors import UsageError
from ghoststore.settings.projection import ProjectionConfig
from indexer.encode.engine import GradProjLoraEngine
from indexer.projection.matrices import Projection
from indexer.projection.plan import ProjectionPlan
from tests.indexer.layers.test_layers_alone import Alone, drawn
from tests.support.models import (
    CAUSAL,
    bert_masked,
    causal_vectors,
    examples,
    gpt2,
    next_token_loss_of,
    settle,
)
from tests.support.oracle import LossOf, gradient_matrix, gradients_alone, relative_error

TOLERANCE = 5e-5
SIDES = ("neither", "in", "out", "norms scaled")
B = 3


def sides_of(plan: ProjectionPlan, projected: str) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """(P_in, P_out) by block name; ``projected`` says which are matrices."""
    found: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for place, layer in enumerate(plan.layers):
        p_in = drawn((3, layer.block.n_in), 10 + place) if projected == "in" and layer.block.is_matrix else None
        p_out = drawn((4, layer.block.n_out), 20 + place) if projected == "out" else None
        if projected == "norms scaled" and not layer.block.is_matrix:
            p_in = torch.tensor([[-1.7]])
        found[layer.block.name] = (p_in, p_out)
    return found


def projection_with(model: nn.Module, projected: str) -> Projection:
    plan = ProjectionPlan.for_model(model, ProjectionConfig(layers=("all",), rank_total=1))
    return Projection.with_sides(plan, sides_of(plan, projected))


def agree(projection: Projection, vectors: Tensor, model: nn.Module, count: int, loss_of: LossOf) -> None:
    """Each block is P_out G P_inᵀ with the matrices that there are."""
    gradients = gradients_alone(model, count, loss_of)
    assert vectors.dtype == torch.float32
    assert vectors.shape == (count, projection.plan.dimension)
    for layer in projection.plan.layers:
        p_in, p_out = projection.sides[layer.block.name]
        expected = torch.stack([gradient_matrix(model, layer.block.name, one) for one in gradients])
        norms = expected.flatten(1).norm(dim=1)
        if p_in is not None:
            expected = expected @ p_in.double().t()
        if p_out is not None:
            expected = p_out.double() @ expected
        assert expected.shape[1:] == (layer.k_out, layer.k_in)
        found = vectors[:, layer.start : layer.stop]
        assert relative_error(found, expected.flatten(1), norms) <= TOLERANCE, layer.block.name


def losses_of(y: Tensor) -> Tensor:
    weight = drawn(tuple(y.shape[1:]), 3)
    return (torch.tanh(0.5 * y) * weight).flatten(1).sum(1) + 0.1 * y.square().flatten(1).sum(1)


IDS = torch.tensor([[4, 2, 4, 0], [2, 2, 1, 5], [0, 3, 0, 0]])
ALONE: dict[str, tuple[Any, Tensor]] = {
    "linear": (lambda: nn.Linear(5, 7), drawn((B, 4, 5), 0)),
    "linear-without-bias": (lambda: nn.Linear(5, 7, bias=False), drawn((B, 2, 3, 5), 0)),
    "linear-without-positions": (lambda: nn.Linear(5, 7), drawn((B, 5), 0)),
    "conv1d": (lambda: Conv1D(7, 5), drawn((B, 4, 5), 0)),
    "embedding": (lambda: nn.Embedding(6, 5), IDS),
    "embedding-padding": (lambda: nn.Embedding(6, 5, padding_idx=2), IDS),
    "layernorm": (lambda: nn.LayerNorm(6), drawn((B, 4, 6), 0)),
    "layernorm-without-bias": (lambda: nn.LayerNorm(6, bias=False), drawn((B, 4, 6), 0)),
    "rmsnorm": (lambda: nn.RMSNorm(6), drawn((B, 4, 6), 0)),
    "rmsnorm-llama": (lambda: LlamaRMSNorm(6), drawn((B, 4, 6), 0)),
    "rmsnorm-gemma": (lambda: GemmaRMSNorm(6), drawn((B, 4, 6), 0)),
}


@pytest.mark.thin
@pytest.mark.parametrize("projected", SIDES)
@pytest.mark.parametrize("layer", ALONE)
def test_each_layer_type(layer: str, projected: str) -> None:
    make, x = ALONE[layer]
    model = settle(Alone(make()))
    projection = projection_with(model, projected)
    with GradProjLoraEngine(model, projection=projection) as engine:
        engine.prepare(B)
        vectors = engine.collect(losses_of(model(x)))
    agree(projection, vectors, model, B, lambda model, i: losses_of(model(x[i : i + 1])).sum())


@pytest.mark.thin(3)
@pytest.mark.parametrize("projected", SIDES)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_language_models(architecture: str, projected: str) -> None:
    """Padded batches; positions that run once for all samples; heads tied to embeddings, with other uses' biases."""
    model, batch = CAUSAL[architecture](), examples()
    projection = projection_with(model, projected)
    with GradProjLoraEngine(model, projection=projection) as engine:
        vectors = causal_vectors(engine, model, batch)
    agree(projection, vectors, model, len(batch), next_token_loss_of(batch))


@pytest.mark.parametrize("projected", SIDES)
def test_a_tied_decoder_with_a_bias(projected: str) -> None:
    """One more row of the block, which the embedding has no number for."""
    model = bert_masked()
    ids = torch.randint(1, 101, (B, 9), generator=torch.Generator().manual_seed(0))
    projection = projection_with(model, projected)

    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        return F.cross_entropy(model(input_ids=ids).logits.transpose(1, 2), ids, reduction="none").mean(1)

    with GradProjLoraEngine(model, projection=projection) as engine:
        engine.prepare(B)
        vectors = engine.collect(losses(model, ids))
    agree(projection, vectors, model, B, lambda model, i: losses(model, ids[i : i + 1]).sum())


def test_some_layers_whole_and_some_projected() -> None:
    """Columns follow the sides that are given, not the ranks of the plan."""
    model, batch = gpt2(layers=1), examples()
    plan = ProjectionPlan.for_model(model, ProjectionConfig(layers=("all",), rank_total=25))
    mixed = {
        name: pair if place % 2 else (None, None) for place, (name, pair) in enumerate(sides_of(plan, "in").items())
    }
    projection = Projection.with_sides(plan, mixed)
    assert projection.plan.layers[0].start == 0
    assert projection.plan.dimension == sum(one.k_out * one.k_in for one in projection.plan.layers)
    assert projection.sketch is None
    with GradProjLoraEngine(model, projection=projection) as engine:
        vectors = causal_vectors(engine, model, batch)
    agree(projection, vectors, model, len(batch), next_token_loss_of(batch))


def test_sides_that_overflow_the_dtype_are_refused() -> None:
    """Infinite numbers would make every row one that is not finite."""
    model = settle(Alone(nn.Linear(5, 7))).half()
    plan = ProjectionPlan.for_model(model, ProjectionConfig(layers=("all",), rank_total=4))
    sides = {plan.layers[0].block.name: (torch.eye(6), 1e5 * torch.eye(7))}
    with (
        pytest.raises(UsageError, match=r"layer 'layer': .* up to 1e\+05, which are infinite in torch.float16"),
        GradProjLoraEngine(model, projection=Projection.with_sides(plan, sides)),
    ):
        pass
