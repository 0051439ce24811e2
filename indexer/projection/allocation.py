"""Dividing a fixed number of stored numbers among the layers, and within a layer between kept numbers and a sketch.

A sketch to s numbers has a squared error of about tail² / s in an inner product, where the tail is the energy of the
numbers that are sketched. Over layers, Σ tail_l² / s_l is least if s_l is proportional to tail_l; it is then
(Σ tail)² / Σ s. The numbers with the most energy are better kept as they are: as many as minimise
(Σ tail)² / (K - kept).

Legend: L layers, n numbers of a layer's block, K stored numbers in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Shares(NamedTuple):
    """The stored numbers of each layer."""

    sizes: list[int]
    """(L,): how many stored numbers each layer has."""
    kept: list[Tensor]
    """For each layer the places in its block of the numbers that are kept as they are, ascending, int64."""


def share_out(energies: Sequence[Tensor], total: int, *, keep: bool) -> Shares:
    """Divide ``total`` numbers among blocks. ``energies`` are the mean squares of the numbers of each block, (n,) each.

    A block gets at least one number, and no more than it has. Without ``keep`` all numbers are sketched. Equal energies
    are ordered by place, so equal ``energies`` give equal shares on every machine.

    ValueError unless ``total`` is at least the number of layers and less than the numbers of all blocks.
    """
    widths = [len(energy) for energy in energies]
    if not len(widths) <= total < sum(widths):
        raise ValueError(f"{total} numbers cannot be shared between {len(widths)} layers of {sum(widths)} numbers")
    kept = _most_energy(energies, total) if keep else [torch.zeros(0, dtype=torch.int64) for _ in widths]
    tails = []
    for energy, places in zip(energies, kept, strict=True):
        sketched_energy = energy.double().clone()
        sketched_energy[places] = 0.0
        tails.append(float(sketched_energy.sum()))
    room = [width - len(places) for width, places in zip(widths, kept, strict=True)]
    sketched = in_proportion(tails, total - sum(map(len, kept)), [1 if space else 0 for space in room], room)
    return Shares([len(places) + size for places, size in zip(kept, sketched, strict=True)], kept)


def _most_energy(energies: Sequence[Tensor], total: int) -> list[Tensor]:
    """For each layer the places of the numbers with the most energy: as many as minimise the error of the sketches."""
    energy = torch.cat([of_layer.double() for of_layer in energies])
    order = energy.argsort(descending=True, stable=True)
    most = total - len(energies)  # every layer needs one number for its sketch
    ends = torch.cat([energy.new_zeros(1), energy[order][:most].cumsum(0)])
    tail = (energy.sum() - ends).clamp_min(0.0)
    error = tail.square() / (total - torch.arange(most + 1))
    count = int(error.argmin())
    chosen = torch.zeros(len(energy), dtype=torch.bool)
    chosen[order[:count]] = True
    return [part.nonzero().flatten() for part in torch.split(chosen, [len(of_layer) for of_layer in energies])]


def in_proportion(weights: Sequence[float], total: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Divide ``total`` in proportion to ``weights`` into whole numbers between ``least`` and ``most``.

    The largest remainders are rounded up first. ValueError unless the sum of ``least`` is at most ``total`` and the sum
    of ``most`` at least ``total``.
    """
    if not sum(least) <= total <= sum(most):
        raise ValueError(f"{total} is not between {sum(least)} and {sum(most)}")
    low, high = 0.0, 1.0
    places = range(len(weights))
    scale = max(sum(weights), torch.finfo(torch.float64).tiny)

    def limited(factor: float) -> list[float]:
        return [min(max(weights[i] / scale * factor, least[i]), most[i]) for i in places]

    while sum(limited(high)) < total and high < 2.0**100:
        high *= 2
    for _ in range(200):  # bisection for the factor at which the limited sizes add up to total
        middle = (low + high) / 2
        low, high = (middle, high) if sum(limited(middle)) < total else (low, middle)
    exact = limited(high)
    sizes = [int(size) for size in exact]
    order = sorted(places, key=lambda i: (sizes[i] - exact[i], i))
    while sum(sizes) > total:  # the factor was rounded up
        sizes[max((i for i in places if sizes[i] > least[i]), key=lambda i: (sizes[i], -i))] -= 1
    while sum(sizes) < total:
        for i in order:
            if sizes[i] < most[i] and sum(sizes) < total:
                sizes[i] += 1
    return sizes
