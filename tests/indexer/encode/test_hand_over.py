"""Blocks that are handed over one by one, against the vectors of the same rows.

Legend: B rows of a batch, K, J ranks of a block.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from ghoststore.corpus import Sample
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.store.part.status import Status
from indexer.encode.encoder import RowEncoder
from indexer.encode.tokens import Row
from indexer.projection.matrices import Projection
from tests.support.models import POSITIONS, VOCABULARY, settle


def model() -> Any:
    """Of two layers, its head tied to its embeddings."""
    return settle(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=12, n_layer=2, n_head=2,
                bos_token_id=0, eos_token_id=0,
            )
        )
    )  # fmt: skip


def some_rows() -> list[Row]:
    rng = np.random.default_rng(0)
    return [
        Row(
            Sample(place, f"{place}", None, "text", -1, 0), 0, 0,
            rng.integers(1, VOCABULARY, length).astype(np.int32), 1, Status.OK,
        )
        for place, length in enumerate((9, 7, 4, 12))
    ]  # fmt: skip


def drawn(loaded: Any, seed: int) -> Projection:
    return Projection.for_model(
        loaded, ProjectionConfig(layers=("all",), rank_total=20, compress="none", precondition="none", seed=seed)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_of_two_projections_from_one_backward_pass(checkpointing: bool) -> None:
    loaded, rows = model(), some_rows()
    projections = [drawn(loaded, seed) for seed in (1, 2)]
    expected, losses = [], torch.zeros(0)
    for projection in projections:
        with RowEncoder(loaded, projection) as encoder:
            vectors, losses = encoder(rows)
        plan = projection.plan
        expected += [vectors[:, x.start : x.stop].view(-1, x.k_out, x.k_in) for x in plan.layers]
    assert any(len(layer.block.uses) > 1 for layer in projections[0].plan.layers), "no block has two uses"
    blocks: dict[int, Tensor] = {}

    def take(place: int, block_BKJ: Tensor) -> None:
        assert place not in blocks
        blocks[place] = block_BKJ.clone()

    with RowEncoder(loaded, projections[0], beside=projections[1], checkpointing=checkpointing) as encoder:
        found = encoder.hand_over(rows, take)
    assert sorted(blocks) == list(range(len(expected)))
    torch.testing.assert_close(found, losses)
    for place, wanted in enumerate(expected):
        torch.testing.assert_close(blocks[place], wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_no_block_is_kept() -> None:
    loaded = model()
    alive: list[weakref.ref[Any]] = []

    def take(place: int, block_BKJ: Tensor) -> None:
        assert sum(reference() is not None for reference in alive) == 0
        alive.append(weakref.ref(block_BKJ.untyped_storage()))

    with RowEncoder(loaded, drawn(loaded, 1)) as encoder:
        encoder.hand_over(some_rows(), take)
    assert len(alive) > 10


def test_an_error_of_the_taker_ends_the_pass() -> None:
    loaded = model()

    def take(place: int, block_BKJ: Tensor) -> None:
        raise ArithmeticError("the taker's own")

    with RowEncoder(loaded, drawn(loaded, 1)) as encoder, pytest.raises(ArithmeticError, match="the taker's own"):
        encoder.hand_over(some_rows(), take)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
