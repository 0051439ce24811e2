"""Ids that several samples have: the count, against plain counting, in memory and through a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghoststore.corpus import repeated
from ghoststore.corpus.repeated import RepeatedIds, repeated_words


def counted(ids: Sequence[str]) -> dict[str, int] | None:
    """The obvious way."""
    times = [count for count in Counter(ids).values() if count > 1]
    return {"ids": len(times), "samples": sum(times)} if times else None


@pytest.mark.thin(2)
@pytest.mark.parametrize("held", [1, 3, 7, 1000], ids=str)
@given(ids=st.lists(st.text("ab3é", max_size=3), max_size=40))
def test_plain_counting(held: int, ids: list[str]) -> None:
    """Whatever fits in memory at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeated, "HELD", held)
        assert RepeatedIds.of(ids) == counted(ids)


def test_many_pieces() -> None:
    ids = [f"row-{number % 900}" for number in range(1000)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeated, "HELD", 64)
        assert RepeatedIds.of(ids) == {"ids": 100, "samples": 200}


def test_words() -> None:
    assert repeated_words(None) is None
    assert repeated_words({"ids": 2, "samples": 1005}) == (
        "2 id(s) occur more than once, in 1,005 samples: tell them apart by row"
    )
