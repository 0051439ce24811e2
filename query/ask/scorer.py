"""A question with its val set and parts read: the scores that answer it.

:func:`ask` turns a :class:`Question` into an :class:`Asked`, which ranks rows or gives every row's score. ``query`` and
``select`` are two ways to use it.

Legend: Q rankings, N rows of the part.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.checkpoint.load import resolve_device
from ghoststore.corpus import Corpus, open_corpus
from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.store import Part, Store
from query.ann.index import AnnIndex
from query.ask.blend import BLEND, RowValues, blended, checked_weight, rankings_of, values_of_rows
from query.ask.question import COMBINED, Question
from query.ask.recompute import RowsAgain
from query.ask.rerank import rerank
from query.ask.val_set import ValVectors, encode_val_set
from query.search.layers import choose_groups
from query.search.part_score import Term, shared_spans
from query.search.parts import open_parts
from query.search.search import Ranking, search, similarities
from query.search.second_moment import DampedInverse, checked_damping

FUSION_CONSTANT = 60.0
"""Of reciprocal rank fusion (Cormack, Clarke, Büttcher 2009): a row scores Σ over groups of 1 / (60 + its rank)."""


@dataclass(frozen=True, slots=True)
class Blend:
    """Similarities, values and their blend, for every row of the part."""

    similarity: NDArray[np.float64]
    """(Q, N)."""
    values: RowValues
    scores: NDArray[np.float64]
    """(Q, N): NaN where a row does not take part."""
    rows: int
    """Usable rows that have a value."""
    weight: float

    @property
    def without_score(self) -> int:
        """Usable rows without a value."""
        return int(np.isfinite(self.similarity[0]).sum()) - self.rows

    def settings(self, run: str | None) -> dict[str, Any]:
        """What the result says of it."""
        return {
            "with_scores": run,
            "score_weight": self.weight,
            "blend": BLEND,
            "value": "cumulative",
            "joined_by": self.values.joined_by,
            "run_steps": self.values.steps,
            "rows_blended": self.rows,
            "rows_without_score": self.without_score,
        }


@dataclass(slots=True, kw_only=True)
class Asked:
    """A question with its val set and parts read. The first ranking of ``names`` is the one over everything."""

    question: Question
    part: Part
    """The part whose rows are ranked."""
    val: ValVectors
    weights: list[float]
    """Of the parts."""
    terms: list[Term]
    """With ``combine="mean"`` their first query is the mean of the groups'."""
    names: list[str]
    """Q names of rankings."""
    run: RowValues | None
    device: str
    blend: Blend | None = None
    """After :meth:`scores` or :meth:`rank` with ``with_scores``."""
    _scores: NDArray[np.float64] | None = None

    @property
    def rows(self) -> int:
        """Rows that are searched."""
        return sum(stop - start for start, stop in map(self.part.layout.span_of, shared_spans(self.terms)))

    def rank(
        self,
        top_k: int,
        bottom_k: int,
        progress: Progress,
        *,
        candidates: int | None = None,
        index: AnnIndex | None = None,
    ) -> tuple[Ranking, Ranking]:
        """For each of ``names`` the best and the worst rows, by exact search or, with ``index``, out of its candidates.

        With ``candidates`` that many are found by the stored vectors, and ranked by gradients that the model computes
        again. UsageError where these are fewer than the rows asked for, or the score is no product with one vector.
        """
        if candidates is not None:
            return self._rank_again(top_k, bottom_k, candidates, progress, index)
        counts = (min(top_k, self.rows), min(bottom_k, self.rows))
        if index is not None:
            index.refuse(self.terms)
            assert self.run is None, "an index does not give the scores of all rows: refused by query()"
            assert not self._by_rows
            return index.search(self.terms[0], top_k=counts[0], bottom_k=counts[1])
        if self.run is not None or self._fused:
            scores = self.scores(progress)
            return rankings_of(scores, counts[0]), rankings_of(scores, counts[1], sign=-1.0)
        combine: Literal["max"] | None = "max" if self._grouped and self.question.combine == "max" else None
        with closing(progress.task("searching", self.rows)) as task:
            best, worst = search(
                self.terms, top_k=counts[0], bottom_k=counts[1], combine=combine, device=self.device, task=task
            )
        return (_last_first(best), _last_first(worst)) if combine else (best, worst)

    def _rank_again(
        self, top_k: int, bottom_k: int, candidates: int, progress: Progress, index: AnnIndex | None
    ) -> tuple[Ranking, Ranking]:
        if candidates < max(top_k, bottom_k):
            raise UsageError(f"--rerank {candidates} is fewer than the rows asked for, {max(top_k, bottom_k)}")
        unfit = {
            "several --part": len(self.terms) > 1,
            "--precondition": self.question.precondition != "none",
            "--with-scores": self.run is not None,
            f"--combine {self.question.combine}": self._by_rows,
        }
        for option, given in unfit.items():
            if given:
                raise UsageError(
                    f"--rerank scores rows by one product with each query; it cannot be used with {option}"
                )
        (term,) = self.terms
        found = self.rank(candidates if top_k else 0, candidates if bottom_k else 0, progress, index=index)
        with RowsAgain(self.part, checkpoint=self.question.checkpoint, device=self.device, progress=progress) as again:
            best, worst = (
                rerank(
                    one,
                    term.queries_QD,
                    metric=self.question.metric,
                    top_k=min(count, one.rows.shape[1]),
                    rows_again=lambda rows: again(rows) * term.mask,
                    sign=sign,
                )
                for one, count, sign in zip(found, (top_k, bottom_k), (1.0, -1.0), strict=True)
            )
        if self.question.metric == "dot":
            return best, worst
        lengths = term.lengths[:, None]  # of a mean of queries of length 1, less than 1
        return Ranking(best.rows, best.scores * lengths), Ranking(worst.rows, worst.scores * lengths)

    def scores(self, progress: Progress, first: int | None = None) -> NDArray[np.float64]:
        """(Q, N): every row's score in every ranking, or in the ``first`` ones; NaN where a row does not take part. 8
        bytes a number.
        """
        if self._scores is not None:
            return self._scores[:first]
        terms, alone = self.terms, first is not None and self.run is None and not self._by_rows
        if alone:
            terms = [term.with_queries(term.queries_QD[:first]) for term in terms]
        with closing(progress.task("scoring", self.rows)) as task:
            found = similarities(terms, device=self.device, task=task)
        if alone:
            return found
        if self._grouped and self.question.combine == "max":
            found = np.concatenate([found.max(0, keepdims=True), found])
        elif self._fused:
            found = np.concatenate([fused(found), found])
        if self.run is None:
            self._scores = found
            return found[:first]
        weight = checked_weight(self.question.score_weight)
        scores, rows = blended(found, self.run.value, weight)
        self.blend = Blend(found, self.run, scores, rows, weight)
        if self.blend.without_score:
            fate = "left out" if weight > 0 else "ranked by similarity, as all are"
            progress.note(
                f"{self.blend.without_score:,} of {self.blend.without_score + rows:,} usable rows have no score in run "
                f"{self.question.with_scores!r}: they are {fate}"
            )
        self._scores = scores
        return scores[:first]

    @property
    def val_rows(self) -> Sequence[int | None]:
        """For each of ``names`` the place of its val sample in the val set; None for a mean."""
        return self.val.places if self.question.each else [None] * len(self.names)

    @property
    def _grouped(self) -> bool:
        return self.question.group_field is not None

    @property
    def _by_rows(self) -> bool:
        """Whether the combined score of a row is no product with one vector."""
        return self._grouped and self.question.combine != "mean"

    @property
    def _fused(self) -> bool:
        return self._grouped and self.question.combine == "rank-fusion"

    def settings(self) -> dict[str, Any]:
        """What results say of how they came about."""
        question = self.question
        mode = "groups" if self._grouped else "each" if question.each else "mean"
        parts = [term.part for term in self.terms]
        several: dict[str, Any] = {"parts": [part.name for part in parts], "part_weights": self.weights}
        preconditioned = {"precondition": question.precondition, "damping": checked_damping(question.damping)}
        groups = {"group_field": question.group_field, "combine": question.combine, "groups": self.val.rows_of}
        return {
            "part": self.part.name,
            **(several if len(parts) > 1 else {}),
            "val_set": str(question.val_set),
            "val_rows": self.val.used,
            "val_rows_left_out": self.val.left_out,
            "mode": mode,
            **(groups if self._grouped else {}),
            "metric": question.metric,
            **({"precondition": "none"} if question.precondition == "none" else preconditioned),
            "layers": list(question.layers),
            "exclude_layers": list(question.exclude_layers),
            "checkpoint": str(question.checkpoint or self.part.manifest["source"]["checkpoint"]),
            "rows": self.rows,
            "repeated_ids": self.part.repeated_ids,
            **({} if self.blend is None else self.blend.settings(question.with_scores)),
        }


def ask(question: Question, progress: Progress) -> Asked:
    """Open the part, encode the val set, prepare the rankings.

    Raises UsageError for a val set without a usable row and patterns that fit nothing, MismatchError for another
    checkpoint, tokenizer or projection, or a run on other samples, CorruptError for damaged rows.
    """
    device = resolve_device(question.device)
    parts, weights = open_parts(question.store, question.part, question.part_weights, progress)
    part = parts[0]
    if len(parts) > 1 and question.checkpoint is not None:
        raise UsageError("--checkpoint is another path to one part's checkpoint; it cannot stand for several parts")
    groups = choose_groups(part, question.layers, question.exclude_layers)
    run = None
    if question.with_scores is not None:
        run = values_of_rows(part, Store.open(question.store).run(question.with_scores), progress)
    with open_corpus(str(question.val_set), question.val_fields(), progress) as corpus:
        vals = [encode(one, corpus, question, device, progress) for one in parts]
    _refuse_other_queries(parts, vals)
    terms = []
    for one, val, weight in zip(parts, vals, weights, strict=True):
        inverse = None
        if question.precondition == "second-moment":
            inverse = DampedInverse(one, checked_damping(question.damping), progress, device)
        terms.append(
            Term.of(
                one,
                val.vectors,
                metric=question.metric,
                weight=weight,
                groups=groups,
                preconditioner=inverse,
                names=val.ids,
            )
        )
    names = list(vals[0].ids)
    if question.group_field is not None:
        if COMBINED in names:
            raise UsageError(
                f"a group of --group-field {question.group_field} is called {COMBINED!r}, as the ranking over all "
                "groups is: give it another name"
            )
        names = [COMBINED, *names]
        if question.combine == "mean":
            terms = [term.with_queries(_with_mean(term)) for term in terms]
            if not max(term.lengths[0] for term in terms):
                raise UsageError(
                    "the groups cancel each other: the mean of their queries is zero, and every row would score the "
                    "same; give --combine max or rank-fusion"
                )
    return Asked(
        question=question, part=part, val=vals[0], weights=weights, terms=terms, names=names, run=run, device=device
    )


def _refuse_other_queries(parts: Sequence[Part], vals: Sequence[ValVectors]) -> None:
    """UsageError where val samples have a gradient at one checkpoint and none at another."""
    for part, val in zip(parts, vals, strict=True):
        if val.digest != vals[0].digest:  # ids may repeat, and as many may be others
            raise UsageError(
                f"{val.used} val samples have a gradient at the checkpoint of part {part.name!r}, and {vals[0].used} "
                f"(or others) at that of part {parts[0].name!r} (left out: {val.left_out}, {vals[0].left_out}): scores "
                "cannot be summed. Remove these val samples, or query one part"
            )


def encode(
    part: Part, corpus: Corpus, question: Question, device: str, progress: Progress, *, blocks: bool = False
) -> ValVectors:
    """The val set's vectors as ``question`` groups them; with ``blocks`` before the sketch. Notes what is left out."""
    val = encode_val_set(
        part,
        corpus,
        grouping="each" if question.each else "mean" if question.group_field is None else "domain",
        checkpoint=question.checkpoint,
        device=device,
        max_samples=question.max_samples,
        blocks=blocks,
        progress=progress,
    )
    if val.left_out and not blocks:
        shown = ", ".join(f"{count} {status}" for status, count in sorted(val.left_out.items()))
        progress.note(f"val rows left out: {shown}; {val.used} are used")
    return val


def _with_mean(term: Term) -> Tensor:
    """The queries of ``term`` with their mean before them: its score is the mean of theirs."""
    return torch.cat([term.queries_QD.mean(0, keepdim=True), term.queries_QD])


def _last_first(ranking: Ranking) -> Ranking:
    return Ranking(np.roll(ranking.rows, 1, axis=0), np.roll(ranking.scores, 1, axis=0))


def fused(scores_QN: NDArray[np.float64]) -> NDArray[np.float64]:
    """(1, N): reciprocal rank fusion of Q rankings, Σ 1 / (60 + rank); equal scores by lower row, NaN stays NaN."""
    total = np.zeros(scores_QN.shape[1])
    for scores_N in scores_QN:
        order = np.argsort(-scores_N, kind="stable")  # NaN last
        rank = np.empty(len(order))
        rank[order] = np.arange(1, len(order) + 1)
        total += 1.0 / (FUSION_CONSTANT + rank)
    total[np.isnan(scores_QN).any(0)] = np.nan
    return total[None]
