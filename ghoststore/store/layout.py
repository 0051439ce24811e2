"""The shape of a part on disk: arrays, chunks, spans. Specified in ``docs/format.md``.

Legend: N rows, D numbers of a vector, S rows of a span.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ghoststore.errors import MismatchError, UsageError
from ghoststore.store.encoding import encoding

FORMAT_VERSION = 1
CHUNK_BYTES = 8 << 20
"""Aim for the size of a chunk of vectors; above 32 MiB reading falls off a cliff."""
LARGEST_ROW_BYTES = 32 << 20
MIN_SPAN_ROWS, MAX_SPAN_ROWS = 256, 4096

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_name(name: str) -> str:
    """``name`` itself if it can name a part or a run; UsageError otherwise. Never a path."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a part: use 1 to 128 letters, digits, '.', '_' and '-', the first a letter or digit"
        )
    return name


def safe_name(*pieces: str) -> str:
    """A valid name made of ``pieces`` (other characters become '-')."""
    joined = "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", piece).strip("-._") for piece in pieces if piece)
    return check_name(joined.strip("-._")[:128] or "part")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """One Zarr array of a part; ``columns`` empty means one number (or string) a row."""

    name: str
    dtype: Any
    chunk_rows: int
    columns: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartLayout:
    """Everything that fixes the arrays of a part."""

    rows: int
    dimension: int
    groups: int
    """Blocks that have a norm of their own."""
    dtype: str
    span_rows: int
    chunk_rows: int
    """Rows of a chunk of ``vectors``; divides ``span_rows``."""
    store_text: bool

    def __post_init__(self) -> None:
        encoding(self.dtype)
        if self.rows < 1 or self.dimension < 1 or self.groups < 1:
            raise MismatchError(
                f"a part has rows, numbers and blocks; found {self.rows}, {self.dimension}, {self.groups}"
            )
        if self.span_rows < 1 or self.chunk_rows < 1 or self.span_rows % self.chunk_rows:
            raise MismatchError(f"chunks of {self.chunk_rows} rows do not divide spans of {self.span_rows} rows")

    @classmethod
    def choose(
        cls, *, rows: int, dimension: int, groups: int, dtype: str, span_rows: int | None, store_text: bool
    ) -> PartLayout:
        """Chunks of about 8 MiB, a power of two of rows; spans of one chunk, or 256 rows if that is more."""
        row_bytes = dimension * encoding(dtype).stored.itemsize
        if row_bytes > LARGEST_ROW_BYTES:
            raise UsageError(
                f"a vector of {dimension} numbers is {row_bytes >> 20} MiB; a part stores at most "
                f"{LARGEST_ROW_BYTES >> 20} MiB a row: lower --proj-rank-total or give --proj-compress"
            )
        chunk = min(
            MAX_SPAN_ROWS,
            max(1, 1 << (CHUNK_BYTES // row_bytes).bit_length() - 1 if row_bytes <= CHUNK_BYTES else 1),
        )
        span = max(chunk, MIN_SPAN_ROWS) if span_rows is None else span_rows
        if span < 1:
            raise UsageError(f"--span-rows must be at least 1, not {span}")
        span = min(span, rows)
        chunk = min(chunk, span)
        while span % chunk:
            chunk -= 1
        return cls(
            rows=rows, dimension=dimension, groups=groups, dtype=dtype, span_rows=span, chunk_rows=chunk,
            store_text=store_text,
        )  # fmt: skip

    @property
    def spans(self) -> int:
        """Number of spans."""
        return -(-self.rows // self.span_rows)

    def span_of(self, span: int) -> tuple[int, int]:
        """First row and one past the last of ``span``."""
        if not 0 <= span < self.spans:
            raise IndexError(f"span {span} of {self.spans}")
        return span * self.span_rows, min((span + 1) * self.span_rows, self.rows)

    def arrays(self) -> list[ArraySpec]:
        """Every array of the part, in the order in which a span writes them."""
        span = self.span_rows
        specs = [
            ArraySpec(
                name="vectors",
                dtype=encoding(self.dtype).stored,
                chunk_rows=self.chunk_rows,
                columns=self.dimension,
            ),
            ArraySpec(name="norm", dtype=np.dtype("<f4"), chunk_rows=span, columns=self.groups),
            ArraySpec(name="loss", dtype=np.dtype("<f4"), chunk_rows=span),
            ArraySpec(name="n_tokens", dtype=np.dtype("<i4"), chunk_rows=span),
            ArraySpec(name="status", dtype=np.dtype("u1"), chunk_rows=span),
            ArraySpec(name="sample_id", dtype=str, chunk_rows=span),
            ArraySpec(name="domain", dtype=np.dtype("<i2"), chunk_rows=span),
            ArraySpec(name="source_row", dtype=np.dtype("<i8"), chunk_rows=span),
            ArraySpec(name="source_file", dtype=np.dtype("<i4"), chunk_rows=span),
            ArraySpec(name="source_offset", dtype=np.dtype("<i8"), chunk_rows=span),
            ArraySpec(name="source_digest", dtype=np.dtype("<u8"), chunk_rows=span),
            ArraySpec(name="window_start", dtype=np.dtype("<i4"), chunk_rows=span),
        ]
        if self.store_text:
            specs.append(ArraySpec(name="text", dtype=str, chunk_rows=span))
        return specs

    def chunk_keys(self, spec: ArraySpec, span: int) -> list[str]:
        """Paths, relative to the part, of the chunks of one array that ``span`` writes."""
        start, stop = self.span_of(span)
        first, last = start // spec.chunk_rows, (stop - 1) // spec.chunk_rows
        tail = "" if spec.columns is None else "/0"
        return [f"{spec.name}/c/{chunk}{tail}" for chunk in range(first, last + 1)]
