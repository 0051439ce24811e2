"""The second stage of a query by whole gradients, ``ghoststore query --rerank``.

The first stage brings candidates, by the stored vectors. The second scores them by exact gradients of the part's
layers: ⟨M⁻¹ ∇L_val, ∇ℓ⟩, with the metric M of the part, with M's eigenvalues measured, or with the Gauss-Newton matrix
in its place. M is applied to the val gradient alone; each candidate goes through the model once, and no gradient is
stored.

Legend: Q queries, V val rows, U candidates of all queries together, O, I axes of a gradient matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.progress import Progress
from ghoststore.settings.option import check_choices
from ghoststore.settings.question import RerankOptions
from ghoststore.store import Part
from indexer.encode.tokens import Row
from indexer.projection.blocks import Block
from indexer.projection.plan import ProjectionPlan
from indexer.projection.stored import metric_of
from query.ask.encoder import ROWS_AT_ONCE, PartEncoder, ValVectors
from query.ask.scorer import Scorer
from query.exact.eigen_corrected import eigen_corrected
from query.exact.gauss_newton import Blocks, GaussNewton, conjugate_gradients, mean_eigenvalues
from query.exact.layer_gradients import Half, LayerGradients, Passes

MEMORY = 2 << 30
"""Bytes of val gradients, and of what conjugate gradients keep beside them, unless those of one query are more."""
COPIES = {"exact": 2, "ekfac": 2, "cg": 7}
"""How many val gradients of a query are in memory at once."""
SAMPLES = {"ekfac": 256, "cg": 128}
DAMPING, STEPS = 0.1, 8
"""Of conjugate gradients: `benchmarks/rerank.py`."""
LITTLE = 0.01
"""Damping of whole gradients, which predict better with less than stored vectors need: `benchmarks/by_domain.py`."""


@dataclass(frozen=True, kw_only=True)
class Reranking(RerankOptions):
    """The options of a second stage, checked. UsageError for those that belong to another way."""

    def __post_init__(self) -> None:
        check_choices(self)
        self.refuse_contradictions()

    @property
    def in_metric(self) -> bool:
        """Whether scores are in the metric of the part, whatever its damping, and not in one that is measured anew."""
        return self.rerank is None or self.rerank_with not in ("ekfac", "cg")

    def samples(self, part: Part) -> int:
        """Rows of the corpus to learn from: no more than there are."""
        wanted = SAMPLES[self.rerank_with] if self.rerank_samples is None else self.rerank_samples
        return min(wanted, int(part.usable().sum()))

    @property
    def steps(self) -> int:
        """Steps of conjugate gradients."""
        return STEPS if self.cg_steps is None else self.cg_steps

    def damping(self, part: Part) -> float | None:
        """The damping; None where there is none: for vectors, and for whole gradients without Kronecker factors."""
        own = part.manifest["projection"]["damping"]
        if self.rerank is None or self.rerank_with == "vectors" or (self.rerank_with == "exact" and own is None):
            return None
        if self.rerank_damping is not None:
            return self.rerank_damping
        return DAMPING if self.rerank_with == "cg" else min(LITTLE, float(own))

    def directions(self, part: Part, plan: ProjectionPlan) -> float:
        """How many directions the metric of the second stage has, ÷ those of the part's."""
        learned, damping = None if plan.calibration is None else plan.calibration.preconditioner, self.damping(part)
        if learned is None or damping is None:
            return 1.0
        return replace(learned, damping=damping).directions() / learned.directions()

    def settings(self, part: Part) -> dict[str, Any]:
        """What the settings of a result say about the second stage."""
        if self.rerank is None:
            return {"rerank": None}
        settings: dict[str, Any] = {"rerank": self.rerank, "rerank_with": self.rerank_with}
        if self.rerank_with in ("ekfac", "cg"):
            settings["rerank_samples"] = self.samples(part)
        if (damping := self.damping(part)) is not None:
            settings["rerank_damping"] = damping
        return settings | ({"cg_steps": self.steps} if self.rerank_with == "cg" else {})


def exact_scores(
    scorer: Scorer, how: Reranking, candidates: NDArray[np.int64], progress: Progress
) -> NDArray[np.float64]:
    """(Q, U) float64: the exact scores of the rows ``candidates`` in every ranking of ``scorer``.

    ``scorer`` must keep its model and val sets. A score is NaN where the gradient of the row is not finite. A note to
    ``progress`` says what it will cost. Raises what :meth:`PartEncoder.source_rows` raises.
    """
    stage = _Stage.of(scorer, how, progress)
    vals, weights_QV = _val_rows(scorer)
    stage.note_cost(weights_QV, candidates)
    scores = []
    for start in range(0, len(weights_QV), stage.queries_at_once):
        weights = weights_QV[start : start + stage.queries_at_once]
        (involved,) = torch.nonzero(weights.any(0), as_tuple=True)
        with stage.layers, closing(progress.task("exact val gradients", len(involved))) as task:
            gradients = stage.passes.combined([vals[place] for place in involved], weights[:, involved], task)
        scores.append(stage.scores(gradients, candidates))
    scores_QU = np.concatenate(scores)
    extra = len(scorer.names) - len(scores_QU)  # the ranking over all groups: the mean of theirs
    return np.concatenate([scores_QU.mean(0, keepdims=True), scores_QU]) if extra else scores_QU


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """The model of a part, ready for exact gradients of some of its layers."""

    scorer: Scorer
    encoder: PartEncoder
    how: Reranking
    layers: LayerGradients
    passes: Passes
    progress: Progress

    @classmethod
    def of(cls, scorer: Scorer, how: Reranking, progress: Progress) -> _Stage:
        (term,), encoder = scorer.terms, scorer.encoder
        assert encoder is not None
        blocks = [layer.block for layer in encoder.plan.layers]
        if term.groups is not None:
            blocks = [blocks[group] for group in term.groups]
        manifest = encoder.part.manifest
        layers = LayerGradients(encoder.model, blocks, reduction=manifest["loss"]["reduction"])
        passes = Passes(layers, int(manifest["batching"]["batch_tokens"]), bool(manifest["batching"]["padding"]))
        return cls(scorer=scorer, encoder=encoder, how=how, layers=layers, passes=passes, progress=progress)

    @property
    def blocks(self) -> list[Block]:
        return self.layers.blocks

    @property
    def cosine(self) -> bool:
        return self.scorer.terms[0].metric == "cosine"

    @property
    def numbers(self) -> int:
        """Numbers of a gradient of the layers."""
        return sum(block.n_out * block.n_in for block in self.blocks)

    @property
    def queries_at_once(self) -> int:
        return max(1, MEMORY // (4 * self.numbers * COPIES[self.how.rerank_with]))

    def scores(self, gradients: Blocks, candidates: NDArray[np.int64]) -> NDArray[np.float64]:
        """(Q, U) float64 for the val ``gradients``, which are overwritten."""
        half = self._half()
        queries, lengths_Q = self._solved(gradients, half)
        dots, squares = [], []
        with self.layers, closing(self.progress.task("exact gradients", len(candidates))) as task:
            for start in range(0, len(candidates), ROWS_AT_ONCE):
                rows = self.encoder.source_rows(candidates[start : start + ROWS_AT_ONCE])
                dots_QR, squares_R = self.passes.products(rows, queries, task, half if self.cosine else None)
                dots.append(dots_QR)
                squares.append(squares_R)
        scores_QU = torch.cat(dots, dim=1)
        if self.cosine:
            lengths_U = torch.cat([square for square in squares if square is not None]).sqrt()
            scores_QU = scores_QU / lengths_Q.unsqueeze(1) / lengths_U.clamp_min(np.finfo(np.float64).tiny)
        return np.asarray(scores_QU.where(scores_QU.isfinite(), torch.nan).numpy())

    def _half(self) -> Half:
        damping = self.how.damping(self.encoder.part)
        if self.how.rerank_with != "ekfac":
            of_exact = None if self.how.rerank_with == "cg" else damping
            return metric_of(self.encoder.part, self.encoder.plan, of_exact) or (lambda block, g_OI: g_OI)
        calibration = self.encoder.plan.calibration
        assert calibration is not None
        assert calibration.preconditioner is not None
        assert damping is not None
        rows = self._corpus_sample()
        with self.layers, closing(self.progress.task("measuring eigenvalues", len(rows))) as task:
            return eigen_corrected(self.passes, calibration.preconditioner, rows, damping, task)

    def _solved(self, gradients: Blocks, half: Half) -> tuple[Blocks, Tensor]:
        """(M⁻¹ g, (Q,) lengths of g in the metric) for the val gradients g, which are overwritten."""
        if self.how.rerank_with == "cg":
            return self._conjugate(gradients, half), torch.ones(len(gradients[0]), dtype=torch.float64)
        squares_Q = torch.zeros(len(gradients[0]), dtype=torch.float64)
        for block, matrices in zip(self.blocks, gradients, strict=True):
            for place, g_OI in enumerate(matrices):
                once_OI = half(block, g_OI)
                squares_Q[place] += float(once_OI.square().sum(dtype=torch.float64))
                matrices[place] = half(block, once_OI)
        return gradients, squares_Q.sqrt()

    def _conjugate(self, gradients: Blocks, half: Half) -> Blocks:
        rows = self._corpus_sample()
        newton = GaussNewton(
            self.encoder.model,
            self.blocks,
            rows,
            batch_tokens=self.passes.batch_tokens,
            reduction=self.encoder.part.manifest["loss"]["reduction"],
        )
        with closing(self.progress.task("conjugate gradients", (self.how.steps + 1) * len(rows))) as task:
            with self.layers:
                means = mean_eigenvalues(self.passes, rows, task)
            relative = self.how.damping(self.encoder.part)
            assert relative is not None
            damping = [relative * mean for mean in means]

            def times(vectors: Blocks) -> Blocks:
                return newton.times(vectors, task)

            return conjugate_gradients(times, gradients, damping, _twice(half, self.blocks), self.how.steps)

    def _corpus_sample(self) -> list[Row]:
        """Usable rows of the part, evenly spaced."""
        part = self.encoder.part
        usable = part.row_numbers[part.usable()]
        count = self.how.samples(part)
        return self.encoder.source_rows(usable[np.arange(count) * len(usable) // count])

    def note_cost(self, weights_QV: Tensor, candidates: NDArray[np.int64]) -> None:
        """Say how many gradients it takes, before any is computed."""
        queries, vals = weights_QV.shape
        rounds = -(-queries // self.queries_at_once)
        tokens = int(np.asarray(self.encoder.part.read_rows("n_tokens", candidates), dtype=np.int64).sum())
        rows = f"{len(candidates):,} row{'s' * (len(candidates) != 1)} of the corpus ({tokens:,} tokens)"
        if rounds > 1:
            rows += f", these {rounds} times, for {self.queries_at_once} of {queries} queries each"
        val_rows = f"{vals:,} val row" + "s" * (vals != 1)
        note = f"second stage: forward and backward passes of {val_rows} and {rows}"
        if self.how.rerank_with == "ekfac":
            note += f"; before it of {rounds * self.how.samples(self.encoder.part):,} rows, for the eigenvalues"
        if self.how.rerank_with == "cg":
            steps, samples = self.how.steps, self.how.samples(self.encoder.part)
            products = rounds + steps * queries
            note += (
                f"; before it {steps} step{'s' * (steps != 1)} of conjugate gradients for {queries:,} "
                f"quer{'y' if queries == 1 else 'ies'} on {samples:,} rows, about as much as passes of "
                f"{2 * products * samples:,} rows"
            )
        self.progress.note(note)


def _twice(half: Half, blocks: Sequence[Block]) -> Callable[[Blocks], Blocks]:
    """The whole inverse of the metric that ``half`` is the root of."""

    def apply(vectors: Blocks) -> Blocks:
        return [
            torch.stack([half(block, half(block, g_OI)) for g_OI in matrices])
            for block, matrices in zip(blocks, vectors, strict=True)
        ]

    return apply


def _val_rows(scorer: Scorer) -> tuple[list[Row], Tensor]:
    """(V val rows, (Q, V) their weights in the gradient of each query, without the ranking over all groups)."""
    assert scorer.encoder is not None
    assert scorer.val_set is not None
    val, encoder, question = scorer.val, scorer.encoder, scorer.question
    rows = _used_rows(encoder.val_rows(scorer.val_set, question.max_samples, question.phrase), val)
    weights_QV = torch.zeros(len(val.ids), len(rows), dtype=torch.float64)
    if question.each:
        weights_QV.fill_diagonal_(1.0)
    else:
        place_of = {name: place for place, name in enumerate(val.ids)}
        for column, row in enumerate(rows):
            name = "mean" if question.grouping == "mean" else str(row.sample.domain)
            weights_QV[place_of[name], column] = 1.0 / val.rows_of[name]
    if scorer.minus_set is None:
        return rows, weights_QV
    assert scorer.minus is not None
    minus = _used_rows(encoder.val_rows(scorer.minus_set, None), scorer.minus)
    minus_QV = torch.full((len(val.ids), len(minus)), -1.0 / len(minus), dtype=torch.float64)
    return [*rows, *minus], torch.cat([weights_QV, minus_QV], dim=1)


def _used_rows(rows: Iterable[Row], val: ValVectors) -> list[Row]:
    """Those of the ``rows`` of a val set that have a vector."""
    used = set(val.row_places)
    return [row for place, row in enumerate(rows) if place in used]
