"""The scores that answer a question.

:func:`open_scorer` reads the val set and the parts of a :class:`Question` and returns a :class:`Scorer`, which ranks
rows or gives every row's score. ``query``, ``select`` and ``evaluate`` use it.

Legend: Q rankings, N rows of the part.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ghoststore.checkpoint.in_memory import checkpoint_name
from ghoststore.checkpoint.load import resolve_device
from ghoststore.corpus import Corpus, source_name
from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.store import Part, Store
from ghoststore.store.part.metric import metric_for, part_metric
from ghoststore.store.where.rows import Chosen
from query.ann.index import AnnIndex
from query.ask.blend import Blend, RowValues, rankings_of, values_of_rows
from query.ask.chosen import chosen_rows, usable_rows
from query.ask.encoder import PartEncoder, ValVectors
from query.ask.groups import combined, fused, last_first
from query.ask.hybrid import Hybrid, HybridSearch, few
from query.ask.lexical import PartWords, lexical_scores
from query.ask.opened_model import OpenedModel
from query.ask.question import Question
from query.ask.val_vectors import val_vectors
from query.search.counts import bins_of, count_scores
from query.search.part_score import Metric, Term
from query.search.parts import choose_groups
from query.search.search import Search, search, shared_spans, similarities
from query.search.second_moment import DampedInverse, checked_damping
from query.search.top_k import Ranking
from query.search.unions import refuse_united


def open_scorer(
    question: Question,
    parts: Sequence[Part],
    weights: Sequence[float],
    val_set: Corpus,
    progress: Progress,
    *,
    minus: Corpus | None = None,
    keep_model: bool = False,
    opened: OpenedModel | None = None,
    keep_words: bool = False,
    keep_vectors: bool = False,
) -> Scorer:
    """Encode ``val_set`` with the model of each of ``parts``, grouped as ``question`` says, and prepare the rankings.

    ``minus`` is the val set whose mean gradient is subtracted. With ``keep_model``, and for a single part, the scorer
    keeps the encoder and the val sets, which must stay open. ``opened`` has the model of a single part already. With
    ``keep_words`` the index of words, where there is one, is kept among the caches of the part; with ``keep_vectors``
    those of the val set, unless the model is kept, in the user's folder for caches.

    Raises UsageError for a val set without a usable row and for patterns that match no layer, MismatchError for another
    checkpoint, tokenizer or projection and for a run on other samples, CorruptError for damaged rows.
    """
    resolve_device(question.device)  # refuses one that is not there, before anything is read
    checkpoints = question.checkpoints(len(parts))
    # Patterns, conditions and runs that do not fit are refused before a model is loaded, which takes longest.
    metric_for(question.metric, parts)
    groups = choose_groups(parts[0], question.layers, question.exclude_layers)
    chosen = chosen_rows(parts, question.where, progress)
    run = None
    if question.with_scores is not None:
        refuse_united(parts, "`with_scores`")
        scored = Store.open(question.store).run(question.with_scores)
        run = values_of_rows(parts[0], scored, question.weight, progress, data=question.data)
    words, first = None, parts[0]
    if question.lexical is not None:
        words = opened.words(first, progress) if opened else PartWords(first, question.data, progress, keep=keep_words)
    vals: list[ValVectors] = []
    minus_vals: list[ValVectors] = []
    kept_encoder: PartEncoder | None = None
    for part, checkpoint in zip(parts, checkpoints, strict=True):
        val, minus_val, encoder = val_vectors(
            question,
            part,
            checkpoint,
            val_set,
            minus,
            progress,
            encoder=None if opened is None else opened.encoder(part, progress),
            keep=keep_vectors and not keep_model,
        )
        vals.append(val)
        minus_vals += [] if minus_val is None else [minus_val]
        kept_encoder = encoder if keep_model and len(parts) == 1 else None
        del encoder  # before the next model is loaded
    lexical_QN = None
    if words is not None:
        far = None if minus is None else (minus_vals[0], minus)
        lexical_QN = lexical_scores(words, vals[0], val_set, question.max_samples, far)
    scorer = Scorer.of(
        question,
        parts,
        weights,
        vals,
        progress,
        minus=minus_vals or None,
        groups=groups,
        run=run,
        chosen=chosen,
        lexical_QN=lexical_QN,
    )
    if kept_encoder is not None:
        scorer.encoder, scorer.val_set, scorer.minus_set = kept_encoder, val_set, minus
    return scorer


@dataclass(slots=True, kw_only=True)
class Scorer:
    """The rankings of a question, after its val set and parts are read. Where rankings are combined, the first is
    theirs.
    """

    question: Question
    metric: Metric
    """That of the question, or the one that the parts were made for."""
    part: Part
    """The part whose rows are ranked."""
    val: ValVectors
    weights: Sequence[float]
    """One weight for each part."""
    terms: list[Term]
    """One for each part. With groups and ``combine="mean"`` the first query is the mean over the groups."""
    names: list[str]
    """The names of the Q rankings."""
    rows: int
    """Number of rows searched: those committed in every part."""
    run: RowValues | None
    device: str
    encoder: PartEncoder | None = None
    val_set: Corpus | None = None
    minus_set: Corpus | None = None
    """Encoder and val sets, kept where vectors are to be recomputed: see :func:`open_scorer`."""
    minus: ValVectors | None = None
    """The vector that is subtracted, of :attr:`part`."""
    chosen: Chosen | None = None
    """The rows that may rank; None: all usable ones."""
    blend: Blend | None = None
    """Set by :meth:`scores` and :meth:`rank` if the question has ``with_scores``."""
    lexical_QN: NDArray[np.float64] | None = None
    """(Q, N): BM25 of every row, with the question's ``lexical``; of all groups together their mean."""
    hybrid: Hybrid | None = None
    """Set by :meth:`scores` and :meth:`rank` if the question has ``lexical``."""
    find: Search = search
    by_index: bool = False
    """Whether an index gave the last ranking."""
    _scores: NDArray[np.float64] | None = None
    _hybrid_search: HybridSearch | None = None

    @classmethod
    def of(
        cls,
        question: Question,
        parts: Sequence[Part],
        weights: Sequence[float],
        vals: Sequence[ValVectors],
        progress: Progress,
        *,
        minus: Sequence[ValVectors] | None = None,
        groups: Sequence[int] | None = None,
        run: RowValues | None = None,
        chosen: Chosen | None = None,
        lexical_QN: NDArray[np.float64] | None = None,
    ) -> Scorer:
        """A scorer for a val set that is encoded already: one of ``vals`` for each of ``parts``. See
        :func:`open_scorer`.
        """
        _refuse_other_queries(parts, vals)
        if minus is not None:
            _refuse_other_queries(parts, minus)
        device, metric = resolve_device(question.device), metric_for(question.metric, parts)
        # On a GPU the search of rows in files is slower than on the CPU of its machine: it is asked for by name.
        searching = "cpu" if question.device == "auto" else device
        terms = []
        for place, (part, val, weight) in enumerate(zip(parts, vals, weights, strict=True)):
            inverse = None
            if question.precondition == "second-moment":
                inverse = DampedInverse(part, checked_damping(question.damping), progress, device)
            terms.append(
                Term.of(
                    part,
                    val.vectors,
                    metric=metric,
                    weight=weight,
                    groups=groups,
                    preconditioner=inverse,
                    names=val.ids,
                    minus_D=None if minus is None else minus[place].vectors[0],
                )
            )
        names = list(vals[0].ids)
        if question.group_field is not None:
            terms, names = combined(question, terms, names)
            if lexical_QN is not None:
                lexical_QN = np.concatenate([lexical_QN.mean(0, keepdims=True), lexical_QN])
        return cls(
            question=question,
            metric=metric,
            part=parts[0],
            val=vals[0],
            weights=weights,
            terms=terms,
            names=names,
            rows=sum(stop - start for start, stop in map(parts[0].layout.span_of, shared_spans(terms))),
            run=run,
            device=searching,
            minus=None if minus is None else minus[0],
            chosen=chosen,
            lexical_QN=lexical_QN,
        )

    def rank(
        self, top_k: int, bottom_k: int, progress: Progress, *, index: AnnIndex | None = None
    ) -> tuple[Ranking, Ranking]:
        """The best and the worst rows of each ranking: by exact search or, with ``index``, among its candidates."""
        most = self.rows if self.chosen is None else self.chosen.count
        counts = (min(top_k, most), min(bottom_k, most))
        if index is not None:
            index.refuse(self.terms)
            assert not self.mixed, "an index does not give the scores of all rows: refused by query()"
            assert not self._by_rows
            self.by_index = True
            if self.chosen is None:
                return index.search(self.terms[0], top_k=counts[0], bottom_k=counts[1])
            if (by_index := self._rank_by_index(index, counts, progress)) is not None:
                return by_index
            self.by_index = False
        if (with_words := self._searched_with_words()) is not None:
            with closing(progress.task("searching", self.rows)) as task:
                return with_words.rank(*counts, task)
        if self._needs_all:
            scores = self.scores(progress)
            return rankings_of(scores, counts[0]), rankings_of(scores, counts[1], sign=-1.0)
        with closing(progress.task("searching", self.rows)) as task:
            best, worst = self.find(
                self.terms,
                top_k=counts[0],
                bottom_k=counts[1],
                combine=self._combine,
                device=self.device,
                task=task,
                allowed_N=self._allowed,
            )
        if not self._combine:
            return best, worst
        return last_first(best), last_first(worst)

    def _searched_with_words(self) -> HybridSearch | None:
        """The search by the blend with words, if rows can be ranked without the scores of all of them."""
        if self.lexical_QN is None or self._fused or self._scores is not None:
            return None
        if self._hybrid_search is None:
            assert self.question.lexical is not None
            ranked_N = usable_rows(self.parts)
            if self.chosen is not None:
                ranked_N &= self.chosen.mask
            if few(ranked_N):
                return None
            found = HybridSearch(
                self.terms,
                self.lexical_QN,
                self.question.lexical,
                ranked_N,
                by_rows=self._by_rows,
                device=self.device,
            )
            self._hybrid_search, self.hybrid = found, found.hybrid
        return None if self._hybrid_search.hybrid.words_alone else self._hybrid_search

    def _rank_by_index(
        self, index: AnnIndex, counts: tuple[int, int], progress: Progress
    ) -> tuple[Ranking, Ranking] | None:
        """The rankings among the chosen rows by ``index``; None, with a note, if it cannot filter or gives too few."""
        assert self.chosen is not None
        rankings = index.search_among(self.terms[0], self.chosen.mask, top_k=counts[0], bottom_k=counts[1])
        if rankings is None:
            problem = "cannot be filtered"
        elif any((ranking.rows < 0).any() for ranking in rankings):
            problem = "gives fewer matching rows than there are"
        else:
            return rankings
        progress.note(f"index {index.name!r} {problem}: the rows that match are searched exactly")
        return None

    def counts(
        self, low_Q: NDArray[np.float64], high_Q: NDArray[np.float64], progress: Progress
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """((Q, 60) counts of the scores of all rows in bins from the lowest to the highest, (N,) which rows have one),
        for each ranking.
        """
        with_words = self._searched_with_words()
        if with_words is None and self._needs_all:
            scores = self.scores(progress)
            has_QN = np.isfinite(scores)
            bounds = zip(scores, has_QN, low_Q, high_Q, strict=True)
            return np.stack([bins_of(own_N[has_N], *ends) for own_N, has_N, *ends in bounds]), has_QN[0]
        if with_words is not None:
            low_Q, high_Q = (with_words.hybrid.in_similarities(ends_Q) for ends_Q in (low_Q, high_Q))
        if self._combine:  # which the search puts last
            low_Q, high_Q = np.roll(low_Q, -1), np.roll(high_Q, -1)
        with closing(progress.task("counting", self.rows)) as task:
            counts_QB, has_N = count_scores(
                self.terms,
                low_Q,
                high_Q,
                combine=self._combine,
                device=self.device,
                task=task,
                allowed_N=self._allowed,
                added_CN=None if with_words is None else with_words.added(),
            )
        return np.roll(counts_QB, 1, axis=0) if self._combine else counts_QB, has_N

    @property
    def _needs_all(self) -> bool:
        """Whether rankings are made of the scores of all rows, or these are there already."""
        return self.mixed or self._fused or self._scores is not None

    @property
    def _combine(self) -> Literal["max"] | None:
        return "max" if self._by_rows else None

    @property
    def _allowed(self) -> NDArray[np.bool_] | None:
        return None if self.chosen is None else self.chosen.mask

    def scores(self, progress: Progress, first: int | None = None) -> NDArray[np.float64]:
        """(Q, N) float64: the score of every row in every ranking, or in the ``first`` rankings only.

        NaN for a row that has no score. Memory: 8 bytes for each of the Q·N numbers.
        """
        if self._scores is not None:
            return self._scores[:first]
        # Combined and blended rankings need the scores of all queries.
        terms, independent = self.terms, first is not None and not self.mixed and not self._by_rows
        if independent:
            terms = [term.with_queries(term.queries_QD[:first]) for term in terms]
        with closing(progress.task("scoring", self.rows)) as task:
            scores = similarities(terms, device=self.device, task=task, allowed_N=self._allowed)
        if independent:
            return scores
        if self._fused:
            scores = np.concatenate([fused(scores), scores])
        elif self._by_rows:
            scores = np.concatenate([scores.max(0, keepdims=True), scores])
        if self.run is not None:
            self.blend = Blend.of(scores, self.run, self.question.score_weight)
            self.blend.note_left_out(self.question.with_scores, progress)
            scores = self.blend.scores
        if self.lexical_QN is not None:
            assert self.question.lexical is not None
            self.hybrid = Hybrid.of(scores, self.lexical_QN, self.question.lexical)
            scores = self.hybrid.scores
        self._scores = scores
        return scores[:first]

    @property
    def parts(self) -> list[Part]:
        return [term.part for term in self.terms]

    @property
    def val_rows(self) -> Sequence[int | None]:
        """For each ranking the place of its val sample in the val set; None for a mean."""
        return self.val.places if self.question.each else [None] * len(self.names)

    @property
    def mixed(self) -> bool:
        """Whether scores are mixed with something else, for which those of all rows are needed."""
        return self.run is not None or self.lexical_QN is not None

    @property
    def _grouped(self) -> bool:
        return self.question.group_field is not None

    @property
    def _by_rows(self) -> bool:
        """Whether the combined score comes from the row's own scores, and is not the product with one vector."""
        return self._grouped and self.question.combine != "mean"

    @property
    def _fused(self) -> bool:
        return self._grouped and self.question.combine == "rank-fusion"

    def settings(self) -> dict[str, Any]:
        """The settings that a result records."""
        question = self.question
        mode = "groups" if self._grouped else "each" if question.each else "mean"
        parts = self.parts
        several: dict[str, Any] = {"parts": [part.name for part in parts], "part_weights": list(self.weights)}
        preconditioned = {"precondition": question.precondition, "damping": checked_damping(question.damping)}
        groups = {"group_field": question.group_field, "combine": question.combine, "groups": self.val.rows_of}
        return {
            "part": self.part.members[0].name,
            **({} if len(self.part.members) == 1 else {"united": [member.name for member in self.part.members]}),
            **(several if len(parts) > 1 else {}),
            "val_set": source_name(question.val_set),
            "val_rows": self.val.used,
            "val_rows_left_out": self.val.left_out,
            **({} if self.minus is None else minus_settings(question, self.minus)),
            **({} if question.phrase is None else {"phrase": question.phrase}),
            "mode": mode,
            **(groups if self._grouped else {}),
            "metric": self.metric,
            "part_metric": part_metric(self.part.manifest["projection"]),
            **({"precondition": "none"} if question.precondition == "none" else preconditioned),
            "layers": list(question.layers),
            "exclude_layers": list(question.exclude_layers),
            **({} if self.chosen is None else self.chosen.settings()),
            "checkpoint": checkpoint_name(
                question.checkpoints(len(parts))[0] or self.part.manifest["source"]["checkpoint"]
            ),
            "rows": self.rows,
            "repeated_ids": self.part.repeated_ids,
            **({} if self.blend is None else self.blend.settings(question.with_scores)),
            **({} if self.hybrid is None else self.hybrid.settings()),
        }


def minus_settings(question: Question, minus: ValVectors) -> dict[str, Any]:
    """What the settings of a result say about the val set that is subtracted."""
    return {"minus": source_name(question.minus), "minus_rows": minus.used, "minus_rows_left_out": minus.left_out}


def _refuse_other_queries(parts: Sequence[Part], vals: Sequence[ValVectors]) -> None:
    """UsageError if a val sample has a gradient at one checkpoint and none at another."""
    for part, val in zip(parts, vals, strict=True):
        if val.digest != vals[0].digest:  # neither ids, which may repeat, nor counts would tell
            raise UsageError(
                f"{val.used} val samples have a gradient at the checkpoint of part {part.name!r}, and {vals[0].used} "
                f"(or others) at that of part {parts[0].name!r} (left out: {val.left_out}, {vals[0].left_out}): scores "
                "cannot be summed. Remove these val samples, or query one part"
            )
