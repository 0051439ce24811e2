"""Small modules whose layers see their axes turned, flattened, broadcast and routed.

Legend: B samples, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Op(nn.Module):
    """One layer, called on ``x`` (B, T, D) in some layout; gives (B, T, D)."""

    def __init__(self, layer: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self._run = layer, run

    def extra_repr(self) -> str:
        return self._run.__name__

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self._run(self.layer, x)) + 0.5 * x


def turned(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.transpose(0, 1)).transpose(0, 1)


def flat(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.flatten(0, 1)).view_as(x)


def along_positions(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.transpose(1, 2)).transpose(1, 2)


def samples_last(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.permute(1, 2, 0).transpose(1, 2)).permute(1, 0, 2)


def backwards(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.flip(0)).flip(0)


def rolled(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.roll(1, 0)).roll(-1, 0)


def sorted_samples(layer: nn.Module, x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    return layer(x[order])[order.argsort()]


def broadcast(layer: nn.Module, x: Tensor) -> Tensor:
    return x + layer(torch.linspace(-1, 1, x.shape[1] * x.shape[2]).view(x.shape[1], x.shape[2]))


def one_for_all(layer: nn.Module, x: Tensor) -> Tensor:
    return x + layer(torch.linspace(-1, 1, x.shape[2]).view(1, 1, -1))


def routed(layer: nn.Module, x: Tensor) -> Tensor:
    """The tokens of the highest first number, as many as there are samples: expert choice."""
    tokens = x.flatten(0, 1)
    chosen = tokens[:, 0].topk(len(x)).indices.sort().values
    return tokens.index_add(0, chosen, layer(tokens[chosen])).view_as(x)


def routed_by_token(layer: nn.Module, x: Tensor) -> Tensor:
    """Tokens whose first number is positive, however many."""
    tokens = x.flatten(0, 1)
    chosen = (tokens[:, 0] > 0).nonzero().flatten()
    return tokens.index_add(0, chosen, layer(tokens[chosen])).view_as(x)


def first_token(layer: nn.Module, x: Tensor) -> Tensor:
    return x + layer(x[:, 0]).unsqueeze(1)


def without_the_mean(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x - x.mean(0))


def positions(layer: nn.Module, x: Tensor) -> Tensor:
    return x + layer(torch.arange(x.shape[1]).unsqueeze(0))


def positions_of_each(layer: nn.Module, x: Tensor) -> Tensor:
    return x + layer(torch.arange(x.shape[1]).expand(len(x), -1))


def table(layer: nn.Module, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    return x + layer((places.unsqueeze(0) - places.unsqueeze(1)).abs()).mean(1)


def ids_turned(layer: nn.Module, x: Tensor) -> Tensor:
    ids = (x[:, :, 0].abs() * 10).long().remainder(x.shape[1])
    return x + layer(ids.t()).transpose(0, 1)


def ids(layer: nn.Module, x: Tensor) -> Tensor:
    return x + layer((x[:, :, 0].abs() * 10).long().remainder(x.shape[1]))


SOUND = (along_positions, first_token, positions, positions_of_each, ids)
"""Layouts in which the samples are the first axis, beside the plain one."""
UNSOUND = (
    turned,
    flat,
    samples_last,
    backwards,
    rolled,
    sorted_samples,
    broadcast,
    routed,
    routed_by_token,
    without_the_mean,
    table,
    ids_turned,
    one_for_all,
)
LOOKUPS = (positions, positions_of_each, table, ids_turned, ids)


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def module(runs: Sequence[Callable[[nn.Module, Tensor], Tensor]], length: int, width: int, *, norm: bool) -> nn.Module:
    """The ``runs`` one after another, each with a layer of its own."""

    def layer_of(run: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
        if run in LOOKUPS:
            return nn.Embedding(length, width)
        size = length if run is along_positions else width
        # One number less its mean is zero: a norm of one number has no gradient but rounding.
        return nn.LayerNorm(size) if norm and size > 1 else nn.Linear(size, size)

    return nn.Sequential(*(Op(layer_of(run), run) for run in runs))
