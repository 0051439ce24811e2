"""What a build learns from a sample of its corpus before it encodes rows, and keeps in the part:

- The sides of blocks, if they are not drawn. The principal directions of gradients hold most of their energy (the PCA
  initialisation of LogIX, Choe et al., arXiv 2405.13954, section 4.1, uses those of activations). With the gradient
  matrices G of the sample, the rows of P_out are the eigenvectors of Σ G Gᵀ with the largest eigenvalues, and the rows
  of P_in those of Σ Gᵀ G (De Lathauwer et al. 2000, "A multilinear singular value decomposition").
- The factors of a preconditioner, which the sides are multiplied with: see :mod:`indexer.projection.kfac`.
- How many numbers each layer has, and which are kept as they are: see :mod:`indexer.projection.allocation`.

All of it is stored, because eigenvectors differ in the last bits from machine to machine, and every query must use
those of the build.

Legend: O, I axes of a gradient matrix; K, J the ranks of its block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from indexer.projection.allocation import Shares
from indexer.projection.kfac import KroneckerPreconditioner, MomentFactor, flat_length

SIDES = ("projection_in", "projection_out")
"""Names of the arrays of a part that hold the sides of all layers, one after the other, row by row."""
FACTORS = ("preconditioner_in", "preconditioner_out")
"""Names of the arrays of a part that hold the factors of all layers, one after the other."""
KEPT = "kept_numbers"
"""Name of the array of a part with the places, in the Kronecker vector, of the numbers that are kept as they are."""
ARRAYS = (*SIDES, *FACTORS, KEPT)

Sides = Mapping[str, tuple[Tensor, Tensor]]
"""(P_in (J, I), P_out (K, O)) by block name."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The name, ranks and axes of one layer, which are all that a calibration depends on."""

    name: str
    k_out: int
    k_in: int
    n_out: int
    n_in: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was learned from a sample, or read from a part."""

    samples: int
    """Number of rows that it was learned from."""
    sides: Sides | None
    """float32 on the CPU; None if the sides are drawn."""
    preconditioner: KroneckerPreconditioner | None
    """The preconditioner, with which ``sides`` are multiplied already; None without one."""
    shares: Shares | None
    """None unless each block has a sketch of its own."""

    def digest(self) -> str:
        """The SHA-256 of everything learned, as ``sha256:…``."""
        digest = hashlib.sha256()
        sizes = None if self.shares is None else self.shares.sizes
        names = None if self.sides is None else list(self.sides)
        digest.update(json.dumps([self.samples, names, sizes]).encode())
        for pair in (self.sides or {}).values():
            for side in pair:
                digest.update(side.numpy().astype("<f4", copy=False).tobytes())
        if self.preconditioner is not None:
            digest.update(self.preconditioner.digest().encode())
        for places in [] if self.shares is None else self.shares.kept:
            digest.update(places.numpy().astype("<i8", copy=False).tobytes())
        return f"sha256:{digest.hexdigest()}"

    def to_json(self) -> dict[str, Any]:
        """The manifest's ``projection.calibration``."""
        kept = 0 if self.shares is None else sum(map(len, self.shares.kept))
        preconditioner = None if self.preconditioner is None else self.preconditioner.digest()
        return {"samples": self.samples, "kept": kept, "preconditioner": preconditioner, "digest": self.digest()}

    def arrays(self, layers: Sequence[LayerShape]) -> dict[str, NDArray[Any]]:
        """The arrays that the part keeps, by the names in ARRAYS, without empty ones."""
        arrays: dict[str, NDArray[Any]] = {}
        if self.sides is not None:
            for side, name in enumerate(SIDES):
                arrays[name] = torch.cat([self.sides[layer.name][side].flatten() for layer in layers]).numpy()
        if self.preconditioner is not None:
            for side, name in enumerate(FACTORS):
                flat = [self.preconditioner.factors[layer.name][side].flat() for layer in layers]
                arrays[name] = torch.cat(flat).numpy()
        if self.shares is not None:
            borders = _borders(layers)
            places = [kept.numpy() + start for kept, start in zip(self.shares.kept, borders[:-1], strict=True)]
            if sum(map(len, places)):
                arrays[KEPT] = np.concatenate(places).astype(np.int64)
        return arrays

    @classmethod
    def of_arrays(
        cls,
        arrays: Mapping[str, NDArray[Any]],
        layers: Sequence[LayerShape],
        *,
        samples: int,
        damping: float,
        sizes: Sequence[int] | None,
    ) -> Calibration:
        """The inverse of :meth:`arrays`. ``sizes`` are the stored numbers of each layer; None unless each has a sketch.

        ValueError if the arrays do not fit the layers.
        """
        sides = preconditioner = shares = None
        if SIDES[0] in arrays:
            p_in = _split(arrays, SIDES[0], [layer.k_in * layer.n_in for layer in layers])
            p_out = _split(arrays, SIDES[1], [layer.k_out * layer.n_out for layer in layers])
            sides = {
                layer.name: (side_in.view(layer.k_in, layer.n_in), side_out.view(layer.k_out, layer.n_out))
                for layer, side_in, side_out in zip(layers, p_in, p_out, strict=True)
            }
        if FACTORS[0] in arrays:
            f_in = _split(arrays, FACTORS[0], [flat_length(layer.n_in) for layer in layers])
            f_out = _split(arrays, FACTORS[1], [flat_length(layer.n_out) for layer in layers])
            factors = {
                layer.name: (MomentFactor.of_flat(flat_in, layer.n_in), MomentFactor.of_flat(flat_out, layer.n_out))
                for layer, flat_in, flat_out in zip(layers, f_in, f_out, strict=True)
            }
            preconditioner = KroneckerPreconditioner(factors, damping)
        if sizes is not None:
            shares = Shares(list(sizes), _kept_by_layer(arrays.get(KEPT), layers, sizes))
        return cls(samples=samples, sides=sides, preconditioner=preconditioner, shares=shares)


def _borders(layers: Sequence[LayerShape]) -> NDArray[np.int64]:
    """(layers + 1,): the first column of each block in the Kronecker vector, and the length of that."""
    return np.cumsum([0, *(layer.k_out * layer.k_in for layer in layers)], dtype=np.int64)


def _kept_by_layer(places: NDArray[Any] | None, layers: Sequence[LayerShape], sizes: Sequence[int]) -> list[Tensor]:
    places, borders = np.asarray([] if places is None else places, dtype=np.int64), _borders(layers)
    if len(places) and (np.any(np.diff(places) <= 0) or places[0] < 0 or places[-1] >= borders[-1]):
        raise ValueError(f"{KEPT} are no ascending places in a vector of {borders[-1]} numbers")
    cuts = np.searchsorted(places, borders)
    by_layer = []
    for layer, size, start, stop, border in zip(layers, sizes, cuts[:-1], cuts[1:], borders[:-1], strict=True):
        if not stop - start <= size <= layer.k_out * layer.k_in:
            raise ValueError(f"layer {layer.name!r} has {size} numbers and keeps {stop - start} as they are")
        by_layer.append(torch.from_numpy(places[start:stop] - border))
    return by_layer


def _split(arrays: Mapping[str, NDArray[Any]], name: str, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    flat = torch.from_numpy(np.asarray(arrays[name], dtype=np.float32))
    if len(flat) != sum(lengths):
        raise ValueError(f"{name} has {len(flat)} numbers; the layers need {sum(lengths)}")
    return torch.split(flat, list(lengths))
