"""What each layer adds to a score: ⟨query, row⟩ cut at the borders of the blocks.

Where a part keeps one sketch of all layers together, the blocks before the sketch are computed again from the model,
for the val set and for the rows concerned.

Legend: Q queries, R rows, D numbers of a vector, G layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.corpus import open_corpus
from ghoststore.errors import MismatchError, UsageError
from ghoststore.progress import Progress
from query.ask.recompute import RowsAgain
from query.ask.scorer import Asked, encode
from query.search.part_score import RowFacts, Term
from query.search.vectors import StoredRows

MOST_VAL_VECTORS = 256
"""Of blocks before the sketch, which are large."""


@dataclass(frozen=True, slots=True)
class Contributions:
    """What layers add to scores."""

    layers: list[str]
    of: list[dict[int, NDArray[np.float64]]]
    """For each ranking: row to (G,); empty for a combined ranking that is no sum over layers."""
    note: str
    """How they came about, for a reader."""


def contributions(asked: Asked, rows: Sequence[Sequence[int]], progress: Progress) -> Contributions | str:
    """For ``rows`` of each of the rankings of ``asked``. Where that is not possible, as without the corpus behind a
    sketched part: the reason, in words.
    """
    sketched = asked.part.sketched_together
    if not sketched:
        names = [asked.part.groups[place][0] for place in _chosen(asked.terms[0])]
        note = "To the similarity: they sum to it."
        return Contributions(names, [_stored(asked.terms, query, mine) for query, mine in _queries(asked, rows)], note)
    if len(asked.terms) > 1 or asked.question.precondition != "none":
        return "the part keeps one sketch of all layers, and scores are of several parts or preconditioned"
    if len(asked.val.ids) > MOST_VAL_VECTORS:
        return f"there are more than {MOST_VAL_VECTORS} val vectors, and the part keeps one sketch of all layers"
    try:
        return _again(asked, rows, progress)
    except (UsageError, MismatchError) as error:  # model and val set are those of a moment ago: it is the corpus
        return f"the part keeps one sketch of all layers, and its rows cannot be computed again ({error})"


def _queries(asked: Asked, rows: Sequence[Sequence[int]]) -> list[tuple[int | None, Sequence[int]]]:
    """(place of the query among those of the terms, or None; its rows), for each ranking."""
    extra = len(asked.names) - len(asked.terms[0].queries_QD)
    return [(place - extra if place >= extra else None, mine) for place, mine in enumerate(rows)]


def _chosen(term: Term) -> Sequence[int]:
    return range(len(term.part.groups)) if term.groups is None else term.groups


def _stored(terms: Sequence[Term], query: int | None, rows: Sequence[int]) -> dict[int, NDArray[np.float64]]:
    """Row to (G,) for one query, from the stored blocks."""
    if query is None or not rows:
        return {}
    wanted = sorted(rows)
    total = np.zeros((len(wanted), len(_chosen(terms[0]))))
    for term in terms:
        facts = RowFacts.for_term(term)
        factor = np.array([facts.of(row, row + 1)[2][0] for row in wanted])
        columns = [term.part.groups[place][1:] for place in _chosen(term)]
        total += _cut(StoredRows(term.part).gather(wanted), term.queries_QD[query], columns) * factor[:, None]
    return dict(zip(wanted, total, strict=True))


def _cut(rows_RD: Tensor, query_D: Tensor, columns: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """(R, G): the product of each row with the query, layer by layer."""
    product_RD = rows_RD.double() * query_D.double()
    return np.asarray(torch.stack([product_RD[:, start:stop].sum(1) for start, stop in columns], dim=1).numpy())


def _again(asked: Asked, rows: Sequence[Sequence[int]], progress: Progress) -> Contributions:
    """From blocks that the model computes again."""
    question = asked.question
    with open_corpus(str(question.val_set), question.val_fields()) as corpus:
        val = encode(asked.part, corpus, question, asked.device, progress, blocks=True)
    cosine = question.metric == "cosine"
    queries_QD = val.vectors.double()
    if cosine:
        queries_QD = queries_QD / queries_QD.norm(dim=1, keepdim=True)
    if len(asked.terms[0].queries_QD) > len(queries_QD):
        queries_QD = torch.cat([queries_QD.mean(0, keepdim=True), queries_QD])
    found: list[dict[int, NDArray[np.float64]]] = []
    with RowsAgain(
        asked.part, checkpoint=question.checkpoint, device=asked.device, blocks=True, progress=progress
    ) as again:
        columns = [(start, stop) for _, start, stop in again.groups]
        for query, mine in _queries(asked, rows):
            if query is None or not mine:
                found.append({})
                continue
            rows_RD = again(mine).double()
            if cosine:
                rows_RD = rows_RD / rows_RD.norm(dim=1, keepdim=True).clamp_min(np.finfo(np.float64).tiny)
            found.append(dict(zip(mine, _cut(rows_RD, queries_QD[query], columns), strict=True)))
        names = [name for name, _, _ in again.groups]
    note = "To the similarity, computed again before the sketch, which moves it a little: they sum to what it was."
    return Contributions(names, found, note)
