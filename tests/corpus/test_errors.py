"""A corpus that cannot be read says where, what was expected, and what was found."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import zstandard

from ghoststore.corpus import Corpus, Position
from ghoststore.errors import CorpusError, UsageError
from tests.support.corpora import jsonl_bytes, write_parquet

GOOD = b'{"text":"a"}\n'


def message(source: Path | str) -> str:
    with pytest.raises(CorpusError) as caught:
        list(Corpus.open(str(source)).samples())
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"body":"x"}', "no field 'text'; fields found: 'body'"),
        (b'{"text":5}', "field 'text': expected a string or null, found 5 (int)"),
        (b'["x"]', "expected a JSON object, found ['x'] (list)"),
        (b"null", "expected a JSON object, found null"),
        (b'{"text":', "invalid JSON at column"),
        (b'{"text":"\\ud800"}', "invalid JSON at column"),
        (b'{"text":"\xff"}', "expected UTF-8, found byte 0xff"),
        (b"", "expected a JSON object, found a blank line"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_bad_line(line: bytes, expected: str, suffix: str, tmp_path: Path) -> None:
    data = GOOD * 2 + line + b"\n" + GOOD
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[suffix]
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(pack(data))
    assert f"bad.{suffix}, line 3: {expected}" in message(path)
    with pytest.raises(CorpusError, match="line 3"):
        list(Corpus.open(str(path)).samples(Position(source_row=1, file=0, offset=len(GOOD))))


@pytest.mark.parametrize("line", [b"[1]", b"{", b"", b'{"text":\xff}'])
def test_bad_first_line(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(line + b"\n" + GOOD)
    assert "bad.jsonl, line 1: " in message(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("value", [True, ["a"], {"a": 1}])
def test_bad_id(value: Any, tmp_path: Path) -> None:
    rows = [{"text": "a", "id": 1}, {"text": "a", "id": value}]
    (tmp_path / "bad.jsonl").write_bytes(jsonl_bytes(rows))
    assert "line 2: field 'id': expected a string, a number or null, found" in message(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("value", [[], "hi", ["hi"], [{"role": "u"}], [{"content": "x"}], [{"role": 1, "content": ""}]])
def test_bad_messages(value: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "u", "content": "x"}]}, {"messages": value}]
    (tmp_path / "bad.jsonl").write_bytes(jsonl_bytes(rows))
    assert "line 2: field 'messages'" in message(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"text,id\na,1\nb\n", "line 3: expected 2 cells as in the header, found 1"),
        (b'text,id\n"a\nb",1\nb,2,3\n', "line 4: expected 2 cells as in the header, found 3"),
        (b"text,id\na,1\n\nb,2\n", "line 3: expected a CSV record, found a blank line"),
        (b'text,id\na,1\n"b,2\n', "line 3: invalid CSV"),
        (b"text,id\na,1\n\xff,2\n", "line 3: expected UTF-8, found byte 0xff"),
        (b"text,text\na,1\n", "line 1: the header names a column twice"),
        (b"body\na\n", "line 2: no field 'text'"),
    ],
)
def test_bad_csv(data: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_bytes(data)
    assert f"bad.csv, {expected}" in message(tmp_path / "bad.csv")


def test_bad_text_line(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"a\r\nb\r\n\xe9\r\n")
    assert "bad.txt, line 3: expected UTF-8, found byte 0xe9" in message(tmp_path / "bad.txt")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_truncated_stream(suffix: str, tmp_path: Path) -> None:
    data = b"".join(json.dumps({"text": f"{i * 7919}"}).encode() + b"\n" for i in range(5000))
    whole = gzip.compress(data) if suffix == "gz" else zstandard.compress(data)
    for cut in (len(whole) - 1, len(whole) // 2, 3):
        path = tmp_path / f"cut.jsonl.{suffix}"
        path.write_bytes(whole[:cut])
        assert "damaged or cut short" in message(path)
        assert path.name in message(path)
    (tmp_path / f"wrong.jsonl.{suffix}").write_bytes(data)
    assert "damaged" in message(tmp_path / f"wrong.jsonl.{suffix}")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"text": f"t{i}"} for i in range(100)])
    whole = path.read_bytes()
    for damaged in (b"", whole[:-5], whole[:20] + b"\xff" * 200 + whole[220:], b"x" * 100):
        path.write_bytes(damaged)
        assert re.search(r"a\.parquet: (damaged|cannot be read)", message(path))


def test_bad_values_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "parts").mkdir()
    write_parquet(tmp_path / "parts/a.parquet", [{"text": "x"}, {"text": "y"}])
    write_parquet(tmp_path / "parts/b.parquet", [{"body": "x"}])
    assert "b.parquet, row 1: no field 'text'; fields found: 'body'" in message(tmp_path / "parts")
    write_parquet(tmp_path / "n.parquet", [{"text": 1}])
    assert "n.parquet, row 1: field 'text': expected a string or null, found 1 (int)" in message(tmp_path / "n.parquet")
    raw = pyarrow.array([b"fine", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "u.parquet")
    assert "u.parquet, row 2: expected UTF-8, found byte 0xff" in message(tmp_path / "u.parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.jsonl.gz", "a.parquet"])
def test_empty(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    else:
        path.write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    assert f"{name}: has no rows" in message(path)


def test_sources_that_are_no_corpus(tmp_path: Path) -> None:
    assert "nothing.jsonl: does not exist" in message(tmp_path / "nothing.jsonl")
    assert "does not exist; for a dataset of the hub, add its split: org/name:train" in message("org/name")
    for name in ("a.yaml", "a.jsonl.bz2", "a"):
        (tmp_path / name).write_bytes(GOOD)
        assert ".jsonl.zst" in message(tmp_path / name)
        assert "unsupported form" in message(tmp_path / name)
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    assert "a split is for a saved DatasetDict" in message(f"{tmp_path}/b.jsonl:train")
    assert "unsupported form '.bz2'" in message(f"{tmp_path}:train")
    with pytest.raises(UsageError, match="standard input"):
        Corpus.open("-")


def test_folders_that_are_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_bytes(b"")
    (tmp_path / ".hidden.jsonl").write_bytes(GOOD)
    assert "no data files" in message(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    assert len(list(Corpus.open(str(tmp_path)).samples())) == 1
    (tmp_path / "b.csv").write_bytes(b"text\na\n")
    assert "expected files of one form, found csv, jsonl" in message(tmp_path)
    (tmp_path / "b.csv").rename(tmp_path / "b.npz")
    assert "b.npz: unsupported form '.npz'" in message(tmp_path)


def test_damaged_saved_dataset(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list([{"text": "a" * 1000}] * 10).save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:900])
    assert "saved" in message(tmp_path / "saved")
    (tmp_path / "saved/state.json").write_text("{")
    assert "saved: cannot be read as a saved dataset" in message(tmp_path / "saved")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(name: str, **options: Any) -> None:
        assert options == {"split": "train"}
        raise ConnectionError(f"Couldn't reach {name!r}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert "no such path exists, and the Hugging Face hub could not be reached" in message("org/name:train")
    for never_on_the_hub in ("json:train", "pandas:train", "data/a.csv:train"):
        assert "does not exist" in message(never_on_the_hub)


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    loaded = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: loaded)
    assert [s.content for s in Corpus.open("org/name:train").samples()] == ["a", "b"]


def test_corpus_that_shrank(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 3)
    corpus = Corpus.open(str(path))
    last = Position(source_row=2, file=0, offset=2 * len(GOOD))
    path.write_bytes(GOOD)
    assert corpus.fetch([last]) == {}, "a sample that is gone is left out"
    for place in (Position(source_row=2, file=0), Position(source_row=0, file=3)):
        with pytest.raises(CorpusError, match=r"a\.jsonl"):
            corpus.fetch([place])
    with pytest.raises(CorpusError, match="no record at byte"):
        list(corpus.samples(last))
    write_parquet(tmp_path / "a.parquet", [{"text": "a"}])
    assert Corpus.open(str(tmp_path / "a.parquet")).fetch([Position(source_row=5, file=0)]) == {}
    path.unlink()
    with pytest.raises(CorpusError, match="cannot be read"):
        corpus.fetch([last])
