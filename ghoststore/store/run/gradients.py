"""The layout of a run's kept gradients: those of one step in ``every``, in an encoding of parts.

``docs/format.md`` specifies it.

Legend: D numbers of a vector, G blocks of columns, R vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.store.part.encoding import Encoding, encoding

Float32 = NDArray[np.float32]
BFLOAT16_NAN = 0x7FC0


class Stored(NamedTuple):
    """dtype and fill value of the array of an encoding."""

    stored: str
    fill: float
    """The value of a missing vector: NaN; for codes 0, with a scale of NaN."""


GRADIENT_DTYPES: dict[str, Stored] = {
    "int8": Stored("i1", 0),
    "float32": Stored("<f4", np.nan),
    "float16": Stored("<f2", np.nan),
    "bfloat16": Stored("<u2", BFLOAT16_NAN),
    "onebit": Stored("u1", 0),
}


class KeptArrays(NamedTuple):
    """Names of the arrays of a run's gradients."""

    vectors: str
    scale: str | None = None
    val: str | None = None
    """Of the val gradients; None if they are not kept."""
    val_scale: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientLayout:
    """Which steps keep gradients, and how. UsageError for impossible settings."""

    every: int
    """Steps 0, ``every``, 2·``every``, … keep the gradients of their samples."""
    dtype: str
    """An encoding of parts."""
    groups: tuple[tuple[str, int, int], ...]
    """(name, first column, one past the last) of each block with a scale of its own; together all D columns."""

    def __post_init__(self) -> None:
        encoding(self.dtype)
        if self.every < 1:
            raise UsageError(f"`keep_gradients` must be at least 1 step, not {self.every}")
        end = 0
        for _, start, stop in self.groups:
            if not start == end < stop:
                raise UsageError(f"blocks of gradients do not follow one another: one from {start} to {stop}")
            end = stop
        if not end:
            raise UsageError("gradients that are kept have at least one number")

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> GradientLayout:
        """The layout in a manifest. KeyError, TypeError or ValueError if it describes none."""
        groups = tuple((str(name), int(start), int(stop)) for name, start, stop in stored["groups"])
        return cls(every=int(stored["every"]), dtype=str(stored["dtype"]), groups=groups)

    def to_json(self) -> dict[str, Any]:
        """The inverse of :meth:`of`."""
        return {"every": self.every, "dtype": self.dtype, "groups": [list(group) for group in self.groups]}

    @property
    def dimension(self) -> int:
        """Numbers of a vector (D)."""
        return self.groups[-1][2]

    @property
    def encoding(self) -> Encoding:
        """The encoding of the vectors."""
        return encoding(self.dtype)

    @property
    def columns(self) -> int:
        """Columns of the array for D numbers."""
        return self.encoding.columns(self.dimension)

    @property
    def scaled(self) -> bool:
        """Whether the encoding has scales."""
        return self.encoding.scaled

    @property
    def arrays(self) -> KeptArrays:
        """Names of the arrays of the gradients."""
        if self.scaled:
            return KeptArrays("gradient", "gradient_scale", "val_gradient", "val_gradient_scale")
        return KeptArrays("gradient", None, "val_gradient")

    def holds(self, step: int) -> bool:
        """Whether ``step`` keeps its gradients."""
        return step % self.every == 0

    def encode(self, vectors_RD: Float32) -> tuple[NDArray[Any], Float32 | None]:
        """Encode vectors as (stored, scales). One that is not finite, or too large, is stored as missing."""
        code = self.encoding
        finite_R = np.asarray(np.isfinite(vectors_RD).all(axis=1), dtype=bool)
        encoded = code.encode(np.where(finite_R[:, None], vectors_RD, np.float32(0)), self.groups)
        stored, scale = encoded.stored, encoded.scale
        finite_R &= np.asarray(np.isfinite(code.decode(stored, scale, self.groups)).all(axis=1), dtype=bool)
        stored[~finite_R] = GRADIENT_DTYPES[self.dtype].fill
        if scale is not None:
            scale[~finite_R] = np.nan
        return stored, scale

    def decode(self, stored: NDArray[Any], scale: Float32 | None) -> Float32:
        """Decode (R, columns) and (R, G) to (R, D) float32; NaN for a missing vector."""
        return self.encoding.decode(stored, scale, self.groups)
