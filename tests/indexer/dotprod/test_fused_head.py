"""A head that TRL fuses with the loss is scored as the module would be, in a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ghoststore import GradDotProdEngine
from ghoststore.errors import CaptureError
from indexer.dotprod import fused_head
from indexer.dotprod.segments import packed_samples
from tests.support.models import examples, gpt2, llama
from tests.support.scoring import VAL, agree, check, exact_causal, val_batch

trl_utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed: pip install '.[trl]'")

SAMPLES = examples((9, 3, 11, 5), seed=3)


def fused(fresh: Callable[[], Any], **settings: Any) -> Any:
    model = fresh()
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"), **settings)
    return model


def step(engine: GradDotProdEngine, model: Any, batch: dict[str, Tensor], **opened: Any) -> Any:
    """A step whose loss is half of the mean over the targets, computed from the log-probabilities."""
    engine.prepare(len(SAMPLES), **opened)
    log_probs = model(**batch, fused_lm_head=True).log_probs
    engine.watch(fused_head.mean_loss(log_probs, batch["labels"]), labels=batch["labels"], log_probs=log_probs)
    (-log_probs.sum() / (2 * (batch["labels"][:, 1:] != -100).sum())).backward()
    return engine.collect()


@pytest.mark.parametrize("numbers", [1 << 25, 2000])
@pytest.mark.parametrize("fresh", [gpt2, llama])
def test_scores_and_pairs_in_any_number_of_pieces(
    fresh: Callable[[], Any], numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_head, "CHUNK_NUMBERS", numbers)
    model, exact = fused(fresh), exact_causal(fresh(), SAMPLES, VAL[:3])
    with GradDotProdEngine(model, val_batch(VAL[:3]), pairs=True) as engine:
        for _ in range(2):
            scores = step(engine, model, val_batch(SAMPLES))
            check(scores, exact)
        pairs = exact_causal(fresh(), SAMPLES, SAMPLES).total()
        torch.testing.assert_close(scores.pairs, pairs, rtol=1e-4, atol=1e-4 * float(pairs.abs().max()))


@pytest.mark.parametrize("numbers", [1 << 25, 2000])
def test_packed_rows_in_any_number_of_pieces(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_head, "CHUNK_NUMBERS", numbers)
    model, exact = fused(llama), exact_causal(llama(), SAMPLES, VAL[:3])
    batch = {
        "input_ids": torch.cat([ids for ids, _ in SAMPLES]).unsqueeze(0),
        "labels": torch.cat([torch.cat([torch.tensor([-100]), labels[1:]]) for _, labels in SAMPLES]).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in SAMPLES]).unsqueeze(0),
    }
    with GradDotProdEngine(model, val_batch(VAL[:3])) as engine:
        check(step(engine, model, batch, segments=packed_samples(batch, len(SAMPLES))), exact)


def test_what_is_done_to_the_logits_and_not_known() -> None:
    """A temperature is in no configuration; without the head, as the error says, the rest is exact."""
    model = fused(llama, temperature=2.0)
    with (
        GradDotProdEngine(model, val_batch(VAL[:3]), hold_losses=False) as engine,
        pytest.raises(CaptureError, match="Leave the head out with `exclude_layers`"),
    ):
        step(engine, model, val_batch(SAMPLES))
    model = fused(llama)
    with GradDotProdEngine(model, val_batch(VAL[:3]), exclude_layers=["lm_head"]) as engine:
        scores = step(engine, model, val_batch(SAMPLES))
    exact = exact_causal(llama(), SAMPLES, VAL[:3]).only(lambda name: name != "lm_head.weight")
    agree(scores.total, exact.total().mean(1))


def test_hooks_go_with_the_engine() -> None:
    model = fused(gpt2)
    engine = GradDotProdEngine(model, val_batch(VAL[:3])).attach()
    engine.prepare(len(SAMPLES))
    with pytest.raises(IndexError):
        model(**{**val_batch(SAMPLES), "input_ids": torch.full((4, 11), 999)}, fused_lm_head=True)
    assert model.transformer._forward_hooks  # the forward pass did not come to its end
    engine.discard()
    assert not model.transformer._forward_hooks
    check(step(engine, model, val_batch(SAMPLES)), exact_causal(gpt2(), SAMPLES, VAL[:3]))
    engine.detach()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
