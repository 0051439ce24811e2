"""Modules that no formula knows run again for each sample: exact in every engine, refused where they mix samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ghoststore.errors import CaptureError, LayerError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine
from indexer.encode.engine import GradProjLoraEngine
from indexer.layers import layer_type_of
from tests.support.around import Around
from tests.support.models import settle
from tests.support.oracle import naive, relative_error
from tests.support.scoring import check, exact_plain, plain_step, sum_of_squares

T, D = 4, Around.width


def drawn(count: int, seed: int) -> Tensor:
    return torch.randn(count, T, D, generator=torch.Generator().manual_seed(seed))


X, VAL = drawn(3, 0), drawn(5, 1)


class Fused(nn.Module):
    """Experts in parameters of three axes, on rows of samples and positions, as transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 3, bias=False)
        self.experts = FusedExperts()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.gate(flat).softmax(-1).topk(2)
        return self.experts(flat, index, weights).view_as(x)


class FusedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, D))
        self.down = nn.Parameter(torch.randn(3, D, 5))
        self.down_bias = nn.Parameter(torch.randn(3, D))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(3):
            token, place = torch.where(index == expert)
            inner = torch.tanh(F.linear(x[token], self.up[expert]))
            out = F.linear(inner, self.down[expert], self.down_bias[expert])
            y = y.index_add(0, token, out * weights[token, place, None])
        return y


class Listed(nn.Module):
    """Experts in a list of modules, each called with the tokens that the router picked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 3, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, D)) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat, y = x.reshape(-1, D), torch.zeros_like(x).view(-1, D)
        logits = self.gate(flat)
        weights, index = logits.softmax(-1).topk(2)
        for place, expert in enumerate(self.experts):
            token, column = torch.where(index == place)
            y = y.index_add(0, token, expert(flat[token]) * weights[token, column, None])
        return y.view_as(x), logits


class Router(nn.Module):
    """A tuple of outputs, of which the loss depends on some."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x, self.weight)
        return logits, logits.softmax(-1), logits.argmax(-1)


class Sinks(nn.Module):
    """A parameter of its own beside layers with formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.sink = nn.Linear(D, D), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor, *, mask: Tensor) -> dict[str, Any]:
        scores = self.query(x) @ x.transpose(1, 2) + mask
        with_sink = torch.cat([scores, self.sink.expand(*scores.shape[:2], 1)], dim=-1)
        return {"y": with_sink.softmax(-1)[..., :-1] @ x, "scores": scores}


class Learned(nn.Embedding):
    """Positions that run once for the whole batch, by a class that looks them up itself (OPT, Bart)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.arange(x.shape[1]) + 2).unsqueeze(0)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x * F.silu(gate), (D,))


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(D, D))


MASK = torch.full((1, T, T), -1e9).triu(1)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "a linear times two": lambda: Around(Scaled(D, D)),
    "weight norm": lambda: Around(parametrizations.weight_norm(nn.Linear(D, D))),
    "old weight norm": lambda: Around(old_weight_norm()),
    "orthogonal": lambda: Around(parametrizations.orthogonal(nn.Linear(D, D))),
    "convolution": lambda: Around(nn.Conv1d(D, D, 3, padding=1), lambda layer, x: layer(x.mT).mT),
    "bilinear": lambda: Around(nn.Bilinear(D, D, D), lambda layer, x: layer(x, torch.sin(x))),
    "prelu": lambda: Around(nn.PReLU()),
    "group norm": lambda: Around(nn.GroupNorm(2, D), lambda layer, x: layer(x.mT).mT),
    "norm over two axes": lambda: Around(nn.LayerNorm((T, D))),
    "gated norm": lambda: Around(Gated(), lambda layer, x: layer(x, gate=x.cos())),
    "frozen batch norm": lambda: Around(nn.BatchNorm1d(D).eval(), lambda layer, x: layer(x.mT).mT),
    "attention": lambda: Around(nn.MultiheadAttention(D, 2, batch_first=True), lambda layer, x: layer(x, x, x)[0]),
    "positions": lambda: Around(Learned(T + 2, D), lambda layer, x: x + layer(x)),
    "fused experts": lambda: Around(Fused()),
    "listed experts": lambda: Around(Listed(), lambda layer, x: layer(x)[0]),
    "router": lambda: Around(
        Router(), lambda layer, x: x * layer(x)[1].sum(-1, keepdim=True).tanh() + layer(x)[0][..., :1]
    ),
    "sinks": lambda: Around(Sinks(), lambda layer, x: layer(x, mask=MASK)["y"]),
}
ALL = ProjectionConfig(layers=("all",), rank_total=9)


def made(name: str) -> nn.Module:
    model = settle(LAYERS[name]())
    return model.eval() if "batch norm" in name else model


def loss_alone(model: nn.Module, i: int) -> Tensor:
    return sum_of_squares(model, X[i : i + 1]).sum()


def project(model: nn.Module, config: ProjectionConfig = ALL) -> tuple[Tensor, Any]:
    with GradProjLoraEngine(model, config) as engine:
        engine.prepare(len(X))
        return engine.collect(sum_of_squares(model, X)), engine.projection


@pytest.mark.parametrize("name", LAYERS)
def test_vectors_are_autograds(name: str) -> None:
    model = made(name)
    expected_y = model(X)
    config = ProjectionConfig(layers=("all",), rank_total="full")
    vectors, projection = project(model, config)
    covered = {parameter for layer in projection.plan.layers for parameter in layer.block.parameters}
    assert covered == {parameter for parameter, _ in model.named_parameters()}
    assert relative_error(vectors, naive(model, projection, len(X), loss_alone).vectors) < 1e-5
    assert torch.equal(model(X), expected_y)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - {"old weight norm"}))  # which cannot be copied once it ran
def test_scores_are_autograds_and_weights_are_untouched(name: str) -> None:
    model = made(name)
    plain = made(name)
    plain.load_state_dict(model.state_dict())
    exact = [exact_plain(model, x, VAL) for x in (X, X.flip(0))]
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares) as engine:
        check(plain_step(engine, model, X), exact[0])
        check(plain_step(engine, model, X.flip(0)), exact[1])
    for x in (X, X.flip(0)):
        sum_of_squares(plain, x).mean().backward()
    for (parameter, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, q.grad), parameter


@pytest.mark.thin(3)
@pytest.mark.parametrize("groups", [None, "each"])
@pytest.mark.parametrize("name", LAYERS)
def test_gram_route_and_groups(name: str, groups: Any) -> None:
    model = made(name)
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares, route="gram", groups=groups) as engine:
        check(plain_step(engine, model, X), exact_plain(model, X, VAL))


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", LAYERS)
def test_sketched_scores(name: str) -> None:
    model = made(name)
    config = ProjectionConfig(layers=("all",), rank_total="full")
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares, projection=config) as engine:
        scores = plain_step(engine, model, X).total
    expected = exact_plain(model, X, VAL).total().mean(1)
    assert float((scores - expected).norm() / expected.norm()) < 1e-4


def test_a_layer_is_selected_by_its_path_and_by_that_of_a_parameter() -> None:
    model = made("fused experts")
    for pattern, names in {
        "experts": ["layer.experts.up", "layer.experts.down", "layer.experts.down_bias"],
        "experts.up": ["layer.experts.up"],
        "layer": ["layer.gate", "layer.experts.up", "layer.experts.down", "layer.experts.down_bias"],
    }.items():
        _, projection = project(model, ProjectionConfig(layers=(pattern,), rank_total=1))
        assert [layer.block.name for layer in projection.plan.layers] == names
    assert layer_type_of(model.layer.experts) is None


class Shuffled(nn.Module):
    """Gives each sample the output of another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).roll(1, 0)


class Mixing(Shuffled):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(0, keepdim=True))


class Random(Shuffled):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rand_like(x)


class Counting(Shuffled):
    """Has a state: each call gives another output."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.weight * x * self.calls


class PositionsFirst(Shuffled):
    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x.transpose(0, 1).contiguous()).cumsum(1).transpose(0, 1)


class LastState(nn.GRU):
    """Returns its last state, too, whose first axis is none of samples."""

    def __init__(self) -> None:
        super().__init__(D, D, batch_first=True)


@pytest.mark.parametrize("layer", [Shuffled, Mixing, Random, Counting, PositionsFirst, LastState])
def test_what_mixes_samples_or_is_random_is_refused(layer: type[nn.Module]) -> None:
    model = settle(Around(layer(), lambda layer, x: y[0] if isinstance(y := layer(x), tuple) else y))
    with pytest.raises(CaptureError, match="exclude_layers"):
        project(model)
    with (
        pytest.raises(CaptureError),
        GradDotProdEngine(model, VAL, val_losses=sum_of_squares) as engine,
    ):
        plain_step(engine, model, X)


def test_a_batch_of_one_length_with_its_samples_is_not_taken_for_positions() -> None:
    """Four samples of four positions: a table of positions has as many rows as there are samples."""
    model = settle(LAYERS["positions"]())
    x = drawn(T, 3)
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares) as engine:
        check(plain_step(engine, model, x), exact_plain(model, x, VAL))


def test_an_input_that_is_changed_later_is_refused() -> None:
    def call(layer: nn.Module, x: Tensor) -> Tensor:
        copied = x.detach().clone()
        y = layer(copied)
        copied.zero_()
        return x + y

    with pytest.raises(CaptureError, match="changed in place"):
        project(settle(Around(nn.PReLU(), call)))


class TiedAnew(nn.Module):
    """Looks up and multiplies with one weight, in a class of its own; a linear has the same weight."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ self.weight.t() @ self.weight)


def test_a_weight_shared_with_a_layer_that_has_a_formula_is_refused() -> None:
    """Its gradient is the sum of both: one of them alone would be a wrong number without a word."""
    model = nn.Sequential()
    head = nn.Linear(D, D)
    model.add_module("odd", TiedAnew(head))
    model.add_module("top", head)
    settle(model)
    with pytest.raises(LayerError, match=r"'odd'.*shares 'odd.weight' with 'top'.*exclude_layers"):
        GradDotProdEngine(model, VAL, val_losses=sum_of_squares)
    with pytest.raises(LayerError, match="shares its weight"):
        project(model, ProjectionConfig(layers=("top",), rank_total=4))
    exact = exact_plain(model, X, VAL).only(lambda name: name != "odd.weight")
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares, exclude_layers=["odd.weight"]) as engine:
        check(plain_step(engine, model, X), exact)


@pytest.mark.parametrize("name", ["fused experts", "weight norm", "convolution"])
def test_gradients_are_laid_out_and_taken_apart(name: str) -> None:
    model = made(name)
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    for layer in project(model)[1].plan.layers:
        matrix_OI = layer.block.lay_out(parameters)
        assert matrix_OI.shape == (layer.block.n_out, layer.block.n_in)
        for key, tensor in layer.block.take_apart(matrix_OI, parameters).items():
            assert torch.equal(tensor, parameters[key])


class Flat(nn.Module):
    """Samples and positions on one axis, from the first layer to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, D)).view(len(x), -1, 3)


def test_a_batch_size_that_nothing_shows_is_not_taken_at_its_word() -> None:
    model = settle(Flat())
    x = drawn(4, 0)
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares) as engine:
        engine.prepare(2)  # of twice the positions
        loss = sum_of_squares(model, x).mean()
        engine.watch(loss)
        loss.backward()
        with pytest.raises(CaptureError, match="nothing shows that there are 2 samples"):
            engine.collect()
        engine.discard()
        engine.prepare(4)
        loss = sum_of_squares(model, x).mean()
        engine.watch(loss, weights=torch.full((4,), 0.25))
        loss.backward()
        check(engine.collect(), exact_plain(model, x, VAL))
