"""How the scores of all rows lie, and of which domains the best rows are: ``ghoststore query --histogram``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.store import Part
from query.ask.scorer import Scorer
from query.ask.second_stage import Reranking
from query.search.top_k import Ranking

BINS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainRows:
    """One domain: its rows among those that rank, and among the best rows listed."""

    domain: str | None
    rows: int
    hits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """The scores of all rows that rank."""

    rows: int
    low: float
    """The lowest score, as ``score`` of a hit; ``high`` is the highest. NaN never counts."""
    high: float
    counts: list[int]
    """Rows in each of 60 equal bins from ``low`` to ``high``; of equal scores all in the middle one."""
    domains: list[DomainRows]
    """Those with any row, in the order of the part, rows without a domain first; empty where no row has one."""

    @classmethod
    def of(cls, part: Part, scores_N: NDArray[np.float64], hits: NDArray[np.int64]) -> Distribution:
        """That of ``scores_N``, (N,) by row of ``part``, of which ``hits`` are listed. ``scores_N`` has a number."""
        low, high, counts = binned(scores_N)
        (ranked,) = np.nonzero(np.isfinite(scores_N))
        return cls(rows=len(ranked), low=low, high=high, counts=counts.tolist(), domains=_domains(part, ranked, hits))


def binned(scores_N: NDArray[np.float64]) -> tuple[float, float, NDArray[np.int64]]:
    """(lowest, highest, (60,) counts) of the finite ones of ``scores_N``, of which there is one."""
    finite = scores_N[np.isfinite(scores_N)]
    low, high = float(finite.min()), float(finite.max())
    spread = high - low
    if spread <= 1e-12 * max(abs(low), abs(high)):  # less is rounding
        shares = np.full(len(finite), 0.5)
    else:
        shares = (finite - low) / spread
    counts, _ = np.histogram(shares, BINS, (0.0, 1.0))
    return low, high, counts


def distributions(scorer: Scorer, best: Ranking, progress: Progress) -> list[Distribution | None]:
    """One for each ranking of ``scorer``, whose best rows are ``best``; None where no row has a score."""
    return [
        Distribution.of(scorer.part, scores_N, rows[rows >= 0]) if np.isfinite(scores_N).any() else None
        for scores_N, rows in zip(scorer.scores(progress), best.rows, strict=True)
    ]


def refuse_histogram(how: Reranking, index: str) -> None:
    """UsageError where not all rows have the score that is listed."""
    for name, given in ((f"rerank={how.rerank}", how.rerank is not None), (f"index={index}", index != "exact")):
        if given:
            raise UsageError(
                f"`histogram` counts the scores of all rows, and `{name}` gives those of some alone: leave one out"
            )


def _domains(part: Part, ranked: NDArray[np.int64], hits: NDArray[np.int64]) -> list[DomainRows]:
    names = [None, *part.domains]
    if len(names) == 1:
        return []
    every = np.full(part.layout.rows, -1, dtype=np.int64)
    every[part.row_numbers] = part.column("domain")
    of_all = np.bincount(every[ranked] + 1, minlength=len(names)).tolist()
    of_hits = np.bincount(every[hits] + 1, minlength=len(names)).tolist()
    counted = zip(names, of_all, of_hits, strict=True)
    return [DomainRows(domain=name, rows=rows, hits=listed) for name, rows, listed in counted if rows]
