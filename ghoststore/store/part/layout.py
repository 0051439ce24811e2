"""The layout of a part on disk, which ``docs/format.md`` specifies.

Legend: N rows, D numbers of a vector, S rows of a span.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ghoststore.errors import MismatchError, UsageError
from ghoststore.store.base.manifest import ENDED, OPEN
from ghoststore.store.part.encoding import encoding
from ghoststore.store.part.kept import NULL, KeptField, dtypes_of, fields_of
from ghoststore.store.spans.layout import (
    CHUNK_BYTES,
    LARGEST_ROW_BYTES,
    SAMPLE_COLUMNS,
    ArraySpec,
    SpanLayout,
    column_specs,
)

STREAM = "stream"
"""The array with an entry for each span of a stream."""
MIN_SPAN_ROWS, MAX_SPAN_ROWS = 256, 4096
LARGEST_CHUNK = LARGEST_ROW_BYTES
"""Most numbers of a chunk of vectors. Each may take a byte or less as stored, and takes four as float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartLayout(SpanLayout):
    """All that determines the arrays of a part."""

    rows: int
    dimension: int
    groups: int
    """Number of blocks with a norm of their own."""
    dtype: str
    span_rows: int
    chunk_rows: int
    """Rows of a chunk of ``vectors``, a divisor of ``span_rows``."""
    store_text: bool
    fields: tuple[KeptField, ...] = ()
    """Fields of the samples that are kept as columns."""
    stream: str | None = None
    """Of a part built from a stream: OPEN, or ENDED once its end is known. None for other parts."""

    def __post_init__(self) -> None:
        encoding(self.dtype)
        if self.rows < 1 or self.dimension < 1 or self.groups < 1:
            raise MismatchError(
                f"a part has rows, numbers and blocks; found {self.rows}, {self.dimension}, {self.groups}"
            )
        if self.chunk_rows * self.dimension > LARGEST_CHUNK:
            raise MismatchError(
                f"chunks of {self.chunk_rows} rows of {self.dimension} numbers are larger than any part has "
                f"(at most {LARGEST_CHUNK} numbers)"
            )
        if self.stream not in (None, OPEN, ENDED):
            raise MismatchError(f"a stream is {OPEN} or {ENDED}, not {self.stream!r:.40}")
        if self.span_rows < 1 or self.chunk_rows < 1 or self.span_rows % self.chunk_rows:
            raise MismatchError(f"chunks of {self.chunk_rows} rows do not divide spans of {self.span_rows} rows")

    @classmethod
    def choose(
        cls,
        *,
        rows: int,
        dimension: int,
        groups: int,
        dtype: str,
        span_rows: int | None,
        store_text: bool,
        fields: tuple[KeptField, ...] = (),
    ) -> PartLayout:
        """Choose chunks of about 8 MiB, a power of two of rows, and spans of one chunk, or of 256 rows if that is more.

        Codes of less than a byte count as bytes, so that a chunk is at most four times as large in float32.
        """
        row_bytes = max(encoding(dtype).row_bytes(dimension), dimension)
        if row_bytes > LARGEST_ROW_BYTES:
            raise UsageError(
                f"a vector of {dimension} numbers is {row_bytes >> 20} MiB; a part stores at most "
                f"{LARGEST_ROW_BYTES >> 20} MiB a row: lower `rank_total` or give `compress`"
            )
        chunk = min(
            MAX_SPAN_ROWS,
            max(1, 1 << (CHUNK_BYTES // row_bytes).bit_length() - 1 if row_bytes <= CHUNK_BYTES else 1),
        )
        span = max(chunk, MIN_SPAN_ROWS) if span_rows is None else span_rows
        if span < 1:
            raise UsageError(f"`span_rows` must be at least 1, not {span}")
        span = min(span, rows)
        chunk = min(chunk, span)
        # A chunk must not cross a span: other processes may write other spans.
        while span % chunk:
            chunk -= 1
        return cls(
            rows=rows,
            dimension=dimension,
            groups=groups,
            dtype=dtype,
            span_rows=span,
            chunk_rows=chunk,
            store_text=store_text,
            fields=fields,
        )

    @classmethod
    def of(cls, storage: Mapping[str, Any]) -> PartLayout:
        """The layout of a manifest's storage section. KeyError, TypeError or ValueError if it describes none."""
        end = 0
        for _, start, stop in storage["groups"]:
            if not (isinstance(stop, int) and start == end < stop):
                raise ValueError(f"its groups do not follow one another: one from {start!r:.40} to {stop!r:.40}")
            end = stop
        if end != storage["dimension"]:
            raise ValueError(f"its groups end at {end}, its dimension is {storage['dimension']!r:.40}")
        return cls(
            rows=int(storage["rows"]),
            dimension=int(storage["dimension"]),
            groups=len(storage["groups"]),
            dtype=str(storage["dtype"]),
            span_rows=int(storage["span_rows"]),
            chunk_rows=int(storage["chunk_rows"]),
            store_text=bool(storage["store_text"]),
            fields=fields_of(storage),
            stream=storage.get("stream"),
        )

    def to_json(self) -> dict[str, Any]:
        """What the storage section of a manifest says of the layout; nothing of kept fields, or of a stream, where
        there are none.
        """
        described = {**asdict(self), "fields": [asdict(field) for field in self.fields]}
        for name in ("fields", "stream"):
            if not described[name]:
                del described[name]
        return described

    @property
    def length(self) -> int:
        """Rows."""
        return self.rows

    @property
    def span_length(self) -> int:
        """Rows of a span."""
        return self.span_rows

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's numbers in all arrays, without id and text."""
        return sum(spec.width * int(spec.dtype.itemsize) for spec in self.arrays() if spec.dtype is not str)

    def arrays(self) -> list[ArraySpec]:
        """Every array of the part, in the order in which a span writes them."""
        code, span = encoding(self.dtype), self.span_rows
        columns = (code.columns(self.dimension),)
        vectors = ArraySpec(name="vectors", dtype=code.stored, chunk_rows=self.chunk_rows, columns=columns)
        of_blocks = ["scale", "norm"] if code.scaled else ["norm"]
        blocks = [
            ArraySpec(name=name, dtype=np.dtype("<f4"), chunk_rows=span, columns=(self.groups,)) for name in of_blocks
        ]
        columns_of_rows = {"loss": "<f4", "status": "u1", **SAMPLE_COLUMNS}
        if self.store_text:
            columns_of_rows["text"] = str
        kept = column_specs(dtypes_of(self.fields), span)
        if self.fields:
            kept.append(ArraySpec(name=NULL, dtype=np.dtype("u1"), chunk_rows=span, columns=(len(self.fields),)))
        specs = [vectors, *blocks, *column_specs(columns_of_rows, span), *kept]
        if self.stream is not None:
            specs.append(ArraySpec(name=STREAM, dtype=str, chunk_rows=1, axes=("span",), fill="", every=span))
        return specs
