"""Token ids of Megatron-LM: shards with the tokenizer that the user names, the same as of the texts; nothing else reads
them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore.corpus import Corpus, Fields, Position, Tokenized
from ghoststore.errors import CorpusError, UsageError

if TYPE_CHECKING:
    from tests.conftest import Lab

DOCUMENTS = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9], [2, 2]]
CODES = {"u1": 1, "i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}


def write(path: Path, documents: Sequence[Sequence[int]], dtype: str = "<u2", split: bool = False) -> Path:
    """As Megatron's IndexedDatasetBuilder writes it; ``split``: a sequence for each token, as of sentences."""
    sequences = [[token] for document in documents for token in document] if split else list(documents)
    counts = [len(document) if split else 1 for document in documents]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    sizes = lengths.astype("<i8") * np.dtype(dtype).itemsize
    path.with_suffix(".bin").write_bytes(b"".join(np.array(s, dtype).tobytes() for s in sequences))
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(documents) + 1)
        + lengths.tobytes()
        + (np.cumsum(sizes) - sizes).astype("<i8").tobytes()
        + np.array([0, *np.cumsum(counts)], "<i8").tobytes()
    )
    return path.with_suffix(".bin")


def ids_of(sample: Any) -> list[int]:
    assert isinstance(sample.content, Tokenized)
    return list(sample.content.ids.tolist())


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", CODES)
def test_documents(dtype: str, split: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "a", DOCUMENTS, dtype, split)
    for source in (path, path.with_suffix(".idx")):
        corpus = Corpus.open(str(source))
        samples = list(corpus.samples())
        assert list(map(ids_of, samples)) == DOCUMENTS
        assert [s.id for s in samples] == list("01234")
        places = [Position(source_row=s.source_row, file=s.file) for s in samples]
        assert corpus.fetch(places[::-1]) == dict(enumerate(samples))
        assert list(corpus.samples(places[3])) == samples[3:]


@pytest.mark.thin(1)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_shards_are_those_of_the_texts(lab: Lab, workers: str, tmp_path: Path) -> None:
    tokenizer = lab.checkpoint
    texts = [{"text": row["text"]} for row in lab.rows]
    lab.write(tmp_path / "a.jsonl", texts)
    words = ["tokenize", "--tokenizer", tokenizer, "--shard-samples", "5", "--workers", workers]
    assert lab.run(*words, "--data", tmp_path / "a.jsonl", "--out", tmp_path / "lines").code == 0
    lines = ghoststore.TokenShards.open(tmp_path / "lines")
    path = write(tmp_path / "a", [lines.tokens_of(i).tolist() for i in range(lines.samples)])
    told = lab.run(*words, "--data", path, "--out", tmp_path / "ids")
    assert told.code == 0, told.err
    assert "the ids are taken for those of the tokenizer that is given" in told.err
    shards = ghoststore.TokenShards.open(tmp_path / "ids")
    assert [shards.row(i) for i in range(shards.samples)] == [lines.row(i) for i in range(lines.samples)]
    assert shards.tokenizer_identity == lines.tokenizer_identity
    for name in ("ids", "lines"):
        assert lab.build(tmp_path / name / "store", "--data", tmp_path / name).code == 0
    parts = [ghoststore.Store.open(tmp_path / name / "store").part() for name in ("ids", "lines")]
    assert np.array_equal(*(part.read_rows("vectors", range(part.rows)) for part in parts))


def test_nothing_else_reads_them(lab: Lab, tmp_path: Path) -> None:
    """The advice works: see above."""
    path = write(tmp_path / "a", DOCUMENTS)
    for words in (["build", "--data", path, "--store", tmp_path / "store"],):
        outcome = lab.run(*words, "--checkpoint", lab.checkpoint, "--quiet")
        assert outcome.code == 2
        assert f"ghoststore tokenize --data {path} --tokenizer TOKENIZER --out SHARDS" in " ".join(outcome.err.split())


def test_ids_beyond_the_vocabulary(lab: Lab, tmp_path: Path) -> None:
    path = write(tmp_path / "a", [[1], [2, 60_000]])
    with pytest.raises(
        UsageError, match=r"a\.bin, row 2: sample '1': has the token 60000, and the tokenizer has ids up to"
    ):
        ghoststore.tokenize(data=path, tokenizer=lab.checkpoint, out=tmp_path / "out")


HARMS: dict[str, tuple[int, bytes, str]] = {
    "magic": (0, b"TNTIDX", "does not begin as an index"),
    "version": (9, b"\2", "version 2"),
    "floats": (17, b"\6", "type 6"),
    "sequences": (18, b"\xff" * 7, "cut short"),
    "documents": (26, b"\5", "its documents are sequences 0 to 4 of 5"),
    "length": (34, struct.pack("<i", -1), "document 1 lies beyond"),
    "long": (34, struct.pack("<i", 1 << 30), "document 1 lies beyond"),
    "place": (54, struct.pack("<q", 1 << 60), "document 1 lies beyond"),
    "before": (54, struct.pack("<q", -2), "document 1 lies beyond"),
    "order": (34 + 20 + 40 + 8, struct.pack("<q", 4), "not in order"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_index(harm: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a", DOCUMENTS)
    index = path.with_suffix(".idx")
    place, data, words = HARMS[harm]
    whole = index.read_bytes()
    index.write_bytes(whole[:place] + data + whole[place + len(data) :])
    with pytest.raises(CorpusError, match=rf"a\.idx: damaged: .*{words}"):
        list(Corpus.open(str(path)).samples())
    for end in (0, 5, 30, len(whole) - 1):
        index.write_bytes(whole[:end])
        with pytest.raises(CorpusError, match=r"a\.idx: damaged"):
            list(Corpus.open(str(path)).samples())


def test_other_bounds(tmp_path: Path) -> None:
    path = write(tmp_path / "a", DOCUMENTS)
    with pytest.raises(CorpusError, match="row 4: a record of more than 9 bytes"):
        list(Corpus.open(str(path), Fields(max_record_bytes=9)).samples())
    with pytest.raises(CorpusError, match="row 1: -1 to 1 are no token ids"):
        list(Corpus.open(str(write(tmp_path / "b", [[1, -1]], "<i4"))).samples())
    path.with_suffix(".idx").unlink()
    assert Corpus.open(str(path)).form == "token-stream"
    path.unlink()
    with pytest.raises(CorpusError, match="does not exist"):
        Corpus.open(str(path.with_suffix(".idx")))
