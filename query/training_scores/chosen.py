"""What the steps of a run chose among their candidates, counted as it grows."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.store.run.run import Run
from query.training_scores.steps import StepPiece

RECENT_STEPS = 50


class Chosen:
    """How many candidates the steps of ``run`` had, and how many of these they trained on.

    Legend: E domains (the last entry is for samples without one).
    """

    def __init__(self, run: Run) -> None:
        domain = run.rows.read("domain", 0, len(run.rows)).astype(np.int64)
        self._domain_of_row = np.where(domain < 0, len(run.domains), domain)
        self._by_domain = np.zeros((2, len(run.domains) + 1), dtype=np.int64)
        """(2, E): candidates, and those that were trained on."""
        self._recent: deque[tuple[int, int]] = deque(maxlen=RECENT_STEPS)

    def add(self, piece: StepPiece) -> None:
        """Count the candidates of ``piece``."""
        sample, weight = piece.data["sample"], piece.data["weight"]
        filled = sample >= 0
        trained = filled & (weight > 0)
        for sums, places in zip(self._by_domain, (filled, trained), strict=True):
            sums += np.bincount(self._domain_of_row[sample[places]], minlength=len(sums))
        drawn, trained_on = (places.reshape(len(sample), -1).sum(1).tolist() for places in (filled, trained))
        self._recent.extend(zip(drawn, trained_on, strict=True))

    @property
    def shares(self) -> NDArray[np.float64]:
        """(E,): share of each domain's candidates that were trained on; NaN without any."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self._by_domain[1] / self._by_domain[0])

    def fields(self) -> dict[str, Any]:
        """The fields of a frame about choosing."""
        drawn, trained = self._by_domain.sum(1).tolist()
        recent, recently = (sum(counts) for counts in zip(*self._recent, strict=True))
        return {
            "candidates": drawn,
            "kept": trained,
            "kept_share": trained / drawn if drawn else None,
            "recent_kept_share": recently / recent if recent else None,
        }
