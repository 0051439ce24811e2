"""Sums of scores as what a person reads: rankings of samples, and a table of domains.

Legend: U units (samples, or windows).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ghoststore.progress import Progress
from ghoststore.store import Run
from query.common.texts import texts_of
from query.training_scores.results import DomainScores, ScoreHit
from query.training_scores.sums import ScoreSums, Unit, Units, Value, best, standard_error


def hits_of(
    run: Run,
    units: Units,
    sums: ScoreSums,
    values: NDArray[np.float64],
    counts: tuple[int, int],
    text: bool,
    unit: Unit,
    progress: Progress,
) -> list[list[ScoreHit]]:
    """The highest and the lowest of ``values``, each in order. Every row's data are read once."""
    rankings = [best(values, counts[0]), best(-values, counts[1])]
    wanted = sorted({int(place) for ranking in rankings for place in ranking})
    place_of = {place: index for index, place in enumerate(wanted)}
    rows = units.first_row[wanted].tolist() if wanted else []
    ids, sources, domains, starts = (
        run.rows.read_rows(name, rows) for name in ("sample_id", "source_row", "domain", "window_start")
    )
    texts = texts_of(run, rows, progress) if text else [None] * len(rows)

    def hit(rank: int, place: int) -> ScoreHit:
        at, times = place_of[place], int(sums.times[place])
        return ScoreHit(
            rank=rank,
            value=float(values[place]),
            id=str(ids[at]),
            source_row=int(sources[at]),
            domain=run.domains[domains[at]] if domains[at] >= 0 else None,
            times=times,
            mean_score=float(sums.plain[place]) / times,
            negative_share=int(sums.negative[place]) / times,
            last_step=int(sums.last_step[place]),
            text=texts[at],
            window_start=int(starts[at]) if unit == "window" else 0,
        )

    return [[hit(rank, int(place)) for rank, place in enumerate(ranking, 1)] for ranking in rankings]


def by_domain(run: Run, units: Units, sums: ScoreSums, value: Value, allowed: NDArray[np.bool_]) -> list[DomainScores]:
    """A row for each domain that has units among the ``allowed``, by falling value per time."""
    domain, values = units.domain, sums.values(value)
    found = []
    for place in np.unique(domain[allowed]).tolist():
        mine = allowed & (domain == place)
        scored = mine & np.isfinite(values)
        times, rows = int(sums.times[mine].sum()), int(scored.sum())
        total = float(values[scored].sum())
        plain, squares = float(sums.plain[mine].sum()), float(sums.squares[mine].sum())
        found.append(
            DomainScores(
                domain=run.domains[place] if place >= 0 else None,
                rows=int(mine.sum()),
                scored_rows=rows,
                times=times,
                value_per_row=total / rows if rows else None,
                value_per_time=total / times if times else None,
                value_sum=total,
                negative_share=int(sums.negative[mine].sum()) / times if times else None,
                mean_score=plain / times if times else None,
                standard_error=finite(float(standard_error(times, plain, squares))),
            )
        )
    return sorted(found, key=lambda one: -math.inf if one.value_per_time is None else one.value_per_time, reverse=True)


def finite(value: float) -> float | None:
    """``value``; None where it is NaN or infinite."""
    return value if math.isfinite(value) else None
