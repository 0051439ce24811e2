"""JSON documents: whatever shape they have, their rows are those of the same rows as lines; what is none is refused."""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghoststore.corpus import Corpus, Fields, Position, Sample
from ghoststore.corpus.formats import compressed, json_document
from ghoststore.errors import CorpusError
from tests.support.bounded import refused, run_bounded

if TYPE_CHECKING:
    from tests.conftest import Lab

ROWS = [{"id": i, "text": 'a "q" \\ [x] {y} ü\n' * i, "meta": {"deep": [[{"]": "}"}]]}} for i in range(7)]
SHAPES = {
    "array": lambda rows: json.dumps(rows),
    "indented": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False),
    "mark": lambda rows: "\ufeff\n " + json.dumps(rows),
    "data": lambda rows: json.dumps({"version": "1", "info": {"data": [1]}, "data": rows, "end": None}),
    "data first": lambda rows: json.dumps({"data": rows}),
    "objects": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows),
    "lines": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
}


def contents(samples: list[Sample]) -> list[tuple[Any, ...]]:
    return [(s.source_row, s.id, s.content, s.domain, s.digest()) for s in samples]


def write(path: Path, text: str) -> str:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("buffer", [7, 64, 1 << 17])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape: str, buffer: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a piece that is read ends in the middle of a string, of an escape, or of a number."""
    monkeypatch.setattr(json_document, "BUFFER", buffer)
    corpus = Corpus.open(write(tmp_path / name, SHAPES[shape](ROWS)))
    samples = list(corpus.samples())
    assert contents(samples) == contents(list(Corpus.open(ROWS).samples()))
    places = [Position(source_row=s.source_row, file=s.file, offset=s.offset) for s in samples]
    assert contents(list(corpus.samples(places[4]))) == contents(samples[4:])
    assert corpus.fetch(random.Random(0).choices(places, k=9)).keys() <= set(range(7))
    assert corpus.fetch([places[6], places[0]]) == {0: samples[0], 6: samples[6]}
    row = re.escape(str(tmp_path / name)) + r", row 5 \(line \d+\)"
    assert re.fullmatch(row, str(samples[4].place))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.lists(st.dictionaries(st.text(max_size=5), values, max_size=4), min_size=1, max_size=5), st.sampled_from([0, 1])
)
def test_any_objects(tmp_path: Path, rows: list[dict[str, Any]], indent: bool) -> None:
    form = json_document.JsonForm()
    texts = [json.dumps(rows, indent=1 if indent else None)]
    if "data" not in rows[0]:  # an array there would be the rows
        texts.append("\n".join(json.dumps(row) for row in rows))
    for text in texts:
        (tmp_path / "a.json").write_text(text)
        assert [row for _, row in form.rows(tmp_path / "a.json", None, 0)] == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text":"a"}', r"line 1 \(byte 13\): cut short: expected ']' or ',' after a row, found the end of the file"),
        ('[{"text":"a"},\n', "line 2 .*cut short: expected a row"),
        ('[{"text":"a"},]', "expected a row, found ']'"),
        ('[{"text":"a"} {"text":"b"}]', "expected ']' or ',' after a row, found '{'"),
        ('[{"text":"a"}] [', "expected the end of the file .*, found '\\['"),
        ('{"data":[{"text":"a"}]', "cut short: expected '}' or ',' after the rows"),
        ('{"data":[{"text":"a"}],"x":', "cut short: expected a value"),
        ('{"data":[{"text":"a"}],"data":[]}', "has 'data' twice"),
        ('{"data":[{"text":"a"}]}\n{"data":[{"text":"b"}]}', "expected the end of the file .*jsonl"),
        ('{"text":"a"}\n{"text":"b', "line 2: cut short: a value begins there that does not end"),
        ('[{"text":"a"},{"text":nil}]', r"row 2 \(line 1\): invalid JSON"),
        ('[{"text":"a"},\n{"text":"b","x":NaN}]', r"row 2 \(line 2\): invalid JSON: NaN is a literal of Python's json"),
        ('[{"text":"a"},"b"]', r"row 2 \(line 1\): expected a JSON object, found 'b'"),
        ("text", "expected an array of rows, or an object, found 't'"),
        ("[" * 70_000, "nests deeper than 1,024 levels"),
        ('[{"text":' + "[" * 70_000, "nests deeper than 1,024 levels"),
        ('{"a":' * 70_000, "nests deeper than 1,024 levels"),
        ("[]", "has no rows"),
        ("", "has no rows"),
        (
            '{"train":[{"text":"a"}],"test":[{"text":"b"}]}',
            "If the rows are those under 'train', give `.*:train`",
        ),
    ],
)
def test_what_is_no_document(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=message):
        list(Corpus.open(write(tmp_path / "a.json", text)).samples())


def test_rows_under_a_key(tmp_path: Path) -> None:
    source = write(tmp_path / "a.json", json.dumps({"x": [[1, "]"]], "train": ROWS, "test": ROWS[:2]}))
    for name, rows in (("train", ROWS), ("test", ROWS[:2])):
        corpus = Corpus.open(f"{source}:{name}")
        assert contents(list(corpus.samples())) == contents(list(Corpus.open(rows).samples()))
        assert corpus.recorded == f"{source}:{name}"
    with pytest.raises(CorpusError, match=r"a\.json:dev: expected an object with an array of rows under 'dev'"):
        list(Corpus.open(f"{source}:dev").samples())


def test_the_limit_of_a_row(tmp_path: Path) -> None:
    """A row may be as long as the limit says; a document, and what stands beside its rows, may be longer."""
    rows = [{"text": "word" * 100}] * 3
    size = len(json.dumps(rows[0]))
    source = write(tmp_path / "a.json", json.dumps({"beside": rows * 1000, "data": rows}))
    assert len(list(Corpus.open(source, Fields(max_record_bytes=size)).samples())) == 3
    with pytest.raises(CorpusError, match=rf"row 1 \(line 1\): a record of more than {size - 1} bytes"):
        list(Corpus.open(source, Fields(max_record_bytes=size - 1)).samples())


@pytest.mark.slow
@pytest.mark.parametrize("begin", ['[{"text": "', '{"data": [{"text": "', '{"a": "', "[1"])
def test_a_row_without_end(lab: Lab, tmp_path: Path, begin: str) -> None:
    path = tmp_path / "a.json.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(begin.encode())
        for _ in range(400):
            file.write(b"1" * (1 << 20))
    words = ["build", "--checkpoint", lab.checkpoint, "--data", path, "--store", tmp_path / "store", "--quiet"]
    refused(run_bounded(lab, *words), f"{path}, ", "67,108,864 bytes", "--max-record-bytes", codes=(2,))


def test_lines_that_are_a_document(tmp_path: Path) -> None:
    """A name that ends in .jsonl promises lines; the advice works."""
    for text in (json.dumps(ROWS), json.dumps(ROWS, indent=1), json.dumps(ROWS[0], indent=1)):
        source = write(tmp_path / "a.jsonl", text)
        with pytest.raises(CorpusError, match=r"a\.jsonl, line 1: .* is read where its name ends in \.json"):
            list(Corpus.open(source).samples())
        assert list(Corpus.open(write(tmp_path / "a.json", text)).samples())


def test_a_window_of_zstd_is_bounded_there_too() -> None:
    assert set(json_document.json_forms()) == {".json", ".json.gz", ".json.zst"}
    assert compressed.WINDOW == 1 << 27


def test_a_document_that_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    corpus = Corpus.open(write(path, json.dumps(ROWS)))
    places = [Position(source_row=s.source_row, file=s.file, offset=s.offset) for s in corpus.samples()]
    write(path, json.dumps(ROWS[:1]))
    assert list(corpus.fetch(places)) == [0]
    with pytest.raises(CorpusError, match="cut short"):
        list(corpus.samples(places[3]))


@pytest.mark.thin(3)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_byte_that_is_another(shape: str, tmp_path: Path) -> None:
    """An error of the corpus, or rows; never anything else. A row that is read alone is the same as in order."""
    whole, draw = SHAPES[shape](ROWS).encode(), random.Random(shape)
    for _ in range(150):
        place = draw.randrange(len(whole))
        other = draw.choice([b'"', b"[", b"}", b",", b"\\", b""])
        (tmp_path / "a.json").write_bytes(whole[:place] + other + whole[place + 1 :])
        corpus = Corpus.open(str(tmp_path / "a.json"), Fields(text="text"))
        try:
            samples = list(corpus.samples())
        except CorpusError as error:
            assert "a.json" in str(error)  # noqa: PT017
            continue
        places = [Position(source_row=s.source_row, file=s.file, offset=s.offset) for s in samples]
        assert corpus.fetch(places) == {s.source_row: s for s in samples}
