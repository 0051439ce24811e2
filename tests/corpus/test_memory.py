"""Data in memory: the same samples as the same rows in a file, and what is refused."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from ghoststore.corpus import Corpus, Fields, MemoryData, Sample, SampleScan, open_corpus, source_name, source_of
from ghoststore.corpus.corpus import Position
from ghoststore.corpus.export import check_export, write_export
from ghoststore.corpus.source_rows import SourceRows
from ghoststore.errors import CorpusError, UsageError

Rows = list[dict[str, Any]]

TEXTS: Rows = [{"text": "a b"}, {"text": "ü 😀"}, {"text": None}]
LABELLED: Rows = [{"id": 7, "text": "x", "domain": "d", "year": 1}, {"id": "y", "text": "", "domain": None, "year": 2}]
PROMPTS: Rows = [{"prompt": "p", "completion": " c"}, {"prompt": "q", "completion": None}]
CHATS: Rows = [
    {
        "messages": [
            {"role": "user", "content": "hi", "name": None},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"arguments": {"x": None}}}]},
        ],
        "tools": [{"type": "function", "b": 1, "a": None}],
    }
]
OTHER_FIELDS: Rows = [{"name": "n1", "body": "one", "site": "s"}, {"name": "n2", "body": "two", "site": "t"}]
CASES = {
    "texts": (TEXTS, Fields()),
    "labelled": (LABELLED, Fields()),
    "prompts": (PROMPTS, Fields()),
    "chats": (CHATS, Fields()),
    "other fields": (OTHER_FIELDS, Fields(text="body", id="name", domain="site")),
}


def jsonl(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def content(sample: Sample) -> Any:
    return (sample.source_row, sample.id, sample.domain, sample.content, sample.kept, sample.digest(), sample.preview())


def scanned(corpus: Corpus) -> Any:
    return SampleScan(corpus.samples()).finish()


@pytest.mark.parametrize("case", CASES)
def test_rows_in_memory_are_those_of_a_file(tmp_path: Path, case: str) -> None:
    rows, fields = CASES[case]
    there, here = Corpus.open(jsonl(tmp_path, rows), fields), Corpus.open(rows, fields)
    assert list(map(content, here.samples())) == list(map(content, there.samples()))
    assert scanned(here) == scanned(there)
    assert here.resolved == there.resolved
    assert here.field_names == there.field_names
    assert here.recorded == "-"
    assert here.form == "memory"


def test_texts_are_rows_with_a_text() -> None:
    assert list(map(content, Corpus.open(["a b", "ü 😀", None]).samples())) == list(  # type: ignore[list-item]
        map(content, Corpus.open(TEXTS).samples())
    )
    assert [sample.id for sample in Corpus.open(("a", {"text": "b", "id": "not read"})).samples()] == ["0", "1"]


TABLES: dict[str, Callable[[Rows], Any]] = {
    "dataset": datasets.Dataset.from_list,
    "formatted dataset": lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
    "selected dataset": lambda rows: datasets.Dataset.from_list([*rows, *rows]).select(range(len(rows))),
    "pandas": pd.DataFrame,
    "arrow": pa.Table.from_pylist,
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("case", ["texts", "prompts", "chats", "other fields"])
def test_tables_in_memory_are_the_rows_of_a_file(tmp_path: Path, case: str, kind: str) -> None:
    """Chats without the nulls that a schema cannot tell from keys that are not there."""
    rows, fields = CASES[case]
    if case == "chats":
        rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    there, here = Corpus.open(jsonl(tmp_path, rows), fields), Corpus.open(TABLES[kind](rows), fields)
    assert list(map(content, here.samples())) == list(map(content, there.samples()))
    assert scanned(here) == scanned(there)
    assert (here.recorded, here.form) == ("-", "dataset")


def test_samples_are_found_by_their_places(tmp_path: Path) -> None:
    """Also by places that were recorded from a file, and the other way round."""
    rows = [{"text": f"t{i}"} for i in range(5)]
    there, here = Corpus.open(jsonl(tmp_path, rows)), Corpus.open(rows)
    places = [Position(source_row=s.source_row, file=s.file, offset=s.offset) for s in there.samples()]
    own = [Position(source_row=s.source_row, file=s.file, offset=s.offset) for s in here.samples()]
    for chosen in (places, own):
        for corpus in (there, here):
            fetched = corpus.fetch([chosen[3], chosen[1]])
            assert {row: sample.content for row, sample in fetched.items()} == {3: "t3", 1: "t1"}
    assert [sample.source_row for sample in here.samples(own[3])] == [3, 4]
    assert here.fetch([Position(source_row=9, file=0)]) == {}


def test_numbers_of_numpy_and_kept_dates() -> None:
    rows = [{"id": np.int64(3), "text": np.str_("a"), "year": np.int32(5), "day": datetime.date(2026, 1, 2)}]
    (sample,) = Corpus.open(rows).keeping(["year", "day"]).samples()
    assert (sample.id, sample.content, sample.kept) == ("3", "a", (5, datetime.date(2026, 1, 2)))
    assert sample.digest() == next(iter(Corpus.open([{"id": 3, "text": "a"}]).samples())).digest()


@pytest.mark.parametrize("form", ["jsonl", "parquet", "dataset"])
@pytest.mark.parametrize("in_memory", ["list", "dataset"])
def test_rows_in_memory_are_exported_whole(tmp_path: Path, in_memory: str, form: str) -> None:
    rows = [{"text": f"t{i}", "more": i} for i in range(4)]
    corpus = Corpus.open(rows if in_memory == "list" else datasets.Dataset.from_list(rows))
    samples = [sample for sample in corpus.samples() if sample.source_row in (1, 3)]
    places = [Position(source_row=s.source_row, file=s.file, offset=s.offset) for s in samples]
    out = tmp_path / ("out" if form == "dataset" else f"out.{form}")
    check_export(corpus.source, corpus.form, out)
    write_export(SourceRows(corpus, places, [sample.digest() for sample in samples]), out, None)
    loaded = (
        datasets.load_from_disk(str(out))
        if form == "dataset"
        else datasets.load_dataset(
            {"jsonl": "json"}.get(form, form), data_files=str(out), split="train", cache_dir=str(tmp_path / "cache")
        )
    )
    assert loaded.to_list() == [rows[1], rows[3]]


def test_other_forms_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rows of 1 texts in memory \(memory\) cannot be written as csv; give .jsonl"):
        check_export(source_name(["a"]), "memory", tmp_path / "out.csv")


def test_refused_is_what_is_no_data(tmp_path: Path) -> None:
    path = jsonl(tmp_path, TEXTS)
    stream = datasets.Dataset.from_list(LABELLED[:1]).to_iterable_dataset()
    for given, words in {
        "generator": ((row for row in TEXTS), "read only once"),
        "stream": (stream, "read only once"),
        "dict": ({"prompt": "p", "completion": "c"}, "give a list of such rows"),
        "splits": (datasets.DatasetDict(), "give one of its splits"),
        "bytes": (b"abc", "give a path, or a list"),
        "number": (3, "give a path, or a list"),
        "a path among texts": ([path, "text"], "is a path"),
        "names": ([str(path)], "is a path: for several files give a list of pathlib.Path"),
    }.values():
        with pytest.raises(UsageError, match=words):
            source_of(given)  # type: ignore[arg-type]
    with pytest.raises(CorpusError, match="has no rows"):
        _ = Corpus.open([]).resolved


def test_errors_name_the_row() -> None:
    for rows, words in (
        ([{"text": "a"}, {"text": 3}], "2 rows in memory, row 2: field 'text': expected a string or null, found 3"),
        (["a", 3], "2 rows in memory, row 2: expected a text or a dict, found 3"),
        (["a", "b\ud800"], "2 texts in memory, row 2: field 'text': half a surrogate pair at character 1"),
        ([{"text": "a"}, {"body": "b"}], "2 rows in memory, row 2: no field 'text'"),
    ):
        with pytest.raises(CorpusError, match=words.replace("(", r"\(")), open_corpus(rows, Fields()) as corpus:
            list(corpus.samples())


def test_a_fields_name_that_is_not_there() -> None:
    with pytest.raises(CorpusError, match=r"1 texts in memory, row 1: no field 'body' \(from `fields.text`\)"):
        _ = Corpus.open(["a"], Fields(text="body")).resolved


def test_a_source_keeps_its_rows() -> None:
    source = source_of(["a", "b"])
    assert isinstance(source, MemoryData)
    assert (str(source), len(source)) == ("2 texts in memory", 2)
    assert source_of(source) is source
    assert source_name(pd.DataFrame(TEXTS)) == "3 rows in memory"
