"""Encodings of vectors: float32 rows to stored numbers and back.

Legend: R rows, D numbers of a vector, G blocks of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import UsageError

Float32 = NDArray[np.float32]
Groups = Sequence[tuple[str, int, int]]
"""(name, first column, one past the last) of each block, in order. Together they are all D columns."""

LAYER_BYTES = 256
"""Bytes of a layer of a row by default, without its scale."""
LARGEST_CODE = 127
LARGEST_SCALE = np.float32(66052 * 2.0**105)
"""The largest number of 17 bits whose product with 127 is finite in float32."""


class Encoded(NamedTuple):
    """Rows as they are stored."""

    stored: NDArray[Any]
    """(R, columns): the rows of the array ``vectors``."""
    scale: Float32 | None = None
    """(R, G): the rows of the array ``scale``, the factor of the codes of each row and block. None without scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """One value of ``proj_dtype``."""

    name: str
    stored: np.dtype[Any]
    """dtype of the Zarr array."""
    encode: Callable[[Float32, Groups], Encoded]
    """Finite float32 (R, D) to stored rows, rounded to nearest even. Numbers that are too large become infinite."""
    numbers: Callable[[NDArray[Any], int], Float32]
    """(R, columns) as stored, and D, to (R, D), exact, before the scale. A copy in encodings with a scale."""
    columns: Callable[[int], int] = lambda dimension: dimension
    """Columns of the Zarr array for D numbers."""
    scaled: bool = False
    """Whether the encoding has a ``scale``."""

    def decode(self, stored: NDArray[Any], scale: Float32 | None = None, groups: Groups = ()) -> Float32:
        """Decode stored rows to (R, D) float32, the same bits everywhere. Needs scale and groups if :attr:`scaled`."""
        numbers = self.numbers(stored, groups[-1][2] if groups else stored.shape[1])
        if self.scaled:
            multiply(numbers, scale, groups)
        return numbers

    def row_bytes(self, dimension: int) -> int:
        """Bytes of one stored vector, without its scales."""
        return self.columns(dimension) * self.stored.itemsize


def multiply(numbers_RD: Any, scale_RG: Any, groups: Groups) -> None:
    """Multiply each block by its scales, in place. The arguments are NumPy arrays or tensors."""
    for group, (_, start, stop) in enumerate(groups):
        numbers_RD[:, start:stop] *= scale_RG[:, group, None]


def _as_float32(stored: NDArray[Any], dimension: int) -> Float32:
    return stored.astype(np.float32, copy=False)


def _to_bfloat16(x: Float32, groups: Groups) -> Encoded:
    u = np.ascontiguousarray(x).view(np.uint32)
    rounded: NDArray[np.uint16] = ((u + np.uint32(0x7FFF) + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    # The carry of the rounding turns some NaNs into numbers, so they are set here.
    return Encoded(np.where(np.isnan(x), np.uint16(0x7FC0), rounded))


def _from_bfloat16(u: NDArray[Any], dimension: int) -> Float32:
    return (u.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_float16(x: Float32, groups: Groups) -> Encoded:
    with np.errstate(over="ignore"):
        return Encoded(x.astype(np.float16))


def _to_int8(x: Float32, groups: Groups) -> Encoded:
    """x ≈ scale · code with |code| ≤ 127; the error is at most half a scale.

    The scale is the largest magnitude of the block ÷ 127, rounded up to 17 bits. Its product with a code of 7 bits is
    exact in float32, so decoding does not round, and encoding a decoded vector gives the same codes.
    """
    largest = np.stack([np.abs(x[:, start:stop]).max(1) for _, start, stop in groups], axis=1)
    bits = ((largest / np.float32(LARGEST_CODE)).view(np.uint32) + np.uint32(0x7F)) & np.uint32(0xFFFFFF80)
    scale: Float32 = np.minimum(bits.view(np.float32), LARGEST_SCALE)
    divisor = np.where(scale > 0, scale, np.float32(1))
    codes = np.empty(x.shape, dtype=np.int8)
    for group, (_, start, stop) in enumerate(groups):
        codes[:, start:stop] = np.rint(x[:, start:stop] / divisor[:, group, None])
    return Encoded(codes, scale)


def _to_onebit(x: Float32, groups: Groups) -> Encoded:
    """x ≈ ±scale. The bit is 1 for x ≥ 0. The scale is the block's mean magnitude, which has the least error."""
    scale = np.stack([np.abs(x[:, start:stop]).mean(1, dtype=np.float64) for _, start, stop in groups], axis=1)
    return Encoded(np.packbits(x >= 0, axis=1, bitorder="little"), scale.astype(np.float32))


def _from_onebit(bits: NDArray[Any], dimension: int) -> Float32:
    return np.unpackbits(bits, axis=1, count=dimension, bitorder="little").astype(np.float32) * 2 - 1


ENCODINGS: dict[str, Encoding] = {
    code.name: code
    for code in (
        Encoding(name="float32", stored=np.dtype("<f4"), encode=lambda x, groups: Encoded(x), numbers=_as_float32),
        Encoding(name="float16", stored=np.dtype("<f2"), encode=_to_float16, numbers=_as_float32),
        # Zarr has no bfloat16: the array is uint16, and the manifest names the encoding of its bits.
        Encoding(name="bfloat16", stored=np.dtype("<u2"), encode=_to_bfloat16, numbers=_from_bfloat16),
        Encoding(name="int8", stored=np.dtype("i1"), encode=_to_int8, numbers=_as_float32, scaled=True),
        Encoding(
            name="onebit",
            stored=np.dtype("u1"),
            encode=_to_onebit,
            numbers=_from_onebit,
            columns=lambda dimension: -(-dimension // 8),
            scaled=True,
        ),
    )
}


def encoding(name: str) -> Encoding:
    """The encoding ``name``. UsageError with the known names if there is none."""
    try:
        return ENCODINGS[name]
    except KeyError:
        raise UsageError(f"`proj_dtype` {name!r} is unknown; known: {', '.join(ENCODINGS)}") from None


def numbers_per_layer(name: str) -> int:
    """How many numbers of the encoding ``name`` fill :data:`LAYER_BYTES`: 64 of float32, 2,048 of one bit."""
    return LAYER_BYTES // encoding(name).row_bytes(8) * 8
