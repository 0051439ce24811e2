"""Rows of samples: windows, policies for samples that are too long, targets, and statuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghoststore.corpus import Sample
from ghoststore.errors import CorpusError, UsageError
from ghoststore.store.part.status import Status
from indexer.encode.tokens import Row, TokenSettings, rows_of_sample, windows

lengths = st.integers(0, 200)
limits = st.integers(2, 40)


def rows(length: int, max_length: int, overlong: Any = "truncate", first_target: int = 1) -> list[Row]:
    sample = Sample(7, "seven", None, "text", -1, 0)
    tokens = np.arange(100, 100 + length, dtype=np.int32)
    return rows_of_sample(sample, tokens, first_target, TokenSettings(max_length=max_length, overlong=overlong))


def targets(row: Row) -> list[int]:
    """Places in the sample of the tokens that the row predicts."""
    if not row.status.usable:
        return []
    return [row.window_start + place for place in range(row.first_target, len(row.tokens))]


@given(lengths, limits)
def test_windows_predict_every_token_but_the_first_once(length: int, max_length: int) -> None:
    found = windows(length, max_length)
    predicted = [place for start, stop in found for place in range(start + 1, stop)]
    assert predicted == list(range(1, length))
    assert all(stop - start <= max_length for start, stop in found)
    assert len(found) == 1 or all(stop - start >= 2 for start, stop in found)
    assert all(stop - start == max_length for start, stop in found[:-1])


@given(lengths, limits, st.integers(1, 210))
def test_rows_of_windows_predict_every_target_once(length: int, max_length: int, first_target: int) -> None:
    found = rows(length, max_length, "window", first_target)
    assert [place for row in found for place in targets(row)] == list(range(first_target, length))
    assert [row.window for row in found] == list(range(len(found)))
    for row in found:
        assert row.tokens.tolist() == list(range(100 + row.window_start, 100 + row.window_start + len(row.tokens)))
        assert row.first_target >= 1
        assert row.status.usable == bool(targets(row))


@given(lengths, limits, st.integers(1, 210))
def test_truncation_keeps_the_first_tokens(length: int, max_length: int, first_target: int) -> None:
    (row,) = rows(length, max_length, "truncate", first_target)
    assert row.tokens.tolist() == list(range(100, 100 + min(length, max_length)))
    assert targets(row) == list(range(first_target, min(length, max_length)))
    if row.status.usable:
        assert row.status == (Status.TRUNCATED if length > max_length else Status.OK)


@pytest.mark.parametrize(
    ("length", "first_target", "status"),
    [
        (0, 1, Status.EMPTY),
        (1, 1, Status.TOO_SHORT),
        (2, 1, Status.OK),
        (8, 1, Status.OK),
        (9, 1, Status.TRUNCATED),
        (6, 6, Status.NO_TARGETS),
        (6, 5, Status.OK),
        (20, 8, Status.NO_TARGETS),
        (20, 7, Status.TRUNCATED),
    ],
)
def test_statuses(length: int, first_target: int, status: Status) -> None:
    (row,) = rows(length, 8, "truncate", first_target)
    assert row.status is status
    assert (row.sample.source_row, row.window, row.window_start) == (7, 0, 0)


def test_skipping_keeps_the_place_of_a_sample() -> None:
    (row,) = rows(9, 8, "skip")
    assert row.status is Status.TOO_LONG
    assert not row.status.usable
    (row,) = rows(8, 8, "skip")
    assert row.status is Status.OK


def test_an_error_names_the_sample_and_the_limit() -> None:
    with pytest.raises(CorpusError, match=r"'seven' \(row 7\) has 9 tokens; `max_length` is 8"):
        rows(9, 8, "error")
    assert rows(8, 8, "error")[0].status is Status.OK


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match=r"`overlong` 'cut'.*truncate, window, skip, error"):
        TokenSettings(max_length=8, overlong="cut")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="`max_length` must be at least 2"):
        TokenSettings(max_length=1)
