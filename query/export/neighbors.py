"""The nearest rows of each row of a part, by cosine: every pair of rows is compared.

Legend: N rows, Q rows at a time whose neighbours are looked for, R rows of a piece that they are compared with, D
numbers of a vector, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.progress import Task
from ghoststore.store import Part
from query.search.vectors import PartVectors

QUERY_BYTES = 256 << 20
"""Most bytes of the Q vectors."""
MOST_QUERIES = 4096
PAIRS = 1 << 22
"""Most pairs that are compared at once."""
DIGITS = 10**6
"""Cosines are rounded to these digits, which float32 products have: so equal rows are equally near."""
_PLACES = 1 << 31
"""More than a part can have rows here. A key is the cosine in whole steps, times this, plus the place: unique, and in
the order wanted, so that the best K do not depend on the order in which pairs are seen."""
_NONE = torch.iinfo(torch.int64).min


def nearest(part: Part, rows: NDArray[np.int64], k: int, task: Task) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(places, cosines), each (N, K): of each of ``rows``, ascending numbers of rows of ``part``, the ``k`` other ones
    with the largest cosines, the largest first; equal ones (to six digits) by lower place. Places are in ``rows``.

    ``k`` is less than N. The cosine with a row of length zero is 0. Memory is bounded: `QUERY_BYTES`, a piece of
    decoded rows, and the results.
    """
    count = len(rows)
    step = max(1, min(MOST_QUERIES, QUERY_BYTES // (4 * part.layout.dimension)))
    places, cosines = np.empty((count, k), dtype=np.int64), np.empty((count, k))
    for first in range(0, count, step):
        some = rows[first : first + step]
        unit_QD = _unit(PartVectors(part).gather(some))
        best_QK = torch.full((len(some), k), _NONE)
        for start, rows_RD in _pieces(part, rows, PAIRS // len(some)):
            key_QR = _keys(unit_QD @ _unit(rows_RD).T, start)
            own = range(max(first, start), min(first + len(some), start + len(rows_RD)))
            key_QR[[place - first for place in own], [place - start for place in own]] = _NONE
            best_QK = torch.cat([best_QK, key_QR], dim=1).topk(k, dim=1).values
        of_some = slice(first, first + len(some))
        places[of_some] = _PLACES - 1 - (best_QK & (_PLACES - 1)).numpy()
        cosines[of_some] = (best_QK >> 31).numpy() / DIGITS
        task.advance(len(some))
    return places, cosines


def _keys(cosine_QR: Tensor, start: int) -> Tensor:
    """(Q, R) int64 keys of rows from place ``start`` on."""
    steps_QR = (cosine_QR.clamp_(-1, 1).double() * DIGITS).round_().long()
    place_R = torch.arange(start, start + cosine_QR.shape[1])
    return steps_QR * _PLACES + (_PLACES - 1 - place_R)


def _unit(rows_RD: Tensor) -> Tensor:
    """The rows, scaled to length 1; those of length zero stay."""
    length_R1 = torch.linalg.vector_norm(rows_RD, dim=1, keepdim=True, dtype=torch.float64)
    return (rows_RD / torch.where(length_R1 > 0, length_R1, 1.0)).float()


def _pieces(part: Part, rows: NDArray[np.int64], most: int) -> Iterator[tuple[int, Tensor]]:
    """(place of the first, (R, D) float32): all of ``rows``, at most ``most`` at a time."""
    spans = np.unique(rows // part.layout.span_rows).tolist()
    for chunk in PartVectors(part).stream(spans):
        start, stop = np.searchsorted(rows, (chunk.start, chunk.stop))
        inside = torch.from_numpy(rows[start:stop] - chunk.start)
        for at in range(0, len(inside), max(1, most)):
            yield int(start) + at, chunk.rows_RD[inside[at : at + max(1, most)]]


def sketched(part: Part, rows: NDArray[np.int64], matrix_Dn: Tensor) -> NDArray[np.float32]:
    """(N, n) float32: ``rows``, scaled to length 1, times a matrix."""
    pieces = [(_unit(rows_RD) @ matrix_Dn).numpy() for _, rows_RD in _pieces(part, rows, len(rows))]
    return np.concatenate(pieces) if pieces else np.zeros((0, matrix_Dn.shape[1]), dtype=np.float32)
