"""``ghoststore.query``: a val set to the samples whose gradients point the same way."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from ghoststore.checkpoint import resolve_device
from ghoststore.corpus import Fields, open_corpus
from ghoststore.errors import UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.store import Part, Store
from indexer.layers import layer_type_by_name
from indexer.selection import matches
from query.results import Hit, QueryHits, QueryResult
from query.search import Metric, Ranking, search
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
    progress: Progress | None = None,
) -> QueryResult:
    """The training samples most (``top_k``) and least (``bottom_k``) similar to ``val_set``, by exact search.

    With ``each`` one ranking for every val sample, else one for their mean gradient. ``metric`` is ``dot`` or
    ``cosine``. ``layers`` and ``exclude_layers`` are patterns that restrict the score to some layers of a part
    of plain Kronecker blocks. The val set goes through the model, tokenization and projection that the part's
    manifest names; ``checkpoint`` is another path to the same weights.

    Raises UsageError for a val set without a usable row and patterns that fit nothing, MismatchError for
    another checkpoint, tokenizer or projection, CorruptError for damaged rows.
    """
    progress = progress or Silent()
    if top_k < 0 or bottom_k < 0 or not top_k + bottom_k:
        raise UsageError(f"--top-k {top_k} and --bottom-k {bottom_k}: ask for at least one row")
    if max_samples is not None and max_samples < 1:
        raise UsageError(f"--max-samples must be at least 1, not {max_samples}")
    if metric not in ("dot", "cosine"):
        raise UsageError(f"--metric {metric!r} is unknown; known: dot, cosine")
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
    with open_corpus(str(val_set), fields or Fields()) as corpus:
        val = encode_val_set(
            opened, corpus, average=not each, checkpoint=checkpoint, device=device, max_samples=max_samples,
            progress=progress,
        )  # fmt: skip
    if val.left_out:
        shown = ", ".join(f"{count} {status}" for status, count in sorted(val.left_out.items()))
        progress.note(f"val rows left out: {shown}; {val.used} are used")
    with closing(progress.task("searching", opened.rows)) as task:
        top, bottom = search(
            opened, val.vectors, metric=metric, top_k=min(top_k, opened.rows), bottom_k=min(bottom_k, opened.rows),
            groups=groups, device=device, task=task,
        )  # fmt: skip
    hits = _hits(opened, [top, bottom], text, progress)
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


def _hits(part: Part, rankings: list[Ranking], text: bool, progress: Progress) -> list[list[list[Hit]]]:
    """For each ranking, for each query, its hits. Every row's data are read once."""
    rows = sorted({int(row) for ranking in rankings for row in ranking.rows.ravel() if row >= 0})
    place = {row: index for index, row in enumerate(rows)}
    ids, sources, domains, windows = (
        part.read_rows(name, rows) for name in ("sample_id", "source_row", "domain", "window_start")
    )
    texts = texts_of(part, rows, progress) if text else [None] * len(rows)
    names = part.domains

    def hit(rank: int, row: int, score: np.float64) -> Hit:
        at = place[row]
        return Hit(
            rank=rank, score=float(score), id=str(ids[at]), source_row=int(sources[at]),
            domain=names[domains[at]] if domains[at] >= 0 else None, text=texts[at], window_start=int(windows[at]),
        )  # fmt: skip

    return [
        [
            [
                hit(rank, int(row), score)
                for rank, (row, score) in enumerate(zip(rows_q, scores_q, strict=True), 1)
                if row >= 0
            ]
            for rows_q, scores_q in zip(ranking.rows, ranking.scores, strict=True)
        ]
        for ranking in rankings
    ]
