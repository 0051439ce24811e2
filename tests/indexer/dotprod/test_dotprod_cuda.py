"""Scores on a GPU equal batch-of-one autograd on the CPU, and the step that they are taken from stays what it is."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from ghoststore import ProjectionConfig
from indexer.dotprod import GradDotProdEngine
from indexer.dotprod.exact import Route
from indexer.dotprod.scores import Scores
from indexer.encode.encoder import RowEncoder
from indexer.projection.matrices import Projection
from tests.indexer.encode.test_invariance import ROWS
from tests.support.models import CAUSAL, gpt2
from tests.support.oracle import relative_error
from tests.support.scoring import BATCH, VAL, agree, check, exact_causal, val_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROUTES: tuple[Route, ...] = ("auto", "direct", "gram")


def on_cuda(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.cuda() for name, values in batch.items()}


def step(engine: GradDotProdEngine | None, model: Any, scale: float = 1.0, **autocast: Any) -> Scores | None:
    """Forward and backward of the batch on the GPU."""
    batch = on_cuda(val_batch(BATCH))
    if engine is not None:
        engine.prepare(len(BATCH), tokens=batch["input_ids"].numel(), loss_scale=scale)
    with torch.autocast("cuda", enabled=bool(autocast), **autocast):
        loss = model(**batch).loss
    if engine is not None:
        engine.watch(loss, labels=batch["labels"])
    (loss * scale).backward()
    return None if engine is None else engine.collect()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_exact_scores(architecture: str, route: Route) -> None:
    exact = exact_causal(CAUSAL[architecture]())
    model = CAUSAL[architecture]().cuda()
    with GradDotProdEngine(model, [on_cuda(val_batch(VAL[:3])), on_cuda(val_batch(VAL[3:]))], route=route) as engine:
        scores = step(engine, model)
    assert scores is not None
    assert scores.total.is_cuda
    check(Scores(**{name: _to_cpu(getattr(scores, name)) for name in Scores.__dataclass_fields__}), exact, 1e-4)


@pytest.mark.filterwarnings("ignore:the loss of .* that is watched was not held:RuntimeWarning")
@pytest.mark.parametrize("in_place", [False, True])
def test_scores_of_a_compiled_model(in_place: bool) -> None:
    torch._dynamo.reset()
    exact = exact_causal(gpt2())
    model = gpt2().cuda()
    trained: Any = model
    if in_place:
        model.compile()
    else:
        trained = torch.compile(model)
    with GradDotProdEngine(trained, on_cuda(val_batch(VAL))) as engine:
        scores = step(engine, trained)
    assert scores is not None
    check(Scores(**{name: _to_cpu(getattr(scores, name)) for name in Scores.__dataclass_fields__}), exact, 1e-4)
    torch._dynamo.reset()


def _to_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_cpu(each) for name, each in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("mode", ["bfloat16", "float16", "bfloat16 weights"])
def test_narrow_scores(mode: str) -> None:
    model = gpt2()
    dtype = torch.float16 if mode == "float16" else torch.bfloat16
    model = model.to(dtype) if mode.endswith("weights") else model
    exact = exact_causal(deepcopy(model).float())
    model = model.cuda()
    scale = 1024.0 if mode == "float16" else 1.0
    given = {} if mode.endswith("weights") else {"dtype": dtype}
    with (
        torch.autocast("cuda", enabled=bool(given), **given),
        GradDotProdEngine(model, on_cuda(val_batch(VAL))) as engine,
    ):
        scores = step(engine, model, scale, **given)
    assert scores is not None
    sizes = torch.stack([size.square() for size in exact.sizes.values()]).sum(0).sqrt()
    error = (scores.total.cpu() - exact.total().mean(1)).norm()
    assert float(error) <= 2e-2 * float(sizes.norm())


def test_sketched_scores_and_vectors() -> None:
    model = gpt2()
    config = ProjectionConfig(rank_total=64)
    moved = deepcopy(model).cuda()
    results = []
    for device, one in (("cpu", model), ("cuda", moved)):
        val, batch = val_batch(VAL), val_batch(BATCH)
        if device == "cuda":
            val, batch = on_cuda(val), on_cuda(batch)
        with GradDotProdEngine(one, val, projection=config) as engine:
            engine.prepare(len(BATCH), tokens=batch["input_ids"].numel())
            loss = one(**batch).loss
            engine.watch(loss, labels=batch["labels"])
            loss.backward()
            results.append(engine.collect())
    agree(results[1].total.cpu(), results[0].total, 1e-4)
    assert results[0].vectors is not None
    assert results[1].vectors is not None
    assert relative_error(results[1].vectors.cpu(), results[0].vectors) <= 1e-4


@pytest.mark.parametrize("make", ["gpt2-tied", "llama"])
def test_the_step_is_the_plain_one(make: str) -> None:
    plain, scored = CAUSAL[make]().cuda(), CAUSAL[make]().cuda()
    step(None, plain)
    with GradDotProdEngine(scored, on_cuda(val_batch(VAL[:3]))) as engine:
        step(engine, scored)
    for (name, one), (_, other) in zip(plain.named_parameters(), scored.named_parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad), name


def test_rows_of_other_batches() -> None:
    """Batch mates and padding change a row on a GPU by rounding alone."""
    model = gpt2().cuda()
    with RowEncoder(model, Projection.for_model(model, ProjectionConfig())) as encoder:
        together = encoder(ROWS).vectors
        alone = torch.cat([encoder([row]).vectors for row in ROWS])
    assert relative_error(together.cpu(), alone.cpu()) <= 1e-4
