"""Ranges of steps: sorted lists of (first, one past the last) that neither overlap nor touch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Steps = tuple[int, int]
"""First step and one past the last."""


def merged(ranges: Iterable[Steps]) -> list[Steps]:
    """The union of ``ranges``, which may be in any order and overlap."""
    result: list[Steps] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return result


def inside(ranges: Sequence[Steps], window: Steps) -> list[Steps]:
    """The part of ``ranges`` inside ``window``."""
    clipped = ((max(start, window[0]), min(stop, window[1])) for start, stop in ranges)
    return [(start, stop) for start, stop in clipped if start < stop]


def without(ranges: Sequence[Steps], removed: Sequence[Steps]) -> list[Steps]:
    """The part of ``ranges`` outside ``removed``, both sorted."""
    result: list[Steps] = []
    first = 0
    for start, stop in ranges:
        while first < len(removed) and removed[first][1] <= start:
            first += 1
        index = first  # the last removed range here may reach into the next range
        while index < len(removed) and removed[index][0] < stop:
            if removed[index][0] > start:
                result.append((start, removed[index][0]))
            start = max(start, removed[index][1])
            index += 1
        if start < stop:
            result.append((start, stop))
    return result


def count(ranges: Iterable[Steps]) -> int:
    """Number of steps in ``ranges``."""
    return sum(stop - start for start, stop in ranges)
