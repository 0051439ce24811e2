"""Parts are read span by span on threads of their own: the same answers on any number, and errors that arrive."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from ghoststore.errors import CorruptError
from ghoststore.store import Part
from ghoststore.store.spans.reader import stream
from query.search.part_score import Term
from query.search.search import search, similarities
from query.search.top_k import Ranking
from query.search.units import Units, on_threads
from tests.support.made_parts import DIMENSION, SPAN_ROWS, clustered, make_part


def two_parts(folder: Path) -> list[Part]:
    """Of the same rows, in other encodings, with chunks that do not end at the same rows."""
    rows = clustered()
    return [
        make_part(folder, rows, name="codes", dtype="int8", chunk_rows=10),
        make_part(folder, rows, name="signs", dtype="onebit", chunk_rows=25),
    ]


def both_ends(terms: list[Term]) -> tuple[Ranking, Ranking]:
    return search(terms, top_k=9, bottom_k=9)


def test_threads_change_no_bit(tmp_path: Path) -> None:
    queries = torch.randn(3, DIMENSION, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    terms = [Term.of(part, queries, metric="cosine") for part in two_parts(tmp_path)]
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            answers.append([*both_ends(terms), similarities(terms)])
            assert torch.get_num_threads() == threads
            assert list(on_threads(lambda _: torch.get_num_threads(), range(5))) == [1] * 5
            with ThreadPoolExecutor(1) as later:  # a thread of the user's, afterwards
                assert later.submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*(answer[:2] for answer in answers), strict=True):
        np.testing.assert_array_equal(one.rows, three.rows)
        np.testing.assert_array_equal(one.scores, three.scores)
    np.testing.assert_array_equal(answers[0][2], answers[1][2])
    best, scores_QN = answers[0][0], answers[0][2]
    for rows, scores, scores_N in zip(best.rows, best.scores, scores_QN, strict=True):
        assert rows.tolist() == np.argsort(np.nan_to_num(-scores_N, nan=np.inf), kind="stable")[:9].tolist()
        np.testing.assert_array_equal(scores, scores_N[rows])


def test_rows_multiplied_at_once_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = torch.randn(3, DIMENSION, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    terms = [Term.of(part, queries, metric="dot") for part in two_parts(tmp_path)]
    whole_QN = similarities(terms)
    for rows in (1, 7, 16):
        monkeypatch.setattr("query.search.search.ALL_BYTES", 8 * DIMENSION * rows)
        np.testing.assert_array_equal(similarities(terms), whole_QN)


def test_few_results_wait() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    results = on_threads(lambda item: item, items())
    assert next(results) == 0
    assert len(taken) <= torch.get_num_threads() + 1
    assert list(results) == list(range(1, 100))


def test_units_are_the_stored_rows(tmp_path: Path) -> None:
    """Several chunks in one piece of memory, each over the checksum of the one before it."""
    parts = two_parts(tmp_path)
    for unit in Units(parts).of_span(2):
        assert (unit.start, unit.stop) == (2 * SPAN_ROWS, 3 * SPAN_ROWS)
        for part, rows in zip(parts, unit.rows, strict=True):
            chunks = [chunk.data.copy() for chunk in stream(part, "vectors", [2])]
            assert len(chunks) > 1
            np.testing.assert_array_equal(rows.stored.numpy(), np.concatenate(chunks))
            assert rows.scale_RG is not None
            np.testing.assert_array_equal(rows.scale_RG.numpy(), part.column("scale")[unit.start : unit.stop])


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    part = make_part(tmp_path, clustered(), dtype="onebit")
    key = part.layout.chunk_keys(part.spec("vectors"), 3)[1]
    (part.path / key).write_bytes((part.path / key).read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptError, match=f"{key} is damaged"):
        search([Term.of(part, torch.ones(1, DIMENSION), metric="dot")], top_k=3)
