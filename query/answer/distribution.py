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


def counted_rankings(
    scorer: Scorer, top_k: int, bottom_k: int, progress: Progress
) -> tuple[tuple[Ranking, Ranking], list[Distribution | None]]:
    """((best, worst) rows of each ranking of ``scorer``, how the scores of all rows lie; None where no row has one)."""
    best, worst = scorer.rank(max(1, top_k), max(1, bottom_k), progress)
    counted: list[Distribution | None] = [None] * len(best.rows)
    if (best.rows[:, 0] >= 0).all():
        low_Q, high_Q = worst.scores[:, 0], best.scores[:, 0]
        counts_QB, has_N = scorer.counts(low_Q, high_Q, progress)
        counted = [
            Distribution(
                rows=int(counts_B.sum()),
                low=float(low),
                high=float(high),
                counts=counts_B.tolist(),
                domains=_domains(scorer.part, np.nonzero(has_N)[0], rows[:top_k][rows[:top_k] >= 0]),
            )
            for counts_B, low, high, rows in zip(counts_QB, low_Q, high_Q, best.rows, strict=True)
        ]
    return (best.cut(top_k), worst.cut(bottom_k)), counted


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
