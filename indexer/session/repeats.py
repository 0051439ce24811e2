"""Steps that are in the store already and come again: a loop that starts over, or goes on from an older checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ghoststore.errors import MismatchError
from ghoststore.store.run.ranges import inside
from ghoststore.store.run.run import Run
from indexer.session.ranks import Ranks

NOTHING: NDArray[Any] = np.zeros(0)
SAME = 0.1
"""Relative difference up to which scores of a repeated step are the same: devices may add in another order."""


class Repeats:
    """The committed steps of a run, against which repeated ones are held. ``run`` is None on ranks that do not lead."""

    def __init__(self, run: Run | None, ranks: Ranks, note: Callable[[str], None]) -> None:
        self._run, self._ranks, self._note = run, ranks, note
        last = run.ranges[-1][1] if run is not None and run.ranges else 0
        self._end = int(ranks.stacked(torch.tensor([last]))[0])
        """Steps before this one may have been committed by an earlier process."""
        self._scores_compared = False
        self._read: dict[str, tuple[int, NDArray[Any]]] = {}
        """The steps that were read last, by array: the first of them, and their values."""

    def check(self, step: int, sample_B: NDArray[np.int64], score_B: NDArray[np.float32]) -> None:
        """What is committed never changes: a step that is repeated must be of the same samples. That its scores are
        others (another random state) is said once.

        MismatchError on every rank if the samples are others.
        """
        if step >= self._end:
            return
        committed = self._committed(step, "sample")
        if self._ranks.any(committed is not None and not np.array_equal(committed, sample_B)):
            name = "" if self._run is None else f"{self._run.name!r} "
            raise MismatchError(
                f"the run {name}has step {step} already, with other samples (or none): this is another training, or "
                "its data come in another order. Nothing was changed; give it a name of its own, or resume from its "
                "state"
            )
        if committed is not None and not self._scores_compared:
            self._scores_compared = True
            stored = np.nan_to_num(self._committed(step, "score"))
            if np.linalg.norm(stored - np.nan_to_num(score_B)) > SAME * np.linalg.norm(stored):
                self._note(
                    f"step {step} is in the run already, with other scores: this training has other weights or another "
                    "random state. The store keeps what it has; give another training a name of its own"
                )

    def _committed(self, step: int, array: str) -> Any:
        """(B,): the first rank's values of a step; None where it is not committed, and on other ranks."""
        if self._run is None:
            return None
        first, values = self._read.get(array, (0, NOTHING))
        if not first <= step < first + len(values):
            # Steps of one chunk, of which whole ones are read anyway, that are committed together.
            size = self._run.spec(array).chunk_rows
            ahead = inside(self._run.ranges, (step, step - step % size + size))
            if not ahead or ahead[0][0] > step:
                return None
            first, values = step, self._run.read(array, *ahead[0])
            self._read[array] = (first, values)
        return values[step - first, 0]
