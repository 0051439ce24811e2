"""Encodes the vectors of a span, and marks the rows whose numbers cannot be stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.store.part.part import Part
from ghoststore.store.part.status import Status


def seal_vectors(arrays: dict[str, NDArray[Any]], vectors: NDArray[np.float32], part: Part) -> None:
    """Encode float32 ``vectors`` into ``arrays``, with their ``norm``, and set the status of rows that do not fit.

    A row that is not finite, or not finite once encoded, becomes zero. Norms are those of the stored numbers, so that a
    cosine is that of the vectors as they are read.
    """
    status = arrays["status"]
    usable = status < Status.EMPTY
    finite = np.isfinite(vectors).all(1) & np.isfinite(arrays["loss"])
    status[usable & ~finite] = Status.NOT_FINITE
    vectors[~(usable & finite)] = 0.0  # before encoding: a NaN would make the scale of its block NaN
    stored, scale = part.encoding.encode(vectors, part.groups)
    decoded = part.encoding.decode(stored, scale, part.groups)
    # In float64: squares of float32 overflow from 1.8e19 on, and vanish below 1e-23.
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.square(decoded, dtype=np.float64)
        norm = np.sqrt(np.stack([squares[:, start:stop].sum(1) for _, start, stop in part.groups], axis=1))
        row_norm = np.sqrt(np.square(norm).sum(1)).astype(np.float32)
    fits = np.isfinite(row_norm)
    status[~fits] = Status.OUT_OF_RANGE
    stored[~fits], norm[~fits] = 0, 0.0
    norm = norm.astype(np.float32)
    unusable = status >= Status.EMPTY
    arrays["loss"][unusable] = 0.0
    arrays["vectors"], arrays["norm"] = stored, norm
    if scale is not None:
        scale[~fits] = 0.0
        arrays["scale"] = scale
