"""``ghoststore.query``: the training samples whose gradients point the same way as those of a val set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from ghoststore.checkpoint.load import resolve_device
from ghoststore.errors import UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import part_of, takes
from ghoststore.settings.option import given
from ghoststore.settings.question import QueryOptions
from ghoststore.store import Part
from ghoststore.store.part.fidelity import read_fidelity
from ghoststore.store.part.metric import metric_for
from query.ann.index import AnnIndex, refuse_lengths
from query.answer.contributions import recomputable
from query.answer.distribution import Distribution, counted_rankings, refuse_histogram
from query.answer.near import query_near
from query.answer.report import write_report
from query.answer.results import QueryHits, QueryResult, hits_of, with_nats
from query.answer.run_query import query_run
from query.answer.tokens import explain, refuse_pairs, refuse_tokens
from query.ask.opened_model import OpenedModel
from query.ask.question import Question
from query.ask.rerank import rank_anew, refuse_part, refuse_rerank
from query.ask.run_question import refuse_options_of_runs
from query.ask.scorer import Scorer, open_scorer
from query.ask.second_stage import Reranking
from query.ask.unit import unit_of
from query.common.output import check_output
from query.common.texts import corpus_behind
from query.search.on_ray import refuse_terms_on_ray, searching_on_ray
from query.search.part_score import Metric
from query.search.parts import named_parts, note_repeated, weights_of
from query.search.search import Search, search
from query.search.unions import refuse_united

Searching = Callable[[Sequence[Part]], AbstractContextManager[Search]]


@takes(QueryOptions)
def query(options: QueryOptions) -> QueryResult:
    """The training samples most similar (``top_k``) and least similar (``bottom_k``) to ``val_set``.

    There is one ranking for the mean gradient of the val set or, with ``each``, one for every val sample. Products have
    a meaning: ``nats`` of a hit is by how much the val loss is predicted to rise if the row were left out of the
    training, see `docs/query.md`. ``layers`` and ``exclude_layers`` want a part that keeps plain Kronecker blocks, or
    one sketch a layer. The val set goes through the model, tokenization and projection that the part's manifest names.
    ``checkpoint``, ``tokenizer`` and ``data`` are read where the user's own build read them, unless they are given;
    paths in a store that somebody else made are not followed.

    ``minus`` is a second val set, to be far from: its mean gradient is subtracted from that of ``val_set`` (of each val
    sample or group). By ``dot`` a score is then what a step on the sample does to the difference of the two losses.

    ``where`` is a condition in SQL: only rows that match it rank. Its columns are id, domain, n_tokens, loss,
    source_row, source_file (a number), window_start, status, the fields that the part keeps
    (``build(keep_fields=…)``), and text where it keeps texts; of a run those of its row table.

    ``group_field`` gives one ranking for the mean gradient of each group, after the first, ``combined``, over all of
    them: ``combine`` says how.

    ``part`` may name several parts. Builds of other rows at one checkpoint, with one projection
    (``ghoststore.build(like=…)``), are ranked as one part. Of builds of the same rows at successive checkpoints the
    score is the weighted sum of their scores (TracIn, LESS); both may be combined. ``part_weights`` is
    ``learning-rate`` (of each checkpoint, the default), ``equal``, or one number for each checkpoint.

    ``precondition="second-moment"`` scores with qᵀ (H + λI)⁻¹ g. H is the second moment of the part's rows in each
    block, and λ = ``damping`` (default 0.1) × the mean eigenvalue of H. The cosine is then that of this metric. H is
    computed by one scan and cached.

    ``with_scores`` blends similarities with the values of a training run, ``lexical`` with BM25 of the rows' texts, as
    the part or its corpus has them, for those of the val samples; `docs/query.md` has the measurements.

    ``index="ann"`` takes candidates from a FAISS index that ``ghoststore.index`` made and scores them exactly.
    ``index_name`` names the index (default: the only one for the metric). Its measured recall is among the settings of
    the result.

    ``rerank`` is a number of candidates: so many of the best (and of the worst) rows by the stored vectors are ranked
    anew, as ``rerank_with`` says. With ``ekfac`` the eigenvalues of the part's metric are measured on
    ``rerank_samples`` rows of the corpus; with ``cg`` the Gauss-Newton matrix of so many rows takes its place, damped
    by ``rerank_damping`` times its mean eigenvalue in each layer. Of ``exact`` and ``ekfac`` it is that of K-FAC's
    factors, less than a part's by default: whole gradients predict better with less.

    ``tokens`` computes the gradients of the rows shown again, and says what each token adds to a row's similarity: its
    ``tokens``, each with its place in the text, sum to ``recomputed``, of which the similarity of the stored vector is
    a rounding. ``val_sample`` says the same of the tokens of the val sample, or of the one that adds most.

    ``run`` names a training run of the store instead of a part: its samples are ranked by the gradients that it keeps
    (``ghoststore train --keep-gradients``), as committed at this moment, also while it trains. A sample's score is the
    sum of its scores at the steps it was in, each times the step's ``weight``, see ``docs/scores.md``; of
    ``step_window`` (``"0:100"`` or a slice), or of the ``last`` so many steps. With ``val_set``, ``checkpoint`` is a
    checkpoint of that training; without, each step's samples are held against the val gradient of that step, and no
    model is needed. Of a run that chose, a visit counts with the weight that its sample had in the step; with
    ``candidates`` those that were not trained on count, too, all alike. What belongs to parts is refused.

    With ``engine="ray"`` the rows are searched by actors of a Ray cluster (``ray_address``), each some spans of them:
    the same answer. The val set goes through the model here, and a second stage does, too.

    ``histogram`` counts the scores of all rows: ``histogram`` of a ranking has 60 bins, and the rows of each domain.

    ``near`` is a row of the corpus in the place of a val set: the rows whose stored vectors are most similar to its
    own, without itself. It needs no model; what belongs to a val set is refused.

    ``server`` is the address of an explorer (``ghoststore serve``), with its token, or without and that in
    GHOSTSTORE_TOKEN. It answers in the place of a store here, with the model that it keeps; ``store`` is then the name
    of one of its stores, where it has several. What it does not offer is refused by name.

    ``report`` is a new .html file: the answer as one page, with histograms, domains and what each layer adds.

    Raises UsageError for a val set without a usable row and for patterns that match no layer, MismatchError for
    another checkpoint, tokenizer or projection and for a run on other samples, CorruptError for damaged rows.
    """
    if options.server is not None:
        from query.answer.remote import ask_server

        return ask_server(options)
    if not str(options.store):
        raise UsageError("give `store`, whose rows are ranked; or `server`, the address of an explorer")
    return answer(options)


def answer(options: QueryOptions, opened: OpenedModel | None = None, searching: Searching | None = None) -> QueryResult:
    """The answer to ``options``, see :func:`query`, with the model of a session, and its search, if there is one."""
    progress = options.progress or Silent()
    if options.top_k < 0 or options.bottom_k < 0 or not options.top_k + options.bottom_k:
        raise UsageError(f"`top_k={options.top_k}` and `bottom_k={options.bottom_k}`: ask for at least one row")
    options.check_engine()
    if options.engine is not None:
        _refuse_on_ray(options)
    if options.near is not None:
        return query_near(options, progress)
    if options.run is not None:
        return query_run(options, progress)
    refuse_options_of_runs(options, candidates=options.candidates)
    page = None if options.report is None else check_output(options.report, "report", (".html",))
    if options.index_name is not None and options.index == "exact":
        raise UsageError("`index_name` belongs to `index=ann`")
    question = part_of(Question, options)
    how = part_of(Reranking, options)
    if how.rerank is not None:
        refuse_rerank(question, how, options.top_k, options.bottom_k)
    settings = {"index": options.index, "top_k": options.top_k, "bottom_k": options.bottom_k}
    settings |= {name: True for name in ("tokens", "histogram") if getattr(options, name)}
    if searching is None and options.engine is not None:
        searching = partial(searching_on_ray, options.ray_address)
    return _answer(question, settings, how, options.index_name, options.text, page, progress, opened, searching)


def _answer(
    question: Question,
    settings: dict[str, Any],
    how: Reranking,
    index_name: str | None,
    text: bool,
    page: Path | None,
    progress: Progress,
    opened: OpenedModel | None,
    searching: Searching | None,
) -> QueryResult:
    """The answer to ``question``. ``settings`` say how rows are ranked: index, top_k, bottom_k; ``how``, how anew;
    ``searching(parts)``, who searches them on a Ray cluster.
    """
    counts = (settings["top_k"], settings["bottom_k"])
    parts, ann = named_parts(question.store, question.part, progress), None
    metric = _checked_metric(question, settings, how, parts, on_ray=searching is not None)
    weights = weights_of(parts, question.part_weights)
    if settings["index"] == "ann":
        ann = AnnIndex.open(parts[0], index_name, metric=metric, device=resolve_device(question.device))
        settings = {**ann.settings(), **settings}
    if how.rerank is not None or "tokens" in settings:
        for part in parts[0].members:
            corpus_behind(part, question.data)  # it can be read: found out before a model is loaded
    recomputes = page is not None and parts[0].sketched_together and recomputable(question, len(parts))
    with (
        question.opened_val_set(progress) as corpus,
        question.opened_minus(progress) as minus,
        nullcontext(search) if searching is None else searching(parts) as find,
    ):
        keep_model = how.rerank is not None or recomputes or "tokens" in settings
        scorer = open_scorer(
            question,
            parts,
            weights,
            corpus,
            progress,
            minus=minus,
            keep_model=keep_model,
            opened=opened,
            keep_words=opened is None,
            keep_vectors=opened is None,
        )
        scorer.find = find
        note_repeated(scorer.part, progress)
        counted: Sequence[Distribution | None] = [None] * len(scorer.names)
        if "histogram" in settings:
            rankings, counted = counted_rankings(scorer, *counts, progress)
        elif how.rerank is None:
            rankings = scorer.rank(*counts, progress, index=ann)
        else:
            rankings = rank_anew(scorer, how, *counts, progress, ann)
        if ann is not None and not scorer.by_index:  # it could not be filtered
            settings = {**settings, "index": "exact"}
        explained = explain(scorer, rankings, progress) if "tokens" in settings else None
        hits = hits_of(scorer.part, rankings, text, progress, scorer.blend or scorer.hybrid, question.data, explained)
        encoder = scorer.encoder
        directions = 1.0 if how.rerank is None or encoder is None else how.directions(encoder.part, encoder.plan)
        unit = unit_of(question, parts, rounded=how.rerank is None, directions=directions) if how.in_metric else None
        settings = {"unit": None if unit is None else unit.to_json(), **settings}
        result = QueryResult(
            store=str(question.store),
            settings={
                **scorer.settings(),
                **how.settings(scorer.part),
                **settings,
                "fidelity": fidelity_settings(scorer, progress) if how.rerank is None else None,
            },
            results=[
                QueryHits(query=name, hits=best, bottom=worst, val_row=val_row, histogram=of_all)
                for name, val_row, of_all, best, worst in zip(
                    scorer.names, scorer.val_rows, counted, *with_nats(hits, unit), strict=True
                )
            ],
        )
        if page is not None:
            write_report(page, scorer, corpus if text else None, result, rankings, progress)
    return result


def _checked_metric(
    question: Question, settings: dict[str, Any], how: Reranking, parts: Sequence[Part], *, on_ray: bool
) -> Metric:
    """The metric of the answer. UsageError for what does not go together, before a model is loaded."""
    by_index = settings["index"] == "ann"
    if by_index:
        _refuse_index(question, parts)
    if "tokens" in settings:
        refuse_tokens(question, how, parts)
        refuse_pairs(parts[0])
    if "histogram" in settings:
        refuse_histogram(how, settings["index"])
    if question.data is not None:
        refuse_united(parts, "`data`")
    metric = metric_for(question.metric, parts)
    refuse_part(how, parts, metric)
    if on_ray:
        refuse_terms_on_ray(metric, question.precondition)
    if by_index:
        some_layers = bool(question.layers or question.exclude_layers)
        refuse_lengths(metric, some_layers=some_layers, preconditioned=question.precondition != "none")
    return metric


def _refuse_on_ray(options: QueryOptions) -> None:
    """UsageError for what is not done by a search of the best rows of each range. It comes before any work."""
    ranked = ("combine",) if options.combine == "rank-fusion" else ()
    for option in given(options, ("run", "index", "with_scores", "lexical", *ranked, "report", "histogram", "near")):
        raise UsageError(
            f"`engine=ray` gives the best rows by exact search of a part, and {option} needs something else: leave one "
            "of the two out"
        )


def _refuse_index(question: Question, parts: Sequence[Part]) -> None:
    """UsageError for scores that no index can give. It comes before any work, so that nobody builds an
    index in vain.
    """
    if len(parts) > 1:
        raise UsageError(f"an index is of one part, the scores are summed over {len(parts)}; use `index=exact`")
    for option in given(question, ("with_scores", "lexical", "combine")):
        raise UsageError(f"{option} needs the scores of all rows, which an index does not give; use `index=exact`")


def fidelity_settings(scorer: Scorer, progress: Progress) -> dict[str, Any] | None:
    """What `ghoststore.fidelity` measured for rankings like this one.

    None where nothing was measured, and where the score is of another kind than measured: of some layers, of several
    parts (summed or united), preconditioned, blended, or of a difference.
    """
    question = scorer.question
    plain = question.precondition == "none" and not scorer.mixed and scorer.terms[0].groups is None
    plain = plain and question.minus is None
    plain = plain and len(scorer.part.members) == 1
    measured = read_fidelity(scorer.part, scorer.metric) if plain and len(scorer.terms) == 1 else None
    if measured is None or measured.state == "damaged":
        if measured is not None:
            progress.note(
                f"the measured fidelity is not shown: {measured.problem}; `ghoststore fidelity` measures it again"
            )
        return None
    return measured.to_json()
