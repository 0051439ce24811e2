"""Streams the projected gradients of a run, with their samples and the val gradients.

Legend: P samples of some steps, one after another; K steps, D numbers of a vector, C columns as stored, G blocks.
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
    """The samples of some steps with kept gradients, in the order of steps, ranks and places."""

    step: NDArray[np.int64]
    """(P,)."""
    rank: NDArray[np.int64]
    place: NDArray[np.int64]
    row: NDArray[np.int64]
    """(P,): index in the row table."""
    learning_rate: NDArray[np.float64]
    weight: NDArray[np.float64]
    """(P,): weight of the sample in its step, if the step chose among candidates (0: not trained on); else 1."""
    vectors: Float32
    """(P, D); NaN if the gradient was not finite, or out of range of the encoding."""
    stored: NDArray[Any]
    """(P, C): ``vectors`` before decoding."""
    scale: Float32 | None
    """(P, G): scales of ``stored``; None without scales."""
    val: Float32 | None
    """(K, D): val gradient of each step, NaN without val samples; None unless requested."""
    steps: NDArray[np.int64]
    """(K,): the steps with kept gradients, also those without samples."""
    of_step: NDArray[np.int64]
    """(P,): index in ``steps``."""
    data: dict[str, NDArray[Any]]
    """(P, …): further arrays that were requested, as stored."""


def kept_of(run: Run) -> tuple[GradientLayout, KeptArrays]:
    """Layout and arrays of the gradients that ``run`` keeps. UsageError if it keeps none."""
    if run.layout.kept is None:
        raise UsageError(
            f"run {run.name!r} keeps no gradients, so nothing in it can be searched; a training with "
            "`ghoststore train --keep-gradients EVERY` does. `ghoststore scores` ranks what this one has"
        )
    return run.layout.kept


def stream_visits(
    run: Run, ranges: Sequence[Steps], *, val: bool = False, also: Sequence[str] = ()
) -> Iterator[Visits]:
    """Stream the committed steps in ``ranges`` that keep gradients, piece by piece.

    ``val`` adds the val gradients; ``also`` names further arrays of the samples. Memory: one chunk of each array, and a
    few MiB. CorruptError naming what is damaged.
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
    data, index_K = piece.data, steps - piece.start
    check_rows(run, piece)
    sample = data["sample"][index_K]
    present = sample >= 0
    of_step, rank, place = present.nonzero()
    stored = data[arrays.vectors][present]
    scale = None if arrays.scale is None else data[arrays.scale][present]
    val_vectors = None
    if val and arrays.val is not None:
        val_vectors = kept.decode(data[arrays.val], None if arrays.val_scale is None else data[arrays.val_scale])
    return Visits(
        step=steps[of_step],
        rank=rank,
        place=place,
        row=sample[present],
        learning_rate=data["learning_rate"][index_K][of_step],
        weight=data["weight"][index_K][present].astype(np.float64) if run.layout.weights else np.ones(len(of_step)),
        vectors=kept.decode(stored, scale),
        stored=stored,
        scale=scale,
        val=val_vectors,
        steps=steps,
        of_step=of_step,
        data={name: data[name][index_K][present] for name in also},
    )
