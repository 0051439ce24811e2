"""Streaming the committed steps of a run: which samples were trained on, their scores, and the learning rate.

Legend: S steps of a piece, R ranks, B samples of one rank in a step, P places of a piece that hold a sample.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.store.run.pieces import check_rows, side_by_side
from ghoststore.store.run.ranges import Steps, inside, without
from ghoststore.store.run.run import Run
from query.training_scores.weights import StepWeights


@dataclass(frozen=True, slots=True)
class ScoreColumn:
    """Which score of a run to read. :func:`choose_column` makes it."""

    array: str
    places: tuple[int, ...] | None = None
    """The entries of the array's last axis to sum; None if the array has no such axis."""

    def of(self, data: NDArray[Any]) -> NDArray[np.float64]:
        """(S, R, B) float64: the score, from the stored array ``data``."""
        if self.places is None:
            return data.astype(np.float64)
        if len(self.places) == 1:
            return np.asarray(data[..., self.places[0]], dtype=np.float64)
        return np.asarray(data[..., list(self.places)].sum(-1, dtype=np.float64))


@dataclass(frozen=True, slots=True)
class Places:
    """The places of some steps that hold a sample, in the order of steps, then ranks, then places in the batch."""

    step: NDArray[np.int64]
    """(P,), like all the others."""
    rank: NDArray[np.int64]
    row: NDArray[np.int64]
    """Place of the sample in the row table."""
    score: NDArray[np.float64]
    """NaN if the sample was not scored."""
    learning_rate: NDArray[np.float64]
    weight: NDArray[np.float64]
    """What the score counts with: the weight of its step, times that of its sample in the step where that chose among
    candidates. NaN where the step has none.
    """
    loss: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class StepPiece:
    """The consecutive committed steps ``start`` to ``stop``."""

    start: int
    stop: int
    places: Places
    data: dict[str, NDArray[Any]]
    """The arrays that were read, as stored."""
    not_chosen: int = 0
    """Candidates that were not trained on, and are not among the places."""


def choose_column(
    run: Run, group: str | None = None, layers: Sequence[str] = (), exclude_layers: Sequence[str] = ()
) -> ScoreColumn:
    """The score for the whole val set, for one val ``group``, or of some layers only.

    UsageError for a group or layer pattern that the run does not have, and for a run that did not record such scores.
    """
    if group is not None:
        if layers or exclude_layers:
            raise UsageError("`group` and `layers` do not go together: scores by layer are kept for the whole val set")
        groups = run.layout.groups
        if not groups:
            raise UsageError(f"run {run.name!r} has no scores by val group; `ghoststore train --val-groups` keeps them")
        if group not in groups:
            raise UsageError(f"run {run.name!r} has no val group {group!r}; it has: {', '.join(groups)}")
        return ScoreColumn("group_score", (groups.index(group),))
    if layers or exclude_layers:
        return ScoreColumn("block_score", _blocks(run, layers, exclude_layers))
    return ScoreColumn("score")


def _blocks(run: Run, layers: Sequence[str], exclude_layers: Sequence[str]) -> tuple[int, ...]:
    from indexer.projection.selection import matches_path  # imports torch, which nothing else here needs

    names = run.layout.blocks
    if not names:
        raise UsageError(f"run {run.name!r} has no scores by layer; `ghoststore train --per-layer` keeps them")
    for pattern in (*layers, *exclude_layers):
        if not any(matches_path(pattern, name) for name in names):
            raise UsageError(
                f"layer pattern {pattern!r} matches no layer of run {run.name!r}: {', '.join(names[:12])} …"
            )
    chosen = tuple(
        place
        for place, name in enumerate(names)
        if (not layers or any(matches_path(pattern, name) for pattern in layers))
        and not any(matches_path(pattern, name) for pattern in exclude_layers)
    )
    if not chosen:
        raise UsageError(f"no layer of run {run.name!r} is left: {list(layers)} without {list(exclude_layers)}")
    return chosen


def end_of(run: Run) -> int:
    """One past the last committed step."""
    return run.ranges[-1][1] if run.ranges else 0


def window_of(run: Run, steps: str | slice | None, parameter: str = "steps") -> Steps:
    """The window that ``steps`` names: half-open, from 0, ends as in a Python slice. ``parameter`` is for messages.

    A negative end counts from the end of what is committed. UsageError for anything else, and for a window without
    a committed step.
    """
    end = end_of(run)
    if not end:
        raise UsageError(f"run {run.name!r} has no committed steps yet; `ghoststore watch` shows when it has")
    if steps is None:
        return 0, end
    if isinstance(steps, str):
        ends = re.fullmatch(r"\s*([+-]?\d+)?\s*:\s*([+-]?\d+)?\s*", steps)
        if ends is None:
            raise UsageError(f"`{parameter}` {steps!r}: expected first:stop, as 0:100, 500: or -100:")
        steps = slice(*(None if piece is None else int(piece) for piece in ends.groups()))
    if steps.step not in (None, 1):
        raise UsageError(f"`{parameter}` takes every step of a window, not every {steps.step}th")
    start, stop, _ = steps.indices(end)
    if not inside(run.ranges, (start, stop)):
        shown = ":".join("" if bound is None else str(bound) for bound in (steps.start, steps.stop))
        raise UsageError(
            f"`{parameter}={shown}`: no committed step of run {run.name!r} is there; its steps are "
            f"{run.ranges[0][0]:,} to {end - 1:,}"
        )
    return start, stop


def gaps_of(run: Run, window: Steps) -> list[Steps]:
    """Ranges of steps inside ``window`` that are not committed."""
    return without([window], run.ranges)


def stream_steps(
    run: Run,
    column: ScoreColumn,
    ranges: Sequence[Steps],
    *,
    weights: StepWeights,
    also: Sequence[str] = (),
    loss: bool = False,
    candidates: bool = False,
) -> Iterator[StepPiece]:
    """The steps of ``ranges`` of committed ones, piece by piece; ``also`` are further arrays of one number a step.

    A step counts with its weight of ``weights``. Where steps chose among candidates, the
    places are of those that were trained on, each with its weight in the step, too; with ``candidates`` of all, alike.

    Memory: one chunk of each array. CorruptError naming what is damaged.
    """
    weighs = run.layout.weights and not candidates
    names = ["sample", column.array, "learning_rate", *also, *(["loss"] * loss), *(["weight"] * weighs)]
    for piece in side_by_side(run, names, ranges):
        start, stop, data = piece.start, piece.stop, piece.data
        check_rows(run, piece)
        sample = data["sample"]
        filled = sample >= 0
        step, rank, _ = filled.nonzero()
        score, rate = column.of(data[column.array])[filled], data["learning_rate"][step]
        # A step's weight is over all of its candidates, chosen or not.
        weight = weights.of(step + start, score, rate)
        counts = np.ones(len(step), dtype=bool)
        if weighs:
            in_step = data["weight"][filled].astype(np.float64)
            weight, counts = in_step * weight, in_step > 0
        places = Places(
            step=(step + start)[counts],
            rank=rank[counts],
            row=sample[filled][counts],
            score=score[counts],
            learning_rate=rate[counts],
            weight=weight[counts],
            loss=data["loss"][filled][counts] if loss else None,
        )
        yield StepPiece(start, stop, places, data, int((~counts).sum()))
