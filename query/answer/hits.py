"""From rows of a ranking to what a person or a program reads: ids, domains, texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ghoststore.progress import Progress
from ghoststore.store import Part
from query.answer.results import BlendedHit, Hit
from query.ask.scorer import Blend
from query.common.texts import texts_of
from query.search.search import Ranking


def hits_of(
    part: Part, rankings: Sequence[Ranking], text: bool, progress: Progress, blend: Blend | None = None
) -> list[list[list[Hit]]]:
    """For each of ``rankings``, for each of its queries, the hits. Every row's data are read once.

    Without ``text`` texts are not looked up. With ``blend`` a hit shows similarity and value too.
    """
    rows = sorted({int(row) for ranking in rankings for row in ranking.rows.ravel() if row >= 0})
    place = {row: index for index, row in enumerate(rows)}
    ids, sources, domains, windows = (
        part.read_rows(name, rows) for name in ("sample_id", "source_row", "domain", "window_start")
    )
    texts = texts_of(part, rows, progress) if text else [None] * len(rows)
    names = part.domains

    def hit(query: int, rank: int, row: int, score: np.float64) -> Hit:
        at = place[row]
        shared: dict[str, Any] = {
            "rank": rank,
            "score": float(score),
            "id": str(ids[at]),
            "source_row": int(sources[at]),
            "domain": names[domains[at]] if domains[at] >= 0 else None,
            "text": texts[at],
            "window_start": int(windows[at]),
        }
        if blend is None:
            return Hit(**shared)
        value = float(blend.values.value[row])
        return BlendedHit(
            **shared, similarity=float(blend.similarity[query, row]), value=value if np.isfinite(value) else None
        )

    return [
        [
            [
                hit(query, rank, int(row), score)
                for rank, (row, score) in enumerate(zip(rows_q, scores_q, strict=True), 1)
                if row >= 0
            ]
            for query, (rows_q, scores_q) in enumerate(zip(ranking.rows, ranking.scores, strict=True))
        ]
        for ranking in rankings
    ]
