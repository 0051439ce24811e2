"""The loss that is scored is the loss that trains where logits are not at hand: fused heads, and heads that start at
zero.

Legend: B samples, T tokens of the longest.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from indexer.dotprod import GradDotProdEngine, target_counts
from tests.support.models import gpt2
from tests.support.own_losses import Chunked, chunked_losses, losses_of_logits, mean_loss
from tests.support.scoring import VAL, agree, exact_causal, val_batch
from tests.support.watched_losses import IDS, LABELS, refused, scored

COUNTS = target_counts(LABELS)


def chunked_engine(model: nn.Module, **settings: Any) -> GradDotProdEngine:
    return GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=chunked_losses, **settings)


def test_a_fused_head_is_exact() -> None:
    model = Chunked()
    with chunked_engine(model) as engine:
        scores = scored(engine, lambda: model(IDS, LABELS)["loss"], labels=LABELS)
        calls = float(model.calls)
        again = scored(engine, lambda: model(IDS, labels=LABELS)["loss"], labels=LABELS)
    assert float(model.calls) == calls + 1, "once a run, and the buffer is put back"
    expected = exact_causal(gpt2(), val=VAL[:3]).total().mean(1)
    agree(scores.total, expected)
    agree(again.total, expected)


@pytest.mark.parametrize(
    ("settings", "message"), [({"shift": False}, "not shifted"), ({"smoothing": 0.1}, "smoothing 0.1")]
)
def test_a_fused_head_with_another_loss(settings: dict[str, Any], message: str) -> None:
    model = Chunked(**settings)
    with chunked_engine(model) as engine:
        refused(engine, lambda: model(IDS, LABELS)["loss"], message, labels=LABELS)


def test_a_fused_head_that_never_gives_logits() -> None:
    model = Chunked(logits=False)
    own = lambda: model(IDS, LABELS)["loss"]  # noqa: E731
    weights, batch = COUNTS / COUNTS.sum(), {"input_ids": IDS, "labels": LABELS}
    expected = exact_causal(gpt2(), val=VAL[:3]).total().mean(1)
    for said in ({"weights": weights}, {"weights": weights, "batch": batch}):
        with chunked_engine(model) as engine:
            refused(engine, own, r"returns no logits .*, with labels nor without.*weights=.*check=False", labels=LABELS)
            refused(engine, own, "returns no logits")
            agree(scored(engine, own, **said).total, expected)
    with chunked_engine(model, check=False) as engine:
        agree(scored(engine, own, labels=LABELS).total, expected)


def test_the_second_forward_pass_leaves_training_alone() -> None:
    # Dropout: the loss can be compared only with the same random numbers, and training must go on with its own.
    found = []
    for watches in (False, True):
        torch.manual_seed(3)
        model = Chunked(inner=lambda: gpt2().train()).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with chunked_engine(model, optimizer=optimizer) as engine:
            for _ in range(3):
                if watches:
                    engine.prepare(4)
                loss = model(IDS, LABELS)["loss"]
                if watches:
                    engine.watch(loss, labels=LABELS)
                loss.backward()
                if watches:
                    engine.collect()
                optimizer.step()
                optimizer.zero_grad()
        calls = model.state_dict().pop("calls")
        assert model.training
        found.append([p.detach() for p in model.parameters()])
        assert float(calls) == 3.0
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_model_that_does_not_run_without_labels() -> None:
    class Strict(Chunked):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return super().forward(input_ids, labels + 0)

    model = Strict()
    with chunked_engine(model) as engine:
        refused(engine, lambda: model(IDS, LABELS)["loss"], "does not run without labels", labels=LABELS)


# A head that starts at zero: every cross-entropy is log V, and no value tells one loss from another.


@pytest.mark.parametrize(
    ("settings", "message"), [({"shift": False}, "not shifted"), ({"smoothing": 0.3}, "smoothing 0.3")]
)
def test_a_fused_head_of_zeros_is_held_when_it_is_none_any_more(settings: dict[str, Any], message: str) -> None:
    model = Chunked(**settings, inner=lambda: gpt2(tied=False))
    head = model.inner.lm_head.weight
    trained = head.detach().clone()
    own = lambda: model(IDS, LABELS)["loss"]  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with chunked_engine(model, optimizer=optimizer) as engine:
        nn.init.zeros_(head)
        refused(engine, lambda: own() / 2, "divided by 2", labels=LABELS)  # that can be told
        scored(engine, own, labels=LABELS)
        scored(engine, own, labels=LABELS)
        with torch.no_grad():
            head.copy_(trained)
        engine.refresh()
        refused(engine, own, message, labels=LABELS)


def test_losses_of_samples_that_are_all_one_number_are_held_again() -> None:
    model = gpt2(tied=False)
    head = model.lm_head.weight
    trained = head.detach().clone()
    smooth = lambda: mean_loss(model(input_ids=IDS).logits, LABELS, label_smoothing=0.1)  # noqa: E731
    said = {"weights": COUNTS / COUNTS.sum(), "batch": {"input_ids": IDS, "labels": LABELS}}
    losses = losses_of_logits(lambda model, ids: model(input_ids=ids).logits)
    with GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=losses) as engine:
        nn.init.zeros_(head)
        scored(engine, smooth, **said)
        with torch.no_grad():
            head.copy_(trained)
        engine.refresh()
        refused(engine, smooth, "not Σ weights × val_losses", **said)
