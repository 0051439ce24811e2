"""Exact inner products of the gradients of val samples with those of rows, in bounded memory.

As many val gradients as fit stay in memory while the rows go through the model one at a time. If not all fit, the rows
go through the model once more for the next val samples.

Legend: Q val samples, R rows, n numbers of a piece of a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.progress import Task
from indexer.encode.tokens import Row
from indexer.projection.blocks import Block
from query.exact.gradients import ExactGradients, Gradient
from query.search.part_score import Metric

Share = Literal["layers", "rest"]
SHARES: tuple[Share, ...] = ("layers", "rest")
MEMORY = 2 << 30
"""Bytes of val gradients in memory at once, unless a single gradient is larger."""


@dataclass(frozen=True, slots=True)
class Products:
    """Inner products of the gradients of val samples and rows, and their squared lengths ``val_Q`` and ``row_R``; all
    float64.
    """

    dots_QR: NDArray[np.float64]
    val_Q: NDArray[np.float64]
    row_R: NDArray[np.float64]

    @classmethod
    def of(cls, vals_QD: Tensor, rows_RD: Tensor) -> Products:
        """The products of float64 vectors that are all in memory."""
        dots = (vals_QD @ rows_RD.t(), vals_QD.square().sum(1), rows_RD.square().sum(1))
        return cls(*(np.asarray(numbers.numpy()) for numbers in dots))

    @classmethod
    def empty(cls, queries: int, rows: int) -> Products:
        """Products of NaN, to be filled by :meth:`put`."""
        return cls(np.full((queries, rows), np.nan), np.full(queries, np.nan), np.full(rows, np.nan))

    def put(self, queries: slice, rows: slice, products: Products) -> None:
        """Fill in the products of the val samples ``queries`` and the rows ``rows``."""
        self.dots_QR[queries, rows] = products.dots_QR
        self.val_Q[queries], self.row_R[rows] = products.val_Q, products.row_R

    def __add__(self, other: Products) -> Products:
        """The products of concatenated vectors: each of these, followed by the one of ``other``."""
        return Products(self.dots_QR + other.dots_QR, self.val_Q + other.val_Q, self.row_R + other.row_R)

    @property
    def lengths(self) -> NDArray[np.float64]:
        """(Q, R): |g||h| of each pair."""
        return np.asarray(np.sqrt(self.val_Q)[:, None] * np.sqrt(self.row_R))

    def scores(self, metric: Metric) -> NDArray[np.float64]:
        """(Q, R): the scores. The cosine with a vector of length zero is 0."""
        if metric == "dot":
            return self.dots_QR
        lengths = self.lengths
        return np.asarray(self.dots_QR / np.where(lengths > 0, lengths, 1.0))

    def only(self, queries: NDArray[np.bool_], rows: NDArray[np.bool_]) -> Products:
        """The products of the val samples and rows for which the masks are true."""
        return Products(self.dots_QR[queries][:, rows], self.val_Q[queries], self.row_R[rows])


class Pieces:
    """Cuts a gradient into flat vectors: one for each of the ``chosen`` blocks (default: all ``blocks``), and the rest.

    The vector of a block is its gradient matrix, laid out as in the build. If the part has a ``metric`` (see
    :func:`indexer.projection.stored.metric_of`), the matrix is in that metric; there is no rest then, because the
    metric is known only for the layers.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        metric: Callable[[Block, Tensor], Tensor] | None = None,
        chosen: Collection[str] | None = None,
    ) -> None:
        self._metric = metric
        self.chosen = [block for block in blocks if chosen is None or block.name in chosen]
        self.covered = {name for block in self.chosen for name in block.parameters}
        """Parameters of the chosen blocks."""

    @property
    def parameters(self) -> set[str] | None:
        """The parameters that a gradient must have; None for all."""
        return None if self._metric is None else self.covered

    def matrices(self, gradient: Gradient) -> list[Tensor]:
        """(n_out, n_in) float32: the gradient matrix of each chosen block."""
        return [self._matrix(block, gradient) for block in self.chosen]

    def _matrix(self, block: Block, gradient: Gradient) -> Tensor:
        matrix = block.lay_out(gradient.parts).float()
        return matrix if self._metric is None else self._metric(block, matrix)

    def of(self, gradient: Gradient) -> dict[Share, list[Tensor]]:
        """Flat float32 vectors (n,), for the layers and for the rest."""
        layers = [matrix.flatten() for matrix in self.matrices(gradient)]
        rest = [part.float().flatten() for name, part in gradient.parts.items() if name not in self.covered]
        return {"layers": layers, "rest": [] if self._metric is not None else rest}


class HeldVals:
    """The gradients of ``vals``, kept in memory for products with rows. ``task`` advances by one for each gradient."""

    def __init__(self, exact: ExactGradients, pieces: Pieces, vals: Sequence[Row], task: Task) -> None:
        self._exact, self._pieces = exact, pieces
        self._held = _stacked(exact, pieces, vals, task)
        self.squares = {
            share: sum((_squares(piece) for piece in self._held[share]), np.zeros(len(vals))) for share in SHARES
        }
        """(Q,) for each share: squared lengths over the layers, and over the rest."""

    def products(self, rows: Sequence[Row], task: Task) -> dict[Share, Products]:
        """The products with ``rows``, over the layers and over the rest. One gradient of a row is in memory
        at a time.
        """
        products = {
            share: Products(np.zeros((len(squares), len(rows))), squares, np.zeros(len(rows)))
            for share, squares in self.squares.items()
        }
        for place, row in enumerate(rows):
            pieces = self._pieces.of(self._exact(row))
            for share in SHARES:
                squares = (float(piece.square().sum(dtype=torch.float64)) for piece in pieces[share])
                products[share].row_R[place] = sum(squares)
                for val_Qn, row_n in zip(self._held[share], pieces[share], strict=True):
                    products[share].dots_QR[:, place] += (val_Qn @ row_n).double().cpu().numpy()
            task.advance(1, len(row.tokens))
        return products


def exact_products(
    exact: ExactGradients, pieces: Pieces, vals: Sequence[Row], rows: Sequence[Row], task: Task
) -> dict[Share, Products]:
    """The products over the layers, and those over the rest. Their sum is over all parameters.

    NaN where a gradient is not finite. The products of each parameter are float32; their sum is float64. ``task``
    advances by one for each gradient.
    """
    sums = {share: Products.empty(len(vals), len(rows)) for share in SHARES}
    at_once = vals_at_once(exact.numbers)
    for first in range(0, len(vals), at_once):
        batch = slice(first, min(first + at_once, len(vals)))
        for share, products in HeldVals(exact, pieces, vals[batch], task).products(rows, task).items():
            sums[share].put(batch, slice(None), products)
    return sums


def vals_at_once(numbers: int) -> int:
    """How many val gradients of ``numbers`` numbers to keep in memory at once."""
    return max(1, MEMORY // (4 * numbers))


def _stacked(exact: ExactGradients, pieces: Pieces, vals: Sequence[Row], task: Task) -> dict[Share, list[Tensor]]:
    """(Q, n) for each piece: the gradients of ``vals``."""
    stacked: dict[Share, list[Tensor]] = {}
    for place, row in enumerate(vals):
        of_row = pieces.of(exact(row))
        if not stacked:
            stacked = {share: [piece.new_empty(len(vals), len(piece)) for piece in of_row[share]] for share in SHARES}
        for share in SHARES:
            for rows_Qn, piece in zip(stacked[share], of_row[share], strict=True):
                rows_Qn[place] = piece
        task.advance(1, len(row.tokens))
    return stacked


def _squares(rows_Qn: Tensor) -> NDArray[np.float64]:
    return np.array([float(row.square().sum(dtype=torch.float64)) for row in rows_Qn])
