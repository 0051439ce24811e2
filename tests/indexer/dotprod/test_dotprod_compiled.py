"""Models that torch.compile compiled, whole, in place or in parts: exact scores, the same training, no graph unseen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghoststore import next_token_losses
from ghoststore.errors import CaptureError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine
from tests.indexer.encode.test_non_interference import hooks_of
from tests.support.models import Placed, examples, gpt2, llama, pad, settle
from tests.support.scoring import (
    BATCH,
    VAL,
    agree,
    causal_engine,
    causal_step,
    check,
    exact_causal,
    exact_plain,
    plain_step,
    sum_of_squares,
    val_batch,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:the loss of .* that is watched was not held:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

INDUCTOR = pytest.param(
    "inductor",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("c++") is None, reason="no C compiler here"),
    ],
)
BATCHES = [BATCH, examples((8, 5, 12), seed=3), examples((8, 9, 5, 12, 6), seed=4), BATCH[:3]]
"""Of several sizes: the second makes a graph anew, the others may."""

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
LOST = "no tap saw .* run in this batch.*torch._dynamo.reset"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Tiny: it is compiled in less than a second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def whole(model: Any, backend: str) -> tuple[Any, Any]:
    """(what the engine is given, what is trained)."""
    compiled = torch.compile(model, backend=backend)
    return compiled, compiled


def outside(model: Any, backend: str) -> tuple[Any, Any]:
    return model, torch.compile(model, backend=backend)


def in_place(model: Any, backend: str) -> tuple[Any, Any]:
    model.compile(backend=backend)
    return model, model


def layers(model: Any, backend: str) -> tuple[Any, Any]:
    """Every layer of a Net, every block of a transformer."""
    parts = model.children() if isinstance(model, Net) else next(m for m in model.modules() if type(m) is nn.ModuleList)
    for part in parts:
        part.compile(backend=backend)
    return model, model


WAYS: list[Callable[[Any, str], tuple[Any, Any]]] = [whole, outside, in_place, layers]
TRACED = [(gpt2, whole), (llama, outside), (llama, in_place), (llama, layers)]
"""Each way once, with "aot_eager"."""
INDUCTED = [(gpt2, layers), (llama, whole)]
"""With inductor, whose C++ takes longest: the tiny net goes every way with it, and GPT-2 is compiled whole by it in
the test of pairs."""


# A tiny net: what an engine goes through.


@pytest.mark.thin(3)
@pytest.mark.parametrize("backend", ["eager", INDUCTOR])
@pytest.mark.parametrize("way", WAYS)
def test_batches_of_several_sizes_attached_twice(way: Callable[[Any, str], tuple[Any, Any]], backend: str) -> None:
    model = settle(Net())
    exact = {size: exact_plain(model, X[:size], X) for size in (4, 5)}
    given, trained = way(model, backend)
    engine = GradDotProdEngine(given, X, val_losses=sum_of_squares)
    for _ in range(2):
        with engine:
            for size in (4, 5, 4):
                check(plain_step(engine, trained, X[:size]), exact[size])
        assert hooks_of(model) == 0
        with torch.no_grad():
            trained(X)  # an evaluation without the engine makes a graph of its own


@pytest.mark.parametrize("way", [whole, outside, in_place])
def test_positions_that_all_samples_share(way: Callable[[Any, str], tuple[Any, Any]]) -> None:
    """Whether or not the engine can tell that a graph is to come, before the first one is made."""
    model, ids = settle(Placed()), torch.randint(9, (5, 6), generator=torch.Generator().manual_seed(1))
    given, trained = way(model, "eager")
    with GradDotProdEngine(given, ids, val_losses=sum_of_squares) as engine:
        for size in (4, 5):
            check(plain_step(engine, trained, ids[:size]), exact_plain(model, ids[:size], ids))


@pytest.mark.thin(1)
@pytest.mark.parametrize("check_taps", [True, False])
def test_a_graph_from_before_is_refused_and_the_advice_works(check_taps: bool) -> None:
    model = settle(Net())
    exact = exact_plain(model, X, X)
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    with GradDotProdEngine(compiled, X, val_losses=sum_of_squares, check=check_taps) as engine:
        with pytest.raises(CaptureError, match=LOST):
            plain_step(engine, compiled, X)
        engine.discard()
        torch._dynamo.reset()
        check(plain_step(engine, compiled, X), exact)
    compiled(X)  # without the engine, with a gradient: again a graph without taps
    with engine:
        with pytest.raises(CaptureError, match=LOST):
            plain_step(engine, compiled, X)
        engine.discard()
        torch._dynamo.reset()
        check(plain_step(engine, compiled, X), exact)


def test_a_graph_from_before_of_a_model_that_is_compiled_elsewhere() -> None:
    model = settle(Net())
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    with (
        GradDotProdEngine(model, X, val_losses=sum_of_squares) as engine,
        pytest.raises(CaptureError, match=r"torch._dynamo.reset\(\)"),
    ):
        plain_step(engine, compiled, X)


@pytest.mark.slow
def test_a_second_engine_on_the_same_compiled_model() -> None:
    model = settle(Net())
    exact = exact_plain(model, X, X)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        with GradDotProdEngine(compiled, X, val_losses=sum_of_squares) as engine:
            check(plain_step(engine, compiled, X), exact)


def test_a_late_backward_pass_is_not_scored_in_the_next_batch() -> None:
    model = settle(Net())
    compiled = torch.compile(model, backend="eager")
    with GradDotProdEngine(compiled, X, val_losses=sum_of_squares) as engine:
        engine.prepare(5)
        late = sum_of_squares(compiled, X).mean()
        engine.discard()
        engine.prepare(5)
        loss = sum_of_squares(compiled, X).mean()
        engine.watch(loss)
        late.backward()
        loss.backward()
        with pytest.raises(CaptureError, match="differs from autograd"):  # the late one is in the gradients
            engine.collect()
        engine.discard()
        check(plain_step(engine, compiled, X), exact_plain(model, X, X))


@pytest.mark.slow
def test_weights_have_the_bits_of_compiled_training_without_the_engine() -> None:
    def trained(scored: bool) -> list[Tensor]:
        torch._dynamo.reset()
        model = settle(Net()).train()
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine = GradDotProdEngine(compiled, X, val_losses=sum_of_squares, optimizer=optimizer)
        if scored:
            engine.attach()
        for _ in range(4):
            if scored:
                plain_step(engine, compiled, X)
            else:
                sum_of_squares(compiled, X).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        engine.detach()
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(with_it, without) for with_it, without in zip(trained(True), trained(False), strict=True))


# Language models.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "way", "backend"),
    [
        *((make, way, "aot_eager") for make, way in TRACED),
        *(pytest.param(make, way, *INDUCTOR.values, marks=INDUCTOR.marks) for make, way in INDUCTED),
    ],
)
def test_language_models(make: Any, way: Callable[[Any, str], tuple[Any, Any]], backend: str) -> None:
    model = make(layers=1)
    given, trained = way(model, backend)
    with causal_engine(given, VAL) as engine:
        for batch in BATCHES:
            check(causal_step(engine, trained, batch, factor=0.5), exact_causal(model, batch))
        with engine.scoring(len(BATCH)) as scoring:
            ids, labels, mask = pad(BATCH)
            losses, _ = next_token_losses(trained(input_ids=ids, attention_mask=mask).logits, labels)
            check(scoring.scores(losses), exact_causal(model))
        check(causal_step(engine, trained), exact_causal(model))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_pairs_and_sketches(backend: str) -> None:
    model = gpt2(layers=1)
    compiled = torch.compile(model, backend=backend)
    with causal_engine(compiled, VAL, pairs=True) as engine:
        scores = causal_step(engine, compiled)
    check(scores, exact_causal(model))
    assert scores.pairs is not None
    agree(scores.pairs, exact_causal(model, val=BATCH).total())
    sketch = ProjectionConfig(layers=("all",), rank_total=16)
    with causal_engine(model, VAL, projection=sketch) as engine:
        expected = causal_step(engine, model)
    torch._dynamo.reset()
    with causal_engine(compiled, VAL, projection=sketch) as engine:
        agree(causal_step(engine, compiled).total, expected.total)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "mode"), [(llama, "float32"), (gpt2, "autocast"), (gpt2, "checkpointing"), (llama, "checkpointing")]
)
def test_bits_of_language_models(make: Any, mode: str) -> None:
    """Dropout, accumulation of two micro-batches, AdamW."""
    scores = []

    def trained(scored: bool) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = make(layers=1, attention_dropout=0.1) if make is llama else make(layers=1)
        model.train()
        if mode == "checkpointing":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine = GradDotProdEngine(compiled, val_batch(VAL), optimizer=optimizer)
        if scored:
            engine.attach()
        torch.manual_seed(1)
        for step in range(4):
            ids, labels, mask = pad(examples((9, 4, 12), seed=step))
            if scored:
                engine.prepare(3)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
                loss = compiled(input_ids=ids, attention_mask=mask, labels=labels).loss
            if scored:
                engine.watch(loss, labels=labels)
            (loss / 2).backward()
            if scored:
                scores.append(engine.collect().total)
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
        engine.detach()
        return [*(parameter.detach() for parameter in model.parameters()), torch.get_rng_state()]

    assert all(torch.equal(with_it, without) for with_it, without in zip(trained(True), trained(False), strict=True))
    assert bool(torch.isfinite(torch.stack(scores)).all())
