"""Training-time scores equal batch-of-one autograd: each sample alone, unpadded, with its own loss."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indexer.dotprod import GradDotProdEngine
from indexer.dotprod.exact import Route
from tests.support.models import CAUSAL, examples, gpt2, perceptron
from tests.support.scoring import (
    BATCH,
    VAL,
    VAL_LAYOUTS,
    Exact,
    agree,
    causal_engine,
    causal_step,
    check,
    exact_causal,
    exact_of,
    val_batch,
)

ROUTES: tuple[Route, ...] = ("auto", "direct", "gram")
DOMAINS = ["web", "code", "web", "math", "code", "web", "web", "math"]


@cache
def exact_for(architecture: str, val_count: int = len(VAL)) -> Exact:
    return exact_causal(CAUSAL[architecture](), val=VAL[:val_count])


@pytest.mark.thin(3)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", VAL_LAYOUTS)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_total_parameters_and_blocks(architecture: str, layout: str, route: Route) -> None:
    model, batches = CAUSAL[architecture](), VAL_LAYOUTS[layout]
    with GradDotProdEngine(model, [val_batch(batch) for batch in batches], route=route) as engine:
        scores = causal_step(engine, model)
    check(scores, exact_for(architecture, sum(map(len, batches))))
    assert scores.pairs is None
    assert scores.vectors is None
    assert scores.seconds > 0


@pytest.mark.thin(3)
@pytest.mark.parametrize("layout", ["eight", "three batches"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_groups_and_each(architecture: str, route: Route, layout: str) -> None:
    model, val = CAUSAL[architecture](), [val_batch(batch) for batch in VAL_LAYOUTS[layout]]
    exact = exact_for(architecture)
    with GradDotProdEngine(model, val, route=route, groups="each") as engine:
        each = causal_step(engine, model)
        assert engine.group_names == [str(place) for place in range(8)]
    agree(each.groups, exact.total())
    check(each, exact)
    with GradDotProdEngine(model, val, route=route, groups=DOMAINS) as engine:
        domains = causal_step(engine, model)
        assert engine.group_names == ["web", "code", "math"]
    of_domain = [[place for place, name in enumerate(DOMAINS) if name == domain] for domain in engine.group_names]
    agree(domains.groups, torch.stack([exact.total()[:, places].mean(1) for places in of_domain], dim=1))
    check(domains, exact)  # the total is over samples, whatever the sizes of the groups


@pytest.mark.thin(3)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_all_pairs(architecture: str, route: Route) -> None:
    model = CAUSAL[architecture]()
    with causal_engine(model, VAL, route=route, pairs=True) as engine:
        scores = causal_step(engine, model, factor=0.25)
    check(scores, exact_for(architecture))
    assert scores.pairs is not None
    agree(scores.pairs, exact_causal(model, val=BATCH).total())


@pytest.mark.thin
@pytest.mark.parametrize("scaler", [1.0, 65536.0])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("route", ["direct", "gram"])
def test_accumulation_and_a_loss_scaler_do_not_matter(route: Route, accumulation: int, scaler: float) -> None:
    model = gpt2()
    found = []
    with causal_engine(model, VAL, route=route) as engine:
        for place in range(0, len(BATCH), len(BATCH) // accumulation):
            part = BATCH[place : place + len(BATCH) // accumulation]
            found.append(causal_step(engine, model, part, factor=scaler / accumulation).total)
    agree(torch.cat(found), exact_for("gpt2-tied").total().mean(1))


def test_a_loss_that_is_scaled_in_place() -> None:
    model = gpt2()
    batch = val_batch(BATCH)
    with causal_engine(model, VAL) as engine:
        engine.prepare(4)
        loss = model(**batch).loss
        engine.watch(loss, labels=batch["labels"])
        loss /= 8
        loss.backward()
        agree(engine.collect().total, exact_for("gpt2-tied").total().mean(1))


def test_weights_of_the_users_own() -> None:
    # The sum over samples of twice the first, and nothing of the last.
    model, batch = gpt2(), val_batch(BATCH)
    labels = batch.pop("labels")
    weights = torch.tensor([2.0, 1.0, -0.5, 0.0])
    with causal_engine(model, VAL) as engine:
        engine.prepare(4)
        logits = model(**batch).logits
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
        loss = (each.sum(1) / (labels[:, 1:] != -100).sum(1)) @ weights
        engine.watch(loss, weights=weights)
        loss.backward()
        scores = engine.collect()
    assert bool(scores.total[3].isnan())
    agree(scores.total[:3], exact_for("gpt2-tied").total().mean(1)[:3])


@pytest.mark.thin(2)
@pytest.mark.parametrize("lengths", [(13,), (2,), (7, 7, 7, 7), (24, 24)])
def test_batches_of_any_lengths(lengths: tuple[int, ...]) -> None:
    model, batch = gpt2(), examples(lengths, seed=3)
    with causal_engine(model, VAL[:3], pairs=True) as engine:
        scores = causal_step(engine, model, batch)
    check(scores, exact_causal(model, batch, VAL[:3]))
    assert scores.pairs is not None
    agree(scores.pairs, exact_causal(model, batch, batch).total())


def classified(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 7, generator=generator), torch.randint(5, (count,), generator=generator)


def class_losses(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.thin
@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("val_counts", [(1,), (3,), (8,), (2, 5)])
@pytest.mark.parametrize("route", ROUTES)
def test_a_perceptron_on_classes(route: Route, val_counts: tuple[int, ...], count: int) -> None:
    model = perceptron()
    batch, val = classified(count, 0), [classified(n, 1 + place) for place, n in enumerate(val_counts)]
    whole = tuple(torch.cat(parts) for parts in zip(*val, strict=True))
    exact = exact_of(
        model,
        count,
        lambda model, i: class_losses(model, (batch[0][i : i + 1], batch[1][i : i + 1])).sum(),
        sum(val_counts),
        lambda model, i: class_losses(model, (whole[0][i : i + 1], whole[1][i : i + 1])).sum(),
    )
    with GradDotProdEngine(model, val, val_losses=class_losses, route=route, groups="each") as engine:
        engine.prepare(count)
        loss = class_losses(model, batch).mean()
        engine.watch(loss)
        loss.backward()
        scores = engine.collect()
    check(scores, exact)
    agree(scores.groups, exact.total())
