"""The projected gradients that a run keeps, streamed: of which samples they are, and the val gradients beside.

Legend: P samples of some steps, one after another; K steps, D numbers of a vector, C as they are stored, G blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.store.run.gradients import GradientLayout, KeptArrays
from ghoststore.store.run.pieces import Pieces, check_rows, side_by_side
from ghoststore.store.run.ranges import Steps
from ghoststore.store.run.run import Run

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Visits:
    """The samples of some steps that keep their gradients, in the order of steps, ranks and places."""

    step: NDArray[np.int64]
    """(P,)."""
    rank: NDArray[np.int64]
    place: NDArray[np.int64]
    row: NDArray[np.int64]
    """Place in the row table."""
    learning_rate: NDArray[np.float64]
    weight: NDArray[np.float64]
    """(P,): that the sample had in its step where that chose among candidates (0: not trained on); else 1."""
    vectors: Float32
    """(P, D); NaN where the gradient was not finite, or out of range of the encoding."""
    stored: NDArray[Any]
    """(P, C), what they were decoded from."""
    scale: Float32 | None
    """(P, G), with codes."""
    val: Float32 | None
    """(K, D), if they were asked for: of each step that keeps gradients. NaN without val samples."""
    steps: NDArray[np.int64]
    """(K,): the steps that keep gradients, with samples or without."""
    of_step: NDArray[np.int64]
    """(P,): which of them."""
    data: dict[str, NDArray[Any]]
    """(P, …): the arrays that were asked for, too, as they are stored."""


def kept_of(run: Run) -> tuple[GradientLayout, KeptArrays]:
    """What ``run`` keeps of gradients. UsageError if it keeps none."""
    if run.layout.kept is None:
        raise UsageError(
            f"run {run.name!r} keeps no gradients, so nothing in it can be searched; a training with "
            "`ghoststore train --keep-gradients EVERY` does. `ghoststore scores` ranks what this one has"
        )
    return run.layout.kept


def stream_visits(
    run: Run, ranges: Sequence[Steps], *, val: bool = False, also: Sequence[str] = ()
) -> Iterator[Visits]:
    """The steps of ``ranges`` of committed ones that keep gradients, piece by piece. ``also`` are further arrays of the
    samples, as they are stored.

    Memory: one chunk of each array, and a few MiB. CorruptError naming what is damaged.
    """
    kept, arrays = kept_of(run)
    names = [arrays.vectors, arrays.scale, *((arrays.val, arrays.val_scale) if val else ()), *also]
    names += ["weight"] * run.layout.weights
    for piece in side_by_side(run, ["sample", "learning_rate", *filter(None, names)], ranges):
        steps = np.arange(-(-piece.start // kept.every), -(-piece.stop // kept.every)) * kept.every
        if len(steps):
            yield _of_piece(run, piece, steps, val=val, also=also)


def _of_piece(run: Run, piece: Pieces, steps: NDArray[np.int64], *, val: bool, also: Sequence[str]) -> Visits:
    kept, arrays = kept_of(run)
    data, here = piece.data, steps - piece.start
    check_rows(run, piece)
    sample = data["sample"][here]
    there = sample >= 0
    of_step, rank, place = there.nonzero()
    stored = data[arrays.vectors][there]
    scale = None if arrays.scale is None else data[arrays.scale][there]
    of_val = None
    if val and arrays.val is not None:
        of_val = kept.decode(data[arrays.val], None if arrays.val_scale is None else data[arrays.val_scale])
    return Visits(
        step=steps[of_step],
        rank=rank,
        place=place,
        row=sample[there],
        learning_rate=data["learning_rate"][here][of_step],
        weight=data["weight"][here][there].astype(np.float64) if run.layout.weights else np.ones(len(of_step)),
        vectors=kept.decode(stored, scale),
        stored=stored,
        scale=scale,
        val=of_val,
        steps=steps,
        of_step=of_step,
        data={name: data[name][here][there] for name in also},
    )
