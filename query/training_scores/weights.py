"""What a score of a step counts with in a sum over steps: ``--weight``.

``unit``, the default: 1 ÷ the mean |score| of the step, so that every step counts alike, however long its gradients
are. ``learning-rate``: η of the step, so that the sum is that of In-Run Data Shapley of first order. ``loss-fall``: 1 ÷
the mean |score|, times how far the training loss fell at the step: a step that taught more counts more, and one at
which the loss did not fall nothing. A step whose learning rate is 0 moved no weight and counts nothing, whatever the
kind.

The fall of a step is the slope of the training loss there. The committed steps of the window are cut into BLOCKS
blocks; between the middles of two neighbours the loss falls from the mean of the one to that of the other, evenly.
Before the first middle and behind the last it falls as beside them. A loss that rises falls by 0.

Legend: P places with a sample, one after another; S steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.settings.shared import StepWeight as StepWeight
from ghoststore.store.run.pieces import side_by_side
from ghoststore.store.run.ranges import Steps, inside
from ghoststore.store.run.run import Run

Float64 = NDArray[np.float64]
BLOCKS = 20


class StepWeights:
    """The weights of the steps of a run in ``window``. Memory: 16 bytes a step while it is made, for ``loss-fall``.

    UsageError where the loss of fewer than two steps is known, and a fall is asked for.
    """

    def __init__(self, run: Run, kind: StepWeight, window: Steps) -> None:
        self.kind = kind
        self._falls = _Falls(run, window) if kind == "loss-fall" else None

    def of(self, step: NDArray[np.int64], score: Float64, learning_rate: Float64) -> Float64:
        """(P,): what each of ``score`` is multiplied with. ``step`` is ascending, and has all places of each step that
        it has any of. 0 where the learning rate is. NaN where the step has no finite learning rate, if that is asked
        for, or no finite score.
        """
        if self.kind == "learning-rate":
            return learning_rate
        steps, of_step = np.unique(step, return_inverse=True)
        finite = np.isfinite(score)
        counts = np.bincount(of_step[finite], minlength=len(steps))
        sums = np.bincount(of_step[finite], np.abs(score[finite]), minlength=len(steps))
        with np.errstate(invalid="ignore", divide="ignore"):
            weights = np.where(sums > 0, counts / sums, np.where(counts > 0, 0.0, np.nan))
        if self._falls is not None:
            weights = weights * self._falls.of(steps)
        return np.where(learning_rate == 0, 0.0, weights[of_step])


class _Falls:
    """How far the training loss falls at each step."""

    def __init__(self, run: Run, window: Steps) -> None:
        steps, losses = [np.zeros(0)], [np.zeros(0)]
        for piece in side_by_side(run, ["train_loss"], inside(run.ranges, window)):
            loss = piece.data["train_loss"].astype(np.float64)
            finite = np.flatnonzero(np.isfinite(loss))
            steps.append((finite + piece.start).astype(np.float64))
            losses.append(loss[finite])
        step_S, loss_S = np.concatenate(steps), np.concatenate(losses)
        if len(step_S) < 2:
            raise UsageError(
                f"`weight=loss-fall`: run {run.name!r} has a training loss at {len(step_S)} of these steps; two are "
                "needed for it to fall. Give `weight=unit`, or more steps"
            )
        blocks = min(BLOCKS, len(step_S))
        self._middle = np.array([block.mean() for block in np.array_split(step_S, blocks)])
        mean = np.array([block.mean() for block in np.array_split(loss_S, blocks)])
        self._slope = np.maximum(-np.diff(mean) / np.diff(self._middle), 0.0)

    def of(self, steps: NDArray[np.int64]) -> Float64:
        """Of each of ``steps``."""
        place = np.searchsorted(self._middle, steps, side="right") - 1
        return np.asarray(self._slope[np.clip(place, 0, len(self._slope) - 1)])
