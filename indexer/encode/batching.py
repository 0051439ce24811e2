"""Dividing rows into batches. It depends only on their lengths and the budget, so a rebuilt span has the
same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from indexer.encode.tokens import Row


def batches_of(rows: Sequence[Row], batch_tokens: int, *, padding: bool = True) -> list[list[int]]:
    """:func:`plan_batches` of ``rows``. Without ``padding``, rows with an encoder's tokens have batches of their own:
    two lengths would have to be equal.
    """
    alone = not padding and any(row.source is not None for row in rows)
    return plan_batches([row.length for row in rows], 1 if alone else batch_tokens, padding=padding)


def plan_batches(lengths: Sequence[int], batch_tokens: int, *, padding: bool = True) -> list[list[int]]:
    """Batches of places in ``lengths``: longest rows first, equal lengths by place, as many as fit into the budget.

    A batch of b rows whose longest has t tokens satisfies b·t ≤ ``batch_tokens``, except that a row longer than the
    budget has a batch of its own. Without ``padding``, all rows of a batch have the same length.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    batches, start = [], 0
    while start < len(order):
        longest = lengths[order[start]]
        stop = min(len(order), start + max(1, batch_tokens // max(1, longest)))
        while not padding and lengths[order[stop - 1]] != longest:
            stop -= 1
        batches.append(order[start:stop])
        start = stop
    return batches
