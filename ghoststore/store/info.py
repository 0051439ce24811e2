"""``ghoststore.info``: what a store holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ghoststore.settings.keywords import takes
from ghoststore.settings.store import InfoOptions
from ghoststore.store.part.fidelity import kept_fidelities
from ghoststore.store.part.indexes import index_states
from ghoststore.store.part.part import Part
from ghoststore.store.run.pieces import side_by_side
from ghoststore.store.run.run import Run
from ghoststore.store.spans.group import Spanned
from ghoststore.store.store import Store

STEPS_AT_ONCE = 65_536
"""Steps of a run's losses that are read at a time, from the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartInfo:
    """A part, described by its manifest and commit records."""

    name: str
    complete: bool
    rows: int
    """Rows of the whole part, ``committed`` or not; of an ``open`` part those that are committed."""
    committed: int
    open: bool
    """Whether it is built from a stream whose end was not seen yet: nobody knows how many rows it will have."""
    statuses: dict[str, int]
    """Committed rows by status."""
    tokens: int
    repeated_ids: dict[str, int] | None
    """The number of ``ids`` that occur more than once, and of ``samples`` with them; None if every id is unique."""
    dimension: int
    dtype: str
    row_bytes: int
    """Bytes of a row's numbers, without id and text."""
    fields: dict[str, str]
    """Kept fields of the samples, with their types."""
    bytes: int
    """Bytes of the committed files."""
    indexes: list[dict[str, Any]]
    """Name, state (current, stale, damaged), settings and recall of each index."""
    fidelity: list[dict[str, Any]]
    """Results of `ghoststore.fidelity` by metric, with their state (current, stale, damaged)."""
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """A training run, described by its manifest, commit records, losses and scores."""

    name: str
    complete: bool
    steps: int
    """Steps of the whole run, ``committed`` or not."""
    committed: int
    ranks: int
    batch: int
    """Samples of one rank's step."""
    rows: int
    """Rows of the row table: the training samples, or their windows."""
    repeated_ids: dict[str, int] | None
    """The number of ``ids`` that occur more than once, and of ``samples`` with them; None if every id is unique."""
    train_loss: float | None
    """The loss of the last committed step that has a finite one."""
    val_loss: float | None
    negative: float | None
    """Share of negative scores among the finite ones; None if there are none."""
    statuses: dict[str, int]
    """Committed samples by the status of their score."""
    tokens: int
    bytes: int
    """Bytes of the committed files, without the row table."""
    gradients: dict[str, Any] | None
    """The kept gradients: one step in ``every``, the number of committed ``steps`` with gradients, their ``dtype`` and
    ``dimension``, and their ``step_bytes`` in a step; None if the run keeps none."""
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """What ``ghoststore.info`` returns."""

    store: str
    parts: list[PartInfo]
    runs: list[RunInfo]

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore info --json`` prints."""
        return asdict(self)


def _common(source: Spanned[Any]) -> dict[str, Any]:
    """The fields that parts and runs share, from the manifest and all commit records."""
    statuses: Counter[str] = Counter()
    tokens = size = 0
    for commit in source.commits():
        statuses.update(commit.statuses)
        tokens += commit.tokens
        size += sum(record.bytes for record in commit.files.values())
    return {
        "name": source.name,
        "complete": source.complete,
        "committed": source.length,
        "statuses": dict(statuses),
        "tokens": tokens,
        "repeated_ids": source.repeated_ids,
        "bytes": size,
        "manifest": source.manifest,
    }


def describe(part: Part) -> PartInfo:
    """Describe ``part``. CorruptError if a commit record is damaged."""
    return PartInfo(
        **_common(part),
        rows=part.rows if part.open else part.layout.rows,
        open=part.open,
        dimension=part.layout.dimension,
        dtype=part.layout.dtype,
        row_bytes=part.layout.row_bytes,
        fields={field.name: field.type for field in part.layout.fields},
        indexes=[state.to_json() for state in index_states(part)],
        fidelity=[measured.to_json() for measured in kept_fidelities(part)],
    )


def describe_run(run: Run) -> RunInfo:
    """Describe ``run``. CorruptError if a commit record, a loss or a score is damaged."""
    return RunInfo(
        **_common(run),
        steps=run.layout.steps,
        ranks=run.layout.ranks,
        batch=run.layout.batch,
        rows=run.layout.rows,
        train_loss=_last(run, "train_loss"),
        val_loss=_last(run, "val_loss"),
        negative=_negative(run),
        gradients=_gradients(run),
    )


def _gradients(run: Run) -> dict[str, Any] | None:
    if run.layout.kept is None:
        return None
    kept, arrays = run.layout.kept
    specs = [run.spec(name) for name in arrays if name is not None]
    entries = (specs[0].entries(start, stop) for start, stop in run.ranges)
    return {
        "every": kept.every,
        "steps": sum(last - first for first, last in entries),
        "dtype": kept.dtype,
        "dimension": kept.dimension,
        "step_bytes": sum(spec.width * int(spec.dtype.itemsize) for spec in specs),
    }


def _last(run: Run, array: str) -> float | None:
    """The last finite value of an array with one number a step."""
    for first, last in reversed(run.ranges):
        for stop in range(last, first, -STEPS_AT_ONCE):
            values = run.read(array, max(first, stop - STEPS_AT_ONCE), stop)
            finite = np.flatnonzero(np.isfinite(values))
            if len(finite):
                return float(values[finite[-1]])
    return None


def _negative(run: Run) -> float | None:
    negative = scored = 0
    for piece in side_by_side(run, ["score"], run.ranges):
        score = piece.data["score"]
        finite = np.isfinite(score)
        scored += int(finite.sum())
        negative += int((score[finite] < 0).sum())
    return negative / scored if scored else None


@takes(InfoOptions)
def info(options: InfoOptions) -> StoreInfo:
    """Every part and training run of a store, or one of either.

    UsageError if there is no such store, part or run.
    """
    store = Store.open(options.store)
    parts, runs = store.chosen(options.part, options.run)
    return StoreInfo(
        store=str(options.store),
        parts=[describe(store.part(name)) for name in parts],
        runs=[describe_run(store.run(name)) for name in runs],
    )
