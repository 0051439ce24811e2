"""From stored vectors, or finished queries, to what FAISS sees of them.

Legend: R rows (or queries), D numbers of a vector, d numbers that FAISS sees.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from indexer.projection.sketch import Sketch
from query.search.part_score import Metric


def front_key(dimension: int) -> str:
    """What the sketch of vectors of ``dimension`` numbers is drawn from."""
    return f"ghoststore/1|index|front|n={dimension}"


class Front:
    """Scales rows (to length 1 for the cosine) and, where ``key`` is given, sketches them to d numbers.

    The sketch keeps inner products in the mean, with a standard error of about ‖x‖‖y‖/√d.
    """

    def __init__(self, dimension: int, front_dimension: int, key: str | None, metric: Metric, scale: float) -> None:
        self.metric, self.scale = metric, scale
        self._sketch = None if key is None else Sketch(key, dimension, front_dimension)

    def rows(self, rows_RD: Tensor) -> NDArray[np.float32]:
        """(R, d) of stored vectors, float32, contiguous."""
        if self.metric == "cosine":
            return self._sketched(_unit(rows_RD))
        return self._sketched(rows_RD * self.scale)

    def queries(self, queries_RD: Tensor) -> NDArray[np.float32]:
        """(R, d) of queries, whose length does not matter: each is scaled to 1."""
        return self._sketched(_unit(queries_RD).float())

    def _sketched(self, rows_RD: Tensor) -> NDArray[np.float32]:
        seen = rows_RD if self._sketch is None else self._sketch(rows_RD)
        return np.ascontiguousarray(seen.numpy(), dtype=np.float32)


def _unit(rows_RD: Tensor) -> Tensor:
    length_R = torch.linalg.vector_norm(rows_RD, dim=1, keepdim=True, dtype=torch.float64)
    return rows_RD / torch.where(length_R > 0, length_R, 1.0).to(rows_RD.dtype)


def power_of_two(length: float) -> float:
    """The power of two by which a vector of that ``length`` comes to a length of about 1; 1 for length zero."""
    return 2.0 ** -round(math.log2(length)) if length > 0 else 1.0
