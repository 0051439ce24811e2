"""How the numbers of a vector are stored: float32 rows to bytes on disk and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import UsageError

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Encoding:
    """One value of ``--proj-dtype``."""

    name: str
    stored: np.dtype[Any]
    """dtype of the Zarr array."""
    encode: Callable[[Float32], NDArray[Any]]
    """float32 (rows, D) to the stored dtype, rounded to nearest even; too large becomes infinite."""
    decode: Callable[[NDArray[Any]], Float32]
    """Back to float32, exactly."""


def _to_bfloat16(x: Float32) -> NDArray[np.uint16]:
    u = np.ascontiguousarray(x).view(np.uint32)
    rounded: NDArray[np.uint16] = ((u + np.uint32(0x7FFF) + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    # The carry above turns some NaNs into numbers; a NaN must stay one.
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _from_bfloat16(u: NDArray[Any]) -> Float32:
    return (u.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_float16(x: Float32) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return x.astype(np.float16)


ENCODINGS: dict[str, Encoding] = {
    "float32": Encoding("float32", np.dtype("<f4"), lambda x: x, lambda x: x.astype(np.float32, copy=False)),
    "float16": Encoding("float16", np.dtype("<f2"), _to_float16, lambda x: x.astype(np.float32)),
    # No Zarr release has bfloat16: the array is uint16, and the manifest says what its bits mean.
    "bfloat16": Encoding("bfloat16", np.dtype("<u2"), _to_bfloat16, _from_bfloat16),
}


def encoding(name: str) -> Encoding:
    """The encoding called ``name``; UsageError with the known names otherwise."""
    try:
        return ENCODINGS[name]
    except KeyError:
        raise UsageError(f"--proj-dtype {name!r} is unknown; known: {', '.join(ENCODINGS)}") from None
