"""The engine changes nothing: outputs bit for bit, flags, gradients and hooks; and it refuses randomness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghoststore.errors import UsageError
from ghoststore.settings.projection import ProjectionConfig
from indexer.encode.engine import GradProjLoraEngine
from indexer.projection.matrices import Projection
from tests.support.models import (
    CAUSAL,
    bert_masked,
    causal_vectors,
    examples,
    gpt2,
    llama,
    pad,
    perceptron,
    settle,
)
from tests.support.oracle import naive, relative_error
from tests.support.scoring import causal_engine, causal_step

ALL = ProjectionConfig(layers=("all",), rank_total=16)
DEFAULT = ProjectionConfig()


def hooks_of(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kinds += ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a user may notice of a model, apart from its weights."""
    return {
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": hooks_of(model),
    }


def half_frozen(model: nn.Module) -> nn.Module:
    for place, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(place % 3 != 0)
    return model


@pytest.mark.thin(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [DEFAULT, ALL], ids=["default", "all"])
@pytest.mark.parametrize("architecture", ["gpt2-tied", "llama", "neox"])
def test_outputs_are_bit_identical(architecture: str, config: ProjectionConfig, dtype: torch.dtype) -> None:
    model = CAUSAL[architecture]().to(dtype)
    ids, _, mask = pad(examples())

    def run() -> Tensor:
        return model(input_ids=ids, attention_mask=mask).logits.detach().clone()

    before = run()
    with GradProjLoraEngine(model, config) as engine:
        attached = run()
        engine.prepare(len(ids))
        prepared = run()
    assert torch.equal(attached, before)
    assert torch.equal(prepared, before)
    assert torch.equal(run(), before)


def test_weights_gradients_and_state_are_left_alone() -> None:
    model = half_frozen(gpt2())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0) if parameter.requires_grad else None
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = state_of(model)
    with GradProjLoraEngine(model, ALL) as engine:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        causal_vectors(engine, model, examples())
    assert state_of(model) == state
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert bool((parameter.grad == 7.0).all())
        else:
            assert parameter.grad is None


def test_an_exception_in_the_loop_restores_everything() -> None:
    model = half_frozen(gpt2())
    state = state_of(model)
    engine = GradProjLoraEngine(model, ALL)
    with pytest.raises(UsageError, match="at least one sample"), engine:
        engine.prepare(0)
    assert state_of(model) == state


def test_an_exception_in_attach_restores_everything() -> None:
    model = half_frozen(perceptron())
    engine = GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total=9))
    del model[4]  # found out when the first branches are in place
    state = state_of(model)
    with pytest.raises(AttributeError), engine:
        pass
    assert state_of(model) == state


def test_a_model_that_was_refused_is_left_alone() -> None:
    model = half_frozen(perceptron())
    state = state_of(model)
    with pytest.raises(UsageError, match="rank"):
        GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total=9, rank_min=4))
    assert state_of(model) == state


def test_an_engine_can_be_attached_again_and_again() -> None:
    model, batch = gpt2(), examples()
    engine = GradProjLoraEngine(model, DEFAULT)
    found = []
    for _ in range(2):
        with engine:
            found.append(causal_vectors(engine, model, batch))
            found.append(causal_vectors(engine, model, batch))
    assert all(torch.equal(vectors, found[0]) for vectors in found)
    assert hooks_of(model) == 0


def test_training_goes_on_as_if_nothing_had_been() -> None:
    ids, labels, mask = pad(examples())
    gradients = []
    for visited in (False, True):
        model = gpt2()
        if visited:
            with GradProjLoraEngine(model, ALL) as engine:
                causal_vectors(engine, model, examples())
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_evaluation_between_batches_is_undisturbed() -> None:
    model, batch = gpt2(), examples()
    ids, _, _ = pad(examples((9, 9, 9, 9, 9, 9)))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    with GradProjLoraEngine(model, DEFAULT) as engine:
        first = causal_vectors(engine, model, batch)
        with torch.no_grad():
            found = model(input_ids=ids).logits
        second = causal_vectors(engine, model, batch)
    assert torch.equal(found, expected)
    assert torch.equal(first, second)


def test_what_follows_a_projected_layer_may_work_in_place() -> None:
    model = settle(nn.Sequential(nn.Linear(7, 9), nn.ReLU(inplace=True), nn.Linear(9, 5), nn.ReLU(inplace=True)))
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))

    def losses_of(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum(-1)

    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total=9)) as engine:
        engine.prepare(4)
        vectors = engine.collect(losses_of(model, x))
    expected = naive(model, engine.projection, 4, lambda model, i: losses_of(model, x[i : i + 1]).sum())
    assert relative_error(vectors, expected.vectors) <= 1e-5


RANDOM: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gpt2": (gpt2, "drop"),
    "bert": (bert_masked, "dropout"),
    "attention": (lambda: llama(attention_dropout=0.1), r"self_attn.*attention_dropout=0.1"),
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), r"1 \(Dropout\).*p=0.5"),
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "1 is a BatchNorm1d"),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", RANDOM)
def test_a_random_forward_is_refused_and_the_module_named(kind: str) -> None:
    make, named = RANDOM[kind]
    model = make().train()
    with pytest.raises(UsageError, match=named):
        GradProjLoraEngine(model, ProjectionConfig(layers=("all",)))


def test_a_batch_norm_without_statistics_is_refused_in_eval_mode_too() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(UsageError, match="1 is a BatchNorm1d"):
        GradProjLoraEngine(model, ProjectionConfig(layers=("0",)))


def test_training_mode_without_dropout_is_no_reason_to_refuse() -> None:
    model, batch = llama().train(), examples()
    with GradProjLoraEngine(model, DEFAULT) as engine:
        found = causal_vectors(engine, model, batch)
    model.eval()
    assert torch.equal(found, causal_vectors_of(model, batch))


def causal_vectors_of(model: nn.Module, batch: Any) -> Tensor:
    with GradProjLoraEngine(model, projection=Projection.for_model(model, DEFAULT)) as engine:
        return causal_vectors(engine, model, batch)


def test_dropout_that_comes_alive_between_making_and_attaching_is_refused() -> None:
    model = gpt2()
    engine = GradProjLoraEngine(model, DEFAULT)
    model.train()
    with pytest.raises(UsageError, match="drop"), engine:
        pass
    assert hooks_of(model) == 0


def test_a_check_seeds_no_device_that_begins_later() -> None:
    """torch notes a seed for CUDA, which draws from it once it begins: that of the user stays."""
    if torch.cuda.is_initialized():
        pytest.skip("CUDA has begun")
    torch.manual_seed(7)
    noted = torch.cuda._lazy_seed_tracker.get_calls()
    model = CAUSAL["gpt2-tied"]()
    with GradProjLoraEngine(model, ProjectionConfig()) as engine:
        causal_vectors(engine, model, examples())
    with causal_engine(model) as scorer:
        causal_step(scorer, model)
    assert torch.cuda._lazy_seed_tracker.get_calls() == noted
