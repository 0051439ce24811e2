"""Near-duplicates of the val set in a corpus: what would make a val loss look better than it is.

Two texts are compared by their words: runs of letters, digits and underscores, case folded. A row is a near-duplicate
of a val sample if it holds at least half of its runs of 8 words; for val samples of fewer words, if the words are
equal. The text of a sample is the whole of it: prompt and completion, all messages; not the tools and documents beside
them, which samples share that have nothing else in common.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from ghoststore.corpus import Sample
from ghoststore.errors import UsageError
from ghoststore.settings.question import Leaks as Leaks

SHINGLE_WORDS = 8
OVERLAP = 0.5
SHOWN = 1000
"""Leaks that a report lists."""

WORD = re.compile(r"\w+")
Shingle: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Leak:
    """A row of the corpus and the val sample that it is most like."""

    id: str
    source_row: int
    val_id: str
    val_row: int
    """Place of the val sample in the val set, from 0."""
    overlap: float
    """Share of the val sample's shingles that the row holds; 1 where their words are equal."""


def shingles(text: str) -> Iterable[Shingle]:
    """Every run of 8 words of ``text``, or all its words as one where it has fewer; none without any.

    Letters are compared in Unicode's NFKC form, case folded: é is é however it is written.
    """
    words = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    if len(words) < SHINGLE_WORDS:
        return [tuple(words)] if words else []
    return zip(*(words[first:] for first in range(SHINGLE_WORDS)), strict=False)


class LeakCheck:
    """Holds an index of the val set; rows of the corpus pass by, each once."""

    def __init__(self, val_samples: Iterable[Sample]) -> None:
        self._vals: list[tuple[str, int]] = []
        """(id, source row)."""
        self._sizes: list[int] = []
        self._holders: dict[Shingle, list[int]] = {}
        """Shingles to the val samples that hold them."""
        self.found: dict[int, Leak] = {}
        """Leaks by source row."""
        for place, sample in enumerate(val_samples):
            held = set(shingles(sample.own_text()))
            self._vals.append((sample.id, sample.source_row))
            self._sizes.append(len(held))
            for shingle in held:
                self._holders.setdefault(shingle, []).append(place)

    def see(self, sample: Sample) -> None:
        """Compare one sample of the corpus with the val set. Of val samples that overlap alike, the first is named."""
        known = set(filter(self._holders.__contains__, shingles(sample.own_text())))
        if not known:
            return
        counts = Counter(place for shingle in known for place in self._holders[shingle])
        overlap, place = max((count / self._sizes[place], -place) for place, count in counts.items())
        if overlap >= OVERLAP:
            self.found[sample.source_row] = Leak(sample.id, sample.source_row, *self._vals[-place], overlap)


def refuse(leaks: list[Leak], val_set: str) -> None:
    """UsageError if there are any leaks: ``leaks=error``."""
    if leaks:
        first = leaks[0]
        raise UsageError(
            f"{len(leaks):,} sample(s) of the corpus are near-duplicates of the val set {val_set}: the first is "
            f"{first.id!r} (row {first.source_row}), which holds {first.overlap:.0%} of val sample {first.val_id!r} "
            f"(row {first.val_row}). Nothing was written; leave them out with `leaks=exclude`"
        )


def report_of(leaks: list[Leak], policy: Leaks) -> dict[str, Any]:
    """What the report says: how many, and the first of them."""
    return {
        "policy": policy,
        "shingle_words": SHINGLE_WORDS,
        "least_overlap": OVERLAP,
        "found": len(leaks),
        "rows": [asdict(leak) for leak in leaks[:SHOWN]],
    }
