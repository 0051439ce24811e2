"""What TensorBoard and Weights & Biases get of the scores at each save interval: a histogram, means by domain and by
val group, and the samples with the highest and lowest scores.

Legend: P samples of the steps of an interval, G val groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.shown import clipped, visible
from ghoststore.store.run.layout import RunLayout
from indexer.training.data import TrainingRows
from indexer.training.loop import StepResult
from indexer.training.validation import NO_DOMAIN

EXTREMES = 5
TEXT_LENGTH = 300
COLUMNS = ("score", "id", "domain", "trained on", "text")


@dataclass(frozen=True, slots=True)
class RankedSamples:
    """Samples of an interval, the best or the worst first: a row of COLUMNS each, whose texts are safe to show."""

    rows: list[tuple[float, str, str, str, str]]


Logged = float | NDArray[Any] | RankedSamples
"""A number, numbers for a histogram, or samples."""


class ScoreSummary:
    """The scores of this rank's samples, candidates among them, since the last save interval of ``layout`` ended."""

    def __init__(self, rows: TrainingRows, layout: RunLayout) -> None:
        self._rows, self._layout = rows, layout
        self._names = [visible(name) for name in rows.shards.domains] + [NO_DOMAIN]
        self._parts: list[dict[str, NDArray[Any]]] = []

    def add(self, result: StepResult) -> dict[str, Logged]:
        """Count a step; what is to be logged after it, which is empty unless an interval ends."""
        done, arrays = result.step + 1, result.scored.arrays
        if "score" in arrays:
            self._parts.append({name: arrays[name] for name in ("sample", "score", *_also(arrays))})
        if not self._parts or (done % self._layout.interval and done != self._layout.steps):
            return {}
        parts, self._parts = self._parts, []
        return self._summed({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    def _summed(self, arrays: dict[str, NDArray[Any]]) -> dict[str, Logged]:
        row_P, score_P = arrays["sample"], arrays["score"].astype(np.float64)
        trained_P = arrays["weight"] > 0 if "weight" in arrays else None
        values: dict[str, Logged] = {}
        if np.isfinite(score_P).any():
            values["scores/histogram"] = score_P[np.isfinite(score_P)]
        domain_P = self._rows.shards.domain[self._rows.sample[row_P]]
        for place, name in enumerate(self._names):
            of_domain = domain_P == (place if place < len(self._names) - 1 else -1)
            values |= _means(f"scores/by_domain/{name}", score_P[of_domain])
            if trained_P is not None and of_domain.any():
                values[f"scores/by_domain/{name}/kept_share"] = float(trained_P[of_domain].mean())
        for place, name in enumerate(self._layout.groups):
            values |= _means(f"scores/by_group/{visible(name)}", arrays["group_score"][:, place].astype(np.float64))
        for name, sign in (("best", -1.0), ("worst", 1.0)):
            places = list(_first_of_rows(row_P, sign * score_P))
            values[f"scores/{name}"] = RankedSamples([self._shown(row_P, score_P, trained_P, at) for at in places])
        return values

    def _shown(
        self, row_P: NDArray[Any], score_P: NDArray[Any], trained_P: NDArray[Any] | None, at: int
    ) -> tuple[float, str, str, str, str]:
        rows, row = self._rows, int(row_P[at])
        sample, start = int(rows.sample[row]), int(rows.window_start[row])
        text = rows.shards.decode(rows.shards.tokens_of(sample, start, start + int(rows.length[row])))
        trained_on = "yes" if trained_P is None or trained_P[at] else "no"
        name = visible(str(rows.shards.sample_id[sample]))
        domain = self._names[int(rows.shards.domain[sample])]  # -1, the last, is for none
        return float(score_P[at]), name, domain, trained_on, clipped(visible(" ".join(text.split())), TEXT_LENGTH)


def _also(arrays: dict[str, NDArray[Any]]) -> Sequence[str]:
    return [name for name in ("weight", "group_score") if name in arrays]


def _means(name: str, score_P: NDArray[np.float64]) -> dict[str, Logged]:
    """Mean and negative share of the finite scores; empty without any."""
    finite = score_P[np.isfinite(score_P)]
    if not len(finite):
        return {}
    return {f"{name}/mean": float(finite.mean()), f"{name}/negative_share": float((finite < 0).mean())}


def _first_of_rows(row_P: NDArray[Any], key_P: NDArray[np.float64]) -> Iterator[int]:
    """The places of the lowest finite keys, each row once; equal ones in the order of places."""
    seen: set[int] = set()
    for place in np.argsort(key_P, kind="stable").tolist():
        row = int(row_P[place])
        if np.isfinite(key_P[place]) and row not in seen and len(seen) < EXTREMES:
            seen.add(row)
            yield place
