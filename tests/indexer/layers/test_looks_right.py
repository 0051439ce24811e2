"""Bits that only look right: a class name, an orientation, an identity, a count, the order of hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ghoststore.errors import CaptureError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine
from indexer.encode.engine import GradProjLoraEngine
from tests.support.models import settle
from tests.support.oracle import naive, relative_error
from tests.support.scoring import check, exact_plain, plain_step, sum_of_squares

FULL = ProjectionConfig(layers=("all",), rank_total="full")


def numbers(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 6, generator=torch.Generator().manual_seed(seed))


X, VAL = numbers(4), numbers(5, 1)


def project(model: nn.Module, config: ProjectionConfig = FULL) -> tuple[Tensor, Any]:
    with GradProjLoraEngine(model, config) as engine:
        engine.prepare(len(X))
        return engine.collect(sum_of_squares(model, X)), engine.projection


def projects_exactly(model: nn.Module, config: ProjectionConfig = FULL) -> None:
    vectors, projection = project(model, config)
    expected = naive(model, projection, len(X), lambda model, i: sum_of_squares(model, X[i : i + 1]).sum())
    assert relative_error(vectors, expected.vectors) < 1e-5


def scores_exactly(model: nn.Module) -> None:
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares) as engine:
        check(plain_step(engine, model, X), exact_plain(model, X, VAL))


def sketches(model: nn.Module) -> None:
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares, projection=FULL) as engine:
        plain_step(engine, model, X)


def test_a_hook_that_changes_a_layers_output_after_ours() -> None:
    model = settle(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)))
    model[0].register_forward_hook(lambda module, args, y: 2 * y)
    projects_exactly(model)
    scores_exactly(model)
    model[0].register_forward_pre_hook(lambda module, args: (3 * args[0],))
    projects_exactly(model)
    scores_exactly(model)


class MaybeGatedRMSNorm(nn.Module):
    """Without its gate, an RMSNorm: what it is called with decides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(6)), 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = self.weight * F.rms_norm(x, (6,), None, self.eps)
        return y if gate is None else y * F.silu(gate)


class CenteredRMSNorm(MaybeGatedRMSNorm):
    """Of the name, and of another formula where the mean is not zero."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class WithNorm(nn.Module):
    def __init__(self, norm: nn.Module, *, gated: bool) -> None:
        super().__init__()
        self.first, self.norm, self.gated = nn.Linear(6, 6), norm, gated

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.norm(y, x) if self.gated else self.norm(y)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("norm", [MaybeGatedRMSNorm, CenteredRMSNorm])
def test_a_norm_by_name(norm: type[nn.Module], gated: bool) -> None:
    model = settle(WithNorm(norm(), gated=gated))
    projects_exactly(model)
    scores_exactly(model)
    sketches(model)


def test_a_forward_that_was_replaced() -> None:
    model = settle(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)))
    layer, (expected, _) = model[0], project(model)
    model[0].forward = lambda x: F.linear(x * x, layer.weight, layer.bias)  # type: ignore[method-assign]
    for engine in (project, scores_exactly, sketches):
        with pytest.raises(CaptureError, match="0: computes something else than a linear"):
            engine(model)
    # One that computes the same, as accelerate's hooks do, is none of our business.
    model[0].forward = lambda x: F.linear(x, layer.weight, layer.bias)  # type: ignore[method-assign]
    torch.testing.assert_close(project(model)[0], expected)
    sketches(model)


def test_a_square_layer_of_each_orientation() -> None:
    model = settle(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), Conv1D(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    projects_exactly(model)
    scores_exactly(model)


def test_two_parameters_in_one_memory_are_two() -> None:
    """As autograd has it: each has a gradient of its own, though a step on one moves the other."""
    model = settle(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    model[2].weight = nn.Parameter(model[0].weight.data)
    assert model[2].weight.data_ptr() == model[0].weight.data_ptr()
    projects_exactly(model)
    scores_exactly(model)


class Behind(nn.Module):
    """A weight that is used by a functional call, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.linear(x)) + F.linear(x, self.linear.weight))


def test_a_weight_that_is_used_behind_the_back_of_the_taps() -> None:
    model = settle(Behind())
    with pytest.raises(CaptureError, match=r"projected gradients of 1 layer\(s\) differ from autograd's: linear"):
        sketches(model)
    with pytest.raises(CaptureError, match="linear"):
        scores_exactly(model)
    model.linear.requires_grad_(False)  # autograd says nothing of what is frozen, and nothing of it trains
    with GradDotProdEngine(
        model, VAL, val_losses=sum_of_squares, projection=ProjectionConfig(layers=("out",), rank_total="full")
    ) as engine:
        plain_step(engine, model, X)


def test_positions_given_and_positions_made() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wpe, self.out = nn.Embedding(3, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + self.wpe(self.places(x)))

        def places(self, x: Tensor) -> Tensor:
            places = torch.arange(3).unsqueeze(0)
            return places.expand(len(x), 3) if self.given else places

        given = False

    for given in (False, True):
        model = settle(Positions())
        model.given = given
        projects_exactly(model)
        scores_exactly(model)
