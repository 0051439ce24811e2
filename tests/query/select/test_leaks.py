"""Near-duplicates of the val set, against the comparison of every pair."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghoststore.corpus import Messages, PromptCompletion, Sample, Tokenized
from ghoststore.corpus.content import Content
from query.select.leaks import LeakCheck

words = st.lists(st.sampled_from("abcd"), max_size=14).map(" ".join)


def sample(row: int, content: Content | None) -> Sample:
    return Sample(source_row=row, id=f"s{row}", domain=None, content=content, offset=-1, file=0)


def found(val: Sequence[Content | None], corpus: Sequence[Content | None]) -> dict[int, tuple[str, float]]:
    """Row of the corpus to the id of the val sample, and the overlap."""
    check = LeakCheck(sample(row, content) for row, content in enumerate(val))
    for row, content in enumerate(corpus):
        check.see(sample(row, content))
    return {row: (leak.val_id, leak.overlap) for row, leak in check.found.items()}


def slowly(val: Sequence[str], corpus: Sequence[str]) -> dict[int, tuple[str, float]]:
    """Every pair: the share of the val sample's runs of 8 words, or equality where it has fewer words."""

    def runs(text: str) -> set[tuple[str, ...]]:
        found = text.split()
        return {tuple(found[place : place + 8]) for place in range(len(found) - 7)}

    leaks = {}
    for row, text in enumerate(corpus):
        overlaps = []
        for place, other in enumerate(val):
            if len(other.split()) >= 8:
                overlaps.append((len(runs(text) & runs(other)) / len(runs(other)), -place))
            elif other.split() and other.split() == text.split():
                overlaps.append((1.0, -place))
        overlap, place = max(overlaps, default=(0.0, 0))
        if overlap >= 0.5:
            leaks[row] = (f"s{-place}", overlap)
    return leaks


@given(st.lists(words, max_size=5), st.lists(words, max_size=5))
def test_every_pair(val: list[str], corpus: list[str]) -> None:
    assert found(val, corpus + val) == slowly(val, corpus + val)


LONG = "one two three four five six seven eight nine ten"


@pytest.mark.parametrize(
    ("val", "row", "overlap"),
    [
        (LONG, LONG, 1.0),
        (LONG, f"Before, {LONG.upper()} after!", 1.0),
        (LONG, re.sub(" ", "\n\t ", LONG), 1.0),
        (LONG, LONG.replace("ten", "11"), 2 / 3),
        (LONG, LONG.replace("five", "5"), None),
        ("STRASSE, a b", "straße a  b.", 1.0),
        ("caf\u00e9 cr\u00e8me", "cafe\u0301 cre\u0300me", 1.0),
        ("a short text", "a short text", 1.0),
        ("a short text", "this is a short text", None),
        ("...", "...", None),
        ("", "", None),
        (None, "None", None),
        ("two three four five six seven eight nine", f"{LONG} and more", 1.0),
        (PromptCompletion("one two three four ", "five six seven eight nine ten"), LONG, 1.0),
        (LONG, PromptCompletion("one two three four five six ", "seven eight nine ten"), 1.0),
        (Messages([{"role": "user", "content": LONG}]), LONG, 3 / 4),
    ],
)
def test_what_is_a_near_duplicate(val: Content | None, row: Content | None, overlap: float | None) -> None:
    assert found([val], [row]) == ({} if overlap is None else {0: ("s0", pytest.approx(overlap))})


def test_tokens_are_decoded() -> None:
    class Words:
        tokenizer_identity: ClassVar[dict[str, Any]] = {"fingerprint": "words"}

        def decode(self, ids: np.ndarray) -> str:
            return " ".join(f"w{number}" for number in ids)

    tokens = Tokenized(np.arange(9, dtype="<i4").tobytes(), 1, Words())
    assert found([tokens], [" ".join(f"w{number}" for number in range(9))]) == {0: ("s0", 1.0)}


def test_samples_that_share_their_tools_alone_are_no_duplicates() -> None:
    tools: list[dict[str, object]] = [{"name": "search", "description": LONG * 3}]
    one, other = (Messages([{"role": "user", "content": text}], tools) for text in ("which cat", "how many dogs"))
    assert found([one], [other]) == {}
    assert found([one], [other, one]) == {1: ("s0", 1.0)}
