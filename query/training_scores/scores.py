"""``ghoststore.scores``: which samples helped a model while it trained, by the scores of its run.

The value of a sample is by default Σ over steps of s_i,t ÷ the step's mean |s|. With ``weight="learning-rate"`` it is
Σ η_t·s_i,t: In-Run Data Shapley of first order (Wang et al. 2024, arXiv:2406.11011, section 4.1). Read
``docs/scores.md`` for what it tells.

Legend: U units (samples, or windows).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.store import ScoresOptions
from ghoststore.store import Run, Store
from ghoststore.store.run.ranges import Steps, inside
from ghoststore.store.run.ranges import count as steps_in
from query.common.output import check_picture
from query.common.texts import texts_of
from query.training_scores.matching import chosen_units
from query.training_scores.results import DomainScores, HistoryEntry, ScoreHit, ScoresResult, ScoreSummary
from query.training_scores.steps import (
    Places,
    ScoreColumn,
    choose_column,
    gaps_of,
    stream_steps,
    window_of,
)
from query.training_scores.sums import WEIGHTED, ScoreSums, Units, Value, best, standard_error
from query.training_scores.weights import StepWeights

DEFAULT_TOP_K = 10


@takes(ScoresOptions)
def scores(options: ScoresOptions) -> ScoresResult:
    """The samples with the highest (``top_k``, by default 10) and lowest (``bottom_k``) values in a training run.

    With ``by="domain"`` a table of domains instead, with ``sample`` the history of the sample of that id (of each, with
    a running sum of its own, where several have it). ``value`` is
    ``cumulative`` (Σ w·s), ``mean`` (that ÷ times), ``sum`` (Σ s) or ``last`` (the newest score). ``weight`` says what
    w of a step is: ``unit``, ``learning-rate`` or ``loss-fall``, see ``docs/scores.md``. ``steps`` is a
    window, ``"0:100"`` or a slice. ``group`` takes the scores against one val group, ``layers`` and
    ``exclude_layers`` those of some layers (module paths or globs). ``min_times`` leaves out what was scored less
    often, ``domains`` keeps some domains alone, ``where`` what matches an SQL condition on the columns of the row
    table (id, domain, n_tokens, source_row, source_file, window_start; a sample of several windows matches where
    any does). Where steps chose among candidates, a score counts with the weight that its sample had in the step;
    ``candidates`` counts those that were not trained on, too, all alike. ``plot`` draws scores by domain to a new
    .png, .pdf or .svg file.

    Reads a run while it is written, too: what is committed at that moment. Scores that are not finite enter nothing;
    they are counted. One pass over the steps; memory grows with the row table alone.

    Raises UsageError for a run without steps and for what it does not have or keep, CorruptError for damaged steps.
    """
    progress = options.progress or Silent()
    _refuse_usage(options)
    top_k = DEFAULT_TOP_K if options.top_k is None else options.top_k
    bottom_k = 0 if options.bottom_k is None else options.bottom_k
    if options.plot is not None:
        from query.training_scores.plots import plot_scores

        check_picture(options.plot, "plot")
    run = Store.open(options.store).run(options.run)
    if options.candidates and not run.layout.weights:
        raise UsageError(
            f"`candidates`: run {run.name!r} trained on every sample it scored; `ghoststore train --candidates` "
            "makes steps choose"
        )
    column = choose_column(run, options.group, options.layers, options.exclude_layers)
    window = window_of(run, options.steps)
    domains = _domain_places(run, options.domains)
    units = Units(run, options.unit)
    chosen = chosen_units(run, units, options.where, progress)
    sums = ScoreSums(len(units), weighted=options.value in WEIGHTED)
    same_id, history = None, None
    if options.sample is not None:
        rows, same_id = _rows_of_id(run, options.sample, progress)
        history = _History(run, rows)
    weights = StepWeights(run, options.weight, window)
    _read(run, column, window, units, sums, weights, history, progress, candidates=options.candidates)
    if history is not None and not history.entries:
        progress.note(f"sample {options.sample!r} was not trained on in these steps")
    allowed = _allowed(units, sums, domains, options.min_times)
    if chosen is not None:
        allowed &= chosen.mask
    hits: list[list[ScoreHit]] = [[], []]
    if history is None and options.by is None:
        values = np.where(allowed, sums.values(options.value), np.nan)
        hits = hits_of(run, units, sums, values, (top_k, bottom_k), options, progress)
    if options.plot is not None:
        plot_scores(
            run,
            options.plot,
            steps=options.steps,
            group=options.group,
            layers=options.layers,
            exclude_layers=options.exclude_layers,
            candidates=options.candidates,
            weight=options.weight,
            over=False,
        )
    return ScoresResult(
        store=str(options.store),
        settings={
            **_settings(options, run, window, top_k, bottom_k),
            **({} if chosen is None else chosen.settings()),
        },
        summary=_summary(run, window, units, sums),
        hits=hits[0],
        bottom=hits[1],
        domains=by_domain(run, units, sums, options.value, allowed) if options.by else None,
        history=None if history is None else history.entries,
        same_id=same_id,
    )


def _settings(options: ScoresOptions, run: Run, window: Steps, top_k: int, bottom_k: int) -> dict[str, Any]:
    """What the result says of how it came about."""
    return {
        "run": run.name,
        "value": options.value,
        "weight": options.weight if options.value in WEIGHTED else None,
        "top_k": top_k,
        "bottom_k": bottom_k,
        "sample": options.sample,
        "by": options.by,
        "steps": list(window),
        "group": options.group,
        "layers": list(options.layers),
        "exclude_layers": list(options.exclude_layers),
        "unit": options.unit,
        "min_times": options.min_times,
        "domains": list(options.domains),
        "candidates": options.candidates,
    }


def _read(
    run: Run,
    column: ScoreColumn,
    window: Steps,
    units: Units,
    sums: ScoreSums,
    weights: StepWeights,
    history: _History | None,
    progress: Progress,
    *,
    candidates: bool,
) -> None:
    """Read the steps of ``window`` once, into ``sums`` and ``history``."""
    ranges = inside(run.ranges, window)
    with closing(progress.task("reading scores", steps_in(ranges), unit="steps")) as task:
        for piece in stream_steps(
            run, column, ranges, loss=history is not None, candidates=candidates, weights=weights
        ):
            places = piece.places
            counts = sums.add(places, units.of(places.row))
            sums.tally.not_chosen += piece.not_chosen
            if history is not None:
                history.extend(places, counts)
            task.advance(piece.stop - piece.start)


def _refuse_usage(options: ScoresOptions) -> None:
    """UsageError for options out of range, and for options that would be ignored."""
    ranked = {"`top_k`": options.top_k, "`bottom_k`": options.bottom_k}
    for name, count in ranked.items():
        if count is not None and count < 0:
            raise UsageError(f"{name} must be at least 0, not {count}")
    top, bottom = ranked.values()
    if top == 0 and not bottom:
        raise UsageError("`top_k=0` without `bottom_k`: ask for at least one sample")
    if options.min_times is not None and options.min_times < 1:
        raise UsageError(f"`min_times` must be at least 1, not {options.min_times}")
    if options.weight != ScoresOptions.weight and options.value not in WEIGHTED:
        raise UsageError(f"`weight={options.weight}` belongs to `value=cumulative` and mean, not to {options.value}")
    if options.where is not None and options.plot is not None:
        raise UsageError("`plot` draws the scores of all samples: give it without `where`")
    excluded = [name for name, count in ranked.items() if count is not None]
    if options.by is not None and excluded:
        raise UsageError(f"`by=domain` is a table of domains: it does not go with {excluded[0]}")
    if options.sample is not None:
        excluded += ["`by`"] * (options.by is not None) + ["`min_times`"] * (options.min_times is not None)
        excluded += ["`domains`"] * bool(options.domains) + ["`value`"] * (options.value != "cumulative")
        excluded += ["`unit`"] * (options.unit != "sample") + ["`where`"] * (options.where is not None)
        if excluded:
            raise UsageError(f"`sample` shows everything of one sample: it does not go with {excluded[0]}")


def _domain_places(run: Run, names: Sequence[str]) -> list[int] | None:
    """The places of the domains called ``names``; None for all. UsageError for a domain that the run does not have."""
    unknown = [name for name in names if name not in run.domains]
    if unknown:
        raise UsageError(f"run {run.name!r} has no domain {unknown[0]!r}; it has: {', '.join(run.domains) or 'none'}")
    return [run.domains.index(name) for name in names] or None


def _rows_of_id(run: Run, sample: str, progress: Progress) -> tuple[NDArray[np.int64], int]:
    """(rows of all samples with the id ``sample``, windows included; number of these samples). UsageError if none has
    it.
    """
    size = run.layout.row_arrays()[0].chunk_rows
    rows: list[int] = []
    for start in range(0, len(run.rows), size):
        ids = run.rows.read("sample_id", start, min(start + size, len(run.rows)))
        rows += (np.flatnonzero(ids == sample) + start).tolist()
    if not rows:
        examples = ", ".join(repr(str(name)) for name in run.rows.read("sample_id", 0, min(3, len(run.rows))))
        raise UsageError(f"run {run.name!r} has no sample with the id {sample!r}; its first are {examples}")
    samples = len(np.unique(run.rows.read_rows("source_row", rows)))
    if samples > 1:
        progress.note(f"{samples} samples have the id {sample!r}, each with its own sum: tell them apart by row")
    return np.asarray(rows, dtype=np.int64), samples


class _History:
    """Every time that ``rows`` were trained on. The windows of a sample share one running sum; two samples do not, even
    if they have the same id.
    """

    def __init__(self, run: Run, rows: NDArray[np.int64]) -> None:
        self._run = run
        self._rows = rows
        self._sums: dict[int, float] = {}
        """Running sums by source row."""
        self.entries: list[HistoryEntry] = []

    def extend(self, places: Places, counts: NDArray[np.bool_]) -> None:
        """Append what ``places`` hold of the rows; ``counts`` says which of their scores count."""
        matches = np.flatnonzero(np.isin(places.row, self._rows))
        if not len(matches):
            return
        rows = places.row[matches]
        sources, starts = (self._run.rows.read_rows(name, rows) for name in ("source_row", "window_start"))
        for place, source, start in zip(matches.tolist(), sources.tolist(), starts.tolist(), strict=True):
            assert places.loss is not None
            score, eta = float(places.score[place]), float(places.learning_rate[place])
            weighted = float(places.weight[place]) * score if counts[place] else None
            self._sums[source] = self._sums.get(source, 0.0) + (weighted or 0.0)
            self.entries.append(
                HistoryEntry(
                    step=int(places.step[place]),
                    rank=int(places.rank[place]),
                    source_row=source,
                    window_start=start,
                    loss=finite(float(places.loss[place])),
                    learning_rate=finite(eta),
                    score=finite(score),
                    weighted=weighted,
                    cumulative=self._sums[source],
                )
            )


def _allowed(units: Units, sums: ScoreSums, chosen: Sequence[int] | None, min_times: int | None) -> NDArray[np.bool_]:
    """(U,): true for units of the chosen domains that were scored at least ``min_times`` times."""
    allowed: NDArray[np.bool_] = sums.times >= (min_times or 0)
    return allowed if chosen is None else allowed & np.isin(units.domain, chosen)


def _summary(run: Run, window: Steps, units: Units, sums: ScoreSums) -> ScoreSummary:
    ranges = inside(run.ranges, window)
    tally = sums.tally
    return ScoreSummary(
        steps=steps_in(ranges),
        first=ranges[0][0],
        last=ranges[-1][1] - 1,
        planned=run.layout.steps,
        gaps=gaps_of(run, window),
        rows=len(units),
        seen=int(sums.seen.sum()),
        times=tally.times,
        scored=tally.scored,
        unscored=tally.unscored,
        not_finite=tally.not_finite,
        without_learning_rate=tally.without_learning_rate,
        not_chosen=tally.not_chosen,
        negative_share=tally.negative_share,
        repeated_ids=run.repeated_ids,
    )


def hits_of(
    run: Run,
    units: Units,
    sums: ScoreSums,
    values: NDArray[np.float64],
    counts: tuple[int, int],
    options: ScoresOptions,
    progress: Progress,
) -> list[list[ScoreHit]]:
    """Two rankings: the highest and the lowest of ``values``. The data of each row are read once."""
    rankings = [best(values, counts[0]), best(-values, counts[1])]
    wanted = sorted({int(place) for ranking in rankings for place in ranking})
    place_of = {place: index for index, place in enumerate(wanted)}
    rows = units.first_row[wanted].tolist() if wanted else []
    ids, sources, domains, starts = (
        run.rows.read_rows(name, rows) for name in ("sample_id", "source_row", "domain", "window_start")
    )
    texts = texts_of(run, rows, progress, options.data) if options.text else [None] * len(rows)

    def hit(rank: int, place: int) -> ScoreHit:
        at, times = place_of[place], int(sums.times[place])
        return ScoreHit(
            rank=rank,
            value=float(values[place]),
            id=str(ids[at]),
            source_row=int(sources[at]),
            domain=run.domains[domains[at]] if domains[at] >= 0 else None,
            times=times,
            mean_score=float(sums.plain[place]) / times,
            negative_share=int(sums.negative[place]) / times,
            last_step=int(sums.last_step[place]),
            text=texts[at],
            window_start=int(starts[at]) if options.unit == "window" else 0,
        )

    return [[hit(rank, int(place)) for rank, place in enumerate(ranking, 1)] for ranking in rankings]


def by_domain(run: Run, units: Units, sums: ScoreSums, value: Value, allowed: NDArray[np.bool_]) -> list[DomainScores]:
    """One entry for each domain with ``allowed`` units, highest value per time first."""
    domain, values = units.domain, sums.values(value)
    table = []
    for place in np.unique(domain[allowed]).tolist():
        of_domain = allowed & (domain == place)
        scored = of_domain & np.isfinite(values)
        times, rows = int(sums.times[of_domain].sum()), int(scored.sum())
        total = float(values[scored].sum())
        plain, squares = float(sums.plain[of_domain].sum()), float(sums.squares[of_domain].sum())
        table.append(
            DomainScores(
                domain=run.domains[place] if place >= 0 else None,
                rows=int(of_domain.sum()),
                scored_rows=rows,
                times=times,
                value_per_row=total / rows if rows else None,
                value_per_time=total / times if times else None,
                value_sum=total,
                negative_share=int(sums.negative[of_domain].sum()) / times if times else None,
                mean_score=plain / times if times else None,
                standard_error=finite(float(standard_error(times, plain, squares))),
            )
        )
    return sorted(
        table, key=lambda entry: -math.inf if entry.value_per_time is None else entry.value_per_time, reverse=True
    )


def finite(value: float) -> float | None:
    """``value``; None if it is NaN or infinite."""
    return value if math.isfinite(value) else None
