"""The few samples that the doctor uses. Their lengths differ enough to show effects of padding and of batch mates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from ghoststore.corpus import Corpus, Sample
from ghoststore.errors import UsageError
from indexer.encode.tokens import Row, Tokenizer, TokenSettings, rows_of

POOL = 256
"""Number of samples of a corpus to choose from."""

_SHORT = (
    "The river froze early that year.",
    "Add two eggs and stir.",
    "Why does ice float on water?",
    "A prime has no divisors but one and itself.",
    "She sold the old piano.",
    "Rain fell on the harbour all night.",
    "def area(r): return 3.14159 * r * r",
    "The committee will meet again on Tuesday.",
)
_LONG = (
    "Light from the nearest star takes more than four years to arrive, so we see it as it was.",
    "To repair the pump, close the valve, drain the pipe, replace the worn seal and open the valve slowly.",
    "The treaty was signed in spring, though neither side believed that the other would keep to it for long.",
    "In a sorted list the middle element tells in which half to look next, so a search takes few steps.",
    "Bread needs flour, water, salt and yeast; most of all it needs time, because the dough does its work alone.",
    "The orchestra tuned, the lights went down, and an old man in the third row began to hum the wrong melody.",
    "Plants take in carbon dioxide and water and give off oxygen, with sunlight as the source of the energy.",
    "If the train is late, wait at the northern exit; if it does not come at all, call me from the hotel.",
)


def built_in() -> list[Sample]:
    """24 samples: eight short texts, eight longer ones, and eight still longer ones."""
    texts = [*_SHORT, *_LONG, *(f"{long} {short}" * 2 for long, short in zip(_LONG, _SHORT, strict=True))]
    return [Sample(i, f"built-in-{i}", None, text, -1, 0) for i, text in enumerate(texts)]


def choose_rows(corpus: Corpus | None, tokenizer: Tokenizer, *, max_length: int, count: int) -> list[Row]:
    """``count`` rows of different lengths, at most ``max_length`` tokens each; fewer if there are not enough.

    They are chosen from the first 256 samples of ``corpus`` (None: built-in sentences), spread evenly from the shortest
    to the longest. If all have about the same length, every second one is cut. UsageError if fewer than three samples
    have tokens to predict, and for a token that the model's embedding lacks.
    """
    samples = built_in() if corpus is None else islice(corpus.samples(), POOL)
    settings = TokenSettings(max_length=max_length, overlong="truncate")
    usable = [row for row in rows_of(samples, tokenizer, settings) if row.status.usable]
    if len(usable) < 3:
        where = "the built-in sentences" if corpus is None else corpus.source
        raise UsageError(f"{where}: {len(usable)} samples have tokens to predict; the doctor needs at least 3")
    usable.sort(key=lambda row: len(row.tokens))
    step = max(1.0, (len(usable) - 1) / max(1, count - 1))
    return _varied([usable[round(place * step)] for place in range(min(count, len(usable)))])


def _varied(rows: Sequence[Row]) -> list[Row]:
    if len(rows[0].tokens) * 2 <= len(rows[-1].tokens):
        return list(rows)
    return [cut(row, len(row.tokens) // 2) if place % 2 else row for place, row in enumerate(rows)]


def cut(row: Row, length: int) -> Row:
    """The first ``length`` tokens of ``row``, or more if needed to include a target."""
    return replace(row, tokens=row.tokens[: max(length, row.first_target + 1)])
