"""Whole models: every vector, and every block of it, equals autograd a sample at a time, alone, unpadded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghoststore.settings.projection import ProjectionConfig
from indexer.encode.engine import GradProjLoraEngine
from indexer.encode.losses import IGNORED
from tests.support.models import (
    CAUSAL,
    bert_masked,
    causal_vectors,
    examples,
    gpt2,
    llama,
    next_token_loss_of,
    pad,
    perceptron,
)
from tests.support.oracle import Naive, block_errors, exact_dots, naive, relative_error

TOLERANCE = 1e-5

PROJECTIONS: dict[str, dict[str, Any]] = {
    "sketched": {},
    "plain": {"rank_total": 16},
    "plain-orthonormal": {"rank_total": 16, "kind": "orthonormal"},
    "sketched-small": {"rank_total": 16, "compress": 20, "kind": "rademacher"},
    "full": {"rank_total": "full"},
}
LAYERS = {"all": ("all",), "default": ("mlp", "attn")}


def check(vectors: Tensor, expected: Naive, engine: GradProjLoraEngine) -> None:
    """The whole vector, and each block where there are blocks."""
    assert relative_error(vectors, expected.vectors) <= TOLERANCE
    if engine.projection.sketch is None:
        errors = block_errors(vectors, expected)
        assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.thin(3)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_causal_language_models(architecture: str, layers: str, projection: str) -> None:
    model, batch = CAUSAL[architecture](), examples()
    config = ProjectionConfig(layers=LAYERS[layers], **PROJECTIONS[projection])
    with GradProjLoraEngine(model, config) as engine:
        vectors = causal_vectors(engine, model, batch)
    check(vectors, naive(model, engine.projection, len(batch), next_token_loss_of(batch)), engine)


@pytest.mark.thin(3)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_full_blocks_give_exact_inner_products(architecture: str) -> None:
    model, batch = CAUSAL[architecture](), examples((24, 2, 9, 16, 24))
    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total="full")) as engine:
        vectors = causal_vectors(engine, model, batch).double()
    expected = naive(model, engine.projection, len(batch), next_token_loss_of(batch))
    exact = exact_dots(expected, [name for name, _ in model.named_parameters()])
    norms = exact.diagonal().sqrt()
    error = (vectors @ vectors.t() - exact) / (norms[:, None] * norms[None, :])
    assert float(error.abs().max()) <= TOLERANCE


@pytest.mark.thin(3)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("lengths", [(13,), (2,), (24, 2), (7, 7, 7), (2, 24, 3, 5, 24, 8, 16)])
def test_batches_of_any_lengths(lengths: tuple[int, ...], reduction: Any) -> None:
    model, batch = gpt2(), examples(lengths)
    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total=16)) as engine:
        vectors = causal_vectors(engine, model, batch, reduction)
    check(vectors, naive(model, engine.projection, len(batch), next_token_loss_of(batch, reduction)), engine)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_attention_kernels(make: Any, attention: str) -> None:
    model, batch = make(attn_implementation=attention), examples()
    assert model.config._attn_implementation == attention
    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total=16)) as engine:
        vectors = causal_vectors(engine, model, batch)
    check(vectors, naive(model, engine.projection, len(batch), next_token_loss_of(batch)), engine)


@pytest.mark.thin(3)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("layers", LAYERS)
def test_a_masked_language_model_with_a_loss_of_its_own(layers: str, projection: str) -> None:
    # No shift, every sample its own masked places, and a decoder tied to the embedding, with a bias.
    model, batch = bert_masked(), examples((20, 5, 12), masked=False)
    for place, (_, labels) in enumerate(batch):
        labels[torch.arange(len(labels)) % 3 != place % 3] = IGNORED

    def loss_of(model: nn.Module, sample: int) -> Tensor:
        ids, labels = batch[sample]
        return F.cross_entropy(model(input_ids=ids.unsqueeze(0)).logits[0], labels, ignore_index=IGNORED)

    config = ProjectionConfig(layers=LAYERS[layers], **PROJECTIONS[projection])
    ids, labels, mask = pad(batch)
    with GradProjLoraEngine(model, config) as engine:
        engine.prepare(len(batch))
        logits = model(input_ids=ids, attention_mask=mask).logits
        each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        vectors = engine.collect(each.sum(1) / (labels != IGNORED).sum(1))
    check(vectors, naive(model, engine.projection, len(batch), loss_of), engine)


@pytest.mark.parametrize("projection", ["plain", "sketched-small", "full"])
@pytest.mark.parametrize("batch", [1, 6])
def test_a_perceptron_on_classes(projection: str, batch: int) -> None:
    model = perceptron()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(batch, 7, generator=generator), torch.randint(5, (batch,), generator=generator)

    def loss_of(model: nn.Module, sample: int) -> Tensor:
        return F.cross_entropy(model(x[sample : sample + 1]), y[sample : sample + 1])

    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), **PROJECTIONS[projection])) as engine:
        engine.prepare(batch)
        vectors = engine.collect(F.cross_entropy(model(x), y, reduction="none"))
    check(vectors, naive(model, engine.projection, batch, loss_of), engine)


def test_frozen_parameters_have_gradients_too() -> None:
    model, batch = gpt2(), examples()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total=16)) as engine:
        vectors = causal_vectors(engine, model, batch)
    check(vectors, naive(model, engine.projection, len(batch), next_token_loss_of(batch)), engine)
