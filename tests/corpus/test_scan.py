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
    scan_samples,
    spool_stdin,
)
from ghoststore.errors import CorpusError, StorageError

from .conftest import Write


def sample(row: int, content: object = "é", domain: str | None = None) -> Sample:
    return Sample(row, str(row), domain, content, -1, 0)  # type: ignore[arg-type]


def test_counts() -> None:
    contents = ["é", None, PromptCompletion("ab", "c"), Messages([{"role": "u", "content": "xyz"}]), ""]
    scan = scan_samples(sample(i, content, d) for i, (content, d) in enumerate(zip(contents, "bab\0a", strict=True)))
    assert scan.rows == 5
    assert scan.domains == ["\0", "a", "b"]
    assert scan.text_bytes == 2 + 0 + 3 + 3 + 0
    assert scan_samples([sample(0)]).domains is None
    assert scan_samples([sample(0), sample(1, domain="a")]).domains == ["a"]


def test_fingerprint_by_the_definition() -> None:
    samples = [sample(i, "x" * i, "d") for i in range(5)]
    expected = hashlib.sha256()
    for each in samples:
        expected.update(len(each.canonical()).to_bytes(8, "little"))
        expected.update(each.canonical())
    assert scan_samples(samples).fingerprint == f"sha256:{expected.hexdigest()}"
    assert scan_samples(samples[::-1]).fingerprint != scan_samples(samples).fingerprint


def test_max_rows_and_callbacks() -> None:
    seen: list[Sample] = []
    progress: list[int] = []
    samples = [sample(i) for i in range(5000)]
    scan = scan_samples(samples, max_rows=4500, on_sample=seen.append, progress=progress.append)
    assert seen == samples[:4500]
    assert progress == [4096, 4500]
    assert scan == scan_samples(samples[:4500])
    assert scan_samples(samples, max_rows=0).rows == 0


def test_too_many_domains() -> None:
    samples = [sample(i, domain=f"d{i}") for i in range(MAX_DOMAINS + 1)]
    assert len(scan_samples(samples[:-1]).domains or []) == MAX_DOMAINS
    with pytest.raises(CorpusError, match=r"more than 10,000 distinct domains.*is the field"):
        scan_samples(samples)


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
