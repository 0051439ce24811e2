"""Near-duplicates of the val set in a corpus. Training on them would make the val loss look better than it is.

Texts are compared by their words: runs of letters, digits and underscores, case folded. A row is a near-duplicate of a
val sample if it holds at least half of the val sample's runs of 8 words. A val sample with fewer words must have equal
words. The text of a sample is all of it: prompt and completion, or all messages. Tools and documents are left out,
because samples that have nothing else in common may share them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from ghoststore.corpus import Sample
from ghoststore.errors import UsageError
from ghoststore.settings.question import Leaks as Leaks
from query.select.samples import Samples

SHINGLE_WORDS = 8
OVERLAP = 0.5
SHOWN = 1000
"""Most leaks that a report lists."""

WORD = re.compile(r"\w+")
Shingle: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Leak:
    """A row of the corpus that is a near-duplicate, and the val sample that is most similar to it."""

    id: str
    source_row: int
    val_id: str
    val_row: int
    """Place of the val sample in the val set, counted from 0."""
    overlap: float
    """Share of the val sample's shingles that the row holds, 0.5 to 1."""
    part: str | None = None
    """Where several parts are ranked as one: the one of the row."""


def shingles(text: str) -> Iterable[Shingle]:
    """Every run of 8 words of ``text``; with fewer words one run of them all, and without words none.

    Words are in the Unicode form NFKC and case folded, so that the two encodings of é are equal.
    """
    words = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    if len(words) < SHINGLE_WORDS:
        return [tuple(words)] if words else []
    return zip(*(words[first:] for first in range(SHINGLE_WORDS)), strict=False)


class LeakCheck:
    """Compares the samples of a corpus with a val set, whose shingles are in memory."""

    def __init__(self, val_samples: Iterable[Sample]) -> None:
        self._vals: list[tuple[str, int]] = []
        """(id, source row) of each val sample."""
        self._sizes: list[int] = []
        self._holders: dict[Shingle, list[int]] = {}
        """For each shingle the places of the val samples that hold it."""
        self.found: dict[int, Leak] = {}
        """Leaks by source row."""
        for place, sample in enumerate(val_samples):
            shingle_set = set(shingles(sample.own_text()))
            self._vals.append((sample.id, sample.source_row))
            self._sizes.append(len(shingle_set))
            for shingle in shingle_set:
                self._holders.setdefault(shingle, []).append(place)

    def see(self, sample: Sample) -> None:
        """Compare one sample of the corpus with the val set. Of val samples with equal overlap the first counts."""
        shared = set(filter(self._holders.__contains__, shingles(sample.own_text())))
        if not shared:
            return
        counts = Counter(place for shingle in shared for place in self._holders[shingle])
        overlap, place = max((count / self._sizes[place], -place) for place, count in counts.items())
        if overlap >= OVERLAP:
            self.found[sample.source_row] = Leak(sample.id, sample.source_row, *self._vals[-place], overlap)


def named(leak: Leak, samples: Samples) -> Leak:
    """``leak`` with the place in its own corpus, and the part, where there are several."""
    part, source_row = samples.place_of(leak.source_row)
    return replace(leak, source_row=source_row, part=part)


def refuse(leaks: list[Leak], val_set: str) -> None:
    """UsageError if there are any leaks, for ``leaks=error``."""
    if leaks:
        first = leaks[0]
        raise UsageError(
            f"{len(leaks):,} sample(s) of the corpus are near-duplicates of the val set {val_set}: the first is "
            f"{first.id!r} (row {first.source_row}), which holds {first.overlap:.0%} of val sample {first.val_id!r} "
            f"(row {first.val_row}). Nothing was written; leave them out with `leaks=exclude`"
        )


def report_of(leaks: list[Leak] | None, policy: Leaks) -> dict[str, Any]:
    """What the report says about leaks: how many, and the first 1,000 of them. None: they were not looked for."""
    return {
        "policy": policy,
        "shingle_words": SHINGLE_WORDS,
        "least_overlap": OVERLAP,
        "found": None if leaks is None else len(leaks),
        "rows": [_shown(leak) for leak in (leaks or [])[:SHOWN]],
    }


def _shown(leak: Leak) -> dict[str, Any]:
    shown = asdict(leak)
    if leak.part is None:
        del shown["part"]
    return shown
