"""How many rows have a score in each bin: most are counted by what the screen of exact search knows of them.

Legend: R rows of a piece, C columns (rankings), N rows of a part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ghoststore.progress import Task
from query.search.part_score import Term
from query.search.search import Combine, Piece, PieceScores, searched_spans

BINS = 60
APART = 1e-9
"""A share that is nearer to an edge of its bin is computed exactly."""


def bins_of(scores: NDArray[np.float64], low: float, high: float) -> NDArray[np.int64]:
    """The (60,) counts of finite ``scores`` in equal bins from ``low`` to ``high``; in the middle one where all are
    equal.
    """
    if equal(low, high):
        shares = np.full(len(scores), 0.5)
    else:
        shares = np.clip((scores - low) / (high - low), 0.0, 1.0)  # the ends may be rounded
    return np.asarray(np.histogram(shares, BINS, (0.0, 1.0))[0])


def equal(low: float, high: float) -> bool:
    """Whether scores from ``low`` to ``high`` differ by no more than rounding."""
    return high - low <= 1e-12 * max(abs(low), abs(high))


def count_scores(
    terms: Sequence[Term],
    low_C: NDArray[np.float64],
    high_C: NDArray[np.float64],
    *,
    combine: Combine | None = None,
    device: str = "cpu",
    task: Task | None = None,
    allowed_N: NDArray[np.bool_] | None = None,
    added_CN: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """((C, 60) counts, (N,) which rows have a score) of the scores of :func:`query.search.search.search`, whose lowest
    and highest are ``low_C`` and ``high_C``: those of :func:`bins_of`. Columns as there, the combined one last.

    Reads each committed chunk once. Only of rows near an edge are scores computed exactly. CorruptError for a damaged
    chunk, and for a part whose length is out of proportion to what is committed.
    """
    terms[0].part.refuse_hollow()
    scores = PieceScores(terms, combine, device, allowed_N, screened=True, added_CN=added_CN)
    flat_C = np.array([equal(low, high) for low, high in zip(low_C, high_C, strict=True)])
    spread_C = np.where(flat_C, 1.0, high_C - low_C)
    counts_CB = np.zeros((scores.columns, BINS), dtype=np.int64)
    ranked_N = np.zeros(terms[0].part.layout.rows, dtype=bool)

    def work(piece: Piece) -> tuple[int, NDArray[np.bool_], NDArray[np.int64]]:
        cheap_RC, slack_RC = (x.double().cpu().numpy() for x in scores.cheap(piece))
        usable_R1 = piece.usable_R.cpu().numpy()[:, None]
        share_RC = np.where(flat_C, 0.5, (cheap_RC * scores.units_Q - low_C) / spread_C)
        apart_RC = np.where(flat_C, 0.0, slack_RC * scores.units_Q / spread_C + APART)
        bin_RC, last_RC = np.floor((share_RC - apart_RC) * BINS), np.floor((share_RC + apart_RC) * BINS)
        sure_RC = (bin_RC == last_RC) & (bin_RC >= 0) & (bin_RC < BINS)
        counted_CB = np.stack(
            [
                np.bincount(bin_R[sure_R].astype(np.int64), minlength=BINS)
                for bin_R, sure_R in zip(bin_RC.T, (sure_RC & usable_R1).T, strict=True)
            ]
        )
        places, columns = np.nonzero(~sure_RC & usable_R1)
        exact = piece.exact(places, columns) * scores.units_Q[columns]
        for column in np.unique(columns).tolist():
            counted_CB[column] += bins_of(exact[columns == column], low_C[column], high_C[column])
        return piece.unit.start, usable_R1[:, 0], counted_CB

    for rows, (start, usable_R, counted_CB) in scores.each(work, searched_spans(terms, allowed_N)):
        counts_CB += counted_CB
        ranked_N[start : start + rows] = usable_R
        if task:
            task.advance(rows)
    return counts_CB, ranked_N
