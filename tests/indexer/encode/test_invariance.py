"""A row's vector is its own: alone, padded, reordered, in other company, and equal to plain autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ghoststore.corpus import Sample
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.store.part.status import Status
from indexer.encode.encoder import RowEncoder, pad
from indexer.encode.tokens import Row
from indexer.projection.matrices import Projection
from tests.support.models import CAUSAL, VOCABULARY, Example, gpt2, next_token_loss_of
from tests.support.oracle import naive, relative_error

TOLERANCE = 1e-5
PROJECTIONS = {"sketched": ProjectionConfig(), "plain": ProjectionConfig(layers=("mlp", "attn", "norm"), rank_total=16)}


def row(place: int, length: int, first_target: int = 1) -> Row:
    tokens = np.random.default_rng(place).integers(1, VOCABULARY, length).astype(np.int32)
    return Row(Sample(place, str(place), None, "text", -1, 0), 0, 0, tokens, first_target, Status.OK)


ROWS = [row(0, 7), row(1, 24), row(2, 2), row(3, 15, first_target=9), row(4, 24, first_target=23), row(5, 7)]


def example(row: Row) -> Example:
    ids = torch.from_numpy(row.tokens).long()
    labels = ids.clone()
    labels[: row.first_target] = -100
    return ids, labels


def encoded_in(encoder: RowEncoder, batches: Sequence[Sequence[int]]) -> Tensor:
    """(rows, D): the vectors of ROWS, cut into ``batches`` of places."""
    found: dict[int, Tensor] = {}
    for batch in batches:
        vectors, losses = encoder([ROWS[place] for place in batch])
        assert not vectors.requires_grad
        assert not losses.requires_grad
        found.update(zip(batch, torch.cat([vectors, losses.unsqueeze(1)], dim=1), strict=True))
    return torch.stack([found[place] for place in range(len(ROWS))])


ALONE = [[0], [1], [2], [3], [4], [5]]
COMPANY = {
    "together": [[0, 1, 2, 3, 4, 5]],
    "reversed": [[5, 4, 3, 2, 1, 0]],
    "pairs": [[0, 1], [2, 3], [4, 5]],
    "others": [[5, 0], [3, 1, 4], [2]],
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_the_company_of_a_row_does_not_matter(architecture: str, projection: str, reduction: Any) -> None:
    model = CAUSAL[architecture]()
    drawn = Projection.for_model(model, PROJECTIONS[projection])
    with RowEncoder(model, drawn, reduction=reduction) as encoder:
        alone = encoded_in(encoder, ALONE)
        for batches in COMPANY.values():
            assert relative_error(encoded_in(encoder, batches), alone) <= TOLERANCE
    loss_of = next_token_loss_of([example(row) for row in ROWS], reduction)
    expected = naive(model, drawn, len(ROWS), loss_of)
    assert relative_error(alone[:, :-1], expected.vectors) <= TOLERANCE
    losses = torch.stack([loss_of(model, place).detach() for place in range(len(ROWS))])
    torch.testing.assert_close(alone[:, -1], losses, rtol=1e-5, atol=0)


def test_a_row_twice_in_a_batch_has_the_same_bits() -> None:
    model = gpt2()
    with RowEncoder(model, Projection.for_model(model, ProjectionConfig())) as encoder:
        vectors, _ = encoder([ROWS[3], ROWS[1], ROWS[3]])
        again, _ = encoder([ROWS[3], ROWS[1], ROWS[3]])
    assert torch.equal(vectors[0], vectors[2])
    assert torch.equal(vectors, again)


def test_mean_is_sum_over_the_number_of_targets() -> None:
    model = gpt2()
    drawn = Projection.for_model(model, ProjectionConfig())
    found = []
    for reduction in ("mean", "sum"):
        with RowEncoder(model, drawn, reduction=reduction) as encoder:  # type: ignore[arg-type]
            found.append(encoded_in(encoder, [list(range(len(ROWS)))]))
    targets = torch.tensor([[len(row.tokens) - row.first_target] for row in ROWS])
    assert relative_error(found[0] * targets, found[1]) <= TOLERANCE


def test_rows_are_padded_on_the_right_and_prompts_are_no_targets() -> None:
    ids, labels, mask = pad([ROWS[2], ROWS[3]])
    tokens = torch.from_numpy(ROWS[3].tokens).long()
    assert torch.equal(ids[1], tokens)
    assert torch.equal(mask[1], torch.ones(15, dtype=torch.int64))
    assert torch.equal(labels[1], torch.where(torch.arange(15) < 9, -100, tokens))
    assert ids[0].tolist() == [*ROWS[2].tokens.tolist(), *[0] * 13]
    assert labels[0].tolist() == [-100, int(ROWS[2].tokens[1]), *[-100] * 13]
    assert mask[0].tolist() == [1, 1, *[0] * 13]
