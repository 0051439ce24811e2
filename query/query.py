"""``ghoststore.query``: a val set to the samples whose gradients point the same way."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.checkpoint import resolve_device
from ghoststore.corpus import Fields, open_corpus
from ghoststore.errors import UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.store import Part, Store
from indexer.layers import layer_type_by_name
from indexer.selection import matches
from query.blend import BLEND, RowValues, blended, checked_weight, rankings_of, values_of_rows
from query.results import BlendedHit, Hit, QueryHits, QueryResult
from query.search import Metric, Ranking, search, similarities
from query.texts import texts_of
from query.valset import encode_val_set


def query(
    *,
    store: str | Path,
    val_set: str | Path,
    part: str | None = None,
    top_k: int = 10,
    bottom_k: int = 0,
    each: bool = False,
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
    if max_samples is not None and max_samples < 1:
        raise UsageError(f"--max-samples must be at least 1, not {max_samples}")
    if metric not in ("dot", "cosine"):
        raise UsageError(f"--metric {metric!r} is unknown; known: dot, cosine")
    weight = checked_weight(score_weight)
    if score_weight is not None and with_scores is None:
        raise UsageError("--score-weight belongs to --with-scores, which names a training run")
    device = resolve_device(device)
    opened = Store.open(store).part(part)
    if not opened.spans:
        raise UsageError(
            f"part {opened.name!r} has no committed rows yet; the build that makes it has not got that far"
        )
    if not opened.complete:
        progress.note(
            f"part {opened.name!r} is not complete: {opened.rows:,} of {opened.layout.rows:,} rows are searched"
        )
    groups = choose_groups(opened, layers, exclude_layers)
    run = None if with_scores is None else Store.open(store).run(with_scores)
    values = None if run is None else values_of_rows(opened, run, progress)
    with open_corpus(str(val_set), fields or Fields()) as corpus:
        val = encode_val_set(
            opened, corpus, average=not each, checkpoint=checkpoint, device=device, max_samples=max_samples,
            progress=progress,
        )  # fmt: skip
    if val.left_out:
        shown = ", ".join(f"{count} {status}" for status, count in sorted(val.left_out.items()))
        progress.note(f"val rows left out: {shown}; {val.used} are used")
    blend: _Blend | None = None
    with closing(progress.task("searching", opened.rows)) as task:
        counts = (min(top_k, opened.rows), min(bottom_k, opened.rows))
        if values is None:
            rankings = search(
                opened, val.vectors, metric=metric, top_k=counts[0], bottom_k=counts[1], groups=groups, device=device,
                task=task,
            )  # fmt: skip
        else:
            found = similarities(opened, val.vectors, metric=metric, groups=groups, device=device, task=task)
            blend = _Blend(found, values, *blended(found, values.value, weight), weight)
            rankings = (rankings_of(blend.scores, counts[0]), rankings_of(blend.scores, counts[1], sign=-1.0))
    if blend is not None and blend.without_score:
        fate = "left out" if weight > 0 else "ranked by similarity, as all are"
        progress.note(
            f"{blend.without_score:,} of {blend.without_score + blend.rows:,} usable rows have no score in run "
            f"{with_scores!r}: they are {fate}"
        )
    hits = _hits(opened, rankings, text, progress, blend)
    return QueryResult(
        store=str(store),
        settings={
            "part": opened.name,
            "val_set": str(val_set),
            "val_rows": val.used,
            "val_rows_left_out": val.left_out,
            "mode": "each" if each else "mean",
            "metric": metric,
            "index": "exact",
            "top_k": top_k,
            "bottom_k": bottom_k,
            "layers": list(layers),
            "exclude_layers": list(exclude_layers),
            "checkpoint": str(checkpoint) if checkpoint else opened.manifest["source"]["checkpoint"],
            "rows": opened.rows,
            **({} if blend is None else {"with_scores": with_scores, **blend.settings()}),
        },
        results=[
            QueryHits(query=name, hits=best, bottom=worst) for name, best, worst in zip(val.ids, *hits, strict=True)
        ],
    )


def choose_groups(part: Part, layers: Sequence[str], exclude_layers: Sequence[str]) -> list[int] | None:
    """Places in ``part.groups`` of the layers that the patterns select; None for all.

    UsageError for a pattern without a layer, and for a part whose blocks were sketched together.
    """
    if not layers and not exclude_layers:
        return None
    if part.manifest["projection"]["compress"] is not None:
        raise UsageError(
            f"part {part.name!r} keeps one sketch of all layers together: it has no scores by layer. Build a part of "
            "plain blocks for that: ghoststore build … --proj-rank-total 256 --name …"
        )
    described = [(str(layer["name"]), layer_type_by_name(layer["type"])) for layer in part.manifest["layers"]]
    for pattern in [*layers, *exclude_layers]:
        if not any(matches(pattern, name, kind) for name, kind in described):
            names = ", ".join(name for name, _ in described[:12])
            raise UsageError(f"layer pattern {pattern!r} matches no layer of part {part.name!r}: {names} …")
    chosen = [
        place
        for place, (name, kind) in enumerate(described)
        if (not layers or any(matches(pattern, name, kind) for pattern in layers))
        and not any(matches(pattern, name, kind) for pattern in exclude_layers)
    ]
    if not chosen:
        raise UsageError(f"no layer of part {part.name!r} is left: {list(layers)} without {list(exclude_layers)}")
    return chosen


@dataclass(frozen=True, slots=True)
class _Blend:
    """Similarities, values and their blend, for every row of the part."""

    similarity: NDArray[np.float64]
    """(queries, rows)."""
    values: RowValues
    scores: NDArray[np.float64]
    """(queries, rows): NaN where a row does not take part."""
    rows: int
    """Usable rows that have a value."""
    weight: float

    @property
    def without_score(self) -> int:
        """Usable rows without a value."""
        return int(np.isfinite(self.similarity[0]).sum()) - self.rows

    def settings(self) -> dict[str, Any]:
        """What the result says of it."""
        return {
            "score_weight": self.weight,
            "blend": BLEND,
            "value": "cumulative",
            "joined_by": self.values.joined_by,
            "run_steps": self.values.steps,
            "rows_blended": self.rows,
            "rows_without_score": self.without_score,
        }

    def hit(self, query: int, row: int, **shared: Any) -> BlendedHit:
        """The hit of a row."""
        value = float(self.values.value[row])
        return BlendedHit(
            **shared, similarity=float(self.similarity[query, row]), value=value if np.isfinite(value) else None
        )


def _hits(
    part: Part, rankings: tuple[Ranking, Ranking], text: bool, progress: Progress, blend: _Blend | None
) -> list[list[list[Hit]]]:
    """For each ranking, for each query, its hits. Every row's data are read once."""
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
        return Hit(**shared) if blend is None else blend.hit(query, row, **shared)

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
