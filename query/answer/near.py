"""``ghoststore query --near ROW``: rows whose stored vectors point the same way as that of a row of the part itself."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.settings.keywords import part_of
from ghoststore.settings.option import given
from ghoststore.settings.question import QueryOptions
from ghoststore.store import Part
from ghoststore.store.part.metric import metric_for
from ghoststore.store.where.rows import Chosen
from query.answer.distribution import Distribution, counted_rankings
from query.answer.results import QueryHits, QueryResult, hits_of
from query.ask.chosen import chosen_rows
from query.ask.encoder import ValVectors
from query.ask.question import Question
from query.ask.scorer import Scorer
from query.search.parts import choose_groups, note_repeated, open_parts
from query.search.vectors import PartVectors

TAKEN = {
    *("near", "store", "part", "layers", "exclude_layers", "metric", "precondition", "damping", "where"),
    *("top_k", "bottom_k", "histogram", "text", "data", "device", "progress"),
}
"""The options that it takes: any other is refused."""


@dataclass(frozen=True, kw_only=True)
class _NearQuestion(Question):
    def _refuse_without_val_set(self) -> None:
        pass  # the row stands in its place


def query_near(options: QueryOptions, progress: Progress) -> QueryResult:
    """The rows most and least similar to row ``near`` of the corpus by their stored vectors, without that row itself.

    Of a sample in several windows the mean of their vectors is asked with. No model is needed. Scores have no unit:
    both vectors are rounded. UsageError for what belongs to a val set, for several parts, and for a row that the part
    does not have or that has no vector, and where no other row is left.
    """
    _refuse(options)
    question = part_of(_NearQuestion, options)
    parts, weights = open_parts(question.store, question.part, None, progress)
    (part,) = parts
    if len(part.members) > 1:
        raise UsageError("`near` is a row of one part: give one `part`")
    rows = _rows_of(part, options.near)
    metric_for(question.metric, parts)
    groups = choose_groups(part, question.layers, question.exclude_layers)
    matching = chosen_rows(parts, question.where, progress)
    part.refuse_hollow()
    vector_1D = PartVectors(part).gather(rows).double().mean(0, keepdim=True).float()
    mask = np.zeros(part.layout.rows, dtype=bool)
    mask[part.row_numbers[part.usable()]] = True
    if matching is not None:
        mask &= matching.mask
    mask[rows] = False
    if not mask.any():
        fits = "has a vector" if matching is None else "has a vector and matches `where`"
        raise UsageError(f"`near={options.near}`: no other row of part {part.name!r} {fits}")
    (name,) = {str(of_row) for of_row in part.read_rows("sample_id", rows)}
    scorer = Scorer.of(
        question,
        parts,
        weights,
        [ValVectors(vectors=vector_1D, ids=[name], used=len(rows))],
        progress,
        groups=groups,
        chosen=Chosen(question.where or "", mask, int(mask.sum())),
    )
    note_repeated(part, progress)
    counts = (options.top_k, options.bottom_k)
    counted: list[Distribution | None] = [None]
    if options.histogram:
        rankings, counted = counted_rankings(scorer, *counts, progress)
    else:
        rankings = scorer.rank(*counts, progress)
    (best,), (worst,) = hits_of(part, rankings, options.text, progress, data=question.data)
    return QueryResult(
        store=str(question.store),
        settings=_settings(scorer, options, matching),
        results=[QueryHits(query=name, hits=best, bottom=worst, histogram=counted[0])],
    )


def _refuse(options: QueryOptions) -> None:
    """UsageError for options that a stored row has no use for."""
    for option in given(options, (spec.name for spec in fields(options) if spec.name not in TAKEN)):
        raise UsageError(
            f"`near={options.near}` asks with the stored vector of a row, and {option} has no use there: leave one of "
            "them out"
        )


def _rows_of(part: Part, source_row: int | None) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The rows of the part with a vector that are of row ``source_row`` of its corpus."""
    found = part.column("source_row") == source_row
    if not found.any():
        raise UsageError(
            f"`near={source_row}`: part {part.name!r} has no such row of the corpus; results name it as `source_row`"
        )
    usable = found & part.usable()
    if not usable.any():
        raise UsageError(f"`near={source_row}`: that row has no vector in part {part.name!r}, which `status` tells why")
    rows: np.ndarray[Any, np.dtype[np.int64]] = part.row_numbers[usable]
    return rows


def _settings(scorer: Scorer, options: QueryOptions, matching: Chosen | None) -> dict[str, Any]:
    settings = scorer.settings()
    for name in ("val_set", "val_rows", "val_rows_left_out", "checkpoint", "where", "rows_matching"):
        with suppress(KeyError):
            del settings[name]
    return {
        **settings,
        "near": options.near,
        "mode": "near",
        **({} if matching is None else matching.settings()),
        "unit": None,
        "rerank": None,
        "index": "exact",
        "top_k": options.top_k,
        "bottom_k": options.bottom_k,
        **({"histogram": True} if options.histogram else {}),
        "fidelity": None,
    }
