"""Lower precision, autocast, checkpointing and compilation: the same vectors, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError, GhostStoreError
from ghoststore.settings.projection import ProjectionConfig
from indexer.encode.encoder import RowEncoder
from indexer.encode.engine import GradProjLoraEngine
from indexer.encode.losses import next_token_losses
from indexer.encode.modes import outside_graphs
from indexer.projection.matrices import Projection
from tests.indexer.encode.test_invariance import ROWS
from tests.indexer.encode.test_non_interference import state_of
from tests.support.models import CAUSAL, causal_vectors, examples, gpt2, llama, neox, pad
from tests.support.oracle import naive, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

CONFIGS = {
    "default": ProjectionConfig(),
    "all": ProjectionConfig(layers=("all",)),
    "plain": ProjectionConfig(layers=("all",), rank_total=16),
}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def vectors_of(model: Any, config: ProjectionConfig, batch: Any = None) -> Tensor:
    with GradProjLoraEngine(model, config) as engine:
        return causal_vectors(engine, model, examples() if batch is None else batch)


@pytest.mark.thin(2)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("architecture", ["gpt2-tied", "llama", "neox"])
def test_bfloat16_model(architecture: str, config: str) -> None:
    # The reference has the rounded weights too: what is left is the error of the arithmetic.
    model = CAUSAL[architecture]().bfloat16()
    found = vectors_of(model, CONFIGS[config])
    assert found.dtype == torch.float32
    assert relative_error(found, vectors_of(model.float(), CONFIGS[config])) <= 3e-2


@pytest.mark.thin(2)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("make", [gpt2, llama])
def test_autocast(make: Callable[[], Any], config: str) -> None:
    model = make()
    expected = vectors_of(model, CONFIGS[config])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vectors_of(model, CONFIGS[config])
    assert found.dtype == torch.float32
    assert relative_error(found, expected) <= 3e-2
    # The backward outside of the context, as torch advises.
    ids, labels, mask = pad(examples())
    with GradProjLoraEngine(model, CONFIGS[config]) as engine:
        engine.prepare(len(ids))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses, _ = next_token_losses(model(input_ids=ids, attention_mask=mask).logits, labels)
        outside = engine.collect(losses)
    assert relative_error(outside, expected) <= 3e-2


@pytest.mark.thin(2)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("make", [gpt2, llama, neox])
def test_checkpointing_is_exact(make: Callable[..., Any], config: str) -> None:
    quiet = {} if make is llama else {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    if make is gpt2:
        quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    model = make(**quiet)
    expected = vectors_of(model, CONFIGS[config])
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert relative_error(vectors_of(model, CONFIGS[config]), expected) <= 1e-6


def test_reentrant_checkpointing_is_refused() -> None:
    model = llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    state = state_of(model)
    for config in CONFIGS.values():
        with pytest.raises(CaptureError, match="use_reentrant=False"):
            vectors_of(model, config)
    assert state_of(model) == state


@pytest.mark.parametrize("architecture", CAUSAL)
def test_the_encoder_checkpoints_exactly_and_tidies_up(architecture: str) -> None:
    # The models have dropout where their configs do by default: none of it may come alive.
    model = CAUSAL[architecture]()
    projection = Projection.for_model(model, CONFIGS["default"])
    with RowEncoder(model, projection) as encoder:
        expected = encoder(ROWS)
    state = state_of(model)
    calls = []
    handle = model.get_submodule(projection.plan.layers[0].block.name).register_forward_hook(lambda *_: calls.append(1))
    with RowEncoder(model, projection, checkpointing=True) as encoder:
        found = encoder(ROWS)
        again = encoder(ROWS)
    handle.remove()
    assert len(calls) == 4, "each layer runs twice a batch: it was checkpointed"
    assert relative_error(found.vectors, expected.vectors) <= 1e-6
    assert torch.equal(found.vectors, again.vectors)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-6, atol=0)
    assert not model.training
    assert [m.training for m in model.modules()] == state["training"]
    assert state_of(model)["flags"] == state["flags"]
    assert state_of(model)["hooks"] == state["hooks"]
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_the_encoder_tidies_up_after_an_exception() -> None:
    model = gpt2()
    state = state_of(model)
    encoder = RowEncoder(model, Projection.for_model(model, CONFIGS["default"]), checkpointing=True)
    with pytest.raises(KeyboardInterrupt), encoder:
        raise KeyboardInterrupt
    assert [m.training for m in model.modules()] == state["training"]
    assert state_of(model)["flags"] == state["flags"]
    assert state_of(model)["hooks"] == 0


def test_the_encoder_leaves_the_checkpointing_of_the_user_on() -> None:
    model = llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with RowEncoder(model, Projection.for_model(model, CONFIGS["default"]), checkpointing=True) as encoder:
        encoder(ROWS)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert model.training


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("make", "batches"),
    # A batch of another shape is compiled again, GPT-2 as four graphs where Llama is two.
    [(gpt2, [examples((9, 4, 6))]), (llama, [examples((9, 4, 6)), examples((8, 8))])],
    ids=["gpt2", "llama"],
)
def test_compiled_model(make: Callable[..., Any], batches: list[Any]) -> None:
    model = make(layers=1)
    config = ProjectionConfig(layers=("all",), rank_total=16, compress=30)
    expected = [vectors_of(model, config, batch) for batch in batches]
    compiled = torch.compile(model, backend="aot_eager")
    with GradProjLoraEngine(compiled, config) as engine:
        for batch, exact in zip(batches, expected, strict=True):
            assert relative_error(causal_vectors(engine, compiled, batch), exact) <= 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_that_ran_compiled_before_gives_its_vectors_or_an_error() -> None:
    model, batch = gpt2(layers=1), examples()
    expected = vectors_of(model, CONFIGS["default"])
    compiled = torch.compile(model, backend="aot_eager")
    ids, _, mask = pad(batch)
    before = compiled(input_ids=ids, attention_mask=mask).logits.detach()
    with GradProjLoraEngine(compiled, CONFIGS["default"]) as engine:
        try:
            found, message = causal_vectors(engine, compiled, batch), None
        except CaptureError as error:
            message = str(error)
            torch._dynamo.reset()
            found = causal_vectors(engine, compiled, batch)
    assert message is None or "torch._dynamo.reset()" in message
    assert relative_error(found, expected) <= 1e-6
    assert torch.allclose(compiled(input_ids=ids, attention_mask=mask).logits, before, rtol=1e-5, atol=1e-5)


class Branching(nn.Module):
    """``used`` always runs, ``skipped`` never, ``unheard`` runs for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.skipped, self.unheard = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.unheard(x)
        return self.used(x)


def collect_from(layers: tuple[str, ...]) -> Tensor:
    model = Branching()
    with GradProjLoraEngine(model, ProjectionConfig(layers=layers, rank_total=4)) as engine:
        engine.prepare(3)
        return engine.collect(model(torch.ones(3, 4)).sum(-1))


def test_a_layer_that_does_not_run_is_named() -> None:
    with pytest.raises(CaptureError, match=r"did not run 1 projected layer\(s\)(.|\n)*`exclude_layers` 'skipped'"):
        collect_from(("used", "skipped"))


def test_a_layer_that_the_loss_does_not_depend_on_is_named() -> None:
    with pytest.raises(CaptureError, match=r"does not depend on 1 projected layer\(s\).*`exclude_layers` 'unheard'"):
        collect_from(("used", "unheard"))


def test_a_layer_that_ran_in_the_batch_before_is_missed_in_this_one() -> None:
    model = Branching()
    with GradProjLoraEngine(model, ProjectionConfig(layers=("used", "skipped"), rank_total=4)) as engine:
        engine.prepare(3)
        x = torch.ones(3, 4)
        engine.collect((model(x) + model.skipped(x)).sum(-1))
        engine.prepare(3)
        with pytest.raises(CaptureError, match="skipped"):
            engine.collect(model(x).sum(-1))


@pytest.mark.parametrize("prepared", [1, 2, 5])
def test_a_batch_of_another_size_is_refused(prepared: int) -> None:
    model = Branching()
    # Three rows may be three positions of one sample, but its loss is one then.
    message = r"losses have shape \(3,\)" if prepared == 1 else r"'used' saw an input of shape \(3, 4\)"
    with GradProjLoraEngine(model, ProjectionConfig(layers=("used",), rank_total=4)) as engine:
        engine.prepare(prepared)
        with pytest.raises(CaptureError, match=message):
            engine.collect(model(torch.ones(3, 4)).sum(1))


class Positions(nn.Module):
    """Looks positions up once for the whole batch, by an index of one axis, as nanoGPT does."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))))


@pytest.mark.parametrize(("batch", "length"), [(3, 5), (4, 4), (1, 1), (1, 5)])
def test_positions_of_one_axis_are_exact(batch: int, length: int) -> None:
    # With as many samples as positions the shapes alone look right.
    model = Positions()
    ids = torch.randint(9, (batch, length), generator=torch.Generator().manual_seed(0))

    def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
        return model(ids).logsumexp(-1).sum(1)

    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total=9)) as engine:
        engine.prepare(batch)
        vectors = engine.collect(losses_of(model, ids))
    expected = naive(model, engine.projection, batch, lambda model, i: losses_of(model, ids[i : i + 1]).sum())
    assert relative_error(vectors, expected.vectors) <= 1e-5


def test_losses_without_a_gradient_are_refused() -> None:
    model, (ids, labels, mask) = gpt2(), pad(examples())
    with GradProjLoraEngine(model, CONFIGS["default"]) as engine:
        engine.prepare(len(ids))
        with torch.no_grad():
            losses, _ = next_token_losses(model(input_ids=ids, attention_mask=mask).logits, labels)
        with pytest.raises(CaptureError, match=r"torch.no_grad\(\)"):
            engine.collect(losses)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1), (3, 4)])
def test_losses_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = Branching()
    with GradProjLoraEngine(model, ProjectionConfig(layers=("used",), rank_total=4)) as engine:
        engine.prepare(3)
        total = model(torch.ones(3, 4)).sum()
        with pytest.raises(CaptureError, match="one each for 3 samples"):
            engine.collect(total.expand(shape))


def test_the_order_of_calls_is_enforced() -> None:
    model = Branching()
    engine = GradProjLoraEngine(model, ProjectionConfig(layers=("used",), rank_total=4))
    with pytest.raises(GhostStoreError, match="not attached"):
        engine.prepare(3)
    with engine:
        with pytest.raises(GhostStoreError, match="attached already"):
            engine.attach()
        with pytest.raises(GhostStoreError, match="at least one sample"):
            engine.prepare(0)
        with pytest.raises(GhostStoreError):
            engine.collect(model(torch.ones(3, 4)).sum(-1))
    engine.detach()


def test_collecting_twice_is_refused() -> None:
    model = Branching()
    with GradProjLoraEngine(model, ProjectionConfig(layers=("used",), rank_total=4)) as engine:
        engine.prepare(3)
        losses = model(torch.ones(3, 4)).square().sum(-1)
        engine.collect(losses)
        with pytest.raises(GhostStoreError, match="prepare"):
            engine.collect(losses)


def test_a_hook_is_outside_graphs_at_once_where_something_was_compiled(fresh_compiler: None) -> None:
    """Whatever makes the model run: a pass in which the engine is opened comes before its prepare()."""

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model, states = Doubled(), []
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    outside_graphs(model.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state())))
    compiled(torch.ones(2))
    assert len(states) == 1
