"""The recall of an index (how much of the exact ranking it finds), and the settings that reach a target recall.

There is no val set when an index is built, so rows of the part serve as queries: single rows, and means of several
rows, where possible of one domain, which are like the mean gradient of a val set. The rows that a query was made of do
not count in its ranking.

Legend: Q queries, D numbers of a vector, C candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ghoststore.progress import Task
from ghoststore.store.part.index_manifest import Recall
from indexer.projection import draws
from query.ann.engine import Engine
from query.ann.rows import CheckedRows
from query.ann.searcher import Searcher
from query.search.part_score import Metric, Term
from query.search.search import search
from query.search.top_k import Ranking

QUERIES = 64
"""Number of queries of each kind."""
MEMBERS = 16
"""Number of rows in a mean."""
CUTS = (10, 100)
CANDIDATES = (128, 256, 512, 1024, 2048, 4096)
"""Numbers of candidates to try, cheapest first. Candidates are scored exactly."""
RANDOM_READ = 4
"""Reading one byte of a single row takes about as long as scanning this many bytes of codes."""
KEY = "ghoststore/1|index|recall"


@dataclass(frozen=True, slots=True)
class SampleQueries:
    """Queries of one kind, the rows they were made of, and their exact ranking without those rows."""

    term: Term
    own: NDArray[np.int64]
    """(Q, members): the rows that each query was made of."""
    exact: Ranking
    """The 100 best rows, or all if there are fewer."""


def take_samples(rows: CheckedRows, domain: NDArray[np.int16], metric: Metric, task: Task) -> dict[str, SampleQueries]:
    """Sample queries by kind (``row`` and ``mean``), ranked in one exact search. ``domain`` has one entry a row of the
    table.
    """
    usable = np.flatnonzero(rows.table["length"] > 0)
    order = usable[draws.permutation(f"{KEY}|rows", len(usable))]
    members = max(1, min(MEMBERS, len(order) // 4))
    places_by_kind = {"row": order[:QUERIES, None], "mean": _groups(order, domain, members)}
    terms, own = {}, {}
    for kind, places in places_by_kind.items():
        ascending, inverse = np.unique(places, return_inverse=True)
        mean_QD = rows.read(ascending).double()[torch.from_numpy(inverse.reshape(places.shape))].mean(1)
        not_zero = (mean_QD.norm(dim=1) > 0).numpy()
        terms[kind] = Term.of(rows.part, mean_QD[torch.from_numpy(not_zero)], metric=metric)
        own[kind] = rows.table["row"][places[not_zero]]
    all_queries = terms["row"].with_queries(torch.cat([term.queries_QD for term in terms.values()]))
    exact, _ = search([all_queries], top_k=max(CUTS) + members, task=task)
    split = len(terms["row"].queries_QD)
    parts = {"row": slice(None, split), "mean": slice(split, None)}
    return {
        kind: SampleQueries(term, own[kind], without(_queries_of(exact, parts[kind]), own[kind], max(CUTS)))
        for kind, term in terms.items()
        if len(term.queries_QD)
    }


def _groups(order: NDArray[np.int64], domain: NDArray[np.int16], members: int) -> NDArray[np.int64]:
    """(queries, members): places of the rows to average, each group of one domain, taking domains in turn."""
    groups: list[NDArray[np.int64]] = []
    by_domain = [order[domain[order] == place] for place in np.unique(domain[order])]
    for turn in range(QUERIES):
        for places in by_domain:
            group = places[turn * members : (turn + 1) * members]
            if len(group) == members and len(groups) < QUERIES:
                groups.append(group)
    return np.stack(groups) if groups else order[None, :members]


def _queries_of(ranking: Ranking, queries: slice) -> Ranking:
    return Ranking(ranking.rows[queries], ranking.scores[queries])


def without(ranking: Ranking, own: NDArray[np.int64], k: int) -> Ranking:
    """The best ``k`` rows of each query that are not among its ``own`` rows; fewer if no query has ``k``."""
    others = ~(ranking.rows[:, :, None] == own[:, None, :]).any(2) & (ranking.rows >= 0)
    order = np.argsort(~others, axis=1, kind="stable")[:, :k]
    others_first = np.take_along_axis(others, order, axis=1)
    rows = np.where(others_first, np.take_along_axis(ranking.rows, order, axis=1), -1)
    return Ranking(rows, np.where(others_first, np.take_along_axis(ranking.scores, order, axis=1), -np.inf))


def tune(
    engine: Engine, searcher: Searcher, samples: Mapping[str, SampleQueries], target: float, code_bytes: float
) -> tuple[int | None, int]:
    """The cheapest (effort, candidates) with which every kind of query reaches the recall ``target`` at 10.

    If none does, those with the highest recall. Candidates are scored exactly, so a row of the exact ranking is in the
    result if it is among the candidates: their places are all that must be known. Cost is counted in bytes, not
    measured in time, so the same index gets the same settings.
    """
    row_bytes = RANDOM_READ * searcher.rows.part.encoding.stored.itemsize * searcher.rows.part.layout.dimension
    reached: list[tuple[float, int | None, int]] = []
    best: tuple[float, float, int | None, int] | None = None
    for effort in engine.efforts():
        engine.set_effort(effort)
        scanned = engine.share(effort) * engine.rows * code_bytes
        if reached and scanned > min(reached)[0]:
            break
        ranks = {kind: _ranks_of_exact(searcher, sample) for kind, sample in samples.items()}
        for candidates in CANDIDATES:
            recall = min(float(np.mean(rank < candidates)) if len(rank) else 1.0 for rank in ranks.values())
            cost = scanned + min(candidates, engine.rows) * row_bytes
            if best is None or (-recall, cost) < best[:2]:
                best = (-recall, cost, effort, candidates)
            if recall >= target:
                reached.append((cost, effort, candidates))
                break
    assert best is not None
    _, effort, candidates = min(reached, key=lambda setting: setting[0]) if reached else best[1:]
    return effort, candidates


def _ranks_of_exact(searcher: Searcher, sample: SampleQueries) -> NDArray[np.int64]:
    """For each of the ten exactly best rows of each query its place among the candidates, or one past the last."""
    exact = sample.exact.rows[:, : min(CUTS)]
    places_QC = searcher.engine.search(searcher.front.queries(sample.term.queries_QD), max(CANDIDATES))
    rows_QC = np.where(places_QC >= 0, searcher.rows.table["row"][places_QC], -1)
    ranks = []
    for wanted, candidates in zip(exact, rows_QC, strict=True):
        place = {row: rank for rank, row in enumerate(candidates.tolist())}
        ranks += [place.get(row, max(CANDIDATES)) for row in wanted.tolist() if row >= 0]
    return np.array(ranks, dtype=np.int64)


def measure(searcher: Searcher, samples: Mapping[str, SampleQueries]) -> dict[str, Recall]:
    """The recall of the rankings of ``searcher``, by kind of query."""
    return {
        kind: Recall(
            queries=len(sample.own),
            at_10=_recall(searcher, sample, CUTS[0]),
            at_100=_recall(searcher, sample, CUTS[1]),
        )
        for kind, sample in samples.items()
    }


def _recall(searcher: Searcher, sample: SampleQueries, k: int) -> float:
    """The recall of a search for ``k`` rows. The rows that a query was made of are candidates, too, and are left out of
    the ranking: a query from elsewhere finds as many rows or more.
    """
    ranking, _ = searcher.search(sample.term, top_k=k + sample.own.shape[1], wanted=k)
    return recall_of(without(ranking, sample.own, k), sample.exact, k)


def recall_of(ranking: Ranking, exact: Ranking, k: int) -> float:
    """Mean share (0 to 1) of the ``k`` exactly best rows that ``ranking`` has; a row of equal score counts, too."""
    shares = []
    for rows, scores, best_rows, best_scores in zip(
        ranking.rows[:, :k], ranking.scores[:, :k], exact.rows[:, :k], exact.scores[:, :k], strict=True
    ):
        wanted = int((best_rows >= 0).sum())
        if wanted:
            shares.append(min(wanted, int(((scores >= best_scores[wanted - 1]) & (rows >= 0)).sum())) / wanted)
    return float(np.mean(shares)) if shares else 1.0
