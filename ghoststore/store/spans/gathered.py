"""Values at any rows, read block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.store.base.objects import side_by_side


def gather(
    indexes: Sequence[int] | NDArray[np.int64],
    size: int,
    read: Callable[[int], NDArray[Any]],
    dtype: Any,
    at_once: int = 1,
) -> NDArray[Any]:
    """The values at ``indexes``, in their order, from blocks of ``size``; ``read(block)`` is called once for each.

    ``dtype`` is that of an empty result. ``at_once`` blocks are read at a time.
    """
    index_N = np.asarray(indexes, dtype=np.int64)
    if not len(index_N):
        return np.empty(0, dtype=dtype)
    order = np.argsort(index_N // size, kind="stable")
    blocks, starts = np.unique(index_N[order] // size, return_index=True)
    values: NDArray[Any] | None = None
    read_blocks = side_by_side(read, blocks.tolist(), at_once)
    for block, positions, data in zip(blocks.tolist(), np.split(order, starts[1:]), read_blocks, strict=True):
        if values is None:
            values = np.empty((len(index_N), *data.shape[1:]), dtype=data.dtype)
        values[positions] = data[index_N[positions] - block * size]
    assert values is not None
    return values
