"""Packed rows: every sample of a row is scored as batch-of-one autograd says, or the rows are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from ghoststore import GradDotProdEngine, ProjectionConfig
from ghoststore.errors import CaptureError, UsageError
from indexer.dotprod.segments import Segments, packed_samples
from tests.indexer.layers.test_families import made
from tests.support.models import Example, bert_causal, examples, gpt2, llama, neox
from tests.support.scoring import VAL, agree, causal_engine, causal_step, check, exact_causal, val_batch

SAMPLES = examples((9, 3, 11, 5, 2, 17), seed=3)


def packed(rows: Sequence[Sequence[Example]], padding: int = 0) -> dict[str, Tensor]:
    """Each of ``rows`` holds these samples one after another; all must be of one length, but for ``padding``."""
    ids, labels, positions = [], [], []
    for row in rows:
        ids.append(torch.cat([x for x, _ in row] + [torch.zeros(padding, dtype=torch.long)]))
        targets = [torch.cat([torch.tensor([-100]), y[1:]]) for _, y in row]
        labels.append(torch.cat([*targets, torch.full((padding,), -100)]))
        counted = [torch.arange(len(x)) for x, _ in row]
        positions.append(torch.cat([*counted, torch.zeros(padding, dtype=torch.long)]))
    tensors = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.stack(x) for name, x in tensors.items()}


def step(engine: GradDotProdEngine, model: Any, batch: dict[str, Tensor], count: int, factor: float = 1.0) -> Any:
    engine.prepare(count, segments=packed_samples(batch, count))
    loss = model(**batch, use_cache=False).loss
    engine.watch(loss, labels=batch["labels"])
    (loss * factor).backward()
    return engine.collect()


MODELS: dict[str, Callable[[], Any]] = {"gpt2": gpt2, "llama": llama, "neox": neox}
LAYOUTS: dict[str, tuple[list[list[int]], int]] = {
    "one row": ([[0, 1, 2, 3, 4]], 0),
    "padded": ([[4, 0, 3]], 6),
    "two rows": ([[0, 1, 3], [5]], 0),
    "one sample": ([[2]], 3),
}


@pytest.mark.thin(4)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_each_sample_of_a_row_is_scored_alone(kind: str, layout: str) -> None:
    rows, padding = LAYOUTS[layout]
    order = [place for row in rows for place in row]
    model = MODELS[kind]()
    exact = exact_causal(model, [SAMPLES[place] for place in order], VAL[:3])
    batch = packed([[SAMPLES[place] for place in row] for row in rows], padding)
    with GradDotProdEngine(model, val_batch(VAL[:3])) as engine:
        scores = step(engine, model, batch, len(order), factor=0.25)
    check(scores, exact)


@pytest.mark.parametrize("route", ["direct", "gram"])
def test_routes_and_pairs(route: Any) -> None:
    model, order = gpt2(), [0, 1, 2, 3]
    batch = packed([[SAMPLES[place] for place in order]])
    chosen = [SAMPLES[place] for place in order]
    with GradDotProdEngine(model, val_batch(VAL[:3]), route=route, pairs=True) as engine:
        scores = step(engine, model, batch, 4)
    check(scores, exact_causal(model, chosen, VAL[:3]))
    pairs = exact_causal(model, chosen, chosen).total()
    torch.testing.assert_close(scores.pairs, pairs, rtol=1e-4, atol=1e-4 * float(pairs.abs().max()))


@pytest.mark.parametrize("compress", ["none", 64])
def test_sketched_scores_and_vectors_are_those_of_padded_rows(compress: Any) -> None:
    model = llama()
    chosen = [SAMPLES[place] for place in (0, 2, 3)]
    settings = {"projection": ProjectionConfig(compress=None if compress == "none" else compress)}
    with GradDotProdEngine(model, val_batch(VAL[:3]), **settings) as engine:
        scores = step(engine, model, packed([chosen]), 3)
        padded = val_batch(chosen)
        engine.prepare(3)
        loss = model(**padded).loss
        engine.watch(loss, labels=padded["labels"])
        loss.backward()
        expected = engine.collect()
    agree(scores.total, expected.total)
    torch.testing.assert_close(scores.vectors, expected.vectors, rtol=1e-4, atol=1e-6)


def test_the_collator_of_transformers() -> None:
    model, chosen = llama(), [SAMPLES[place] for place in (0, 1, 5)]
    rows = [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in chosen]
    for collate in (
        DataCollatorWithFlattening(return_tensors="pt"),
        DataCollatorWithFlattening(return_tensors="pt", return_seq_idx=True, return_flash_attn_kwargs=True),
    ):
        batch = collate(rows)
        with GradDotProdEngine(model, val_batch(VAL[:3])) as engine:
            scores = step(engine, model, batch, 3)
        check(scores, exact_causal(model, chosen, VAL[:3]))


def test_later_batches_are_not_run_again() -> None:
    """The check of packed rows is made once: later steps cost what they did."""
    model, calls = llama(), []
    batch = packed([[SAMPLES[place] for place in (0, 1, 2)]])
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(2))
    with GradDotProdEngine(model, val_batch(VAL[:3]), val_refresh_interval=9) as engine:
        step(engine, model, batch, 3)
        calls.clear()
        step(engine, model, batch, 3)
    assert calls == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled(backend: str) -> None:
    model, chosen = llama(), [SAMPLES[place] for place in (0, 2, 3)]
    exact = exact_causal(model, chosen, VAL[:3])
    compiled = torch.compile(model, backend=backend)
    with GradDotProdEngine(compiled, val_batch(VAL[:3])) as engine:
        for _ in range(2):
            scores = step(engine, compiled, packed([chosen]), 3)
    check(scores, exact)


# What is refused.


def test_a_model_that_looks_beyond_a_sample() -> None:
    """A mask of ones lets a sample see those before it; without it, which the error says, it is exact."""
    model, chosen = llama(), [SAMPLES[place] for place in (0, 2, 3)]
    batch = packed([chosen])
    masked = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    engine = GradDotProdEngine(model, val_batch(VAL[:3])).attach()
    engine.prepare(3, segments=packed_samples(batch, 3))
    loss = model(**masked, use_cache=False).loss
    engine.watch(loss, labels=batch["labels"])
    loss.backward()
    with pytest.raises(UsageError, match=r"does not keep the samples of a packed row apart.*without `attention_mask`"):
        engine.collect()
    scores = step(engine, model, batch, 3)
    check(scores, exact_causal(model, chosen, VAL[:3]))
    engine.detach()


def test_a_model_with_a_cache() -> None:
    """By default transformers' model makes a cache, and samples see each other; the error says what to do."""
    model, chosen = llama(), [SAMPLES[place] for place in (0, 2, 3)]
    batch = packed([chosen])
    engine = GradDotProdEngine(model, val_batch(VAL[:3])).attach()
    engine.prepare(3, segments=packed_samples(batch, 3))
    loss = model(**batch).loss
    engine.watch(loss, labels=batch["labels"])
    loss.backward()
    with pytest.raises(UsageError, match=r"model\.config\.use_cache = False"):
        engine.collect()
    model.config.use_cache = False
    engine.prepare(3, segments=packed_samples(batch, 3))
    loss = model(**batch).loss
    engine.watch(loss, labels=batch["labels"])
    loss.backward()
    check(engine.collect(), exact_causal(model, chosen, VAL[:3]))
    engine.detach()


def faint(x: Tensor) -> Tensor:
    """A little of the whole row: less than rounding may change where a sample runs alone."""
    return x + 1e-4 * x.mean(1, keepdim=True)


def placed(x: Tensor) -> Tensor:
    """By the place in the row: no other sample's tokens come in, but a sample alone is elsewhere."""
    return x * (1.0 + 0.01 * torch.arange(x.shape[1])).view(-1, 1)


@pytest.mark.parametrize(
    ("change", "what"), [(faint, "other tokens in the samples beside it"), (placed, "sample 1 of the batch alone")]
)
def test_a_row_that_changes_its_samples(change: Callable[[Tensor], Tensor], what: str) -> None:
    """Each of the two ways to see it."""
    model, chosen = llama(), [SAMPLES[place] for place in (0, 2, 3)]
    model.model.layers[0].register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))
    with (
        GradDotProdEngine(model, val_batch(VAL[:3])) as engine,
        pytest.raises(UsageError, match=f"does not keep the samples of a packed row apart: with {what}"),
    ):
        step(engine, model, packed([chosen]), 3)


def test_a_model_that_knows_no_packed_rows() -> None:
    """BERT's decoder has no mask by positions; padded rows, which the error advises, are exact."""
    model, chosen = bert_causal(), [SAMPLES[place] for place in (0, 2, 3)]
    engine = GradDotProdEngine(model, val_batch(VAL[:3])).attach()
    with pytest.raises(UsageError, match="Or train without packing"):
        step(engine, model, packed([chosen]), 3)
    padded = val_batch(chosen)
    engine.prepare(3)
    loss = model(**padded).loss
    engine.watch(loss, labels=padded["labels"])
    loss.backward()
    scores = engine.collect()
    check(scores, exact_causal(model, chosen, VAL[:3]))
    engine.detach()


class Rolled(torch.nn.Module):
    """A layer that sees each row's positions in another order."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.roll(1, dims=1)).roll(-1, dims=1)


def test_a_layer_that_sees_positions_in_another_order() -> None:
    """The model is right, and the layer's rows would be another sample's; leaving it out is exact for the rest."""
    chosen = [SAMPLES[place] for place in (0, 2, 3)]

    def rolled() -> Any:
        model = llama()
        model.model.layers[0].mlp.up_proj = Rolled(model.model.layers[0].mlp.up_proj)
        return model

    model = rolled()
    with (
        GradDotProdEngine(model, val_batch(VAL[:3])) as engine,
        pytest.raises((UsageError, CaptureError), match=r"up_proj"),
    ):
        step(engine, model, packed([chosen]), 3)
    model.zero_grad()
    with GradDotProdEngine(model, val_batch(VAL[:3]), exclude_layers=["model.layers.0.mlp.up_proj.inner"]) as engine:
        scores = step(engine, model, packed([chosen]), 3)
    exact = exact_causal(model, chosen, VAL[:3]).only(lambda name: "up_proj.inner" not in name)
    agree(scores.total, exact.total().mean(1))


def test_losses_that_are_not_of_segments() -> None:
    model, chosen = llama(), [SAMPLES[place] for place in (0, 2, 3)]
    batch = packed([chosen])
    segments = packed_samples(batch, 3)
    crossing = {**batch, "labels": batch["input_ids"]}
    with GradDotProdEngine(model, val_batch(VAL[:3])) as engine:
        engine.prepare(3, segments=segments)
        loss = model(**crossing, use_cache=False).loss
        with pytest.raises(UsageError, match=r"is the first of its sample and a target.*Set the first label"):
            engine.watch(loss, labels=crossing["labels"])
        with pytest.raises(UsageError, match="say watch\\(loss, labels=labels\\)"):
            engine.watch(loss)
        engine.discard()
        engine.prepare(3, segments=segments)
        loss = model(**batch, use_cache=False).loss
        with pytest.raises(UsageError, match="one over all targets alike"):
            engine.watch(loss, weights=torch.tensor([0.2, 0.5, 0.3]), labels=batch["labels"])
        engine.watch(loss, labels=batch["labels"])
        loss.backward()
        check(engine.collect(), exact_causal(model, chosen, VAL[:3]))


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (torch.tensor([0, 0, 1]), "shape \\(rows, positions\\)"),
        (torch.tensor([[0.0, 1.0]]), "integers"),
        (torch.tensor([[0, 0, 2]]), "names sample 2; the batch has 2"),
        (torch.tensor([[1, 1, 1]]), "gives sample 0 of 2 no position"),
    ],
)
def test_numbers_of_segments(segments: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Segments.of(segments, 2)


def test_what_says_where_samples_begin() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]])
    assert packed_samples({"position_ids": torch.arange(5).unsqueeze(0)}, 1) is None
    assert packed_samples({}, 3) is None
    assert packed_samples({"position_ids": positions}, 5).tolist() == [[0, 0, 0, 1, 1, 2, 3, 4]]
    assert packed_samples({"position_ids": positions}, 2).tolist() == [[0, 0, 0, 1, 1, -1, -1, -1]]
    with pytest.raises(UsageError, match="hold 2 samples, as their `position_ids` say, and 4"):
        packed_samples({"position_ids": positions}, 4)
    with pytest.raises(UsageError, match="they jump within a sample"):
        packed_samples({"position_ids": torch.tensor([[0, 2, 0, 1]])}, 2)
    with pytest.raises(UsageError, match="`seq_idx` and `position_ids`"):
        packed_samples({"position_ids": positions, "seq_idx": torch.tensor([[0, 0, 1, 1, 1, 2, 3, 4]])}, 5)
    with pytest.raises(UsageError, match="`cu_seq_lens_q` and `position_ids`"):
        packed_samples({"position_ids": positions, "cu_seq_lens_q": torch.tensor([0, 4, 8])}, 5)


def test_gather_is_the_slow_obvious_one() -> None:
    sample_RT = torch.tensor([[0, 0, -1, 1], [2, 2, 2, 1]])
    x = torch.randn(2, 4, 3)
    found = Segments.of(sample_RT, 3).gather(x)
    for sample in range(3):
        rows = x[sample_RT == sample]
        assert torch.equal(found[sample, : len(rows)], rows)
        assert not found[sample, len(rows) :].any()


@pytest.mark.thin(5)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3", "Qwen2Moe"])
def test_modules_that_run_again(family: str, layout: str) -> None:
    """Experts and routers, which see all rows on one axis; DeepSeek's projection has an axis of one head."""
    rows, padding = LAYOUTS[layout]
    order = [place for row in rows for place in row]
    model = made(family)
    exact = exact_causal(model, [SAMPLES[place] for place in order], VAL[:3])
    batch = packed([[SAMPLES[place] for place in row] for row in rows], padding)
    with causal_engine(model) as engine:
        for _ in range(2):
            check(step(engine, model, batch, len(order), factor=0.25), exact)
            model.zero_grad()


def test_a_mixture_that_looks_beyond_a_sample() -> None:
    """gpt-oss makes its mask without `position_ids`."""
    model, chosen = made("GptOss"), [SAMPLES[place] for place in (0, 2, 3)]
    with causal_engine(model) as engine, pytest.raises(UsageError, match="with sample 1 of the batch alone"):
        step(engine, model, packed([chosen]), 3)


@pytest.mark.parametrize("compress", ["none", 64])
def test_sketches_of_modules_that_run_again(compress: Any) -> None:
    model, chosen = made("Mixtral"), [SAMPLES[place] for place in (0, 2, 3)]
    settings = {"projection": ProjectionConfig(layers=("all",), compress=None if compress == "none" else compress)}
    with causal_engine(model, **settings) as engine:
        scores, expected = step(engine, model, packed([chosen]), 3), causal_step(engine, model, chosen)
    agree(scores.total, expected.total)
    torch.testing.assert_close(scores.vectors, expected.vectors, rtol=1e-4, atol=1e-6)


class Turned(torch.nn.Module):
    """A module that no formula knows; it gives its row with the positions last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).transpose(1, 2)


@pytest.mark.parametrize("lengths", [(9, 3, 11), (9, 15)])
def test_an_output_without_positions_where_they_are_expected(lengths: tuple[int, ...]) -> None:
    """Also where the row is as long as the model is wide, so that the shape does not tell."""
    chosen = examples(lengths, seed=5)

    def turned() -> Any:
        model = llama()
        model.model.layers[0].mlp.turned = Turned(model.config.hidden_size)
        model.model.layers[0].mlp.register_forward_hook(lambda mlp, args, y: mlp.turned(y).transpose(1, 2))
        return model

    model = turned()
    assert model.config.hidden_size == 24
    with (
        causal_engine(model) as engine,
        pytest.raises((UsageError, CaptureError), match=r"turned|Turned"),
    ):
        step(engine, model, packed([chosen]), len(chosen))
    model.zero_grad()
    with causal_engine(model, exclude_layers=["model.layers.0.mlp.turned"]) as engine:
        scores = step(engine, model, packed([chosen]), len(chosen))
    exact = exact_causal(model, chosen, VAL[:3]).only(lambda name: "turned" not in name)
    agree(scores.total, exact.total().mean(1))


class Neighbours(torch.nn.Module):
    """A convolution along the row: it sees beyond a sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * x.roll(1, dims=1)


def test_a_module_that_runs_again_and_sees_the_sample_before() -> None:
    model, chosen = llama(), [SAMPLES[place] for place in (0, 2, 3)]
    model.model.layers[0].mlp.beyond = Neighbours(model.config.hidden_size)
    model.model.layers[0].mlp.register_forward_hook(lambda mlp, args, y: mlp.beyond(y))
    with causal_engine(model) as engine, pytest.raises(UsageError, match=r"does not keep .* apart.*beyond"):
        step(engine, model, packed([chosen]), 3)
