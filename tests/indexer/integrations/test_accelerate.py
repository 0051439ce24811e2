"""Models, optimizers and loops of accelerate: weights as without scores, scores as batch-of-one autograd says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ghoststore import GhostConfig, GhostEngineManager, GradDotProdEngine
from ghoststore.errors import UsageError
from tests.support.accelerators import fresh_accelerator
from tests.support.loops import (
    ROWS,
    VAL_BATCH,
    batch_of,
    close_to,
    exact_scores,
    identical,
    in_ranks,
    plan,
    roughly,
    run_of,
    steps_of,
    weights_of,
)
from tests.support.models import gpt2

STEPS = 5


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    with fresh_accelerator():
        yield


MIXED = ["no", "bf16"]


def made(mixed: str = "no", accumulation: int = 1) -> tuple[Any, Any, Any, Any]:
    """(accelerator, prepared model, prepared optimizer, the model within)."""
    accelerator = Accelerator(cpu=True, mixed_precision=mixed, gradient_accumulation_steps=accumulation)
    torch.manual_seed(0)
    inner = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    model, optimizer = accelerator.prepare(inner, torch.optim.AdamW(inner.parameters(), lr=0.01))
    return accelerator, model, optimizer, inner


def matches(scores: Any, expected: Tensor, mixed: str) -> None:
    if mixed == "no":
        close_to(np.asarray(scores), expected, 2e-5)
    else:
        roughly(np.asarray(scores), expected, 0.05)


def in_engine(mixed: str, accumulation: int, scored: bool) -> dict[str, Tensor]:
    """A loop as accelerate's users write it; returns the weights."""
    accelerator, model, optimizer, inner = made(mixed, accumulation)
    engine = GradDotProdEngine(model, VAL_BATCH, optimizer=optimizer).attach() if scored else None
    for places in (part for step in plan(STEPS, accumulation=accumulation) for part in step):
        ids, labels, _ = batch_of(places)
        with accelerator.accumulate(model):
            if engine is not None:
                engine.prepare(len(ids))
                due = exact_scores(inner, places)
            loss = model(input_ids=ids, labels=labels).loss
            if engine is not None:
                engine.watch(loss, labels=labels)
            accelerator.backward(loss)
            if engine is not None:
                scores = engine.collect()
                matches(scores.total, due, mixed)
                assert scores.val_age == 0
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    if engine is not None:
        engine.detach()
    return weights_of(inner)


@pytest.mark.thin(2)
@pytest.mark.parametrize("mixed", MIXED)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_engine(mixed: str, accumulation: int) -> None:
    assert identical(in_engine(mixed, accumulation, scored=True), in_engine(mixed, accumulation, scored=False))


def test_the_metric_of_a_prepared_optimizer() -> None:
    """The scores are those of the optimizer within, which was known before."""
    found = []
    for prepared in (True, False):
        accelerator, model, optimizer, _ = made()
        given = optimizer if prepared else optimizer.optimizer
        with GradDotProdEngine(model, VAL_BATCH, optimizer=given, score_metric="adam", score_layers="blocks") as engine:
            for (places,) in plan(3):
                ids, labels, _ = batch_of(places)
                engine.prepare(len(ids))
                loss = model(input_ids=ids, labels=labels).loss
                engine.watch(loss, labels=labels)
                accelerator.backward(loss)
                scores = engine.collect().total
                optimizer.step()
                optimizer.zero_grad()
        assert scores.isfinite().all()
        found.append(scores)
    assert torch.equal(*found)


def managed(folder: Path | None, mixed: str, accumulation: int) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
    """The manager's calls; returns the weights, and the exact scores of each step's micro-batches."""
    accelerator, model, optimizer, inner = made(mixed, accumulation)
    config = GhostConfig(
        method="Regular" if folder is None else "GradDotProd",
        store=folder,
        samples=len(ROWS),
        max_steps=STEPS,
        batch_size=4,
        gradient_accumulation_steps=accumulation,
    )
    due: list[list[Tensor]] = []
    val = None if folder is None else VAL_BATCH
    with GhostEngineManager(config, model, optimizer, val_data=val) as manager:
        for step, parts in enumerate(plan(STEPS, accumulation=accumulation)):
            due.append([exact_scores(inner, places) for places in parts])
            for places in parts:
                ids, labels, batch_idx = batch_of(places)
                with accelerator.accumulate(model):
                    manager.attach_train_batch(ids, labels, step, batch_idx)
                    x, y = manager.prepare_forward_input(ids, labels)
                    loss = model(input_ids=x, labels=y).loss
                    accelerator.backward(loss)
                    manager.prepare_gradients()
                    optimizer.step()
                    if accelerator.sync_gradients:
                        manager.aggregate_and_log()
                        manager.clear_gradients()
                    optimizer.zero_grad()
    return weights_of(inner), due


@pytest.mark.thin(1)
@pytest.mark.parametrize(("mixed", "accumulation"), [("no", 2), ("bf16", 1)])
def test_the_manager(mixed: str, accumulation: int, tmp_path: Path) -> None:
    weights, due = managed(tmp_path / "store", mixed, accumulation)
    assert identical(weights, managed(None, mixed, accumulation)[0])
    run = run_of(tmp_path / "store")
    np.testing.assert_array_equal(run.read_committed("learning_rate"), np.full(STEPS, 0.01))
    for step, places, scores in steps_of(run):
        assert places.tolist() == [place for part in plan(STEPS, accumulation=accumulation)[step] for place in part]
        matches(scores, torch.cat(due[step]), mixed)


def test_what_is_no_optimizer() -> None:
    with pytest.raises(UsageError, match=r"`optimizer` is torch's \(torch\.optim\.Optimizer\)"):
        GradDotProdEngine(gpt2(), VAL_BATCH, optimizer=object())  # type: ignore[arg-type]


# Sharded parameters.


def _in_rank(rank: int, wrap: Callable[[Any], nn.Module]) -> None:
    inner = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    due = exact_scores(inner, [2 * rank, 2 * rank + 1])
    model = wrap(inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with GradDotProdEngine(model, VAL_BATCH, optimizer=optimizer) as engine:
        ids, labels, _ = batch_of([2 * rank, 2 * rank + 1])
        engine.prepare(len(ids))
        loss = model(input_ids=ids, labels=labels).loss
        engine.watch(loss, labels=labels)
        loss.backward()
        close_to(engine.collect().total.numpy(), due, 2e-5)


def _sharded(model: Any) -> nn.Module:
    for block in model.transformer.h:
        fully_shard(block)
    return fully_shard(model)


@pytest.mark.ddp
def test_sharded_parameters_are_refused_and_ddp_is_exact(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with pytest.raises(UsageError, match=r"sharded.*use DDP"):
            _in_rank(rank, _sharded)
        _in_rank(rank, DistributedDataParallel)

    in_ranks(2, work, tmp_path)
