"""Uses of a weight where no branch or tap sees it, and axes that change: in parts of a model, and in later batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ghoststore.errors import CaptureError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine
from indexer.encode.engine import GradProjLoraEngine
from indexer.encode.uses import FrozenInCalls
from tests.support.around import Around
from tests.support.oracle import naive, relative_error
from tests.support.scoring import check, exact_plain, plain_step, sum_of_squares

ALL = ProjectionConfig(layers=("all",), rank_total="full")
SEEN_NOWHERE = "are used where nothing sees it"


def drawn(count: int, positions: int, seed: int) -> Tensor:
    return torch.randn(count, positions, Around.width, generator=torch.Generator().manual_seed(seed))


X, VAL = drawn(3, 4, 0), drawn(5, 4, 1)


class Hidden(nn.Module):
    """Uses a weight without its module while it is ``on``; with 0.0 the use is in the graph and has no effect."""

    def __init__(self, weigh: Callable[[nn.Module, Tensor], Tensor], *, on: float | None) -> None:
        super().__init__()
        self.up, self.weigh, self.on = nn.Linear(Around.width, Around.width), weigh, on

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.tanh(self.up(x))
        return y if self.on is None else y + self.on * self.weigh(self.up, x)


def functional(up: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, up.weight)  # type: ignore[arg-type]


def around_its_hooks(up: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = up.forward(x)  # type: ignore[operator]
    return y


def turned(up: nn.Module, x: Tensor) -> Tensor:
    return x @ up.weight.t().t()  # type: ignore[operator,union-attr]


def checkpointed(up: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(lambda x: F.linear(x, up.weight), x, use_reentrant=False)  # type: ignore[arg-type,assignment]
    return y


WAYS = [functional, around_its_hooks, turned, checkpointed]


def in_parts(model: nn.Module, x: Tensor) -> Tensor:
    """The loop calls the model's parts and not the model."""
    h = torch.tanh(model.first(x))  # type: ignore[operator]
    y: Tensor = model.last(torch.tanh(model.layer(h)))  # type: ignore[operator]
    return y


def beside(model: nn.Module, x: Tensor) -> Tensor:
    """It calls the model, and a part of it with what came out."""
    y: Tensor = model(x)
    return y + model.layer(x).sum(-1, keepdim=True)  # type: ignore[operator]


LOOPS: list[Callable[[nn.Module, Tensor], Tensor]] = [lambda model, x: model(x), in_parts, beside]
LOOP_IDS = ["model", "parts", "beside"]


def collected(engine: GradProjLoraEngine, loop: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> Tensor:
    engine.prepare(len(x))
    return engine.collect(sum_of_squares(lambda x: loop(engine.model, x), x))  # type: ignore[arg-type]


@pytest.mark.parametrize("loop", LOOPS, ids=LOOP_IDS)
@pytest.mark.parametrize("weigh", WAYS)
def test_a_use_in_the_first_batch(weigh: Callable[..., Tensor], loop: Callable[..., Tensor]) -> None:
    """In a loop of parts no block was held against autograd: a half of one was lost."""
    model = Around(Hidden(weigh, on=1.0)).eval()
    with GradProjLoraEngine(model, ALL) as engine, pytest.raises(CaptureError, match=r"layer\.up") as caught:
        collected(engine, loop, X)
    assert caught.value.unsupported
    config = ProjectionConfig(layers=("all",), rank_total="full", exclude_layers=caught.value.unsupported)
    with GradProjLoraEngine(model, config) as engine:
        vectors = collected(engine, loop, X)
    exact = naive(model, engine.projection, len(X), lambda model, i: sum_of_one(loop, model, X, i)).vectors
    assert relative_error(vectors, exact) < 1e-5


def sum_of_one(loop: Callable[..., Tensor], model: nn.Module, x: Tensor, i: int) -> Tensor:
    return sum_of_squares(lambda x: loop(model, x), x[i : i + 1]).sum()  # type: ignore[arg-type]


@pytest.mark.parametrize("loop", LOOPS, ids=LOOP_IDS)
@pytest.mark.parametrize("weigh", WAYS)
@pytest.mark.parametrize("trusted", [False, True])
def test_a_use_that_only_a_later_batch_takes(
    weigh: Callable[..., Tensor], loop: Callable[..., Tensor], *, trusted: bool
) -> None:
    """The check of the first batch has not seen it. A build trusts the rest of it, and finds uses."""
    model = Around(Hidden(weigh, on=None)).eval()
    with GradProjLoraEngine(model, ALL, check=not trusted, find_uses=True) as engine:
        vectors = collected(engine, loop, X)
        exact = naive(model, engine.projection, len(X), lambda model, i: sum_of_one(loop, model, X, i)).vectors
        assert relative_error(vectors, exact) < 1e-5
        assert not any(parameter.requires_grad for parameter in model.parameters())
        collected(engine, loop, X)
        model.layer.on = 1.0  # type: ignore[assignment]
        with pytest.raises(CaptureError, match=SEEN_NOWHERE):
            collected(engine, loop, X)
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("loop", LOOPS, ids=LOOP_IDS)
def test_a_use_without_an_effect_in_the_first_batch(loop: Callable[..., Tensor]) -> None:
    model = Around(Hidden(functional, on=0.0)).eval()
    with GradProjLoraEngine(model, ALL) as engine:
        if loop is in_parts:  # it is compared with autograd, without structure
            collected(engine, loop, X)
            model.layer.on = 1.0  # type: ignore[assignment]
        with pytest.raises(CaptureError, match=r"layer\.up"):
            collected(engine, loop, X)


@pytest.mark.parametrize("weigh", WAYS)
@pytest.mark.parametrize("before", [None, 0.0])
@pytest.mark.parametrize("when", ["train", "val", "scoring", "held"])
def test_a_use_that_only_a_later_step_takes(weigh: Callable[..., Tensor], before: float | None, when: str) -> None:
    model = Around(Hidden(weigh, on=None)).eval()

    def step() -> None:
        if when in ("train", "val"):
            plain_step(engine, model, X)
        else:
            with engine.scoring(len(X), hold=when == "held") as batch:
                batch.scores(sum_of_squares(model, X))

    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares, val_refresh_interval=100) as engine:
        step()
        if when == "train":
            check(plain_step(engine, model, X), exact_plain(model, X, VAL))
        if when == "val":
            model.layer.on = 1.0  # type: ignore[assignment]
            engine.refresh()
        model.layer.on = 1.0 if before is None and when != "val" else before  # type: ignore[assignment]
        with pytest.raises(CaptureError, match=SEEN_NOWHERE) as caught:
            step()
    if when != "held":  # it forms the gradient of all parameters
        with GradDotProdEngine(
            model, VAL, val_losses=sum_of_squares, exclude_layers=caught.value.unsupported
        ) as engine:
            step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_a_weight_that_autocast_casts_once_for_several_calls(dtype: torch.dtype | None) -> None:
    model = Around(nn.Linear(Around.width, Around.width), lambda layer, x: layer(torch.tanh(layer(x)))).eval()
    with (
        GradDotProdEngine(model, VAL, val_losses=sum_of_squares, val_refresh_interval=100) as engine,
        GradProjLoraEngine(model, ALL) as vectors,
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
    ):
        collected(vectors, LOOPS[0], X)
        vectors.detach()
        plain_step(engine, model, X)
        plain_step(engine, model, drawn(3, 4, 7))


class KeepsInside(nn.Linear):
    """Passes on, beside its output, what no branch has seen."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.kept = 2 * y
        return y


@pytest.mark.parametrize("loop", [LOOPS[0], in_parts], ids=["model", "parts"])
def test_what_leaves_a_module_beside_its_output(loop: Callable[..., Tensor]) -> None:
    layer = KeepsInside(Around.width, Around.width)

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return in_parts(model, x) + layer.kept.sum(-1, keepdim=True)

    model = Around(layer, lambda layer, x: layer(x) + layer.kept).eval()  # type: ignore[operator]
    with GradProjLoraEngine(model, ALL) as engine, pytest.raises(CaptureError, match="its gradient is not autograd's"):
        collected(engine, run if loop is in_parts else loop, X)


class Turned(nn.Module):
    """Its layer sees (positions, samples, width) where there are as many of either."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(Around.width, Around.width)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != x.shape[1]:
            return torch.tanh(self.up(x))
        return torch.tanh(self.up(x.transpose(0, 1))).transpose(0, 1)


@pytest.mark.parametrize("loop", [LOOPS[0], in_parts], ids=["model", "parts"])
def test_axes_that_change_in_a_later_batch(loop: Callable[..., Tensor]) -> None:
    """As many samples as positions: the length of an axis does not show it."""
    model = Around(Turned()).eval()
    with GradProjLoraEngine(model, ALL) as engine:
        for seed in range(3):
            collected(engine, loop, drawn(3, 4, seed))
        with pytest.raises(CaptureError, match=r"layer\.up"):
            collected(engine, loop, drawn(4, 4, 9))
        collected(engine, loop, drawn(3, 4, 5))


def test_axes_that_change_in_a_later_step() -> None:
    model = Around(Turned()).eval()
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares, val_refresh_interval=100) as engine:
        for seed in range(3):
            plain_step(engine, model, drawn(3, 4, seed))
        with pytest.raises(CaptureError, match=r"layer\.up: its input does not follow the samples"):
            plain_step(engine, model, drawn(4, 4, 9))


def test_samples_that_are_mixed_in_a_later_batch_are_found_in_the_64th() -> None:
    model = Around(nn.Linear(Around.width, Around.width)).eval()
    with GradProjLoraEngine(model, ALL) as engine:
        for seed in range(63):
            collected(engine, LOOPS[0], drawn(3, 4, seed))
        model.call = lambda layer, x: layer(x.roll(1, 0)).roll(-1, 0)
        with pytest.raises(CaptureError, match="layer"):
            collected(engine, LOOPS[0], drawn(3, 4, 9))


@pytest.mark.parametrize("count", [1, 3])
def test_a_model_that_does_not_run_on_one_sample(count: int) -> None:
    """It was not held against autograd at all: its second batch is now, as a whole."""

    def pairs(layer: nn.Module, x: Tensor) -> Tensor:
        if len(x) == 1 and count != 1:
            raise ValueError("not one")
        return layer(x) + F.linear(x, layer.weight)  # type: ignore[arg-type,no-any-return]

    model = Around(nn.Linear(Around.width, Around.width), pairs).eval()
    with GradProjLoraEngine(model, ALL) as engine, pytest.raises(CaptureError, match="layer"):
        collected(engine, LOOPS[0], X[:count])


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_use_right_beside_a_call(order: str) -> None:
    """Autograd numbers its operation next to those of the call."""
    model = Around(nn.Linear(Around.width, Around.width)).eval()
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares, val_refresh_interval=100) as engine:
        plain_step(engine, model, X)
        if order == "after":
            model.call = lambda layer, x: layer(x) + layer.weight.sum()  # type: ignore[operator]
        else:
            model.call = lambda layer, x: layer.weight.sum() + layer(x)  # type: ignore[operator]
        with pytest.raises(CaptureError, match=SEEN_NOWHERE):
            plain_step(engine, model, X)


def test_what_a_model_that_does_not_run_on_one_sample_hides() -> None:
    """No use of a weight shows it; the second batch is held against autograd as a whole."""

    def pairs(layer: nn.Module, x: Tensor) -> Tensor:
        if len(x) == 1:
            raise ValueError("not one")
        return layer(x) + layer.kept  # type: ignore[no-any-return,operator]

    model = Around(KeepsInside(Around.width, Around.width), pairs).eval()
    with GradProjLoraEngine(model, ALL) as engine:
        collected(engine, LOOPS[0], X)
        with pytest.raises(CaptureError, match="its gradient is not autograd's"):
            collected(engine, LOOPS[0], X)


class Outer(nn.Module):
    """Uses the weight of the module inside, which it calls first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(Around.width, Around.width)
        self.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y + F.linear(torch.tanh(x), self.weight)


def test_calls_inside_calls() -> None:
    """The weight is used inside the outer call after the inner one ended, and hidden only where both ended."""
    model = Around(Outer())
    weight = model.layer.inner.weight  # type: ignore[union-attr]
    uses = FrozenInCalls(model, {"layer": [weight], "layer.inner": [weight]})  # type: ignore[dict-item,list-item]
    handles = uses.attach()
    for call, hidden in (
        (lambda layer, x: layer(x), []),
        (lambda layer, x: layer(x) + F.linear(x, layer.weight), [weight]),
    ):
        model.call = call  # type: ignore[assignment]
        uses.begin(whole=False)
        assert [id(x) for x in uses.hidden(model(X).sum())] == [id(x) for x in hidden]
        uses.end()
    for handle in handles:
        handle.remove()
