"""Which rows of parts may rank: those that are usable in every part, and match ``where``.

Legend: N rows of a part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ghoststore.progress import Progress
from ghoststore.store import Part
from ghoststore.store.where.rows import Chosen, part_matches


def chosen_rows(parts: Sequence[Part], where: str | None, progress: Progress) -> Chosen | None:
    """The rows that match ``where`` by the columns of the first of ``parts`` and are usable in every part; None without
    a condition.

    UsageError for what is no condition, and if no row is left.
    """
    if where is None:
        return None
    matches, first, usable_N = part_matches(parts[0], where), parts[0], usable_rows(parts)
    usable = usable_N[first.row_numbers]
    count = matches.among(first, usable, "usable rows")
    progress.note(f"`where`: {count:,} of {int(usable.sum()):,} usable rows match")
    return Chosen(where, matches.mask & usable_N, count)


def usable_rows(parts: Sequence[Part]) -> NDArray[np.bool_]:
    """(N,): whether a row is usable in every part."""
    usable_N = np.ones(parts[0].layout.rows, dtype=bool)
    for part in parts:
        of_part_N = np.zeros(len(usable_N), dtype=bool)
        of_part_N[part.row_numbers] = part.usable()
        usable_N &= of_part_N
    return usable_N
