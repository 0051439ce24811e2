"""A phrase of the val sample, ``phrase="A:B"``: of its tokens alone the loss is taken.

The model reads the whole text as before; labels outside the phrase are ignored. So the query is the gradient of the
mean (or sum) of the phrase's own losses, as if all that stands before it were a prompt, and nothing came after it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

from ghoststore.errors import UsageError
from indexer.encode.tokens import Row

Places = Sequence[tuple[str, int | None, int | None]]
"""(text, first character in the sample's text, one past its last) of each token of a row."""
_FORM = re.compile(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*")


@dataclass(frozen=True, slots=True)
class Phrase:
    """The characters from ``start`` up to, not including, ``stop`` of the val sample's text."""

    start: int
    stop: int

    @classmethod
    def of(cls, word: str) -> Self:
        """That of ``A:B``. UsageError for another word, and where no character is left."""
        found = _FORM.fullmatch(word)
        if found is None or not int(found[1]) < int(found[2]):
            raise UsageError(
                f"`phrase={word}`: expected A:B, the characters from A up to, not including, B of the val sample's "
                "text, as 10:25"
            )
        return cls(int(found[1]), int(found[2]))

    def rows(self, rows: Sequence[Row], places_of: Callable[[Row], Places]) -> list[Row]:
        """The row of ``rows``, which are those of the val set, whose targets are the tokens of the phrase alone.

        A token belongs to it that holds one of its characters; spaces at its ends belong to no word. UsageError for
        several val samples, for a row without places of its tokens, and unless all of these are targets of one row.
        """
        if len({row.sample.source_row for row in rows}) != 1:
            raise UsageError(
                "`phrase` is of one text: give a val set of one sample, or one of its own with `max_samples=1`"
            )
        sample = rows[0].sample
        text, shown = sample.preview(), f"`phrase={self.start}:{self.stop}`"
        if rows[0].source is not None:
            raise UsageError(f"{shown} is of a causal model's text, and this part is of a model with an encoder")
        if self.stop > len(text):
            raise UsageError(f"{shown}: val sample {sample.id!r} has {len(text):,} characters")
        words = text[self.start : self.stop]
        start = self.start + len(words) - len(words.lstrip())
        stop = self.start + len(words.rstrip())
        if start >= stop:
            raise UsageError(f"{shown} is nothing but spaces: {words!r}")
        shown += f", {text[start:stop]!r:.60}"
        placed, missed = False, ""
        for row in rows:
            places = places_of(row)
            placed = placed or any(first is not None for _, first, _ in places)
            tokens = [
                place
                for place, (_, first, end) in enumerate(places)
                if first is not None and end is not None and first < stop and end > start
            ]
            if not tokens:
                continue
            whole = (places[tokens[0]][1] or 0) <= start and (places[tokens[-1]][2] or 0) >= stop
            if whole and tokens[0] >= row.first_target and row.status.usable:
                return [replace(row, first_target=tokens[0], stop_target=tokens[-1] + 1)]
            if tokens[0] < row.first_target and not row.window_start:
                first = next((first for _, first, _ in places[row.first_target :] if first is not None), None)
                missed = "" if first is None else f"; its targets begin at character {first}"
        if not placed:
            raise UsageError(
                f"{shown}: where the tokens of val sample {sample.id!r} stand in its text is not known (a chat "
                "template made it, or the tokenizer has no offsets): give its words as `prompt` and `completion`"
            )
        raise UsageError(
            f"{shown}: not all of it are targets of one row of val sample {sample.id!r}{missed}. What the model is not "
            "asked to say has no loss: the first token of a text, a prompt, what is cut off. Give a phrase of targets"
        )
