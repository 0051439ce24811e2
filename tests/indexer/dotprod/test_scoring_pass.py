"""A scoring pass: the scores of a training step, without a gradient of any weight."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError, UsageError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine, Scores, language_model_losses
from tests.support.models import CAUSAL, gpt2
from tests.support.oracle import relative_error
from tests.support.scoring import BATCH, VAL, causal_engine, causal_step, check, exact_causal, sum_of_squares, val_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

PROJECTIONS = {"exact": None, "sketched": ProjectionConfig(), "sketched all": ProjectionConfig(layers=("all",))}


def score(engine: GradDotProdEngine, model: nn.Module, autocast: Any = None, **settings: Any) -> Scores:
    """Of the samples of BATCH."""
    with engine.scoring(len(BATCH), **settings) as batch, autocast or nullcontext():
        return batch.scores(language_model_losses(model, val_batch(BATCH)))


def near(found: Scores, expected: Scores, tolerance: float) -> None:
    for name in ("total", "groups"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == torch.float64
        assert relative_error(one.reshape(1, -1), other.reshape(1, -1)) <= tolerance


@pytest.mark.thin(1)
@pytest.mark.parametrize("route", ["direct", "gram", "auto"])
@pytest.mark.parametrize("architecture", CAUSAL)
def test_scores_are_exact_and_no_gradient_is_formed(architecture: str, route: Any) -> None:
    model = CAUSAL[architecture]()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    with causal_engine(model, VAL, route=route, groups="each") as engine:
        for _ in range(2):  # the first is compared with autograd
            scores = score(engine, model)
            check(scores, exact_causal(model))
        assert not engine.training_batch_open
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not first)


@pytest.mark.slow
@pytest.mark.parametrize("method", PROJECTIONS)
def test_it_may_take_turns_with_training_steps(method: str) -> None:
    model = gpt2()
    with causal_engine(model, VAL, projection=PROJECTIONS[method]) as engine:
        before, step, after = score(engine, model), causal_step(engine, model), score(engine, model)
    for scores in (before, after):
        near(scores, step, 1e-6)
        if step.vectors is not None:
            assert scores.vectors is not None
            assert relative_error(scores.vectors, step.vectors) <= 1e-5


NARROW = {
    "bfloat16": (torch.bfloat16, False),
    "autocast bfloat16": (torch.bfloat16, True),
    "autocast float16": (torch.float16, True),
    "float16": (torch.float16, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", PROJECTIONS)
@pytest.mark.parametrize("kind", NARROW)
def test_narrow_dtypes(kind: str, method: str) -> None:
    dtype, autocast = NARROW[kind]
    model = gpt2() if autocast else gpt2().to(dtype)
    under = torch.autocast("cpu", dtype=dtype) if autocast else None
    wide = gpt2()
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    with causal_engine(wide, VAL, projection=PROJECTIONS[method]) as engine:
        expected = score(engine, wide)
    with causal_engine(model, VAL, projection=PROJECTIONS[method]) as engine:
        scale = 1024.0 if dtype == torch.float16 else 1.0
        near(score(engine, model, under, loss_scale=scale), expected, 0.05)


@pytest.mark.slow
def test_the_scale_of_the_loss_leaves_no_trace() -> None:
    model = gpt2()
    with causal_engine(model, VAL) as engine:
        plain = score(engine, model)
        assert torch.equal(score(engine, model, loss_scale=2.0**20).total, plain.total)


@pytest.mark.thin(1)
@pytest.mark.parametrize("method", PROJECTIONS)
def test_gradient_checkpointing(method: str) -> None:
    model = gpt2(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0).train()
    with causal_engine(model, VAL, projection=PROJECTIONS[method], pairs=method == "exact") as engine:
        expected = score(engine, model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found = score(engine, model)
        near(found, expected, 1e-6)
        if expected.pairs is not None:
            torch.testing.assert_close(found.pairs, expected.pairs)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(UsageError, match="use_reentrant"):
            score(engine, model)
        assert not engine.training_batch_open


@pytest.mark.slow
def test_a_sample_without_targets_has_no_score() -> None:
    model, batch = gpt2(), val_batch(BATCH)
    batch["labels"][2] = -100
    with causal_engine(model, VAL) as engine, engine.scoring(len(BATCH)) as scoring:
        scores = scoring.scores(language_model_losses(model, batch))
    expected = exact_causal(gpt2()).total().mean(1)
    assert scores.total.isnan().tolist() == [False, False, True, False]
    others = [0, 1, 3]
    assert relative_error(scores.total[others].unsqueeze(0), expected[others].unsqueeze(0)) <= 1e-5


@pytest.mark.slow
def test_the_val_gradient_is_refreshed_when_it_is_due() -> None:
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with causal_engine(model, VAL, optimizer=optimizer, val_refresh_interval=2) as engine:
        ages = []
        for _ in range(5):
            ages.append(score(engine, model).val_age)
            causal_step(engine, model)
            optimizer.step()
        assert ages == [0, 1, 0, 1, 0]


class UsedTwice(nn.Module):
    """A weight that a functional call uses, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(nn.functional.linear(x, self.linear.weight)))


@pytest.mark.parametrize("projection", [None, ProjectionConfig(layers=("all",))])
def test_the_first_pass_is_held_against_autograd(projection: Any) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    model = UsedTwice()
    engine = GradDotProdEngine(model, x, val_losses=sum_of_squares, projection=projection, route="auto")
    with engine, pytest.raises(CaptureError, match="linear"), engine.scoring(4) as batch:
        batch.scores(sum_of_squares(model, x))
    assert not engine.training_batch_open


@pytest.mark.slow
def test_the_first_pass_alone_asks_for_gradients_of_the_weights() -> None:
    model, asked = gpt2(), []
    weight = model.transformer.h[0].mlp.c_fc.weight
    with causal_engine(model, VAL) as engine:
        engine.refresh()
        weight.register_hook(lambda gradient: asked.append(1))
        counts = []
        for _ in range(3):
            score(engine, model)
            counts.append(len(asked))
    assert counts == [1, 1, 1]


def test_a_layer_that_mixes_the_samples_is_refused() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x - x.mean(0) if self.training else x)

    model, x = Mixing(), torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    engine = GradDotProdEngine(model, x, val_losses=sum_of_squares)
    with engine, pytest.raises(CaptureError, match="linear"), engine.scoring(4) as batch:
        batch.scores(sum_of_squares(model, x))


def test_misuse() -> None:
    model, batch = gpt2(), val_batch(BATCH)
    engine = causal_engine(model, VAL)
    with pytest.raises(UsageError, match="not attached"), engine.scoring(4):
        pass
    with engine:
        with pytest.raises(UsageError, match="at least one sample"), engine.scoring(0):
            pass
        with engine.scoring(4) as scoring:
            losses_B = language_model_losses(model, batch)
            for refused in (lambda: engine.prepare(4), engine.refresh, engine.collect):
                with pytest.raises(UsageError):
                    refused()
            with pytest.raises(UsageError, match="scoring pass is open"):
                engine.watch(losses_B.mean())
            with pytest.raises(UsageError, match="one loss a sample"):
                scoring.scores(losses_B.mean())
            with pytest.raises(CaptureError, match="no gradient"):
                scoring.scores(losses_B.detach())
            scoring.scores(losses_B)
            with pytest.raises(UsageError, match="has been scored"):
                scoring.scores(losses_B)
        with engine.scoring(4) as scoring:
            losses_B = language_model_losses(model, batch)
        with pytest.raises(UsageError, match="closed"):
            scoring.scores(losses_B)
        with engine.scoring(4) as scoring, pytest.raises(CaptureError, match="do not depend"):
            scoring.scores(torch.ones(4, requires_grad=True) * 2)
        engine.prepare(4)
        with pytest.raises(UsageError, match="not collected"), engine.scoring(4):
            pass
        assert engine.training_batch_open
