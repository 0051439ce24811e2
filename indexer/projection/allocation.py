"""How a fixed number of stored numbers is shared out between layers, and between numbers that are kept and a sketch.

A sketch of a vector to s numbers has an error of about |g||h| / √s in an inner product (its squares: tail² / s, where
the tail is the energy that is sketched). Over layers, Σ tail_l² / s_l is least with s_l in proportion to tail_l: then
it is (Σ tail)² / Σ s. Of all numbers, those of the most energy are better kept as they are: as many as make
(Σ tail)² / (K - kept) least.

Legend: L layers, n numbers of a layer's block, K stored numbers in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Shares(NamedTuple):
    """What each layer gets."""

    sizes: list[int]
    """(L,) stored numbers."""
    kept: list[Tensor]
    """For each layer the places, in its block, of the numbers that are kept as they are, ascending, int64."""


def share_out(energies: Sequence[Tensor], total: int, *, keep: bool) -> Shares:
    """``total`` numbers for blocks whose numbers have the mean squares ``energies`` (n,) each, at least 0.

    No block gets more numbers than it has, and none fewer than one. Without ``keep`` nothing is kept as it is. Equal
    energies by place: the same on every machine for the same ``energies``.

    ValueError unless there is a number for each layer, and fewer than the blocks have.
    """
    widths = [len(energy) for energy in energies]
    if not len(widths) <= total < sum(widths):
        raise ValueError(f"{total} numbers cannot be shared between {len(widths)} layers of {sum(widths)} numbers")
    kept = _most_energy(energies, total) if keep else [torch.zeros(0, dtype=torch.int64) for _ in widths]
    tails = []
    for energy, places in zip(energies, kept, strict=True):
        others = energy.double().clone()
        others[places] = 0.0
        tails.append(float(others.sum()))
    room = [width - len(places) for width, places in zip(widths, kept, strict=True)]
    sketched = in_proportion(tails, total - sum(map(len, kept)), [1 if space else 0 for space in room], room)
    return Shares([len(places) + size for places, size in zip(kept, sketched, strict=True)], kept)


def _most_energy(energies: Sequence[Tensor], total: int) -> list[Tensor]:
    """Places of the numbers of the most energy, by layer: as many as leave the least error to the sketches."""
    energy = torch.cat([of_layer.double() for of_layer in energies])
    order = energy.argsort(descending=True, stable=True)
    most = total - len(energies)  # every layer keeps a number for the rest of it
    ends = torch.cat([energy.new_zeros(1), energy[order][:most].cumsum(0)])
    tail = (energy.sum() - ends).clamp_min(0.0)
    error = tail.square() / (total - torch.arange(most + 1))
    count = int(error.argmin())
    chosen = torch.zeros(len(energy), dtype=torch.bool)
    chosen[order[:count]] = True
    return [part.nonzero().flatten() for part in torch.split(chosen, [len(of_layer) for of_layer in energies])]


def in_proportion(weights: Sequence[float], total: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """``total`` cut in proportion to ``weights`` into whole numbers between ``least`` and ``most``, largest remainders
    first. ValueError where ``least`` is more, or ``most`` less, than ``total`` in sum.
    """
    if not sum(least) <= total <= sum(most):
        raise ValueError(f"{total} is not between {sum(least)} and {sum(most)}")
    low, high = 0.0, 1.0
    places = range(len(weights))
    scale = max(sum(weights), torch.finfo(torch.float64).tiny)

    def cut(factor: float) -> list[float]:
        return [min(max(weights[i] / scale * factor, least[i]), most[i]) for i in places]

    while sum(cut(high)) < total and high < 2.0**100:
        high *= 2
    for _ in range(200):  # the factor at which what was cut at both ends adds up
        middle = (low + high) / 2
        low, high = (middle, high) if sum(cut(middle)) < total else (low, middle)
    wanted = cut(high)
    sizes = [int(size) for size in wanted]
    order = sorted(places, key=lambda i: (sizes[i] - wanted[i], i))
    while sum(sizes) > total:  # rounding of the factor
        sizes[max((i for i in places if sizes[i] > least[i]), key=lambda i: (sizes[i], -i))] -= 1
    while sum(sizes) < total:
        for i in order:
            if sizes[i] < most[i] and sum(sizes) < total:
                sizes[i] += 1
    return sizes
