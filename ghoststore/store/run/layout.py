"""The layout of a run on disk, which ``docs/format.md`` specifies.

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
"""Least average size of a span's files, if the run is long enough."""
_NAN = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLayout(SpanLayout):
    """All that determines the arrays of a run. UsageError for impossible settings.

    :meth:`saving` chooses spans for a save interval.
    """

    steps: int
    ranks: int
    batch: int
    """Samples of one rank's step, micro-batches of accumulation side by side."""
    span_steps: int
    """Steps whose chunks are committed together."""
    save_steps: int | None = None
    """The save interval: steps that are saved together, a divisor of ``span_steps``. A journal holds them until their
    span is full. None: the interval is the span, and the run has no journal."""
    rows: int
    """Rows of the row table."""
    groups: tuple[str, ...] = ()
    """Val groups with scores of their own."""
    blocks: tuple[str, ...] = ()
    """Blocks of parameters with scores of their own."""
    dimension: int | None = None
    """Numbers of a projected gradient, if those of all steps are kept as float32; else None."""
    gradients: GradientLayout | None = None
    """The layout of projected gradients in an encoding of parts; None if none are kept so."""
    weights: bool = False
    """Whether samples are candidates, each with the weight that it had in its step."""

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
        """The layout of a run that is saved every ``every`` steps; ``rest`` are its other fields, except the spans.

        The save interval is rounded up to a multiple of the interval of kept gradients. A span has as many save
        intervals as make its files, with its record, 4 MiB on average, or is the whole run if that is shorter.
        """
        if (kept := rest.get("gradients")) is not None:
            every = -(-every // kept.every) * kept.every
        shortest = cls(span_steps=every, save_steps=every, **rest)
        intervals = -(-shortest.steps // every)
        size = 1
        while True:
            spans = intervals // size
            size = -(-intervals // spans)
            if spans > 1:
                # The size of a chunk divides that of its span: a size with many factors of 2 allows large chunks.
                twos = max(0, size.bit_length() - 4)
                size = -(-size >> twos) << twos
            layout = replace(shortest, span_steps=size * every)
            if spans == 1 or layout._file_bytes() >= FILE_BYTES:
                return layout
            size = min(intervals, size + max(1, size // 8))

    def _file_bytes(self) -> float:
        """Average size in bytes of the files of the first span."""
        start, stop = self.span_of(0)
        specs = self.arrays()
        files = 1 + sum(len(self.chunk_keys(spec, 0)) for spec in specs)
        return sum(spec.count(stop - start) * spec.width * int(spec.dtype.itemsize) for spec in specs) / files

    @classmethod
    def of(cls, storage: Mapping[str, Any]) -> RunLayout:
        """The layout of a manifest's storage section. KeyError, TypeError or ValueError if it describes none."""
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
        """This layout with the spans of an existing run, given its storage section, if both save at the same steps.

        The number of intervals in a span is the choice of the writer that made the run.
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
        """The save interval: steps that are saved, or lost, together."""
        return self.span_steps if self.save_steps is None else self.save_steps

    @property
    def intervals(self) -> int:
        """Number of save intervals."""
        return -(-self.steps // self.interval)

    def interval_of(self, number: int) -> tuple[int, int]:
        """The range of steps of a save interval."""
        return number * self.interval, min((number + 1) * self.interval, self.steps)

    def arrays(self) -> list[ArraySpec]:
        """Every step array, in the order in which a span writes them; without the row table."""
        samples, axes = (self.ranks, self.batch), ("step", "rank", "place")
        specs = [
            self._spec("sample", "<i8", samples, axes, -1),
            self._spec("score", "<f4", samples, axes),
            self._spec("loss", "<f4", samples, axes),
        ]
        if self.weights:
            specs.append(self._spec("weight", "<f4", samples, axes))
        if self.groups:
            specs.append(self._spec("group_score", "<f4", (*samples, len(self.groups)), (*axes, "group")))
        if self.blocks:
            specs.append(self._spec("block_score", "<f4", (*samples, len(self.blocks)), (*axes, "block")))
        if self.dimension is not None:
            specs.append(self._spec("vector", "<f4", (*samples, self.dimension), (*axes, "column")))
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
        """Layout and arrays of the kept gradients, in either form; None if the run keeps none."""
        if self.gradients is not None:
            return self.gradients, self.gradients.arrays
        if self.dimension is None:
            return None
        all_steps = GradientLayout(every=1, dtype="float32", groups=(("all", 0, self.dimension),))
        return all_steps, KeptArrays("vector")

    def _gradient_arrays(self) -> list[ArraySpec]:
        """The arrays of kept gradients, with an entry for each step that keeps them."""
        kept = self.gradients
        if kept is None:
            return []
        samples, axes, every = (self.ranks, self.batch), ("kept_step", "rank", "place"), kept.every
        code, numbers = GRADIENT_DTYPES[kept.dtype], (kept.columns,)
        specs = [
            self._spec("gradient", code.stored, (*samples, *numbers), (*axes, "column"), code.fill, every),
            self._spec("val_gradient", code.stored, numbers, ("kept_step", "column"), code.fill, every),
            self._spec("val_step", "<i8", (), ("kept_step",), -1, every),
        ]
        if kept.scaled:
            groups = (len(kept.groups),)
            specs += [
                self._spec("gradient_scale", "<f4", (*samples, *groups), (*axes, "block"), every=every),
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
        """An array in chunks of whole steps, at most about 8 MiB. They divide the span unless it is the only one."""
        one_step = ArraySpec(
            name=name, dtype=np.dtype(dtype), chunk_rows=1, columns=columns, axes=axes, fill=fill, every=every
        )
        span, most = one_step.count(min(self.span_steps, self.steps)), max(1, CHUNK_BYTES // one_step.chunk_bytes)
        if self.save_steps is not None and self.span_steps >= self.steps:
            # Chunks of the only span need not divide it: make them of about one size.
            chunk = -(-span // -(-span // min(span, most)))
        else:
            chunk = _dividing(span, most)
        return replace(one_step, chunk_rows=chunk)

    def row_arrays(self) -> list[ArraySpec]:
        """The arrays of the row table, (N,) each, below ``rows/``."""
        return column_specs(SAMPLE_COLUMNS, min(ROW_CHUNK, self.rows), "rows/")


@lru_cache(maxsize=256)
def _dividing(span: int, most: int) -> int:
    """The largest number up to ``most`` that divides ``span``: a chunk must not cross a span.

    Cached, because a span may be long, and each access to an array asks for it.
    """
    chunk = min(span, most)
    while span % chunk:
        chunk -= 1
    return chunk
