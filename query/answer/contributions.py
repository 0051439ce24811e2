"""What each layer adds to a score: ⟨query, row⟩ as a sum over the blocks of the layers.

Some parts keep one sketch of all layers together. Then the model recomputes the blocks before the sketch, for the val
set and for the rows shown.

Legend: Q queries, R rows, D numbers of a vector, G layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import MismatchError, UsageError
from ghoststore.progress import Progress
from query.ask.groups import with_mean
from query.ask.question import Question
from query.ask.scorer import Scorer
from query.search.part_score import Term, contrasted
from query.search.search import RowFacts
from query.search.vectors import PartVectors

MOST_VAL_VECTORS = 256
"""Most val vectors to recompute before the sketch, where they are large."""


@dataclass(frozen=True, slots=True)
class Contributions:
    """What each layer adds to the scores of the rows shown."""

    layers: list[str]
    of: list[dict[int, NDArray[np.float64]]]
    """For each ranking a dictionary of row to (G,). It is empty for a combined ranking that is no sum over layers."""
    note: str
    """A sentence for the reader: how the contributions were computed."""

    def times(self, factor: float) -> Contributions:
        """In another unit."""
        return replace(self, of=[{row: sums * factor for row, sums in ranking.items()} for ranking in self.of])


def contributions(scorer: Scorer, rows: Sequence[Sequence[int]], progress: Progress) -> Contributions | str:
    """The contributions to the scores of ``rows[i]`` in ranking i of ``scorer``.

    Where they cannot be computed (a sketched part whose corpus is gone, for example), the reason as a phrase.
    """
    extra = len(scorer.names) - len(scorer.terms[0].queries_QD)
    queries = [place - extra if place >= extra else None for place in range(len(rows))]
    if not scorer.part.sketched_together:
        layers = [scorer.part.groups[place][0] for place in _layers(scorer.terms[0])]
        of = [_by_vectors(scorer.terms, query, ranking_rows) for query, ranking_rows in zip(queries, rows, strict=True)]
        return Contributions(layers, of, "To the similarity: they sum to it.")
    if not recomputable(scorer.question, len(scorer.terms)):
        return "the part keeps one sketch of all layers, and scores are of several parts or preconditioned"
    if len(scorer.val.ids) > MOST_VAL_VECTORS:
        return f"there are more than {MOST_VAL_VECTORS} val vectors, and the part keeps one sketch of all layers"
    try:
        return _by_blocks(scorer, queries, rows, progress)
    except (UsageError, MismatchError) as error:  # model and val set have just been used: only the corpus can fail
        return f"the part keeps one sketch of all layers, and its rows cannot be computed again ({error})"


def recomputable(question: Question, parts: int) -> bool:
    """Whether scores are plain inner products or cosines of one part's gradients, so that recomputed blocks
    give them.
    """
    return parts == 1 and question.precondition == "none"


def _layers(term: Term) -> Sequence[int]:
    return range(len(term.part.groups)) if term.groups is None else term.groups


def _by_vectors(terms: Sequence[Term], query: int | None, rows: Sequence[int]) -> dict[int, NDArray[np.float64]]:
    """Dictionary of row to (G,) for one query, from the blocks of the stored vectors."""
    if query is None or not rows:
        return {}
    ascending = sorted(rows)
    total = np.zeros((len(ascending), len(_layers(terms[0]))))
    for term in terms:
        facts = RowFacts.for_term(term)
        factor = np.array([facts.of(row, row + 1)[2][0] for row in ascending])
        columns = [term.part.groups[place][1:] for place in _layers(term)]
        total += _by_layer(PartVectors(term.part).gather(ascending), term.queries_QD[query], columns) * factor[:, None]
    return dict(zip(ascending, total, strict=True))


def _by_blocks(
    scorer: Scorer, queries: Sequence[int | None], rows: Sequence[Sequence[int]], progress: Progress
) -> Contributions:
    """Contributions from blocks before the sketch, which the model recomputes for the val set and the rows."""
    assert scorer.encoder is not None
    assert scorer.val_set is not None
    encoder, question = scorer.encoder.unsketched(), scorer.question
    val = encoder.encode_val_set(scorer.val_set, question.grouping, question.max_samples, question.phrase)
    cosine = scorer.metric == "cosine"
    queries_QD = val.vectors.double()
    if scorer.minus_set is not None:
        minus = encoder.encode_val_set(scorer.minus_set, "mean", None)
        queries_QD = contrasted(queries_QD, minus.vectors[0].double(), names=val.ids)
    if cosine:
        queries_QD = queries_QD / queries_QD.norm(dim=1, keepdim=True)
    if len(scorer.terms[0].queries_QD) > len(queries_QD):
        queries_QD = with_mean(queries_QD)
    columns = [(start, stop) for _, start, stop in encoder.groups]
    of: list[dict[int, NDArray[np.float64]]] = []
    for query, ranking_rows in zip(queries, rows, strict=True):
        if query is None or not ranking_rows:
            of.append({})
            continue
        rows_RD = encoder.recompute(ranking_rows).double()
        if cosine:
            rows_RD = rows_RD / rows_RD.norm(dim=1, keepdim=True).clamp_min(np.finfo(np.float64).tiny)
        of.append(dict(zip(ranking_rows, _by_layer(rows_RD, queries_QD[query], columns), strict=True)))
    note = "To the similarity, computed again before the sketch, which moves it a little: they sum to what it was."
    return Contributions([name for name, _, _ in encoder.groups], of, note)


def _by_layer(rows_RD: Tensor, query_D: Tensor, columns: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """(R, G): the product of each row with the query in each layer."""
    product_RD = rows_RD.double() * query_D.double()
    return np.asarray(torch.stack([product_RD[:, start:stop].sum(1) for start, stop in columns], dim=1).numpy())
