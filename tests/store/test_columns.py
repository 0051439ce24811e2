"""Whole columns of a part: every committed row, whatever spans are missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ghoststore.errors import CorruptError, UsageError
from tests.support.made_parts import ROWS, SPAN_ROWS, UNUSABLE, clustered, make_part


@pytest.mark.parametrize("spans", [None, [0, 2, 3, 7], []])
def test_columns_go_with_row_numbers(tmp_path: Path, spans: list[int] | None) -> None:
    part = make_part(tmp_path / "store", clustered(), spans=spans)
    present = range(ROWS // SPAN_ROWS) if spans is None else spans
    rows = [row for span in present for row in range(span * SPAN_ROWS, (span + 1) * SPAN_ROWS)]
    assert part.row_numbers.tolist() == rows
    assert part.column("source_row").tolist() == rows
    assert part.column("domain").tolist() == [row % 2 for row in rows]
    assert part.column("norm").shape == (len(rows), 2)
    assert part.column("norm").dtype == np.float32
    assert part.row_numbers[part.usable()].tolist() == [row for row in rows if row not in UNUSABLE]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    part = make_part(tmp_path / "store", clustered())
    with pytest.raises(UsageError, match="no array 'colour'"):
        part.column("colour")
    (part.path / "status" / "c" / "3").unlink()
    with pytest.raises(CorruptError, match=r"status/c/3 is missing"):
        part.usable()
