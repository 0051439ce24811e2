"""Arguments and outputs of modules that run again of which it is not plain whether they are of samples, and hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine
from indexer.encode.engine import GradProjLoraEngine
from tests.support.around import Around
from tests.support.oracle import naive, relative_error
from tests.support.scoring import check, exact_plain, plain_step, sum_of_squares

D = Around.width
ALL = ProjectionConfig(layers=("all",), rank_total="full")
TABLE = torch.randn(12, D, generator=torch.Generator().manual_seed(2))


def drawn(count: int, positions: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(count, positions, D, generator=torch.Generator().manual_seed(seed))
    x[:, 0, 0] = torch.arange(count) + 10.0  # tells the samples apart
    return x.to(dtype)


class Conditioned(nn.Module):
    """Takes the class of each sample, (samples,)."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.randn(10, D)), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return x * self.scale + self.shift[label].unsqueeze(1)


class LabelFirst(Conditioned):
    def forward(self, label: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, label)


class Placed(nn.Module):
    """Takes positions, in any form that indexes a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, D))

    def forward(self, position: Tensor, x: Tensor) -> Tensor:
        return x * torch.tanh(self.table[position])


class TableFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full((D,), 0.5))

    def forward(self, table: Tensor, x: Tensor) -> Tensor:
        return x + self.gate * table


def own(x: Tensor) -> Tensor:
    """The class of each sample, which goes with it also where it runs alone."""
    return LABELS[: len(x)] if len(x) > 1 else LABELS[ALONE[0] : ALONE[0] + 1]


LABELS = torch.arange(10)
ALONE = [0]


@contextmanager
def alone(place: int) -> Iterator[None]:
    ALONE[0] = place
    yield
    ALONE[0] = 0


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "labels": (Conditioned, lambda layer, x: layer(x, own(x))),
    "labels first": (LabelFirst, lambda layer, x: layer(own(x), x)),
    "positions": (Placed, lambda layer, x: layer(torch.arange(x.shape[1]), x)),
    "positions of two axes": (Placed, lambda layer, x: layer(torch.arange(x.shape[1])[None], x)),
    "table": (TableFirst, lambda layer, x: layer(TABLE[: x.shape[1]], x)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("count", "positions"), [(3, 4), (3, 6), (3, 9), (3, 3), (2, 4), (1, 4), (4, 1)])
def test_arguments_that_may_be_of_samples(name: str, count: int, positions: int) -> None:
    """Exact, or (a table, and as many positions as samples) refused because nothing tells."""
    make, call = CALLS[name]
    model = Around(make(), call).eval()
    x = drawn(count, positions)

    def loss(model: nn.Module, i: int) -> Tensor:
        with alone(i):
            return sum_of_squares(model, x[i : i + 1]).sum()

    with GradProjLoraEngine(model, ALL, check=False) as engine:
        engine.prepare(count)
        vectors = engine.collect(sum_of_squares(model, x))
    assert relative_error(vectors, naive(model, engine.projection, count, loss).vectors) < 1e-5


class Prototypes(nn.Module):
    """Takes as many prototypes as there are samples, by accident; their share of the output is hard to see."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full((1,), gate))

    def forward(self, x: Tensor, prototypes: Tensor) -> Tensor:
        return x + self.gate * (x @ prototypes.t()).softmax(-1) @ prototypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [0.0, 1e-2, 1.0])
def test_a_table_that_is_as_long_as_the_batch_by_accident(gate: float, dtype: torch.dtype) -> None:
    """It was cut, and in 16 bits an output that is 1 % off was near enough."""
    model = Around(Prototypes(gate), lambda layer, x: layer(x, TABLE[:3].to(x.dtype))).eval().to(dtype)
    x = drawn(3, 5, dtype=dtype)
    with GradProjLoraEngine(model, ALL, check=False) as engine:
        engine.prepare(3)
        losses = sum_of_squares(model, x)
        if gate == 0.0 or (gate == 1e-2 and dtype is torch.bfloat16):
            with pytest.raises(CaptureError, match="whose axis is the first, its output does not tell"):
                engine.collect(losses)
            return
        vectors = engine.collect(losses)  # the output tells
    model.float()
    exact = naive(model, engine.projection, 3, lambda m, i: sum_of_squares(m, x[i : i + 1].float()).sum()).vectors
    assert relative_error(vectors, exact) < (1e-5 if dtype is torch.float32 else 0.05)


class WithLoss(nn.Module):
    """Returns a loss of its own beside its output, one number for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, D) / 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ self.w
        return y, y.square().mean()


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("scored", [False, True])
def test_a_number_beside_the_output(count: int, *, used: bool, scored: bool) -> None:
    """Its gradient was lost. Of one sample alone it is that sample's."""

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        y, number = layer(x)
        return y * (1 + number) if used else y  # type: ignore[no-any-return]

    model = Around(WithLoss(), call).eval()
    x, val = drawn(count, 4), drawn(1, 4, 1)
    if scored:
        with GradDotProdEngine(model, val, val_losses=sum_of_squares, check=False) as engine:
            if used and count > 1:
                with pytest.raises(CaptureError, match="of all 3 samples together"):
                    plain_step(engine, model, x)
                return
            check(plain_step(engine, model, x), exact_plain(model, x, val))
        return
    with GradProjLoraEngine(model, ALL, check=False) as vectors:
        vectors.prepare(count)
        losses = sum_of_squares(model, x)
        if used and count > 1:
            with pytest.raises(CaptureError, match="of all 3 samples together"):
                vectors.collect(losses)
            return
        found = vectors.collect(losses)
    exact = naive(model, vectors.projection, count, lambda m, i: sum_of_squares(m, x[i : i + 1]).sum()).vectors
    assert relative_error(found, exact) < 1e-5


class Labelled(nn.Module):
    """An embedding of the class of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.of_class, self.last = nn.Embedding(10, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(x.mean(1) + self.of_class(own(x))))
        return y


def test_classes_that_count_up_where_nothing_is_checked() -> None:
    """They were taken for positions."""
    model = Labelled().eval()
    with GradProjLoraEngine(model, ALL, check=False) as engine:
        engine.prepare(3)
        with pytest.raises(CaptureError, match="counts up and is as long as the batch"):
            model(drawn(3, 4))
    scores = GradDotProdEngine(model, drawn(3, 4), val_losses=sum_of_squares, check=False)
    with scores, pytest.raises(CaptureError, match="counts up and is as long as the batch"):
        scores.refresh()


@pytest.mark.parametrize("check_it", [False, True])
def test_the_class_of_one_sample_alone(*, check_it: bool) -> None:
    """Its row came back with an axis more."""
    model = Labelled().eval()
    with GradProjLoraEngine(model, ALL, check=check_it) as engine:
        engine.prepare(1)
        y = model(drawn(1, 4))
        assert y.shape == (1, 3)
        vectors = engine.collect(sum_of_squares(lambda _: y, None))  # type: ignore[arg-type]
    exact = naive(model, engine.projection, 1, lambda m, i: sum_of_squares(m, drawn(1, 4)).sum()).vectors
    assert relative_error(vectors, exact) < 1e-5


@pytest.mark.parametrize("kwargs", [False, True])
def test_a_hook_that_changes_the_arguments_of_a_module(*, kwargs: bool) -> None:
    """It ran again on what it had returned."""
    layer = Conditioned()
    if kwargs:
        layer.register_forward_pre_hook(lambda m, a, k: ((a[0] * 2 + 1, *a[1:]), k), with_kwargs=True)
    else:
        layer.register_forward_pre_hook(lambda m, a: (a[0] * 2 + 1, *a[1:]))
    model = Around(layer, lambda layer, x: layer(x, label=own(x)) if kwargs else layer(x, own(x))).eval()
    x = drawn(3, 4)

    def loss(model: nn.Module, i: int) -> Tensor:
        with alone(i):
            return sum_of_squares(model, x[i : i + 1]).sum()

    with GradProjLoraEngine(model, ALL, check=False) as engine:
        engine.prepare(3)
        vectors = engine.collect(sum_of_squares(model, x))
    assert relative_error(vectors, naive(model, engine.projection, 3, loss).vectors) < 1e-5


class CountsAxes(nn.Module):
    """Cannot use positions that have a row for each sample: it counts their axes."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.last = nn.Embedding(20, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = self.place(torch.arange(x.shape[1]))
        y: Tensor = self.last(torch.tanh(x * places[None, None].permute(0, 1, 2, 3)[0]))
        return y


@pytest.mark.parametrize("check_it", [False, True])
def test_an_error_of_the_models_own_names_the_layer(*, check_it: bool) -> None:
    model, x = CountsAxes().eval(), drawn(3, 4)
    with GradProjLoraEngine(model, ALL, check=check_it) as engine:
        engine.prepare(3)
        with pytest.raises(CaptureError, match=r"one row for each there.*`exclude_layers`\): place$") as caught:
            model(x)
    scores = GradDotProdEngine(model, x, val_losses=sum_of_squares)
    with scores, pytest.raises(CaptureError, match=r"one row for each there.*`exclude_layers`\): place$"):
        scores.refresh()
    assert "forward" not in vars(model)
    assert caught.value.unsupported == ("place",)
    config = ProjectionConfig(layers=("all",), rank_total="full", exclude_layers=caught.value.unsupported)
    with GradProjLoraEngine(model, config, check=check_it) as engine:
        engine.prepare(3)
        vectors = engine.collect(sum_of_squares(model, x))
    exact = naive(model, engine.projection, 3, lambda m, i: sum_of_squares(m, x[i : i + 1]).sum()).vectors
    assert relative_error(vectors, exact) < 1e-5


class Gate(nn.Module):
    """Takes samples and positions on one axis, and as many numbers as there are samples by accident."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, D))

    def forward(self, flat: Tensor, bias: Tensor) -> Tensor:
        return (flat @ self.w.t() + bias).softmax(-1) @ self.w


@pytest.mark.parametrize("weight", [False, True])
def test_a_bias_as_long_as_the_batch_beside_samples_and_positions_on_one_axis(*, weight: bool) -> None:
    bias = nn.Parameter(TABLE[0, :3].clone(), requires_grad=False) if weight else TABLE[0, :3]
    model = Around(Gate(), lambda layer, x: layer(x.flatten(0, 1), bias).view_as(x)).eval()
    x = drawn(3, 4)
    with GradProjLoraEngine(model, ALL) as engine:
        engine.prepare(3)
        vectors = engine.collect(sum_of_squares(model, x))
    exact = naive(model, engine.projection, 3, lambda m, i: sum_of_squares(m, x[i : i + 1]).sum()).vectors
    assert relative_error(vectors, exact) < 1e-5
