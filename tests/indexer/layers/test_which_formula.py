"""Classes of somebody's own that have a formula, and keep it: running again is as exact, but slow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.biogpt.modeling_biogpt import BioGptScaledWordEmbedding
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.t5.modeling_t5 import T5LayerNorm

from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine
from indexer.encode.engine import GradProjLoraEngine
from indexer.layers import layer_type_of
from tests.support.around import Around
from tests.support.models import settle
from tests.support.oracle import naive, relative_error
from tests.support.scoring import check, exact_plain, plain_step, sum_of_squares

WIDTH = Around.width
FORMULAS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Falcon's linear": (lambda: FalconLinear(WIDTH, WIDTH), "linear"),
    "Gemma 3's embedding": (lambda: Gemma3TextScaledWordEmbedding(9, WIDTH, 0, embed_scale=2.5), "embedding"),
    "BioGPT's embedding": (lambda: BioGptScaledWordEmbedding(9, WIDTH, 0, embed_scale=2.5), "embedding"),
    "Cohere's norm": (lambda: CohereLayerNorm(WIDTH), "layernorm"),
    "Nemotron's norm": (lambda: NemotronLayerNorm1P(WIDTH), "layernorm"),
    "Llama's norm": (lambda: LlamaRMSNorm(WIDTH), "rmsnorm"),
    "Gemma's norm": (lambda: GemmaRMSNorm(WIDTH), "rmsnorm"),
    "T5's norm": (lambda: T5LayerNorm(WIDTH), "rmsnorm"),
}


def drawn(count: int, seed: int, *, ids: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(9, (count, 4), generator=generator) if ids else torch.randn(count, 4, WIDTH, generator=generator)
    )


class Looked(nn.Module):
    """An embedding, and what comes after it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.last = layer, nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(ids)))


@pytest.mark.parametrize("name", FORMULAS)
def test_has_the_formula_and_is_exact(name: str) -> None:
    make, kind = FORMULAS[name]
    ids = kind == "embedding"
    model = settle(Looked(make()) if ids else Around(make()))
    found = layer_type_of(model.layer)
    assert found is not None
    assert found.name == kind
    x, val = drawn(3, 0, ids=ids), drawn(5, 1, ids=ids)
    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total="full")) as engine:
        engine.prepare(len(x))
        vectors = engine.collect(sum_of_squares(model, x))
    assert not engine.projection.plan.replayed
    expected = naive(model, engine.projection, len(x), lambda model, i: sum_of_squares(model, x[i : i + 1]).sum())
    assert relative_error(vectors, expected.vectors) < 1e-5
    with GradDotProdEngine(model, val, val_losses=sum_of_squares) as scoring:
        check(plain_step(scoring, model, x), exact_plain(model, x, val))
