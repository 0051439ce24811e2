"""The results of a query: their fields, how they are made from rankings, and the files they are written to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ghoststore.progress import Progress
from ghoststore.store import Part
from query.ask.blend import Blend
from query.ask.unit import Unit
from query.common.output import columns_of, write_result
from query.common.texts import texts_of
from query.search.search import Ranking


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One row of a ranking. ``rank`` counts from 1."""

    rank: int
    score: float
    nats: float | None = None
    """``score`` in the ``unit`` of the settings, a change of the val loss; None where it has none."""
    id: str
    source_row: int
    domain: str | None
    text: str | None
    """The sample's whole text; None where the source is gone or has changed."""
    window_start: int
    """First token of the row in its sample; 0 unless long samples were split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendedHit(Hit):
    """One row of a ranking by ``with_scores``: ``score`` is the blend of ``similarity`` and ``value``."""

    similarity: float
    """The cosine or dot product."""
    value: float | None
    """Σ weight·score of the sample in the training run; None where the run has no score of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHit(Hit):
    """A sample of a training run: ``score`` is the sum over the steps that it was in."""

    times: int
    """Of these, those that count."""
    last_step: int
    """The newest of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryHits:
    """The best and the worst rows for one query. ``query`` is ``"mean"``, a val sample's id, or a group's name."""

    query: str
    """Of a run's own val gradients ``"own"``."""
    val_row: int | None = None
    """Place of the val sample in the val set, counted from 0, because ids may repeat; None for a mean."""
    hits: Sequence[Hit]
    bottom: Sequence[Hit]
    """The rows with the lowest scores, lowest first; empty without ``bottom_k``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryResult:
    """What ``ghoststore.query`` returns: one :class:`QueryHits` for each query, and the settings they came from."""

    store: str
    settings: dict[str, Any]
    results: list[QueryHits]

    def to_json(self) -> dict[str, Any]:
        """The document that ``ghoststore query --json`` prints; with ``bottom`` only if ``bottom_k`` is not 0."""
        results = [asdict(result) for result in self.results]
        for result in results:
            if not self.settings.get("bottom_k"):
                del result["bottom"]
        return {"store": self.store, "settings": self.settings, "results": results}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One flat row for each hit: query, val_row, list (``top`` or ``bottom``) and the fields of the hit."""
        for result in self.results:
            for name, hits in (("top", result.hits), ("bottom", result.bottom)):
                for hit in hits:
                    yield {"query": result.query, "val_row": result.val_row, "list": name, **asdict(hit)}

    def write(self, path: str | Path) -> None:
        """Write a new file: the document as ``.json``, or flat rows as ``.jsonl``, ``.csv`` or ``.parquet``.

        UsageError for another suffix, or if the file exists.
        """
        columns = {"query": str, "val_row": int, "list": str, **columns_of(self._hit)}
        write_result(path, self.to_json, columns, self.rows())

    @property
    def _hit(self) -> type[Hit]:
        """The class of the hits."""
        return next((type(hit) for result in self.results for hit in (*result.hits, *result.bottom)), Hit)


def with_nats(hits: Sequence[Sequence[Sequence[Hit]]], unit: Unit | None) -> list[list[list[Hit]]]:
    """``hits`` of :func:`hits_of` with their ``nats``, where ``unit`` is one and their scores are products."""
    if unit is None:
        return [[list(ranking) for ranking in rankings] for rankings in hits]
    return [
        [
            [replace(hit, nats=hit.score * unit.factor) if type(hit) is Hit else hit for hit in ranking]
            for ranking in rankings
        ]
        for rankings in hits
    ]


def hits_of(
    part: Part,
    rankings: Sequence[Ranking],
    text: bool,
    progress: Progress,
    blend: Blend | None = None,
    data: str | Path | None = None,
) -> list[list[list[Hit]]]:
    """The hits as ``[ranking][query][rank]``. The data of each row are read once.

    ``text`` says whether to look up texts, in the corpus that the user gives as ``data`` or in the recorded one. With
    ``blend`` a hit has similarity and value too.
    """
    rows = sorted({int(row) for ranking in rankings for row in ranking.rows.ravel() if row >= 0})
    place = {row: index for index, row in enumerate(rows)}
    ids, sources, domains, windows = (
        part.read_rows(name, rows) for name in ("sample_id", "source_row", "domain", "window_start")
    )
    texts = texts_of(part, rows, progress, data) if text else [None] * len(rows)
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
