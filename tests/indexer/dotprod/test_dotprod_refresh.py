"""When the val gradient is computed: at steps 0, R, 2R, of the weights of that step, and never of others unnoticed."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError, UsageError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine, Scores
from tests.support.models import settle
from tests.support.scoring import check, exact_of, exact_plain, plain_step, sum_of_squares


def mlp() -> nn.Sequential:
    return settle(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)))


def numbers(count: int, seed: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


X, VAL, OTHER = numbers(3, 0), numbers(4, 1), numbers(2, 2)


class Counting:
    """A val_losses that knows how often it was called with the whole val set, and may fail."""

    def __init__(self) -> None:
        self.calls = -2  # those of the probe, which comes first
        self.fails = False

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        self.calls += len(x) == len(VAL)  # not in the probe of two and three samples
        losses = sum_of_squares(model, x)
        return losses * torch.nan if self.fails and len(x) != len(VAL) else losses


def train_step(engine: GradDotProdEngine, model: nn.Module, optimizer: torch.optim.Optimizer) -> Scores:
    scores = plain_step(engine, model, X)
    optimizer.step()
    optimizer.zero_grad()
    return scores


@pytest.mark.thin
@pytest.mark.parametrize("settings", [{}, {"projection": ProjectionConfig(layers=("all",), rank_total=9)}], ids=str)
@pytest.mark.parametrize("tells", ["the optimizer", "the caller"])
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_exactly_every_interval(interval: int, tells: str, settings: dict[str, Any]) -> None:
    model, losses = mlp(), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    given = {"optimizer": optimizer} if tells == "the optimizer" else {}
    engine = GradDotProdEngine(model, VAL, val_losses=losses, val_refresh_interval=interval, **given, **settings)
    with engine:
        for step in range(7):
            scores = train_step(engine, model, optimizer)
            if tells == "the caller":
                engine.stepped()
            assert losses.calls == step // interval + 1
            assert scores.val_age == step % interval


def test_the_val_gradient_is_of_the_weights_of_its_step() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with GradDotProdEngine(
        model, VAL, val_losses=sum_of_squares, optimizer=optimizer, val_refresh_interval=2
    ) as engine:
        for step in range(4):
            if step % 2 == 0:
                old = {name: value.clone() for name, value in model.state_dict().items()}
            new = {name: value.clone() for name, value in model.state_dict().items()}

            def at_old_weights(model: Any, i: int, old: Any = old, new: Any = new) -> Tensor:
                model.load_state_dict(old)
                losses = sum_of_squares(model, VAL[i : i + 1]).sum()
                gradients = torch.autograd.grad(losses, list(model.parameters()))
                model.load_state_dict(new)
                # A loss whose gradient at the new weights is that at the old ones.
                return sum((p * g).sum() for p, g in zip(model.parameters(), gradients, strict=True))

            exact = exact_of(
                model, 3, lambda model, i: sum_of_squares(model, X[i : i + 1]).sum(), len(VAL), at_old_weights
            )
            check(train_step(engine, model, optimizer), exact)


def test_micro_batches_of_a_step_share_a_val_gradient() -> None:
    model, losses = mlp(), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with GradDotProdEngine(model, VAL, val_losses=losses, optimizer=optimizer) as engine:
        for step in range(3):
            for _ in range(4):
                plain_step(engine, model, X)
            optimizer.step()
            assert losses.calls == step + 1


def test_refresh_is_now() -> None:
    model, losses = mlp(), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with GradDotProdEngine(model, VAL, val_losses=losses, optimizer=optimizer, val_refresh_interval=3) as engine:
        train_step(engine, model, optimizer)
        engine.refresh()
        assert train_step(engine, model, optimizer).val_age == 0
        assert train_step(engine, model, optimizer).val_age == 1
    assert losses.calls == 2


def test_other_val_data() -> None:
    model = mlp()
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares, val_refresh_interval=9) as engine:
        check(plain_step(engine, model, X), exact_plain(model, X, VAL))
        engine.set_validation([OTHER, VAL], groups=["a", "b", "a", "b", "b", "b"])
        scores = plain_step(engine, model, X)
        check(scores, exact_plain(model, X, torch.cat([OTHER, VAL])))
        assert engine.group_names == ["a", "b"]
        assert scores.groups.shape == (3, 2)


def test_attaching_again_goes_on_with_the_same_val_gradient() -> None:
    model, losses = mlp(), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    engine = GradDotProdEngine(model, VAL, val_losses=losses, optimizer=optimizer, val_refresh_interval=3)
    for age in (0, 1, 2, 0):
        with engine:
            assert train_step(engine, model, optimizer).val_age == age
    assert losses.calls == 2


def test_steps_made_while_detached_make_the_val_gradient_old() -> None:
    model, losses = mlp(), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine = GradDotProdEngine(model, VAL, val_losses=losses, optimizer=optimizer, val_refresh_interval=9)
    with engine:
        train_step(engine, model, optimizer)
    sum_of_squares(model, X).mean().backward()
    optimizer.step()
    with engine:
        scores = plain_step(engine, model, X)
    assert losses.calls == 2
    assert scores.val_age == 0
    check(scores, exact_plain(model, X, VAL))


def test_weights_that_change_untold_are_refused() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares) as engine:
        train_step(engine, model, optimizer)
        with pytest.raises(UsageError, match=r"stepped\(\)"):
            engine.prepare(3)
        engine.refresh()
        check(plain_step(engine, model, X), exact_plain(model, X, VAL))


@pytest.mark.parametrize("route", ["direct", "gram"])
def test_half_a_val_gradient_is_never_used(route: Any) -> None:
    model, losses = mlp(), Counting()
    with GradDotProdEngine(model, [VAL, OTHER], val_losses=losses, route=route, val_refresh_interval=9) as engine:
        plain_step(engine, model, X)
        losses.fails = True
        with pytest.raises(UsageError, match=r"val sample\(s\) \[4, 5\]"):
            engine.refresh()
        losses.fails = False
        check(plain_step(engine, model, X), exact_plain(model, X, torch.cat([VAL, OTHER])))


def test_a_val_gradient_out_of_range_is_refused() -> None:
    # Finite losses, and the gradient of a root at zero.
    model = mlp()
    engine = GradDotProdEngine(model, VAL, val_losses=lambda model, x: (0 * model(x)).sum(1).sqrt())
    with engine, pytest.raises(CaptureError, match="val gradient is not finite"):
        engine.prepare(3)


# After an error in a step.


@pytest.mark.parametrize("mode", [{}, {"pairs": True}, {"projection": ProjectionConfig(layers=("all",), rank_total=9)}])
def test_a_discarded_batch_leaves_no_trace(mode: dict[str, Any]) -> None:
    model = mlp()
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares, **mode) as engine:
        expected = plain_step(engine, model, X)
        for reach in ("prepare", "forward", "watch", "backward"):
            engine.prepare(2)
            loss = sum_of_squares(model, OTHER).mean() if reach != "prepare" else None
            if reach in ("watch", "backward"):
                engine.watch(loss)
            if reach == "backward":
                loss.backward()
            engine.discard()
            found = plain_step(engine, model, X)
            assert torch.equal(found.total, expected.total)
            assert found.pairs is None or torch.equal(found.pairs, expected.pairs)


@pytest.mark.parametrize("mode", [{}, {"pairs": True}, {"projection": ProjectionConfig(layers=("all",), rank_total=9)}])
def test_a_backward_pass_of_a_discarded_batch_is_not_scored(mode: dict[str, Any]) -> None:
    model = mlp()
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares, **mode) as engine:
        expected = plain_step(engine, model, X)
        engine.prepare(3)
        late = 2 * sum_of_squares(model, X).mean()
        engine.watch(late)
        engine.discard()
        late.backward(retain_graph=True)  # with no batch open
        engine.prepare(3)
        loss = sum_of_squares(model, X).mean()
        engine.watch(loss)
        late.backward()  # with another open
        loss.backward()
        found = engine.collect()
    assert torch.equal(found.total, expected.total)
    assert found.pairs is None or torch.equal(found.pairs, expected.pairs)


def test_an_exception_in_the_backward_pass() -> None:
    model = mlp()

    def explode(gradient: Tensor) -> None:
        raise KeyboardInterrupt

    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares, pairs=True) as engine:
        engine.prepare(3)
        y = model[1](model[0](X))
        y.register_hook(explode)
        loss = model[2](y).sum() / 3
        engine.watch(loss)
        with pytest.raises(KeyboardInterrupt):
            loss.backward()
        engine.discard()
        check(plain_step(engine, model, X), exact_plain(model, X, VAL))


def numbers_alive() -> int:
    """Numbers in all tensors that there are."""
    gc.collect()
    return sum(x.numel() for x in gc.get_objects() if type(x) is Tensor)


@pytest.mark.slow
def test_what_is_done_with_is_let_go() -> None:
    # What stays of any number of batches is one val gradient and the names of its groups.
    model = mlp()
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares, pairs=True, route="direct") as engine:
        before = numbers_alive()
        for _ in range(3):
            plain_step(engine, model, X)
            model.zero_grad()
        assert numbers_alive() - before <= sum(p.numel() for p in model.parameters()) + len(VAL) + 1
