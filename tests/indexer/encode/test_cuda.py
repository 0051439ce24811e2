"""Matrices are drawn on the CPU, so they are the same bits on a GPU; vectors agree to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ghoststore.settings.projection import ProjectionConfig
from indexer.encode.encoder import RowEncoder
from indexer.projection.matrices import Projection
from tests.indexer.encode.test_invariance import ROWS
from tests.support.models import CAUSAL
from tests.support.oracle import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "orthonormal"])
@pytest.mark.parametrize("settings", [{}, {"rank_total": 16}], ids=["sketched", "plain"])
def test_the_same_matrices(kind: str, settings: dict[str, Any]) -> None:
    model = CAUSAL["gpt2-tied"]()
    config = ProjectionConfig(layers=("all",), kind=kind, **settings)
    expected, found = Projection.for_model(model, config), Projection.for_model(model.cuda(), config).to("cuda")
    assert found.hash == expected.hash
    for name, sides in expected.sides.items():
        for one, other in zip(sides, found.sides[name], strict=True):
            assert other.is_cuda
            assert torch.equal(one, other.cpu())
    if expected.sketch:
        assert found.sketch is not None
        assert found.sketch.digest() == expected.sketch.digest()


@pytest.mark.parametrize("settings", [{}, {"rank_total": 16}], ids=["sketched", "plain"])
@pytest.mark.parametrize("architecture", CAUSAL)
def test_the_same_vectors(architecture: str, settings: dict[str, Any]) -> None:
    model = CAUSAL[architecture]()
    config = ProjectionConfig(**settings)
    with RowEncoder(model, Projection.for_model(model, config)) as encoder:
        expected = encoder(ROWS)
    model = model.cuda()
    with RowEncoder(model, Projection.for_model(model, config)) as encoder:
        found = encoder(ROWS)
    assert found.vectors.is_cuda
    assert relative_error(found.vectors.cpu(), expected.vectors) <= 1e-4
    torch.testing.assert_close(found.losses.cpu(), expected.losses, rtol=1e-4, atol=0)
