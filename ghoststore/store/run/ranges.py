"""Ranges of steps: lists of (first, one past the last) that are in order and do not touch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Steps = tuple[int, int]
"""First step and one past the last."""


def merged(ranges: Iterable[Steps]) -> list[Steps]:
    """The steps of ``ranges``, which may lie anyhow."""
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
    """What of ``ranges`` lies in ``window``."""
    cut = ((max(start, window[0]), min(stop, window[1])) for start, stop in ranges)
    return [(start, stop) for start, stop in cut if start < stop]


def without(ranges: Sequence[Steps], taken: Sequence[Steps]) -> list[Steps]:
    """What of ``ranges`` is not in ``taken``; both in order."""
    result: list[Steps] = []
    place = 0
    for start, stop in ranges:
        while place < len(taken) and taken[place][1] <= start:
            place += 1
        here = place  # the next range may begin inside the last one that is taken here
        while here < len(taken) and taken[here][0] < stop:
            if taken[here][0] > start:
                result.append((start, taken[here][0]))
            start = max(start, taken[here][1])
            here += 1
        if start < stop:
            result.append((start, stop))
    return result


def count(ranges: Iterable[Steps]) -> int:
    """How many steps they are."""
    return sum(stop - start for start, stop in ranges)
