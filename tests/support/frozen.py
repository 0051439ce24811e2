"""What is read out of a frozen store, and compared with what was read when it was frozen."""

from __future__ import annotations

import hashlib

import numpy as np

from ghoststore.store import Part


def decoded(part: Part) -> np.ndarray:
    """(N, D) float32: every vector of a complete part."""
    scale = part.read("scale", 0, part.rows) if part.encoding.scaled else None
    return part.encoding.decode(part.read("vectors", 0, part.rows), scale, part.groups)


def digest(array: np.ndarray) -> str:
    """SHA-256 of the numbers, little endian."""
    return hashlib.sha256(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()
