"""Scores of some rows, as :mod:`query.search.search` has them.

Legend: Q queries, K rows, P pairs of a row and a ranking.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from query.search.part_score import Term
from query.search.search import Combine, Piece, PieceScores


def similarities_at(terms: Sequence[Term], rows_K: NDArray[np.int64], *, device: str = "cpu") -> NDArray[np.float64]:
    """(Q, K) float64: the scores of ``rows_K`` for each query, equal to those of a search. They are ascending,
    committed in every part, and usable.

    Reads their chunks. Raises CorruptError for a damaged one.
    """
    scores = PieceScores(terms, None, device, None, screened=False)
    scores_QK = np.empty((scores.queries, len(rows_K)))

    def work(piece: Piece) -> None:
        within = _within(piece, rows_K)
        places = torch.from_numpy(rows_K[within] - piece.unit.start)
        scores_QK[:, within] = scores.all_of(piece, places)

    _over(scores, work, rows_K)
    return np.asarray(scores_QK * scores.units_Q[:, None])


def pair_similarities(
    terms: Sequence[Term],
    rows_P: NDArray[np.int64],
    columns_P: NDArray[np.int64],
    *,
    combine: Combine | None = None,
    device: str = "cpu",
) -> NDArray[np.float64]:
    """(P,) float64: the score of each of ``rows_P``, ascending, in the ranking that ``columns_P`` has at its place, as
    a search counts them; otherwise as :func:`similarities_at`.
    """
    scores = PieceScores(terms, combine, device, None, screened=False)
    scores_P = np.empty(len(rows_P))

    def work(piece: Piece) -> None:
        within = _within(piece, rows_P)
        scores_P[within] = piece.exact(rows_P[within] - piece.unit.start, columns_P[within])

    _over(scores, work, rows_P)
    return np.asarray(scores_P * scores.units_Q[columns_P])


def _within(piece: Piece, rows: NDArray[np.int64]) -> slice:
    """Which of ``rows``, ascending, are of the piece."""
    return slice(*np.searchsorted(rows, (piece.unit.start, piece.unit.stop)))


def _over(scores: PieceScores, work: Callable[[Piece], None], rows: NDArray[np.int64]) -> None:
    """``work`` on each piece of the spans that have any of ``rows``."""
    spans = np.unique(rows // scores.terms[0].part.layout.span_rows)
    deque(scores.each(work, spans.tolist()), maxlen=0)
