"""The fingerprint and the counts of a scan, and standard input kept in a file."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest

from ghoststore.corpus import (
    MAX_DOMAINS,
    Corpus,
    Messages,
    PromptCompletion,
    Sample,
    SampleScan,
    spool_stdin,
)
from ghoststore.errors import CorpusError, StorageError
from ghoststore.progress import counted
from tests.support.corpora import Write


def sample(row: int, content: object = "é", domain: str | None = None) -> Sample:
    return Sample(row, str(row), domain, content, -1, 0)  # type: ignore[arg-type]


def test_counts() -> None:
    contents = ["é", None, PromptCompletion("ab", "c"), Messages([{"role": "u", "content": "xyz"}]), ""]
    scan = SampleScan(
        sample(i, content, d) for i, (content, d) in enumerate(zip(contents, "bab\0a", strict=True))
    ).finish()
    assert scan.rows == 5
    assert scan.domains == ["\0", "a", "b"]
    assert scan.text_bytes == 2 + 0 + 3 + 3 + 0
    assert SampleScan([sample(0)]).finish().domains is None
    assert SampleScan([sample(0), sample(1, domain="a")]).finish().domains == ["a"]


def test_fingerprint_by_the_definition() -> None:
    samples = [sample(i, "x" * i, "d") for i in range(5)]
    expected = hashlib.sha256()
    for each in samples:
        expected.update(len(each.canonical()).to_bytes(8, "little"))
        expected.update(each.canonical())
    assert SampleScan(samples).finish().fingerprint == f"sha256:{expected.hexdigest()}"
    assert SampleScan(samples[::-1]).finish().fingerprint != SampleScan(samples).finish().fingerprint


def test_samples_pass_by_and_progress_is_told() -> None:
    class Told(list[int]):
        def advance(self, rows: int, tokens: int = 0) -> None:
            self.append(rows)

    task = Told()
    samples = [sample(i) for i in range(5000)]
    scanning = SampleScan(samples, max_rows=4500)
    assert list(counted(scanning, task)) == samples[:4500]  # type: ignore[arg-type]
    assert task == [4096, 404]
    assert scanning.finish() == SampleScan(samples[:4500]).finish()
    assert SampleScan(samples, max_rows=0).finish().rows == 0


def test_a_pass_that_stops_early_is_finished() -> None:
    samples = [sample(i) for i in range(9)]
    scanning = SampleScan(samples)
    assert next(iter(scanning)) == samples[0]
    assert scanning.finish() == SampleScan(samples).finish()


def test_too_many_domains() -> None:
    samples = [sample(i, domain=f"d{i}") for i in range(MAX_DOMAINS + 1)]
    assert len(SampleScan(samples[:-1]).finish().domains or []) == MAX_DOMAINS
    with pytest.raises(CorpusError, match=r"more than 10,000 distinct domains.*is the field"):
        SampleScan(samples).finish()


def test_spooled_stdin_is_a_corpus(tmp_path: Path, write: Write) -> None:
    data = Path(write("jsonl", [{"text": str(i)} for i in range(9)])).read_bytes()
    to = tmp_path / "stdin.jsonl"
    assert spool_stdin(io.BytesIO(data), to) == to
    assert to.read_bytes() == data
    assert len(list(Corpus.open(str(to)).samples())) == 9


def test_spool_leaves_nothing_behind(tmp_path: Path) -> None:
    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError("gone")

    with pytest.raises(StorageError, match=r"stdin\.jsonl.*gone"):
        spool_stdin(Broken(), tmp_path / "stdin.jsonl")  # type: ignore[arg-type]
    with pytest.raises(StorageError):
        spool_stdin(io.BytesIO(b""), tmp_path / "missing" / "stdin.jsonl")
    assert list(tmp_path.iterdir()) == []
