"""Which index suits a part: measured in ``benchmarks/index.py``, see ``docs/index.md``."""

from __future__ import annotations

import math

from ghoststore.errors import UsageError
from ghoststore.settings.store import Dimension as Dimension

FRONT_DIMENSION = 1024
FRONT_FROM = 2 * FRONT_DIMENSION
"""Longer vectors are sketched before FAISS sees them."""
ONE_BIT_FROM = 256
"""Numbers from which one bit each tells rows apart; shorter vectors take eight."""
LISTS_FROM = 250_000
"""Rows from which inverted lists pay: fewer are scanned in a few milliseconds."""


def choose_dimension(asked: Dimension, dimension: int) -> int:
    """Numbers that FAISS sees of a vector of ``dimension`` numbers. UsageError for one that cannot be."""
    if asked == "none":
        return dimension
    if asked == "auto":
        return FRONT_DIMENSION if dimension > FRONT_FROM else dimension
    if not isinstance(asked, int) or not 0 < asked <= dimension:
        raise UsageError(f"--dimension {asked}: give 1 to {dimension:,} (the part's vectors), none or auto")
    return asked


def choose_factory(rows: int, dimension: int, device: str) -> str:
    """The factory string for ``rows`` rows of ``dimension`` numbers."""
    lists = 1 << round(math.log2(4 * math.sqrt(max(rows, 1))))
    if device != "cpu":  # the GPU has no one-bit index
        return f"IVF{lists},SQ8" if rows >= LISTS_FROM else "Flat"
    code = "RaBitQ" if dimension >= ONE_BIT_FROM else "SQ8"
    return f"IVF{lists},{code}" if rows >= LISTS_FROM else code
