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
"""Of a run's losses, read from the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartInfo:
    """One part, from its manifest and its commit records."""

    name: str
    complete: bool
    rows: int
    """Rows of the part; ``committed`` of them are there."""
    committed: int
    statuses: dict[str, int]
    """Committed rows by status."""
    tokens: int
    repeated_ids: dict[str, int] | None
    """``ids`` that occur more than once, and the ``samples`` that have them; None where every id is unique."""
    dimension: int
    dtype: str
    row_bytes: int
    """Bytes of a row's numbers, its id and text aside."""
    bytes: int
    """Bytes of the committed files."""
    indexes: list[dict[str, Any]]
    """Each with its name, its state (current, stale, damaged), settings and recall."""
    fidelity: list[dict[str, Any]]
    """What `ghoststore.fidelity` measured, by metric, and its state (current, stale, damaged)."""
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """One training run, from its manifest, its commit records, its losses and its scores."""

    name: str
    complete: bool
    steps: int
    """Steps of the run; ``committed`` of them are there."""
    committed: int
    ranks: int
    batch: int
    """Samples of one rank's step."""
    rows: int
    """Rows of the row table: what it trains on."""
    repeated_ids: dict[str, int] | None
    """``ids`` that occur more than once, and the ``samples`` that have them; None where every id is unique."""
    train_loss: float | None
    """Of the last committed step with a finite one."""
    val_loss: float | None
    negative: float | None
    """Share of negative scores among the finite ones; None without any."""
    statuses: dict[str, int]
    """Committed samples by what became of their score."""
    tokens: int
    bytes: int
    """Bytes of the committed files, the row table aside."""
    gradients: dict[str, Any] | None
    """What it keeps of gradients: ``every`` so many steps, ``steps`` of them committed, their ``dtype`` and
    ``dimension``, and the bytes of a step's in ``step_bytes``; None if nothing."""
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
    """What is said of parts and runs alike, from the manifest and all commit records."""
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
    """Read the commit records of ``part``; CorruptError if one is damaged."""
    return PartInfo(
        **_common(part),
        rows=part.layout.rows,
        dimension=part.layout.dimension,
        dtype=part.layout.dtype,
        row_bytes=part.layout.row_bytes,
        indexes=[state.to_json() for state in index_states(part)],
        fidelity=[measured.to_json() for measured in kept_fidelities(part)],
    )


def describe_run(run: Run) -> RunInfo:
    """Read the commit records, the losses and the scores of ``run``; CorruptError if one of them is damaged."""
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
    """The last finite number of one number a step."""
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
    opened = Store.open(options.store)
    parts, runs = opened.chosen(options.part, options.run)
    return StoreInfo(
        store=str(options.store),
        parts=[describe(opened.part(name)) for name in parts],
        runs=[describe_run(opened.run(name)) for name in runs],
    )
