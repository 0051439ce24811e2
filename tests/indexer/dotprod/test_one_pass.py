"""One pass: the gradients of the chosen samples, from what a scoring pass held, are those of a plain backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError, LayerError, UsageError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine, language_model_losses
from tests.indexer.dotprod.test_dotprod_refused import WithToken
from tests.support.models import CAUSAL, gpt2, llama, perceptron, settle
from tests.support.scoring import BATCH, VAL, causal_engine, sum_of_squares, val_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

Gradients = dict[str, Tensor]

METHODS: dict[str, dict[str, Any]] = {
    "exact": {},
    "blocks": {"score_layers": "blocks"},
    "gram with pairs": {"route": "gram", "pairs": True},
    "sketched": {"projection": ProjectionConfig()},
}
WEIGHTS = {
    "chosen": torch.tensor([0.0, 0.5, 0.0, 0.5]),
    "weighted": torch.tensor([0.7, 0.0, 0.1, 2.5]),
    "all": torch.full((4,), 0.25),
    "one": torch.tensor([0.0, 0.0, 1.0, 0.0]),
    "uneven": torch.tensor([0.7, 0.2, 0.1, 2.5]),  # none left out, so that no sample is picked out of the factors
}


def take_gradients(model: nn.Module) -> Gradients:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def plain(model: nn.Module, weights: Tensor, batch: Any = None, losses: Any = language_model_losses) -> Gradients:
    """Of a plain backward pass of Σ w_i ℓ_i."""
    losses_B = losses(model, val_batch(BATCH) if batch is None else batch)
    (losses_B * weights.to(losses_B.dtype))[weights != 0].sum().backward()
    return take_gradients(model)


def held(engine: GradDotProdEngine, batch: Any = None, losses: Any = language_model_losses, **settings: Any) -> Any:
    """A batch that was scored and is held."""
    batch = val_batch(BATCH) if batch is None else batch
    size = len(batch["input_ids"] if isinstance(batch, dict) else batch)
    with engine.scoring(size, hold=True, **settings) as scoring:
        scoring.scores(losses(engine.model, batch))
    return scoring


def near(found: Gradients, expected: Gradients, tolerance: float) -> None:
    """By norm: each parameter, and all together."""
    assert set(found) == set(expected)
    whole = torch.stack([gradient.double().norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype
        assert found[name].stride() == gradient.stride()
        error = (found[name].double() - gradient.double()).norm()
        assert error <= tolerance * (gradient.double().norm() + 0.01 * whole), name


ROUND = [
    (architecture, method, list(WEIGHTS)[(row + column) % len(WEIGHTS)])
    for row, architecture in enumerate(CAUSAL)
    for column, method in enumerate(METHODS)
]
"""Every architecture by every method; weights go round, and so each method has them all."""


@pytest.mark.thin(1)
@pytest.mark.parametrize(("architecture", "method", "weights"), ROUND)
def test_gradients_are_those_of_a_plain_backward_pass(architecture: str, method: str, weights: str) -> None:
    model = CAUSAL[architecture]()
    expected = plain(model, WEIGHTS[weights])
    with causal_engine(model, VAL, **METHODS[method]) as engine:
        for _ in range(2):  # the first is compared with autograd
            batch = held(engine)
            assert all(parameter.grad is None for parameter in model.parameters())
            batch.add_gradients(WEIGHTS[weights])
            near(take_gradients(model), expected, 1e-6)


@pytest.mark.thin(1)
@pytest.mark.parametrize("make", [gpt2, lambda: gpt2(tied=False), llama], ids=["tied", "untied", "llama"])
def test_several_batches_of_a_step(make: Callable[[], Any]) -> None:
    model = make()
    others = val_batch(VAL)
    first, second = torch.tensor([0.1, 0.0, 0.0, 0.2]), torch.tensor([0.0, 0.3, 0.0, 0.0, 0.05, 0.0, 0.0, 0.1])
    parts = plain(model, first), plain(model, second, others)
    with causal_engine(model, VAL[:3], score_layers="blocks") as engine:
        batches = held(engine), held(engine, others)
        for batch, weights in zip(batches, (first, second), strict=True):
            batch.add_gradients(weights)
    near(take_gradients(model), {name: parts[0][name] + parts[1][name] for name in parts[0]}, 1e-6)


@pytest.mark.slow
def test_they_are_added_to_what_is_there() -> None:
    model = gpt2()
    expected = plain(model, WEIGHTS["chosen"])
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    with causal_engine(model) as engine:
        held(engine).add_gradients(WEIGHTS["chosen"])
    near(take_gradients(model), {name: gradient + 0.5 for name, gradient in expected.items()}, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_dropout(checkpointing: bool) -> None:
    model = gpt2().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with causal_engine(model) as engine:
        engine.refresh()
        torch.manual_seed(5)
        batch = held(engine)
        batch.add_gradients(WEIGHTS["weighted"])
        found = take_gradients(model)
    torch.manual_seed(5)
    near(found, plain(model, WEIGHTS["weighted"]), 1e-6)


NARROW = {
    "bfloat16": (torch.bfloat16, False, 1.0),
    "autocast bfloat16": (torch.bfloat16, True, 1.0),
    "autocast float16": (torch.float16, True, 4096.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["chosen", "weighted"])
@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_narrow_dtypes_are_as_near_the_truth_as_a_plain_pass(make: Callable[[], Any], kind: str, weights: str) -> None:
    dtype, autocast, scale = NARROW[kind]
    model, wide = make() if autocast else make().to(dtype), make()
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})

    def losses(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=dtype) if autocast else nullcontext():
            return language_model_losses(model, batch)

    truth = plain(wide, WEIGHTS[weights])
    own = plain(model, WEIGHTS[weights] * scale, losses=losses)
    with causal_engine(model) as engine:
        held(engine, losses=losses, loss_scale=scale).add_gradients(WEIGHTS[weights] * scale)
    found = take_gradients(model)
    for name, gradient in truth.items():
        assert found[name].dtype == own[name].dtype
        error = (found[name].float() / scale - gradient).norm()
        assert error <= 2 * (own[name].float() / scale - gradient).norm() + 1e-3 * gradient.norm(), name


def test_a_sample_of_weight_zero_takes_no_part() -> None:
    model, x = perceptron(), torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    expected = plain(model, torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0]), x, sum_of_squares)
    with GradDotProdEngine(model, x[:2].clone(), val_losses=sum_of_squares) as engine:
        held(engine, x, sum_of_squares)
        x[2] = torch.inf  # every product with it is NaN
        batch = held(engine, x, sum_of_squares)
        with pytest.raises(UsageError, match=r"loss of sample\(s\) \[2\] is not finite"):
            batch.add_gradients(torch.ones(5))
        batch.add_gradients(torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0]))
    near(take_gradients(model), expected, 1e-6)


@pytest.mark.slow
def test_where_nothing_is_chosen_gradients_are_zeros() -> None:
    model = gpt2()
    with causal_engine(model) as engine:
        held(engine).add_gradients(torch.zeros(4))
    assert all(parameter.grad is not None and not bool(parameter.grad.any()) for parameter in model.parameters())


class Behind(nn.Module):
    """Two layers; a functional call uses the weight of the second, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(nn.functional.linear(self.first(x), self.second.weight)))


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def test_what_is_not_scored_is_held_against_autograd_too() -> None:
    with GradDotProdEngine(Behind(), X, val_losses=sum_of_squares, exclude_layers=["second"]) as engine:
        with pytest.raises(CaptureError, match=r"'second.weight'.*autograd"):
            held(engine, X, sum_of_squares)
        assert not engine.training_batch_open


@pytest.mark.slow
def test_a_hook_that_changes_the_gradient_is_found() -> None:
    model = gpt2()
    model.transformer.wpe.weight.register_hook(lambda gradient: gradient * 0.5)
    with causal_engine(model, score_layers="blocks") as engine, pytest.raises(CaptureError, match=r"wpe\.weight"):
        held(engine)


def test_a_parameter_that_no_layer_type_handles() -> None:
    model, x = settle(WithToken()), torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    with GradDotProdEngine(model, x, val_losses=sum_of_squares, exclude_layers=["token"]) as engine:
        with engine.scoring(3) as batch:
            batch.scores(sum_of_squares(model, x))
        with pytest.raises(LayerError, match=r"every trainable parameter, scored or not: .*\['token'\]"):
            held(engine, x, sum_of_squares)
        assert not engine.training_batch_open


def test_a_layer_under_reentrant_checkpointing_is_refused_even_if_it_is_not_scored() -> None:
    model = gpt2(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    engine = causal_engine(model, exclude_layers=["transformer.h"])
    with engine, pytest.raises(UsageError, match=r"without a graph.*use_reentrant"):
        held(engine)


def test_an_input_that_is_filled_anew_is_noticed() -> None:
    model, x = perceptron(), torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    with GradDotProdEngine(model, x.clone(), val_losses=sum_of_squares) as engine:
        batch = held(engine, x, sum_of_squares)
        x.zero_()
        with pytest.raises(UsageError, match=r"'0.weight'.*changed in place"):
            batch.add_gradients(torch.ones(5))


def test_misuse() -> None:
    model = gpt2()
    with causal_engine(model) as engine:
        with engine.scoring(4) as batch:
            batch.scores(language_model_losses(model, val_batch(BATCH)))
        with pytest.raises(UsageError, match="`hold=True`"):
            batch.add_gradients(torch.ones(4))
        with engine.scoring(4, hold=True) as batch, pytest.raises(UsageError, match="nothing is held"):
            batch.add_gradients(torch.ones(4))
        batch = held(engine)
        for message, weights in {"3": torch.ones(3), "not finite": torch.tensor([1.0, torch.nan, 0.0, 0.0])}.items():
            with pytest.raises(UsageError, match=message):
                batch.add_gradients(weights)
        assert all(parameter.grad is None for parameter in model.parameters())
        batch.add_gradients(torch.ones(4))
        with pytest.raises(UsageError, match="once"):
            batch.add_gradients(torch.ones(4))


@pytest.mark.slow
def test_taps_go_with_the_engine() -> None:
    model = gpt2()
    engine = causal_engine(model).attach()
    held(engine)
    engine.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with engine:
        held(engine).add_gradients(WEIGHTS["all"])
    near(take_gradients(model), plain(model, WEIGHTS["all"]), 1e-6)
