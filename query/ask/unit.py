"""What a product of vectors means, in nats: by how much the val loss changes.

Of preconditioned parts it is what the influence function predicts if a row is left out of the training. Leaving out
one of N rows changes the val loss by (1/N) · g_valᵀ F⁻¹ g (Koh, Liang 2017), with F the curvature of the mean loss. The
part has H = E[g gᵀ] in place of it, where g is the mean over T tokens, so F ≈ T · H. Kronecker factors know nothing of
the curvature that the rows have along their own vectors v: with Σ v vᵀ beside N · I it is N + d there, d = E|v|². Hence

    nats = product ÷ (T · (N + d)).

Of other parts it is what a small step on the row alone does, by gradient descent or by Adam, ÷ its learning rate.
`docs/design/0015-scores-in-nats.md` has the derivation, and what true trainings say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.store import Part
from ghoststore.store.base.object_path import at_once
from ghoststore.store.base.objects import side_by_side
from ghoststore.store.part.metric import metric_for
from ghoststore.store.part.status import FIRST_UNUSABLE
from ghoststore.store.spans.reader import read_span
from query.ask.question import Question

NATS, OF_A_STEP = "nats", "nats/lr"
ONE_BIT = math.pi / 2
"""What one bit a number divides products with a float vector by, and squared lengths too, for normal numbers
(Bussgang 1952)."""
MOST_SPANS = 64
"""Spans that the means over rows are taken from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The unit of the products of one part: ``factor`` × product is in nats, or nats per unit of learning rate."""

    name: str
    factor: float
    rounding: float
    """What of ``factor`` makes up for the rounding of stored vectors: π/2 or 1."""
    rows: int | None = None
    """N; this and the next two only of preconditioned parts."""
    tokens: float | None = None
    """T, the harmonic mean over rows; 1 where the loss of a row is a sum."""
    directions: float | None = None
    """d, the mean squared length of a vector."""
    step: str | None = None
    """Of other parts: whose step."""

    @classmethod
    def of(cls, part: Part, *, rounded: bool = True, directions: float = 1.0) -> Unit | None:
        """That of the products with stored vectors, or with vectors before they were rounded; None without a usable
        row. The metric of the products has ``directions`` times those of the part's.
        """
        one_bit = ONE_BIT if part.layout.dtype == "onebit" else 1.0
        gain = one_bit if rounded else 1.0
        projection = part.manifest["projection"]
        if projection["precondition"] == "none":
            step = "gradient descent" if projection["optimizer_state"] is None else "Adam"
            return cls(name=OF_A_STEP, factor=gain, rounding=gain, step=step)
        last = len(part.spans) - 1
        chosen = sorted({place * last // (MOST_SPANS - 1) for place in range(MOST_SPANS)}) if last >= 0 else []
        spans = [part.spans[place] for place in chosen]
        usable, tokens, squares = [], [], []

        def read(span: int) -> list[NDArray[Any]]:
            return [read_span(part, name, span) for name in ("status", "n_tokens", "norm")]

        for status, n_tokens, norm in side_by_side(read, spans, at_once(part.path)):
            usable.append(status < FIRST_UNUSABLE)
            tokens.append(n_tokens[usable[-1]])
            squares.append(np.square(norm[usable[-1]], dtype=np.float64).sum(1))
        share = float(np.concatenate(usable).mean()) if spans else 0.0
        if not share:
            return None
        rows = round(part.planned_rows * share)
        directions *= one_bit * float(np.concatenate(squares).mean())
        targets = np.maximum(np.concatenate(tokens).astype(np.float64) - 1, 1)  # the first token is no target
        of_row = 1.0 if part.manifest["loss"]["reduction"] == "sum" else 1 / float((1 / targets).mean())
        factor = gain / (of_row * (rows + directions))
        return cls(name=NATS, factor=factor, rounding=gain, rows=rows, tokens=of_row, directions=directions)

    def to_json(self) -> dict[str, Any]:
        """``unit`` of the settings of a result."""
        numbers = {"rows": self.rows, "tokens": self.tokens, "directions": self.directions}
        about = numbers if self.step is None else {"step": self.step}
        return {"name": self.name, "factor": self.factor, "rounding": self.rounding, **about}


def unit_of(question: Question, parts: Sequence[Part], *, rounded: bool = True, directions: float = 1.0) -> Unit | None:
    """The unit of the products that answer ``question``: of its scores, or of what these are blended from. None where
    they have none: by cosine, over several parts, with a second preconditioner, and by ``rank-fusion``.
    """
    products = metric_for(question.metric, parts) == "dot" and len(parts) == 1 and question.precondition == "none"
    if not products or question.combine == "rank-fusion":
        return None
    return Unit.of(parts[0], rounded=rounded, directions=directions)


def unit_words(settings: Mapping[str, Any]) -> str:
    """What the sign and the scale of numbers in the ``unit`` of a result's ``settings`` mean, in a sentence."""
    unit = settings["unit"]
    loss = "the val loss" if settings.get("phrase") is None else "the loss of the phrase"
    loss += "" if settings.get("minus") is None else " less that of the second val set"
    some = settings["layers"] or settings["exclude_layers"]
    of_layers = " Here it is the share of the layers asked for." if some else ""
    if "step" in unit:
        return (
            f"{OF_A_STEP}: by how much a small step of {unit['step']} on the row alone lowers {loss} (below 0: "
            f"raises it), divided by its learning rate.{of_layers}"
        )
    return (
        f"{NATS}: by how much {loss} is predicted to rise if the row were left out of a training on these "
        f"{unit['rows']:,} rows, or to fall if it were seen once more; below 0 it is the other way round.{of_layers}"
    )


def metric_words(settings: Mapping[str, Any]) -> str:
    """What the scores of a result with these ``settings`` are products or cosines of."""
    metric, of_part = settings["metric"], settings.get("part_metric")
    words = f"{metric} of plain gradients" if of_part is None else f"{metric}, {of_part}"
    if settings["precondition"] == "second-moment":
        words += f"; with the second moment of the part's rows, damping {settings['damping']:g}"
    way = settings.get("rerank_with")
    if way == "ekfac":
        words += f", their eigenvalues measured on {settings['rerank_samples']:,} rows"
    if way == "exact" and "rerank_damping" in settings:
        words += f", with damping {settings['rerank_damping']:g}"
    if way == "cg":
        steps = settings["cg_steps"]
        words = (
            f"{metric}, preconditioned by the Gauss-Newton matrix of {settings['rerank_samples']:,} rows "
            f"({steps:,} step{'s' * (steps != 1)} of conjugate gradients)"
        )
    if len(parts := settings.get("parts", ())) > 1:
        words += f"; summed over {len(parts)} parts, each times its weight"
    return words
