"""Manager and callback hold the loss that a model returns as the plain engine does: exact, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghoststore import GhostEngineManager, GhostStoreCallback
from ghoststore.errors import UsageError
from tests.support.loops import ROWS, VAL, VAL_BATCH, batch_of, close_to, exact_scores, plan, run_of, steps_of
from tests.support.models import gpt2
from tests.support.own_losses import (
    DECODER_LEFT_OUT,
    EXPERTS,
    Chunked,
    WithTerm,
    chunked_losses,
    decoder,
    losses_of_logits,
    mean_loss,
    mixture,
)
from tests.support.scoring import agree, exact_causal
from tests.support.trainers import dataset, trainer_of

PLACES = [0, 1, 2, 3]


class Smoothed(nn.Module):
    """GPT-2 whose own loss is smoothed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt2()

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Any:
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        return {"loss": mean_loss(logits, labels, label_smoothing=0.1), "logits": logits}


def of_inner(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model.inner(input_ids=ids).logits
    return logits


def a_mixture() -> Any:
    return mixture("mixtral", output_router_logits=True, router_aux_loss_coef=0.001)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "router loss": (a_mixture, {"exclude_layers": EXPERTS}, "0.001 × aux_loss .*output_router_logits=False"),
    "not shifted": (lambda: decoder("bart"), {"exclude_layers": DECODER_LEFT_OUT}, "own places, not shifted"),
    "smoothed": (Smoothed, {"val_losses": losses_of_logits(of_inner)}, "label smoothing 0.1"),
    "penalty": (lambda: WithTerm("penalty"), {"val_losses": losses_of_logits(of_inner)}, "without passing through"),
    "fused, not shifted": (lambda: Chunked(shift=False), {"val_losses": chunked_losses}, "own places, not shifted"),
    "fused, no logits": (lambda: Chunked(logits=False), {"val_losses": chunked_losses}, "returns no logits"),
}


def manager_of(model: Any, settings: dict[str, Any]) -> GhostEngineManager:
    config = {"method": "GradDotProd", "exclude_layers": settings.get("exclude_layers", ())}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return GhostEngineManager(config, model, optimizer, VAL_BATCH, val_losses=settings.get("val_losses"))


@pytest.mark.thin(3)
@pytest.mark.parametrize("kind", REFUSED)
def test_the_manager(kind: str) -> None:
    make, settings, message = REFUSED[kind]
    model = make()
    X, Y, _ = batch_of(PLACES)
    with manager_of(model, settings) as manager:
        manager.attach_train_batch(X, Y, 0)
        manager.prepare_forward_input(X, Y)
        with pytest.raises(UsageError, match=message):
            model(input_ids=X, labels=Y)


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", REFUSED)
def test_the_callback(kind: str, tmp_path: Path) -> None:
    make, settings, message = REFUSED[kind]
    callback = GhostStoreCallback(store=tmp_path / "store", val_data=VAL_BATCH, samples=len(ROWS), **settings)
    trainer = trainer_of(tmp_path, [callback], model=make(), max_steps=2, rows=dataset())
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(UsageError, match=message):
        trainer.train()
    callback.close()
    assert all(torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("advice", ["no router logits", "a loss from the logits"])
def test_the_advice_for_a_router_loss_works_in_the_manager(advice: str) -> None:
    model = a_mixture()
    exact = exact_causal(model, [ROWS[place] for place in PLACES], VAL).only(lambda name: ".mlp." not in name)
    X, Y, _ = batch_of(PLACES)
    with manager_of(model, {"exclude_layers": EXPERTS}) as manager:
        manager.attach_train_batch(X, Y, 0)
        manager.prepare_forward_input(X, Y)
        if advice == "no router logits":
            loss = model(input_ids=X, labels=Y, output_router_logits=False).loss
        else:
            loss = mean_loss(model(input_ids=X).logits, Y)
            manager.watch(loss, labels=Y)
        loss.backward()
        manager.prepare_gradients()
        manager.aggregate_and_log()
        agree(manager.last_scores[0].total, exact.total().mean(1))


def test_a_loss_held_against_val_losses_in_the_manager() -> None:
    model = Smoothed()
    X, Y, _ = batch_of(PLACES)
    weights = torch.ones(4)
    with manager_of(model, {"val_losses": losses_of_logits(of_inner)}) as manager:
        manager.attach_train_batch(X, Y, 0)
        manager.prepare_forward_input(X, Y)
        batch = {"input_ids": X, "labels": Y}
        losses = losses_of_logits(of_inner)(model, batch)
        with pytest.raises(UsageError, match=re.escape("not Σ weights × val_losses(model, batch)")):
            manager.watch(losses.mean(), weights=weights, batch=batch)
        loss = losses.sum()
        manager.watch(loss, weights=weights, batch=batch)
        loss.backward()
        manager.prepare_gradients()
        manager.aggregate_and_log()
        agree(manager.last_scores[0].total, exact_scores(model.inner, PLACES))


def test_a_fused_head_is_exact_in_the_manager() -> None:
    model = Chunked()
    X, Y, _ = batch_of(PLACES)
    with manager_of(model, {"val_losses": chunked_losses}) as manager:
        manager.attach_train_batch(X, Y, 0)
        manager.prepare_forward_input(X, Y)
        model(input_ids=X, labels=Y)["loss"].backward()
        manager.prepare_gradients()
        manager.aggregate_and_log()
        agree(manager.last_scores[0].total, exact_scores(model.inner, PLACES))


def without_dropout() -> Any:
    return gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", ["fused", "mixture"])
def test_the_callback_is_exact(kind: str, tmp_path: Path) -> None:
    fused = kind == "fused"
    model: Any = Chunked(inner=without_dropout) if fused else mixture("mixtral")
    settings = {"val_losses": chunked_losses} if fused else {"exclude_layers": EXPERTS}
    exact = exact_causal(gpt2() if fused else model, ROWS, VAL)
    expected = exact.only(lambda name: fused or ".mlp." not in name).total().mean(1)
    callback = GhostStoreCallback(store=tmp_path / "store", val_data=VAL_BATCH, samples=len(ROWS), **settings)
    trainer_of(tmp_path, [callback], model=model.eval(), max_steps=1, rows=dataset()).train()
    ((step, places, scores),) = steps_of(run_of(tmp_path / "store", "trainer"))
    assert step == 0
    assert len(plan(1)[0][0]) == len(places)
    close_to(scores, expected[torch.from_numpy(places.astype("int64"))])
