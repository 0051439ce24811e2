"""``ghoststore.self_influence``: the effect of each sample on its own loss."""

from __future__ import annotations

import numpy as np

from ghoststore.checkpoint.load import resolve_device
from ghoststore.errors import UsageError
from ghoststore.progress import Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.question import SelfInfluenceOptions
from ghoststore.store.part.metric import part_metric
from query.answer.results import QueryHits, QueryResult, hits_of
from query.ask.blend import rankings_of
from query.ask.chosen import chosen_rows
from query.search.parts import choose_groups, note_repeated, open_parts
from query.search.second_moment import DampedInverse, checked_damping


@takes(SelfInfluenceOptions)
def self_influence(options: SelfInfluenceOptions) -> QueryResult:
    """The rows with the highest (``top_k``) and lowest (``bottom_k``) self-influence gᵀ (H + λI)⁻¹ g.

    Only rows that match ``where`` rank, see ``ghoststore.query``. H is the second moment of all of the part's rows in
    each block, and λ = ``damping`` (default 0.1) × its mean eigenvalue.
    Samples score high that are unlike the rest and that the model has not learned: rare, noisy or mislabelled ones
    (Koh, Liang 2017; TracIn, Pruthi et al. 2020). There is no cosine: that of a sample with itself is 1. No model is
    loaded.

    Raises UsageError for a part without a usable row, for patterns that match no layer, and for a damping that leaves
    H + λI singular; CorruptError for damaged rows.
    """
    progress = options.progress or Silent()
    if options.top_k < 0 or options.bottom_k < 0 or not options.top_k + options.bottom_k:
        raise UsageError(f"`top_k={options.top_k}` and `bottom_k={options.bottom_k}`: ask for at least one row")
    (part,), _ = open_parts(options.store, options.part, None, progress)
    note_repeated(part, progress)
    groups = choose_groups(part, options.layers, options.exclude_layers)
    chosen = chosen_rows([part], options.where, progress)
    inverse = DampedInverse(part, checked_damping(options.damping), progress, resolve_device(options.device))
    scores = inverse.self_influence()[:, slice(None) if groups is None else groups].sum(1)
    part.refuse_hollow()
    scores_QN = np.full((1, part.layout.rows), np.nan)
    usable = part.row_numbers[part.usable()]
    scores_QN[0, usable] = scores[usable]
    if chosen is not None:
        scores_QN[0, ~chosen.mask] = np.nan
    most = part.rows if chosen is None else chosen.count
    counts = (min(options.top_k, most), min(options.bottom_k, most))
    rankings = (rankings_of(scores_QN, counts[0]), rankings_of(scores_QN, counts[1], sign=-1.0))
    best, worst = hits_of(part, rankings, options.text, progress, data=options.data)
    return QueryResult(
        store=str(options.store),
        settings={
            "part": part.name,
            "metric": "self-influence",
            "part_metric": part_metric(part.manifest["projection"]),
            "precondition": "second-moment",
            "damping": inverse.damping,
            "mean_eigenvalue": inverse.moment.mean_eigenvalue,
            "layers": list(options.layers),
            "exclude_layers": list(options.exclude_layers),
            **({} if chosen is None else chosen.settings()),
            "rows": part.rows,
            "repeated_ids": part.repeated_ids,
            "top_k": options.top_k,
            "bottom_k": options.bottom_k,
        },
        results=[QueryHits(query="self", hits=best[0], bottom=worst[0])],
    )
