"""The projected gradients that a run keeps: what of an engine's results becomes its arrays, at which steps.

Legend: B samples of a micro-batch, D numbers of a vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.store.run.gradients import GradientLayout
from ghoststore.store.run.layout import RunLayout
from indexer.dotprod import GradDotProdEngine, Scores
from indexer.dotprod.keeping import KeepingMethod

OF_SAMPLES = ("gradient", "gradient_scale")
"""Arrays with a vector for each sample."""


def gradient_layout(engine: GradDotProdEngine, every: int | None, dtype: str) -> GradientLayout | None:
    """That of the vectors of ``engine``, of every ``every``-th step; None where none are kept."""
    projection = engine.method.projection
    if every is None or projection is None:
        return None
    return GradientLayout(every=every, dtype=dtype, groups=tuple(projection.plan.groups))


def kept_section(engine: GradDotProdEngine | None, layout: RunLayout) -> dict[str, Any]:
    """What a run's ``scoring`` says of the projection of its vectors, as a part's manifest does; empty where it keeps
    none.
    """
    projection = None if engine is None else engine.method.projection
    if projection is None or (layout.gradients is None and layout.dimension is None):
        return {}
    described = {**projection.plan.to_json(), "hash": projection.hash}
    return {"gradients": {"projection": described, "layers": projection.plan.layers_json()}}


def want_vectors(engine: GradDotProdEngine, kept: GradientLayout | None, step: int, *, scaled: bool) -> None:
    """Before a batch of ``step``: have ``engine`` make vectors beside exact scores where its step keeps them, and of a
    val gradient that a step that keeps them may use. ``scaled``: there is a loss scaler.
    """
    if isinstance(engine.method, KeepingMethod):
        engine.method.wanted = kept is not None and kept.holds(step)
        # Steps that a loss scaler leaves out do not age a val gradient: any step may use it then.
        soon = kept is not None and (scaled or -step % kept.every < engine.val_refresh_interval)
        engine.method.wanted_val = soon


def arrays_of_samples(kept: GradientLayout, scores: Scores) -> dict[str, NDArray[Any]]:
    """(B, …) by array: the vectors of a batch as they are stored."""
    assert scores.vectors is not None
    stored, scale = kept.encode(scores.vectors.cpu().numpy())
    return {"gradient": stored} if scale is None else {"gradient": stored, "gradient_scale": scale}


class ValStep:
    """Which weights the val gradient is of: those that the model had before this step. Where a loss scaler left steps
    out, the weights were the same before several of them: the last one counts.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        """None: no val gradient was seen that was of the weights of its step."""

    def of(self, step: int, scores: Scores) -> int:
        """Of the val gradient that ``step`` was scored against."""
        if scores.val_age == 0:
            self._step = step
        elif self._step is None:
            self._step = step - scores.val_age
        return self._step

    def forget(self) -> None:
        """A step was not seen: its weights may be those."""
        self._step = None


def arrays_of_step(kept: GradientLayout, scores: Scores, val_step: int) -> dict[str, NDArray[Any]]:
    """By array: the vector of the val gradient that the step was scored against, without a metric, and ``val_step``,
    the step whose weights it is of. Empty without val samples.
    """
    if scores.val_vector is None:
        return {}
    stored, scale = kept.encode(scores.val_vector.float().cpu().numpy()[None])
    arrays: dict[str, NDArray[Any]] = {"val_gradient": stored[0], "val_step": np.asarray(val_step)}
    return arrays if scale is None else {**arrays, "val_gradient_scale": scale[0]}
