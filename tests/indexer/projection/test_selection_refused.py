"""What cannot be projected exactly is refused by name; leaving it out, as the message says, works."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ghoststore.errors import LayerError
from indexer.layers import layer_type_by_name, layer_type_of
from indexer.projection.selection import select_blocks
from tests.support.models import gpt2


class Experts(nn.Module):
    """Feed-forward experts in one parameter of three axes, as in mixtures of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.stacked = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btd,ede->bte", x, self.stacked)


class Block(nn.Module):
    """One layer of every fate: ``fine``, ``odd`` and, inside ``mlp``, experts."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.fine, self.odd = nn.Linear(4, 4), odd
        self.mlp = nn.ModuleDict({"router": nn.Linear(4, 2), "experts": Experts()})


@pytest.mark.parametrize("pattern", ["mpl", "transformer.h.2", "h.10", "c_f", "lm_hea"])
def test_an_unknown_pattern_lists_the_layers(pattern: str) -> None:
    with pytest.raises(LayerError, match=re.escape(pattern)) as found:
        select_blocks(gpt2(), (pattern,))
    for name in ("transformer.wte", "transformer.h.0.attn.c_attn", "in all"):
        assert name in str(found.value)


def test_an_unknown_pattern_to_exclude_is_refused_too() -> None:
    with pytest.raises(LayerError, match=r"h\.7"):
        select_blocks(gpt2(), ("mlp",), ("h.7",))


def test_nothing_left_is_refused() -> None:
    with pytest.raises(LayerError, match="no layer is left"):
        select_blocks(gpt2(), ("mlp",), ("h.0", "h.1"))


ODD: dict[str, nn.Module] = {
    "conv2d": nn.Conv2d(1, 2, 3),
    "bilinear": nn.Bilinear(4, 4, 4),
    "embedding-bag": nn.EmbeddingBag(5, 4),
    "prelu": nn.PReLU(),
    "group-norm": nn.GroupNorm(2, 4),
    "experts": Experts(),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("pattern", ["all", "odd", "o*"])
def test_a_layer_of_unknown_type_has_a_block_for_each_parameter(odd: str, pattern: str) -> None:
    blocks = {block.name: block for block in select_blocks(Block(ODD[odd]), (pattern,)).blocks}
    for name, parameter in ODD[odd].named_parameters():
        block = blocks[f"odd.{name}"]
        assert (block.type, block.parameters, block.numel) == ("replayed", (f"odd.{name}",), parameter.numel())
        assert block.n_out * block.n_in == parameter.numel()


def test_experts_of_a_mixture_are_selected_under_mlp() -> None:
    names = [block.name for block in select_blocks(Block(nn.ReLU()), ("mlp",)).blocks]
    assert names == ["mlp.router", "mlp.experts.stacked"]


class OfItsOwn(nn.Module):
    """Parameters of the model itself, and in a list of it: no module is called with samples for them."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.token = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(4))])


def test_parameters_that_no_called_module_has_are_all_named() -> None:
    with pytest.raises(LayerError) as error:
        select_blocks(OfItsOwn(), ("all",))
    assert "no layer type handles 2 of the chosen layers" in str(error.value)
    assert "(the model): a OfItsOwn with parameters ['token']" in str(error.value)
    assert "scales: a ParameterList with parameters ['0']" in str(error.value)
    assert [block.name for block in select_blocks(OfItsOwn(), ("fine",)).blocks] == ["fine"]


@pytest.mark.parametrize("odd", ODD)
def test_leaving_the_unknown_layer_out_as_the_message_says_works(odd: str) -> None:
    selection = select_blocks(Block(ODD[odd]), ("all",), ("odd", "mlp.experts"))
    assert [block.name for block in selection.blocks] == ["fine", "mlp.router"]


def test_an_unknown_layer_that_was_not_asked_for_does_no_harm() -> None:
    assert [block.name for block in select_blocks(Block(ODD["conv2d"]), ("fine",)).blocks] == ["fine"]


def test_an_alias_that_excludes_an_unknown_layer_excludes_it() -> None:
    assert [block.name for block in select_blocks(Block(nn.ReLU()), ("all",), ("mlp",)).blocks] == ["fine"]


def weight_normed() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(4, 4))


def old_weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(4, 4))


def orthogonal() -> nn.Module:
    return parametrizations.orthogonal(nn.Linear(4, 4))


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class PlainSubclass(nn.Linear):
    """Adds nothing to what a Linear computes."""


@pytest.mark.parametrize("make", [weight_normed, old_weight_normed, orthogonal, lambda: ScaledLinear(4, 4)])
@pytest.mark.parametrize("pattern", ["all", "odd"])
def test_a_linear_that_is_not_quite_one_has_no_formula(make: Any, pattern: str) -> None:
    module = make()
    assert layer_type_of(module) is None
    blocks = select_blocks(nn.ModuleDict({"odd": module, "fine": nn.Linear(4, 4)}), (pattern,)).blocks
    odd = [block for block in blocks if block.name.startswith("odd")]
    assert {name for block in odd for name in block.parameters} == {f"odd.{n}" for n, _ in module.named_parameters()}
    assert {(block.type, use.module) for block in odd for use in block.uses} == {("replayed", "odd")}


def test_a_subclass_that_computes_the_same_is_a_linear() -> None:
    kind = layer_type_of(PlainSubclass(4, 4))
    assert kind is layer_type_by_name("linear")


def test_an_unknown_layer_type_names_the_known_ones() -> None:
    with pytest.raises(LayerError, match="conv1d, embedding, layernorm, linear, replayed, rmsnorm"):
        layer_type_by_name("conv3d")


@pytest.mark.parametrize("setting", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_an_embedding_whose_gradient_depends_on_the_batch_is_refused(setting: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(7, 4, **setting), nn.Linear(4, 4))
    with pytest.raises(LayerError, match=f"layer '0' has {next(iter(setting))}"):
        select_blocks(model, ("all",))


def test_norms_that_share_a_weight_are_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    model[1].weight = model[0].weight
    with pytest.raises(LayerError, match="tied norms"):
        select_blocks(model, ("all",))


class NamedRMSNorm(nn.Module):
    """Something of that name; subclasses say what it computes."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((6,), start)), 1e-6

    def normalised(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class CentredRMSNorm(NamedRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normalised(x - x.mean(-1, keepdim=True))


class DoubledRMSNorm(NamedRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.weight * self.normalised(x)


class SquaredRMSNorm(NamedRMSNorm):
    """Looks right while every weight is 1, as it is at the start: its gradient is twice the formula's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.square() * self.normalised(x)


class ExponentialRMSNorm(NamedRMSNorm):
    """Looks like (1 + γ) while every weight is 0."""

    def forward(self, x: Tensor) -> Tensor:
        return (2 * self.weight).exp() * self.normalised(x)


class GatedRMSNorm(NamedRMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * self.normalised(x) * gate


class GroupedRMSNorm(NamedRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normalised(x.unflatten(-1, (2, 3))).flatten(-2)


@pytest.mark.parametrize(
    ("fake", "start"),
    [
        (DoubledRMSNorm, 1.0),
        (GatedRMSNorm, 1.0),
        (GroupedRMSNorm, 1.0),
        (SquaredRMSNorm, 1.3),
        (SquaredRMSNorm, 1.0),
        (ExponentialRMSNorm, 0.0),
    ],
)
def test_an_rmsnorm_in_name_only_has_no_formula(fake: type[NamedRMSNorm], start: float) -> None:
    model = nn.ModuleDict({"norm": fake(start), "fine": nn.Linear(6, 6)})
    assert [block.type for block in select_blocks(model, ("norm",)).blocks] == ["replayed"]


def test_an_rmsnorm_in_name_only_that_is_another_norm() -> None:
    kind = layer_type_of(CentredRMSNorm())
    assert kind is layer_type_by_name("layernorm")


class TransposedHead(nn.Module):
    """A head of its own that shares the embedding's weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def test_a_weight_that_an_unknown_layer_uses_too_is_refused() -> None:
    # The block would hold the embedding's share alone, silently.
    embedding = nn.Embedding(7, 4)
    model = nn.Sequential(embedding, TransposedHead(embedding.weight))
    with pytest.raises(LayerError, match="1"):
        select_blocks(model, ("embeddings",))
