"""Uses of weights that a compiled graph hides: found in the batch in which the graph is new."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghoststore.errors import CaptureError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine
from indexer.encode.engine import GradProjLoraEngine
from tests.indexer.dotprod.test_dotprod_compiled import INDUCTOR, WAYS
from tests.support.oracle import naive, relative_error
from tests.support.scoring import check, exact_plain, plain_step, sum_of_squares

pytestmark = pytest.mark.filterwarnings("ignore:the loss of .* that is watched was not compared:RuntimeWarning")

WIDTH = 6
ALL = ProjectionConfig(layers=("all",), rank_total="full")
SEEN_NOWHERE = "are used where nothing sees it"
WHOLE, OUTSIDE, IN_PLACE, LAYERS = WAYS

Way = Callable[[Any, str], tuple[Any, Any]]


def drawn(count: int, seed: int) -> Tensor:
    return torch.randn(count, 4, WIDTH, generator=torch.Generator().manual_seed(seed))


X, VAL = drawn(3, 0), drawn(5, 1)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """Uses a weight without its module while it is ``on``."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.on = nn.Linear(WIDTH, WIDTH), False

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.up(x))
        return y + F.linear(x, self.up.weight) if self.on else y


class Net(nn.Module):
    """Two blocks; ``below`` they use the weight of the layer before them without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.below = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), False
        self.blocks = nn.ModuleList([Block(), Block()])
        self.as_written: list[int] = []
        """Grows where the model runs outside of graphs."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.as_written.append(len(x))
        h = torch.tanh(self.first(x))
        if self.below:
            h = h + F.linear(x, self.first.weight)
        for block in self.blocks:
            h = block(h)
        y: Tensor = self.last(h)
        return y


def made() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def collected(engine: GradProjLoraEngine, run: Any, x: Tensor) -> Tensor:
    engine.prepare(len(x))
    return engine.collect(sum_of_squares(run, x))


def exact_vectors(model: nn.Module, engine: GradProjLoraEngine, x: Tensor) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        return naive(model, engine.projection, len(x), lambda m, i: sum_of_squares(m, x[i : i + 1]).sum()).vectors


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


INDUCTED = [*INDUCTOR.marks, pytest.mark.slow]


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("way", "backend", "trusted"),
    [
        (WHOLE, "aot_eager", False),
        (LAYERS, "aot_eager", True),
        slow(IN_PLACE, "aot_eager", False),
        slow(OUTSIDE, "aot_eager", False),
        pytest.param(WHOLE, *INDUCTOR.values, True, marks=INDUCTED),
    ],
)
def test_vectors_where_a_later_batch_takes_another_branch(way: Way, backend: str, *, trusted: bool) -> None:
    model = made()
    given, run = way(model, backend)
    with GradProjLoraEngine(given, ALL, check=not trusted, find_uses=True) as engine:
        vectors = collected(engine, run, X)
        model.blocks[0].on = True  # type: ignore[assignment]
        with pytest.raises(CaptureError, match=rf"{SEEN_NOWHERE}.*blocks\.0\.up") as caught:
            collected(engine, run, X)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.blocks[0].on = False  # type: ignore[assignment]
    assert relative_error(vectors, exact_vectors(model, engine, X)) < 1e-5
    model.blocks[0].on = True  # type: ignore[assignment]
    torch._dynamo.reset()
    config = ProjectionConfig(layers=("all",), rank_total="full", exclude_layers=caught.value.unsupported)
    with GradProjLoraEngine(given, config, check=not trusted, find_uses=True) as engine:
        vectors = collected(engine, run, X)
    assert relative_error(vectors, exact_vectors(model, engine, X)) < 1e-5


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("way", "backend"),
    [
        (WHOLE, "aot_eager"),
        (LAYERS, "aot_eager"),
        slow(IN_PLACE, "aot_eager"),
        slow(OUTSIDE, "aot_eager"),
        pytest.param(WHOLE, *INDUCTOR.values, marks=INDUCTED),
    ],
)
def test_scores_where_a_later_step_takes_another_branch(way: Way, backend: str) -> None:
    model = made()
    exact = exact_plain(model, X, VAL)
    given, run = way(model, backend)
    with GradDotProdEngine(given, VAL, val_losses=sum_of_squares, val_refresh_interval=100) as engine:
        check(plain_step(engine, run, X), exact)
        model.blocks[0].on = True  # type: ignore[assignment]
        with pytest.raises(CaptureError, match=rf"{SEEN_NOWHERE}.*blocks\.0\.up\.weight") as caught:
            plain_step(engine, run, X)
        assert not engine.training_batch_open
    torch._dynamo.reset()
    excluded = caught.value.unsupported
    with GradDotProdEngine(given, VAL, val_losses=sum_of_squares, exclude_layers=excluded) as engine:
        plain_step(engine, run, X)


@pytest.mark.thin(1)
@pytest.mark.parametrize("scored", [False, True])
def test_a_use_before_compiled_blocks(*, scored: bool) -> None:
    """The search ended at the first compiled block, and a projection did not search at all."""
    model = made()
    given, run = LAYERS(model, "aot_eager")
    if scored:
        with GradDotProdEngine(given, VAL, val_losses=sum_of_squares, val_refresh_interval=100) as engine:
            plain_step(engine, run, X)
            model.below = True
            with pytest.raises(CaptureError, match=rf"{SEEN_NOWHERE}.*first\.weight"):
                plain_step(engine, run, X)
        return
    with GradProjLoraEngine(given, ALL) as vectors:
        collected(vectors, run, X)
        model.below = True
        with pytest.raises(CaptureError, match=rf"{SEEN_NOWHERE}.*first"):
            collected(vectors, run, X)


@pytest.mark.parametrize("scored", [slow(False), True])
def test_a_graph_is_looked_at_once(*, scored: bool) -> None:
    """Batches in graphs that are known do not run again."""
    model = made()
    given, run = WHOLE(model, "aot_eager")
    engine: Any
    if scored:
        engine, step = GradDotProdEngine(given, VAL, val_losses=sum_of_squares, val_refresh_interval=100), plain_step
    else:
        engine, step = GradProjLoraEngine(given, ALL), collected  # type: ignore[assignment]
    counts = []
    with engine:
        for count in (3, 3, 3, 3, 2, 2, 2, 2):
            step(engine, run, drawn(count, count))
            counts.append(len(model.as_written))
    assert counts[0] > 0
    assert counts[2] == counts[3]
    assert counts[4] > counts[3]  # another size makes a graph
    assert counts[6] == counts[7]


@pytest.mark.slow
@pytest.mark.parametrize("scored", [False, True])
def test_a_loop_that_calls_compiled_parts(*, scored: bool) -> None:
    """Nobody can run it again: a half of a block was lost without a word."""
    model = made()
    model.blocks[0].on = True  # type: ignore[assignment]
    given, run = LAYERS(model, "aot_eager")

    def parts(x: Tensor) -> Tensor:
        return Net.forward(given, x)

    if scored:
        with GradDotProdEngine(given, VAL, val_losses=sum_of_squares, val_refresh_interval=100) as engine:
            with pytest.raises(CaptureError, match="differs from autograd"):
                plain_step(engine, parts, X)
            model.blocks[0].on = False  # type: ignore[assignment]
            with pytest.raises(CaptureError, match="calls parts of Net and not the model"):
                plain_step(engine, parts, X)
            plain_step(engine, run, X)
        return
    with GradProjLoraEngine(given, ALL) as vectors:
        with pytest.raises(CaptureError, match="calls parts of Net and not the model"):
            collected(vectors, parts, X)
        model.blocks[0].on = False  # type: ignore[assignment]
        found = collected(vectors, run, X)
    assert relative_error(found, exact_vectors(model, vectors, X)) < 1e-5


def wrapped(model: Any, backend: str) -> tuple[Any, Any]:
    """Every block inside the wrapper of ``torch.compile``, which takes its place."""
    model.blocks = nn.ModuleList([torch.compile(block, backend=backend) for block in model.blocks])
    return model, model


class Beside(Net):
    """Uses the weight of a compiled block outside of it for batches whose first number is positive."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not torch.compiler.is_compiling() and float(x.detach().flatten()[0]) > 0:
            block = self.blocks[0]
            y = y + F.linear(x, getattr(block, "_orig_mod", block).up.weight).sum(-1, keepdim=True)
        return y


@pytest.mark.parametrize("way", [LAYERS, wrapped])
@pytest.mark.parametrize("trusted", [False, True])
def test_a_part_that_is_not_compiled_uses_a_weight_of_a_graph(way: Way, *, trusted: bool) -> None:
    """No new graph is made for it. The block lost the share of that use without a word."""
    torch.manual_seed(0)
    model = Beside().eval()
    given, run = way(model, "aot_eager")
    without, used = -X.abs(), X.abs()
    with GradProjLoraEngine(given, ALL, check=not trusted, find_uses=True) as engine:
        vectors = collected(engine, run, without)
        for _ in range(3):  # the first two are checked, which makes other graphs
            assert torch.equal(collected(engine, run, without), vectors)
        made_once = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with pytest.raises(CaptureError, match=rf"{SEEN_NOWHERE}.*blocks\.0\.(_orig_mod\.)?up"):
            collected(engine, run, used)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(collected(engine, run, without), vectors)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made_once
    assert relative_error(vectors, exact_vectors(model, engine, without)) < 1e-5
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("way", [WHOLE, slow(IN_PLACE)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_loop_uses_a_weight_of_a_graph(way: Way, when: str) -> None:
    """Also in the first batch. Two engines leave the call of the model as it was, in whatever order they go."""
    model = made()
    given, run = way(model, "aot_eager")
    call = model._compiled_call_impl
    layer: Any = model.blocks[0].up

    def beside(x: Tensor) -> Tensor:
        y: Tensor = run(x + F.linear(x, layer.weight) if when == "before" else x)
        return y + layer.weight.sum() if when == "after" else y

    engine, other = (GradProjLoraEngine(given, ALL, check=False, find_uses=True) for _ in range(2))
    engine.attach()
    with pytest.raises(CaptureError, match=rf"{SEEN_NOWHERE}.*blocks\.0\.up"):
        collected(engine, beside, X)
    vectors = collected(engine, run, X)
    with pytest.raises(CaptureError, match=rf"{SEEN_NOWHERE}.*blocks\.0\.up"):
        collected(engine, beside, X)
    other.attach()
    engine.detach()
    other.detach()
    assert model._compiled_call_impl is call
    assert relative_error(vectors, exact_vectors(model, engine, X)) < 1e-5
