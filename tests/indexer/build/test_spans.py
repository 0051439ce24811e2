"""Any span can be read alone: its rows are those of the whole, and a changed corpus is noticed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghoststore.corpus import Corpus
from ghoststore.errors import CorpusError, MismatchError
from indexer.build.corpus_plan import COLUMNS, CorpusPlan, plan_corpus, rows_of_spans
from indexer.encode.tokens import Row, Tokenizer, TokenSettings, rows_of
from query.demo.tokenizer import train_tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "a", "dog", "that", "ran", "from", "it"]
POLICIES = {
    "truncate": TokenSettings(max_length=12),
    "window": TokenSettings(max_length=5, overlong="window"),
    "skip": TokenSettings(max_length=12, overlong="skip"),
}


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer([" ".join(WORDS)] * 5, vocab_size=300))


def texts(count: int = 37) -> list[str]:
    """Of 0 to 39 words: some samples fill several spans of windows."""
    draw = random.Random(4)
    return [" ".join(draw.choices(WORDS, k=draw.choice([0, 1, 3, 8, 39]))) for _ in range(count)]


def write(folder: Path, rows: list[str], *, files: int = 1) -> str:
    folder.mkdir(exist_ok=True)
    cut = -(-len(rows) // files)
    for number in range(files):
        lines = [json.dumps({"text": text}) + "\n" for text in rows[number * cut : (number + 1) * cut]]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return str(folder)


def sizes(plan: CorpusPlan, span_rows: int) -> list[int]:
    return [min(span_rows, plan.rows - start) for start in range(0, plan.rows, span_rows)]


def plain(row: Row) -> tuple[Any, ...]:
    """What makes a row, comparable."""
    return (row.sample, row.window, row.window_start, tuple(row.tokens.tolist()), row.first_target, row.status)


@pytest.mark.thin(2)
@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_subset_of_spans_is_a_slice_of_the_whole(
    policy: str, files: int, tmp_path: Path, data: st.DataObject
) -> None:
    corpus = Corpus.open(write(tmp_path / "corpus", texts(), files=files))
    settings = POLICIES[policy]
    span_rows = data.draw(st.integers(1, 50))
    limit = data.draw(st.one_of(st.none(), st.integers(1, 40)))
    whole = [plain(row) for row in rows_of(list(corpus.samples())[:limit], tokenizer(), settings)]
    plan = plan_corpus(corpus, tokenizer(), settings, span_rows=span_rows, max_samples=limit)
    assert plan.rows == len(whole)
    assert plan.scan.rows == min(37, limit or 37)
    assert plan.table.shape == (-(-plan.rows // span_rows), len(COLUMNS))
    wanted = sorted(data.draw(st.sets(st.integers(0, len(plan.table) - 1))))
    fresh = Corpus.open(str(tmp_path / "corpus"))
    found = list(rows_of_spans(fresh, tokenizer(), settings, plan, sizes(plan, span_rows), wanted))
    assert [span for span, _ in found] == wanted
    for span, rows in found:
        assert [plain(row) for row in rows] == whole[span * span_rows : (span + 1) * span_rows]


def test_tokens_are_counted_where_they_are_needed(tmp_path: Path) -> None:
    corpus = Corpus.open(write(tmp_path / "corpus", texts()))

    def tokens(settings: TokenSettings, **more: Any) -> int | None:
        return plan_corpus(corpus, tokenizer(), settings, span_rows=8, **more).tokens

    def counted(settings: TokenSettings) -> int:
        return sum(len(row.tokens) for row in rows_of(corpus.samples(), tokenizer(), settings))

    assert tokens(POLICIES["truncate"]) is None
    assert tokens(POLICIES["truncate"], tokenize=True) == counted(POLICIES["truncate"])
    assert tokens(POLICIES["window"]) == counted(POLICIES["window"])


def test_tokenizing_does_not_change_the_plan(tmp_path: Path) -> None:
    corpus = Corpus.open(write(tmp_path / "corpus", texts()))
    plans = [
        plan_corpus(corpus, tokenizer(), POLICIES["truncate"], span_rows=8, tokenize=tokenize)
        for tokenize in (False, True)
    ]
    np.testing.assert_array_equal(plans[0].table, plans[1].table)
    assert plans[0].scan == plans[1].scan


def test_an_overlong_sample_is_an_error_before_anything_is_built(tmp_path: Path) -> None:
    corpus = Corpus.open(write(tmp_path / "corpus", ["a cat", " ".join(WORDS * 3)]))
    with pytest.raises(CorpusError, match=r"\(row 1\) has \d+ tokens; `max_length` is 8"):
        plan_corpus(corpus, tokenizer(), TokenSettings(max_length=8, overlong="error"), span_rows=4)


def test_a_corpus_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="has no rows"):
        plan_corpus(Corpus.open(write(tmp_path / "c", [])), tokenizer(), POLICIES["truncate"], span_rows=4)


CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "a word of the same length": lambda rows: [*rows[:20], rows[20].replace("cat", "bat"), *rows[21:]],
    "a word added": lambda rows: [*rows[:20], rows[20] + " x", *rows[21:]],
    "a row added at the front": lambda rows: ["the cat", *rows],
    "a row removed at the front": lambda rows: rows[1:],
    "two rows exchanged": lambda rows: [*rows[:20], rows[21], rows[20], *rows[22:]],
    "cut short": lambda rows: rows[:20],
    "another corpus": lambda rows: ["quite another text"] * len(rows),
}


@pytest.mark.thin
@pytest.mark.parametrize("policy", ["truncate", "window"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_corpus_is_noticed(change: str, policy: str, tmp_path: Path) -> None:
    rows = [f"row {place} {text} cat" for place, text in enumerate(texts())]
    source = write(tmp_path / "corpus", rows)
    settings = POLICIES[policy]
    plan = plan_corpus(Corpus.open(source), tokenizer(), settings, span_rows=8)
    write(tmp_path / "corpus", CHANGES[change](rows))
    lengths = sizes(plan, 8)
    refused: dict[int, str] = {}
    for span in range(len(lengths)):
        try:
            list(rows_of_spans(Corpus.open(source), tokenizer(), settings, plan, lengths, [span]))
        except MismatchError as error:
            refused[span] = str(error)
    assert refused
    assert all(f"span {span}" in message and source in message for span, message in refused.items())


def test_spans_that_were_not_touched_are_still_read(tmp_path: Path) -> None:
    rows = [f"row {place} cat" for place in range(24)]
    source = write(tmp_path / "corpus", rows)
    settings = POLICIES["truncate"]
    plan = plan_corpus(Corpus.open(source), tokenizer(), settings, span_rows=8)
    write(tmp_path / "corpus", [*rows[:10], rows[10].replace("cat", "bat"), *rows[11:]])
    corpus = Corpus.open(source)
    for span in (0, 2):
        list(rows_of_spans(corpus, tokenizer(), settings, plan, [8, 8, 8], [span]))
    with pytest.raises(MismatchError, match=r"from row 8 on\s+are not those of span 1"):
        list(rows_of_spans(corpus, tokenizer(), settings, plan, [8, 8, 8], [1]))


@pytest.mark.parametrize("policy", POLICIES)
def test_what_lies_beyond_the_last_sample_is_never_read(policy: str, tmp_path: Path) -> None:
    # The plan stopped after 20 samples; the next line is damaged.
    source = write(tmp_path / "corpus", texts())
    file = tmp_path / "corpus" / "0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:20], "{broken\n", *lines[20:]]))
    plan = plan_corpus(Corpus.open(source), tokenizer(), POLICIES[policy], span_rows=8, max_samples=20)
    lengths = sizes(plan, 8)
    spans = range(len(lengths))
    found = list(rows_of_spans(Corpus.open(source), tokenizer(), POLICIES[policy], plan, lengths, spans))
    assert [len(rows) for _, rows in found] == lengths
