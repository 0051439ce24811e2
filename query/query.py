"""``ghoststore.query``: a val set to the samples whose gradients point the same way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ghoststore.corpus import Fields
from ghoststore.errors import UsageError
from ghoststore.progress import Progress, Silent
from query.question import Asked, Combine, Question, ask
from query.results import BlendedHit, Hit, QueryHits, QueryResult
from query.search import Ranking
from query.terms import Metric
from query.texts import texts_of


def query(
    *,
    store: str | Path,
    val_set: str | Path,
    part: str | None = None,
    top_k: int = 10,
    bottom_k: int = 0,
    each: bool = False,
    group_field: str | None = None,
    combine: Combine = "mean",
    metric: Metric = "cosine",
    layers: Sequence[str] = (),
    exclude_layers: Sequence[str] = (),
    fields: Fields | None = None,
    max_samples: int | None = None,
    checkpoint: str | Path | None = None,
    device: str = "auto",
    text: bool = True,
    with_scores: str | None = None,
    score_weight: float | None = None,
    progress: Progress | None = None,
) -> QueryResult:
    """The training samples most (``top_k``) and least (``bottom_k``) similar to ``val_set``, by exact search.

    With ``each`` one ranking for every val sample, else one for their mean gradient. ``metric`` is ``dot`` or
    ``cosine``. ``layers`` and ``exclude_layers`` are patterns that restrict the score to some layers of a part
    of plain Kronecker blocks. The val set goes through the model, tokenization and projection that the part's
    manifest names; ``checkpoint`` is another path to the same weights.

    ``group_field`` names a field of the val set: one ranking for the mean gradient of each group, and before them one
    called ``combined``: by the ``mean`` or the ``max`` of a row's scores over the groups, or by ``rank-fusion``
    (reciprocal ranks).

    ``with_scores`` names a training run of the store whose values (Σ η·score of a sample) are blended with the
    similarities: (1 - W)·z(similarity) + W·z(value), W = ``score_weight`` (default 0.5), z standardised over the rows
    that have both. At W = 0 rows are ranked by similarity alone, at 1 by value alone; rows without a value are left out
    unless W is 0.

    Raises UsageError for a val set without a usable row and patterns that fit nothing, MismatchError for
    another checkpoint, tokenizer or projection, or a run on other samples, CorruptError for damaged rows.
    """
    progress = progress or Silent()
    if top_k < 0 or bottom_k < 0 or not top_k + bottom_k:
        raise UsageError(f"--top-k {top_k} and --bottom-k {bottom_k}: ask for at least one row")
    question = Question(
        store=store, val_set=val_set, part=part, each=each, group_field=group_field, combine=combine, metric=metric,
        layers=layers, exclude_layers=exclude_layers, fields=fields, max_samples=max_samples, checkpoint=checkpoint,
        device=device, with_scores=with_scores, score_weight=score_weight,
    )  # fmt: skip
    asked = ask(question, progress)
    rankings = asked.rank(top_k, bottom_k, progress)
    hits = _hits(asked, rankings, text, progress)
    return QueryResult(
        store=str(store),
        settings={**asked.settings(), "index": "exact", "top_k": top_k, "bottom_k": bottom_k},
        results=[
            QueryHits(query=name, hits=best, bottom=worst) for name, best, worst in zip(asked.names, *hits, strict=True)
        ],
    )


def _hits(asked: Asked, rankings: tuple[Ranking, Ranking], text: bool, progress: Progress) -> list[list[list[Hit]]]:
    """For each ranking, for each query, its hits. Every row's data are read once."""
    part, blend = asked.part, asked.blend
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
            "rank": rank, "score": float(score), "id": str(ids[at]), "source_row": int(sources[at]),
            "domain": names[domains[at]] if domains[at] >= 0 else None, "text": texts[at],
            "window_start": int(windows[at]),
        }  # fmt: skip
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
