"""The shape of a run on disk. Specified in ``docs/format.md``.

Legend: S steps, R ranks, B samples of one rank's step, N rows of the row table, G val groups, K blocks, D numbers
of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ghoststore.errors import UsageError
from ghoststore.store.run.gradients import GRADIENT_DTYPES, GradientLayout, KeptArrays
from ghoststore.store.spans.layout import (
    CHUNK_BYTES,
    LARGEST_ROW_BYTES,
    SAMPLE_COLUMNS,
    ArraySpec,
    SpanLayout,
    column_specs,
)

ROW_CHUNK = 65_536
"""Rows of a chunk of the row table."""
FILE_BYTES = 4 << 20
"""Bytes that the files of a span have on average, at least, where a run is long enough."""
_NAN = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLayout(SpanLayout):
    """Everything that fixes the arrays of a run. UsageError if they cannot be.

    Its arrays follow from it. :meth:`saving` chooses spans for a save interval.
    """

    steps: int
    ranks: int
    batch: int
    """Samples of one rank's step, micro-batches of accumulation side by side."""
    span_steps: int
    """Steps whose chunks are committed together."""
    save_steps: int | None = None
    """Steps that a journal keeps together until their span is full, a divisor of ``span_steps``: the save interval.
    None: that is the span, and the run has no journal."""
    rows: int
    """Rows of the row table."""
    groups: tuple[str, ...] = ()
    """Val groups that have scores of their own."""
    blocks: tuple[str, ...] = ()
    """Blocks of parameters that have scores of their own."""
    dimension: int | None = None
    """Numbers of a projected gradient of each step's samples, kept as float32; None: none are kept so."""
    gradients: GradientLayout | None = None
    """The projected gradients of some steps' samples, kept in an encoding of parts; None: none are kept so."""
    weights: bool = False
    """Whether samples are candidates, each with the weight that its step trained on it with."""

    def __post_init__(self) -> None:
        for name in ("steps", "ranks", "batch", "span_steps", "save_steps", "rows", "dimension"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"a run needs {name} of at least 1, not {value}")
        if self.span_steps % self.interval:
            raise UsageError(f"a span of {self.span_steps} steps is not whole save intervals of {self.interval}")
        if self.gradients is not None and self.interval % self.gradients.every:
            raise UsageError(
                f"a save interval of {self.interval} steps is not whole times {self.gradients.every} steps, of which "
                "one keeps its gradients"
            )
        for name in ("groups", "blocks"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise UsageError(f"a run needs different names of {name}; found {', '.join(getattr(self, name)[:20])}")
        for spec in self.arrays():
            step_bytes = spec.width * spec.dtype.itemsize
            if step_bytes > LARGEST_ROW_BYTES:
                raise UsageError(
                    f"one step of {spec.name!r} is {step_bytes >> 20} MiB ({spec.width:,} numbers); a run stores at "
                    f"most {LARGEST_ROW_BYTES >> 20} MiB a step and array: keep fewer numbers a sample"
                )

    @classmethod
    def saving(cls, every: int, **rest: Any) -> RunLayout:
        """The layout of a run that saves ``every`` so many steps; ``rest`` are its other fields, spans aside.

        Where gradients of every so many steps are kept, the save interval is rounded up to whole times that. A span is
        as many save intervals as make its files 4 MiB on average, its record among them, or the whole run where that is
        shorter.
        """
        if (kept := rest.get("gradients")) is not None:
            every = -(-every // kept.every) * kept.every
        least = cls(span_steps=every, save_steps=every, **rest)
        intervals = -(-least.steps // every)
        size = 1
        while True:
            spans = intervals // size
            size = -(-intervals // spans)
            if spans > 1:
                # Chunks divide the span of which they are parts: a number with many twos in it leaves them large.
                twos = max(0, size.bit_length() - 4)
                size = -(-size >> twos) << twos
            layout = replace(least, span_steps=size * every)
            if spans == 1 or layout._file_bytes() >= FILE_BYTES:
                return layout
            size = min(intervals, size + max(1, size // 8))

    def _file_bytes(self) -> float:
        """Bytes of a file of the first span, on average."""
        start, stop = self.span_of(0)
        specs = self.arrays()
        files = 1 + sum(len(self.chunk_keys(spec, 0)) for spec in specs)
        return sum(spec.count(stop - start) * spec.width * int(spec.dtype.itemsize) for spec in specs) / files

    @classmethod
    def of(cls, storage: Mapping[str, Any]) -> RunLayout:
        """The layout that a manifest's storage section describes; KeyError, TypeError or ValueError if it is none."""
        for name in ("groups", "blocks"):
            if not isinstance(storage[name], list):
                raise TypeError(f"{name} is not a list of names")
        return cls(
            steps=int(storage["steps"]),
            ranks=int(storage["ranks"]),
            batch=int(storage["batch"]),
            span_steps=int(storage["span_steps"]),
            save_steps=int(storage["save_steps"]) if "save_steps" in storage else None,
            rows=int(storage["rows"]),
            groups=tuple(map(str, storage["groups"])),
            blocks=tuple(map(str, storage["blocks"])),
            dimension=None if storage["dimension"] is None else int(storage["dimension"]),
            weights=bool(storage.get("weights", False)),
            gradients=GradientLayout.of(storage["gradients"]) if "gradients" in storage else None,
        )

    def in_spans_of(self, stored: Mapping[str, Any]) -> RunLayout:
        """This layout, in the spans of the run with the storage section ``stored`` if both save at the same steps: how
        many intervals a span has is the writer's choice, and that of the run that is there holds.
        """
        if stored.get("save_steps", stored.get("span_steps")) != self.interval:
            return self
        return replace(self, span_steps=int(stored["span_steps"]), save_steps=stored.get("save_steps"))

    def to_json(self) -> dict[str, Any]:
        """The storage section of a run's manifest."""
        storage = {**asdict(self), "groups": list(self.groups), "blocks": list(self.blocks)}
        if self.save_steps is None:
            del storage["save_steps"]
        if not self.weights:
            del storage["weights"]
        del storage["gradients"]
        if self.gradients is not None:
            storage["gradients"] = self.gradients.to_json()
        return storage

    @property
    def length(self) -> int:
        """Steps."""
        return self.steps

    @property
    def span_length(self) -> int:
        """Steps of a span."""
        return self.span_steps

    @property
    def interval(self) -> int:
        """The save interval: steps that are on the disk, or lost, together."""
        return self.span_steps if self.save_steps is None else self.save_steps

    @property
    def intervals(self) -> int:
        """Number of save intervals."""
        return -(-self.steps // self.interval)

    def interval_of(self, number: int) -> tuple[int, int]:
        """First step and one past the last of a save interval."""
        return number * self.interval, min((number + 1) * self.interval, self.steps)

    def arrays(self) -> list[ArraySpec]:
        """Every step array, in the order in which a span writes them; the row table is apart."""
        place, axes = (self.ranks, self.batch), ("step", "rank", "place")
        specs = [
            self._spec("sample", "<i8", place, axes, -1),
            self._spec("score", "<f4", place, axes),
            self._spec("loss", "<f4", place, axes),
        ]
        if self.weights:
            specs.append(self._spec("weight", "<f4", place, axes))
        if self.groups:
            specs.append(self._spec("group_score", "<f4", (*place, len(self.groups)), (*axes, "group")))
        if self.blocks:
            specs.append(self._spec("block_score", "<f4", (*place, len(self.blocks)), (*axes, "block")))
        if self.dimension is not None:
            specs.append(self._spec("vector", "<f4", (*place, self.dimension), (*axes, "column")))
        return [
            *specs,
            *self._gradient_arrays(),
            self._spec("learning_rate", "<f8"),
            self._spec("train_loss", "<f4"),
            self._spec("val_loss", "<f4"),
            self._spec("grad_norm", "<f4"),
            self._spec("tokens", "<i8", fill=0),
            self._spec("seconds", "<f4"),
            self._spec("score_seconds", "<f4"),
        ]

    @property
    def kept(self) -> tuple[GradientLayout, KeptArrays] | None:
        """How projected gradients are kept, in either form, and where; None where none are."""
        if self.gradients is not None:
            return self.gradients, self.gradients.arrays
        if self.dimension is None:
            return None
        whole = GradientLayout(every=1, dtype="float32", groups=(("all", 0, self.dimension),))
        return whole, KeptArrays("vector")

    def _gradient_arrays(self) -> list[ArraySpec]:
        """Of the steps that keep their gradients alone, one entry each."""
        kept = self.gradients
        if kept is None:
            return []
        place, axes, every = (self.ranks, self.batch), ("kept_step", "rank", "place"), kept.every
        code, numbers = GRADIENT_DTYPES[kept.dtype], (kept.columns,)
        specs = [
            self._spec("gradient", code.stored, (*place, *numbers), (*axes, "column"), code.fill, every),
            self._spec("val_gradient", code.stored, numbers, ("kept_step", "column"), code.fill, every),
            self._spec("val_step", "<i8", (), ("kept_step",), -1, every),
        ]
        if kept.scaled:
            groups = (len(kept.groups),)
            specs += [
                self._spec("gradient_scale", "<f4", (*place, *groups), (*axes, "block"), every=every),
                self._spec("val_gradient_scale", "<f4", groups, ("kept_step", "block"), every=every),
            ]
        return specs

    def _spec(
        self,
        name: str,
        dtype: str,
        columns: tuple[int, ...] = (),
        axes: tuple[str, ...] = ("step",),
        fill: float = _NAN,
        every: int = 1,
    ) -> ArraySpec:
        """Chunks of whole steps, at most about 8 MiB, that divide the span (or are those of the only one)."""
        whole = ArraySpec(
            name=name, dtype=np.dtype(dtype), chunk_rows=1, columns=columns, axes=axes, fill=fill, every=every
        )
        span, most = whole.count(min(self.span_steps, self.steps)), max(1, CHUNK_BYTES // whole.chunk_bytes)
        if self.save_steps is not None and self.span_steps >= self.steps:
            # Of the only span: of about one size, whether or not they divide it.
            chunk = -(-span // -(-span // min(span, most)))
        else:
            chunk = _dividing(span, most)
        return replace(whole, chunk_rows=chunk)

    def row_arrays(self) -> list[ArraySpec]:
        """The arrays of the row table, (N) each, below ``rows/``."""
        return column_specs(SAMPLE_COLUMNS, min(ROW_CHUNK, self.rows), "rows/")


@lru_cache(maxsize=256)
def _dividing(span: int, most: int) -> int:
    """The largest number up to ``most`` that divides ``span``: a chunk never crosses a span, for other spans are
    written by others, at other times. Looked for once: a span may be long, and each look at an array asks.
    """
    chunk = min(span, most)
    while span % chunk:
        chunk -= 1
    return chunk
