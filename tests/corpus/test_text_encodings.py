"""Text files in other encodings than UTF-8, and cells that do not end at commas: read as they say, or refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from ghoststore.corpus import Corpus, Fields, Position, ResolvedFields
from ghoststore.errors import CorpusError, UsageError
from tests.support.corpora import csv_bytes, json_bytes, jsonl_bytes

ROWS = [{"text": f"süß – “{i}”\r\nzwei", "domain": "d" * i} for i in range(5)]
BYTES = {"a.jsonl": jsonl_bytes(ROWS), "a.csv": csv_bytes(ROWS), "a.json": json_bytes(ROWS)}


def contents(source: Path, fields: Fields | None = None) -> list[object]:
    corpus = Corpus.open(str(source), fields)
    samples = list(corpus.samples())
    places = [Position(source_row=s.source_row, file=s.file, offset=s.offset) for s in samples]
    again = Corpus.open(str(source), ResolvedFields.from_json(corpus.resolved.to_json()))
    assert list(again.samples(places[2])) == samples[2:]
    assert again.fetch(places[::-1]) == dict(enumerate(samples))
    return [(s.content, s.domain, s.digest()) for s in samples]


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_says_it(encoding: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(BYTES[name])
    plain = contents(path)
    path.write_bytes(BYTES[name].decode().encode(encoding))
    assert contents(path) == plain
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert contents(packed) == plain


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be", "utf-8"])
def test_an_encoding_that_is_given(encoding: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(BYTES[name])
    plain = contents(path)
    path.write_bytes(BYTES[name].decode().encode(encoding))
    assert contents(path, Fields(encoding=encoding)) == plain
    if encoding != "utf-8":
        with pytest.raises(CorpusError, match=r"`fields\.encoding"):
            contents(path)


def test_bytes_that_are_not_of_the_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\r\nb\r\n\x81\r\n")
    with pytest.raises(CorpusError, match=r"a\.txt: expected cp1252, found byte 0x81 at byte 6"):
        contents(path, Fields(encoding="cp1252"))
    path.write_bytes("ab".encode("utf-16") + b"\x00")
    with pytest.raises(CorpusError, match=r"a\.txt: expected utf-16, found byte 0x00 at byte 6"):
        contents(path)


def test_a_mark_of_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for mark, given in (("utf-16", "utf-8"), ("utf-8-sig", "cp1252"), ("utf-16", "utf-32")):
        path.write_bytes("text\n".encode(mark))
        with pytest.raises(
            CorpusError, match=rf"its byte order mark is that of UTF-\d+, and `fields.encoding` says '{given}'"
        ):
            contents(path, Fields(encoding=given))


def test_options_that_are_none() -> None:
    for encoding in ("no-such", "rot13", "base64", "\0", "../x"):
        with pytest.raises(UsageError, match=r"`fields\.encoding"):
            Fields(encoding=encoding)
    for delimiter in ("", ",,", '"', "\n"):
        with pytest.raises(UsageError, match=r"`fields\.delimiter`"):
            Fields(delimiter=delimiter)
    with pytest.raises(UsageError, match=r"`fields.encoding='cp1252'` is for text files .*2 texts in memory is memory"):
        Corpus.open(["a", "b"], Fields(encoding="cp1252"))


def test_options_for_other_forms(tmp_path: Path) -> None:
    for name, fields, of in (
        ("a.jsonl", Fields(delimiter=";"), "csv and tsv"),
        ("a.parquet", Fields(encoding="cp1252"), "text"),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UsageError, match=rf"is for {of}.*leave it out"):
            Corpus.open(str(tmp_path / name), fields)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_cells_that_end_elsewhere(delimiter: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(BYTES["a.csv"])
    plain = contents(path)
    path.write_bytes(csv_bytes(ROWS, delimiter))
    assert contents(path, Fields(delimiter=delimiter)) == plain
    with pytest.raises(CorpusError, match=r"if cells end there, give `fields\.delimiter`"):
        contents(path)
    if delimiter == "\t":
        assert contents(path.rename(tmp_path / "a.tsv")) == plain


def test_what_the_manifest_keeps() -> None:
    """Only what was given, so that manifests of corpora in UTF-8 stay as they were."""
    plain = ResolvedFields(kind="text", text="text")
    assert set(plain.to_json()) == {"kind", "text", "prompt", "completion", "messages", "id", "domain"}
    given = ResolvedFields(kind="text", text="text", encoding="cp1252", delimiter=";")
    assert ResolvedFields.from_json(given.to_json()) == given
    for name, value in (("encoding", "rot13"), ("delimiter", ",,"), ("encoding", 3)):
        with pytest.raises(UsageError):
            ResolvedFields.from_json({**plain.to_json(), name: value})
