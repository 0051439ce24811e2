"""Near-duplicates of the val set in a corpus: what would make a val loss look better than it is.

Two texts are compared by their words: runs of letters, digits and underscores, case folded. A row is a near-duplicate
of a val sample if it holds at least half of its runs of 8 words; for val samples of fewer words, if the words are
equal. The text of a sample is the whole of it: prompt and completion, all messages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ghoststore.corpus import Sample
from ghoststore.errors import UsageError

Leaks = Literal["exclude", "keep", "error"]
LEAKS = ("exclude", "keep", "error")
SHINGLE_WORDS = 8
OVERLAP = 0.5
SHOWN = 1000
"""Leaks that a report lists."""

WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Leak:
    """A row of the corpus and the val sample that it is most like."""

    id: str
    source_row: int
    val_id: str
    overlap: float
    """Share of the val sample's shingles that the row holds; 1 where their words are equal."""


def shingles(text: str) -> list[str]:
    """Every run of 8 words of ``text``, or all its words as one where it has fewer; none without any."""
    words = WORD.findall(text.casefold())
    if len(words) <= SHINGLE_WORDS:
        return [" ".join(words)] if words else []
    return [" ".join(words[place : place + SHINGLE_WORDS]) for place in range(len(words) - SHINGLE_WORDS + 1)]


class LeakCheck:
    """Holds an index of the val set; rows of the corpus pass by, each once."""

    def __init__(self, val_samples: Iterable[Sample]) -> None:
        self._ids: list[str] = []
        self._sizes: list[int] = []
        self._whole: dict[str, int] = {}
        """The words of short val samples, to the first that has them."""
        self._samples_of: dict[str, list[int]] = {}
        """Shingles to the val samples that hold them."""
        self.found: dict[int, Leak] = {}
        """Leaks by source row."""
        for sample in val_samples:
            self._index(sample)

    def _index(self, sample: Sample) -> None:
        held = dict.fromkeys(shingles(sample.preview()))
        place = len(self._ids)
        self._ids.append(sample.id)
        self._sizes.append(len(held))
        first = next(iter(held), "")
        if first.count(" ") < SHINGLE_WORDS - 1:
            if first:
                self._whole.setdefault(first, place)
            return
        for shingle in held:
            self._samples_of.setdefault(shingle, []).append(place)

    def see(self, sample: Sample) -> None:
        """Compare one sample of the corpus with the val set."""
        held = shingles(sample.preview())
        if len(held) == 1 and held[0] in self._whole:
            self.found[sample.source_row] = Leak(
                sample.id, sample.source_row, self._ids[self._whole[held[0]]], overlap=1.0
            )
            return
        known = {shingle for shingle in held if shingle in self._samples_of}
        if not known:
            return
        counts = Counter(place for shingle in known for place in self._samples_of[shingle])
        overlap, place = max((count / self._sizes[place], -place) for place, count in counts.items())
        if overlap >= OVERLAP:
            self.found[sample.source_row] = Leak(sample.id, sample.source_row, self._ids[-place], overlap)


def check_policy(leaks: Leaks) -> None:
    """UsageError for an unknown ``--leaks``."""
    if leaks not in LEAKS:
        raise UsageError(f"--leaks {leaks!r} is unknown; known: {', '.join(LEAKS)}")


def refuse(found: list[Leak], val_set: str) -> None:
    """UsageError if there are any leaks: ``--leaks error``."""
    if found:
        first = found[0]
        raise UsageError(
            f"{len(found):,} sample(s) of the corpus are near-duplicates of the val set {val_set}: the first is "
            f"{first.id!r} (row {first.source_row}), which holds {first.overlap:.0%} of val sample {first.val_id!r}. "
            "Nothing was written; leave them out with --leaks exclude"
        )


def report_of(found: list[Leak], policy: Leaks) -> dict[str, Any]:
    """What the report says: how many, and the first of them."""
    return {
        "policy": policy,
        "shingle_words": SHINGLE_WORDS,
        "least_overlap": OVERLAP,
        "found": len(found),
        "rows": [asdict(leak) for leak in found[:SHOWN]],
    }
