"""``ghoststore.query`` of a training run: the samples whose gradients, as the run keeps them, point a val set's way."""

from __future__ import annotations

from dataclasses import fields, replace

from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.settings.keywords import part_of
from ghoststore.settings.option import given
from ghoststore.settings.question import QueryOptions, RerankOptions
from query.answer.results import QueryHits, QueryResult, RunHit
from query.ask.blend import rankings_of
from query.ask.run_question import RunQuestion
from query.ask.run_scorer import RunScorer, VisitSums, opened_val_set
from query.common.texts import texts_of
from query.search.top_k import Ranking

OF_PARTS = ("index", "index_name", *(spec.name for spec in fields(RerankOptions)), "report", "tokens", "histogram")
"""Options of a query that a run has no use for, beside those that `RunQuestion` refuses."""


def query_run(options: QueryOptions, progress: Progress) -> QueryResult:
    """The answer to a question to a run, see :func:`ghoststore.query`."""
    for option in given(options, OF_PARTS):
        raise UsageError(f"{option} is for parts, and `run={options.run}` asks a training run: leave it out")
    question = replace(part_of(RunQuestion, options), all_candidates=options.candidates)
    with opened_val_set(question, progress) as val_set, question.opened_minus(progress) as minus:
        scorer = RunScorer(question, val_set, progress, minus)
    sums = scorer.sums(progress)
    counts = (min(options.top_k, len(scorer.units)), min(options.bottom_k, len(scorer.units)))
    rankings = rankings_of(sums.score, counts[0]), rankings_of(sums.score, counts[1], sign=-1.0)
    best, worst = _hits(scorer, sums, rankings, options, progress)
    seen = {
        "samples": int((sums.times > 0).sum()),
        "visits": int(sums.times.sum()),
        "visits_left_out": sums.left_out,
        "candidates_left_out": sums.not_chosen,
    }
    return QueryResult(
        store=str(options.store),
        settings={**scorer.settings(), **seen, "top_k": options.top_k, "bottom_k": options.bottom_k},
        results=[
            QueryHits(query=name, hits=best[place], bottom=worst[place], val_row=val_row)
            for place, (name, val_row) in enumerate(zip(scorer.names, scorer.val_rows, strict=True))
        ],
    )


def _hits(
    scorer: RunScorer, sums: VisitSums, rankings: tuple[Ranking, Ranking], options: QueryOptions, progress: Progress
) -> list[list[list[RunHit]]]:
    """For the best and the worst, for each query, the hits. Every sample's data are read once."""
    run = scorer.run
    units = sorted({int(unit) for ranking in rankings for unit in ranking.rows.ravel() if unit >= 0})
    place_of = {unit: place for place, unit in enumerate(units)}
    rows = scorer.units.first_row[units].tolist()
    ids, sources, domains = (run.rows.read_rows(name, rows) for name in ("sample_id", "source_row", "domain"))
    texts = texts_of(run, rows, progress, options.data) if options.text else [None] * len(rows)

    def hit(rank: int, unit: int, score: float) -> RunHit:
        at = place_of[unit]
        return RunHit(
            rank=rank,
            score=score,
            id=str(ids[at]),
            source_row=int(sources[at]),
            domain=run.domains[domains[at]] if domains[at] >= 0 else None,
            text=texts[at],
            window_start=0,
            times=int(sums.times[unit]),
            last_step=int(sums.last_step[unit]),
        )

    return [
        [
            [
                hit(rank, int(unit), float(score))
                for rank, (unit, score) in enumerate(zip(of_query, scores, strict=True), 1)
                if unit >= 0
            ]
            for of_query, scores in zip(ranking.rows, ranking.scores, strict=True)
        ]
        for ranking in rankings
    ]
