"""A question to a training run: every sample's score, the sum over the steps that it was in.

score(sample, query) = Σ over its visits of weight(step) · ⟨query, vector⟩ (÷ lengths, for the cosine). The query is a
val set's gradient at one checkpoint, or of each step its own val gradient. Where steps chose among candidates, a visit
counts with the weight that its sample had in the step, too: not at all where it was not trained on.

Products are float64, row by row, and visits are added in the order of the steps: so what steps add does not depend on
whether they are in a journal still, nor on what came after them.

Legend: Q rankings, U samples (units), P samples of some steps, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ghoststore.checkpoint.in_memory import checkpoint_name
from ghoststore.corpus import Corpus, source_name
from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.store import Run, Store
from ghoststore.store.base.records import reading
from ghoststore.store.run.ranges import Steps, inside
from ghoststore.store.run.visits import Visits, kept_of, stream_visits
from indexer.layers import LayerType, layer_type_by_name
from indexer.projection.selection import matches
from query.ask.encoder import ValVectors
from query.ask.groups import fused
from query.ask.question import COMBINED
from query.ask.run_encoder import RunEncoder
from query.ask.run_question import RunQuestion
from query.ask.scorer import minus_settings
from query.search.part_score import Metric, contrasted
from query.training_scores.matching import chosen_units
from query.training_scores.sums import Units
from query.training_scores.weights import StepWeights

DEFAULT_METRIC: Metric = "cosine"
"""Of the gradients that runs keep, which are plain."""
OWN = "own"
"""Name of the ranking by each step's own val gradient."""
Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class VisitSums:
    """What the visits of each sample add up to."""

    score: Float64
    """(Q, U): NaN without a visit that counts."""
    times: NDArray[np.int32]
    """(U,): visits that count."""
    last_step: NDArray[np.int64]
    """(U,): of the newest of them, -1 without one."""
    steps: int
    """Steps of the window that keep gradients."""
    left_out: int
    """Visits without a vector, a val gradient, or a weight."""
    not_chosen: int
    """Candidates that their step did not train on."""


@contextmanager
def opened_val_set(question: RunQuestion, progress: Progress) -> Iterator[Corpus | None]:
    """The val set that ``question`` names; None for each step's own val gradient."""
    if question.val_set is None:
        yield None
        return
    with question.opened_val_set(progress) as corpus:
        yield corpus


class RunScorer:
    """``question`` with its run opened, at this moment, and its val set read (None: each step's own val gradient).

    UsageError for a run that keeps no gradients, or none in the window, and for a val set without a usable row;
    MismatchError for another model or projection; CorruptError for what is damaged.
    """

    def __init__(
        self, question: RunQuestion, val_set: Corpus | None, progress: Progress, minus: Corpus | None = None
    ) -> None:
        self.question, self.metric = question, question.metric or DEFAULT_METRIC
        self.run: Run = Store.open(question.store).run(question.run)
        kept, arrays = kept_of(self.run)
        if question.all_candidates and not self.run.layout.weights:
            raise UsageError(
                f"run {self.run.name!r} trained on every sample it scored, so it has no other candidates to count; "
                "`ghoststore train --candidates` makes steps choose"
            )
        self.window: Steps = question.window(self.run)
        first, stop = self.window
        steps = [
            (-(-start // kept.every), -(-end // kept.every)) for start, end in inside(self.run.ranges, self.window)
        ]
        self.kept_steps = sum(end - start for start, end in steps)
        if not self.kept_steps:
            raise UsageError(
                f"run {self.run.name!r} keeps the gradients of one step in {kept.every}, and steps {first:,} to "
                f"{stop - 1:,} have none of them; give a longer window"
            )
        self._columns = _columns(self.run, question)
        self.units = Units(self.run, "sample")
        self.chosen = chosen_units(self.run, self.units, question.where, progress)
        self.val: ValVectors | None = None
        self.minus: ValVectors | None = None
        self._query_QD: Float64 | None = None
        if val_set is not None:
            self.val, self.minus = self._encoded(val_set, minus, progress)
            self._query_QD = self._prepared(self.val, self.minus)
        elif arrays.val is None:
            raise UsageError(
                f"run {self.run.name!r} keeps no val gradients beside its samples' (keep_gradients does): give "
                "`val_set` and `checkpoint`"
            )
        self._sums: VisitSums | None = None

    def _encoded(
        self, corpus: Corpus, minus: Corpus | None, progress: Progress
    ) -> tuple[ValVectors, ValVectors | None]:
        question = self.question
        (checkpoint,) = question.checkpoints(1)
        assert checkpoint is not None
        encoder = RunEncoder(
            self.run,
            checkpoint=checkpoint,
            base=question.base,
            tokenizer=question.tokenizer,
            device=question.device,
            progress=progress,
        )
        val = encoder.encode_val_set(corpus, question.grouping, question.max_samples, question.phrase)
        val.note_left_out(progress)
        if question.group_field is not None and COMBINED in val.ids:
            raise UsageError(
                f"a group of `group_field={question.group_field}` is called {COMBINED!r}, as the ranking over all "
                "groups is: give it another name"
            )
        if minus is None:
            return val, None
        minus_val = encoder.encode_val_set(minus, "mean", None)
        minus_val.note_left_out(progress, "`minus`")
        return val, minus_val

    def _prepared(self, val: ValVectors, minus: ValVectors | None) -> Float64:
        """(Q, D) queries in the chosen columns, less ``minus``; of length 1 for the cosine. Of ``combine="mean"`` their
        mean first.
        """
        query_QD = val.vectors.double().numpy()[:, self._columns]
        lengths_Q = np.sqrt(np.square(query_QD).sum(1))
        wrong = ~(np.isfinite(lengths_Q) & (lengths_Q > 0))
        if wrong.any():
            raise UsageError(
                f"the query {val.ids[int(wrong.argmax())]!r} is zero, or not finite: every sample would score the "
                "same. Leave it out of the val set"
            )
        if minus is not None:
            minus_D = minus.vectors[0].double()[self._columns]
            query_QD = contrasted(torch.from_numpy(query_QD), minus_D, names=val.ids).numpy()
            lengths_Q = np.sqrt(np.square(query_QD).sum(1))
        if self.metric == "cosine":
            query_QD = query_QD / lengths_Q[:, None]
        if self.question.group_field is not None and self.question.combine == "mean":
            query_QD = np.concatenate([query_QD.mean(0, keepdims=True), query_QD])
        return np.ascontiguousarray(query_QD)

    @property
    def names(self) -> list[str]:
        """Of the Q rankings."""
        if self.val is None:
            return [OWN]
        return [COMBINED, *self.val.ids] if self.question.group_field is not None else list(self.val.ids)

    @property
    def val_rows(self) -> list[int | None]:
        """For each of ``names`` the place of its val sample in the val set; None for others."""
        return list(self.val.places) if self.val is not None and self.question.each else [None] * len(self.names)

    def sums(self, progress: Progress) -> VisitSums:
        """By one pass over the window. Memory: 16 bytes a sample and ranking, and some MiB."""
        if self._sums is not None:
            return self._sums
        question, units = self.question, len(self.units)
        queries = 1 if self._query_QD is None else len(self._query_QD)
        weights = StepWeights(self.run, question.weight, self.window)
        total_QU, times_U = np.zeros((queries, units)), np.zeros(units, dtype=np.int32)
        last_U, left_out, not_chosen = np.full(units, -1, dtype=np.int64), 0, 0
        ranges = inside(self.run.ranges, self.window)
        with closing(progress.task("searching", self.kept_steps, unit="steps")) as task:
            for piece in stream_visits(self.run, ranges, val=self._query_QD is None):
                unit_P = self.units.of(piece.row)
                in_step_P = np.ones(len(unit_P)) if question.all_candidates else piece.weight
                trained_P = in_step_P > 0
                not_chosen += int((~trained_P).sum())
                for query, score_P in enumerate(self._scores(piece)):
                    weighted_P = in_step_P * weights.of(piece.step, score_P, piece.learning_rate) * score_P
                    counts_P = np.isfinite(weighted_P) & trained_P
                    np.add.at(total_QU[query], unit_P[counts_P], weighted_P[counts_P])
                    if query == 0:
                        np.add.at(times_U, unit_P[counts_P], 1)
                        np.maximum.at(last_U, unit_P[counts_P], piece.step[counts_P])
                        left_out += int((trained_P & ~counts_P).sum())
                task.advance(len(piece.steps))
        if left_out:
            progress.note(
                f"{left_out:,} visits are left out: their gradient, the val gradient or the learning rate is not finite"
            )
        score_QU = np.where(times_U > 0, total_QU, np.nan)
        if self.chosen is not None:
            score_QU[:, ~self.chosen.mask] = np.nan
            times_U[~self.chosen.mask] = 0
        if question.group_field is not None and question.combine != "mean":
            combined = fused(score_QU) if question.combine == "rank-fusion" else score_QU.max(0, keepdims=True)
            score_QU = np.concatenate([combined, score_QU])
        self._sums = VisitSums(score_QU, times_U, last_U, self.kept_steps, left_out, not_chosen)
        return self._sums

    def _scores(self, piece: Visits) -> list[Float64]:
        """(P,) of each query; NaN without a vector, 0 for the cosine of one that is zero."""
        rows_PD = piece.vectors[:, self._columns].astype(np.float64)
        factor_P = np.ones(len(rows_PD))
        if self.metric == "cosine":
            length_P = np.sqrt(np.einsum("pd,pd->p", rows_PD, rows_PD))
            factor_P = 1 / np.where(length_P > 0, length_P, 1.0)
        if self._query_QD is not None:
            return [np.einsum("pd,d->p", rows_PD, query_D) * factor_P for query_D in self._query_QD]
        assert piece.val is not None
        val_KD = piece.val[:, self._columns].astype(np.float64)
        if self.metric == "cosine":
            with np.errstate(invalid="ignore", divide="ignore"):
                val_KD = val_KD / np.sqrt(np.square(val_KD).sum(1, keepdims=True))
        return [np.einsum("pd,pd->p", rows_PD, val_KD[piece.of_step]) * factor_P]

    def settings(self) -> dict[str, Any]:
        """What results say of how they came about."""
        question, kept = self.question, kept_of(self.run)[0]
        mode = OWN if self.val is None else "each" if question.each else "mean"
        grouped: dict[str, Any] = {}
        if self.val is not None and question.group_field is not None:
            mode = "groups"
            grouped = {
                "group_field": question.group_field,
                "combine": question.combine,
                "groups": self.val.rows_of,
            }
        return {
            "run": self.run.name,
            "val_set": None if self.val is None else source_name(question.val_set),
            "val_rows": 0 if self.val is None else self.val.used,
            "val_rows_left_out": {} if self.val is None else self.val.left_out,
            **({} if self.minus is None else minus_settings(question, self.minus)),
            **({} if question.phrase is None else {"phrase": question.phrase}),
            "mode": mode,
            **grouped,
            "metric": self.metric,
            "weight": question.weight,
            "candidates": question.all_candidates,
            "layers": list(question.layers),
            "exclude_layers": list(question.exclude_layers),
            **({} if self.chosen is None else self.chosen.settings()),
            "checkpoint": None if self.val is None else checkpoint_name(question.checkpoints(1)[0]),
            "steps": list(self.window),
            "every": kept.every,
            "kept_steps": self.kept_steps,
            "repeated_ids": self.run.repeated_ids,
        }


def _columns(run: Run, question: RunQuestion) -> slice | NDArray[np.int64]:
    """The columns of the layers that are asked for. UsageError for a pattern without a layer, and for a run whose
    vectors hold all layers in one sketch.
    """
    if not question.layers and not question.exclude_layers:
        return slice(None)
    layers = _layers(run)
    if not layers:
        raise UsageError(
            f"run {run.name!r} keeps one sketch of all layers together: it has no scores by layer. A training with "
            "`ghoststore train --keep-gradients EVERY --proj-rank-total N` keeps plain blocks"
        )
    for pattern in (*question.layers, *question.exclude_layers):
        if not any(matches(pattern, name, kind) for name, kind, _ in layers):
            names = ", ".join(name for name, _, _ in layers[:12])
            raise UsageError(f"layer pattern {pattern!r} matches no layer of run {run.name!r}: {names} …")
    chosen = [
        np.arange(first, stop)
        for name, kind, (first, stop) in layers
        if (not question.layers or any(matches(pattern, name, kind) for pattern in question.layers))
        and not any(matches(pattern, name, kind) for pattern in question.exclude_layers)
    ]
    if not chosen:
        raise UsageError(
            f"no layer of run {run.name!r} is left: {list(question.layers)} without {list(question.exclude_layers)}"
        )
    return np.concatenate(chosen)


def _layers(run: Run) -> list[tuple[str, LayerType, tuple[int, int]]]:
    """(name, type, columns) of each layer of the vectors that ``run`` keeps; empty where one sketch holds them all, or
    the run does not say.
    """
    described = run.manifest["scoring"].get("gradients")
    if described is None:
        return []
    dimension = kept_of(run)[0].dimension
    with reading(run.path / "zarr.json", "does not describe its gradients"):
        if described["projection"]["compress"] is not None:
            return []
        layers = [
            (
                str(layer["name"]),
                layer_type_by_name(layer["type"]),
                (int(layer["columns"][0]), int(layer["columns"][1])),
            )
            for layer in described["layers"]
        ]
        if not all(0 <= first < stop <= dimension for _, _, (first, stop) in layers):
            raise ValueError(f"columns of its layers are not among the {dimension} that there are")
    return layers
