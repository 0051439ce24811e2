"""Token ids in a file of nothing else: windows, documents, uint32, llm.c's header, and what is refused."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore.checkpoint.load import load_tokenizer
from ghoststore.corpus import Corpus, Fields, Position, ResolvedFields, Tokenized
from ghoststore.corpus.formats import token_stream
from ghoststore.errors import CorpusError, GhostStoreError, UsageError
from tests.support.nanogpt import gpt, save, write_stream

if TYPE_CHECKING:
    from tests.conftest import Lab

IDS = [5, 6, 7, 9, 1, 9, 9, 2, 3, 4]


def ids_of(sample: Any) -> list[int]:
    assert isinstance(sample.content, Tokenized)
    return list(sample.content.ids.tolist())


def read(path: Path, **fields: Any) -> list[Any]:
    """All samples, after it is compared with what is read of them from each place on, and at random."""
    corpus = Corpus.open(path, Fields(**fields))
    samples = list(corpus.samples())
    corpus = Corpus.open(path, ResolvedFields.from_json(corpus.resolved.to_json()))
    places = [Position(source_row=s.source_row, file=s.file, offset=s.offset) for s in samples]
    assert corpus.fetch(places[::-1]) == dict(enumerate(samples))
    for sample, place in zip(samples, places, strict=True):
        assert list(corpus.samples(place)) == samples[sample.source_row :]
        assert list(corpus.samples(Position(source_row=sample.source_row, file=0))) == samples[sample.source_row :]
    assert corpus._form.count(path) == len(samples)
    return samples


@pytest.mark.parametrize("at_once", [1, 5, 1 << 19])
@pytest.mark.parametrize("window", [2, 3, 4, 9, 10, 11])
def test_windows(window: int, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token but the first is a target once, in its place."""
    monkeypatch.setattr(token_stream, "AT_ONCE", at_once)
    for count in range(1, 11):
        samples = read(write_stream(tmp_path / "train.bin", IDS[:count]), ids_window=window)
        starts = [int(sample.id.removeprefix("train.bin:")) for sample in samples]
        assert starts == list(range(0, max(count - 1, 1), window - 1))
        assert [ids_of(s) for s in samples] == [IDS[:count][start : start + window] for start in starts]
        assert [token for s in samples for token in ids_of(s)[1:]] == IDS[1:count]
        assert all(s.content.first_target == 1 for s in samples)


@pytest.mark.parametrize("first", [640, 1152])
def test_the_first_ids_look_like_a_pickle(first: int, tmp_path: Path) -> None:
    """These are tokens as others, though their bytes are those that a pickle begins with."""
    samples = read(write_stream(tmp_path / "train.bin", [first, *IDS]), ids_window=8)
    assert ids_of(samples[0]) == [first, *IDS[:7]]


@pytest.mark.parametrize("at_once", [1, 3, 1 << 19])
def test_documents(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "AT_ONCE", at_once)
    samples = read(write_stream(tmp_path / "train.bin", IDS), ids_document_end=9)
    assert list(map(ids_of, samples)) == [[5, 6, 7, 9], [1, 9], [9], [2, 3, 4]]
    assert [s.id for s in samples] == ["train.bin:0", "train.bin:4", "train.bin:6", "train.bin:7"]
    samples = read(write_stream(tmp_path / "train.bin", IDS[:6]), ids_document_end=9)
    assert list(map(ids_of, samples)) == [[5, 6, 7, 9], [1, 9]]
    monkeypatch.setattr(token_stream, "AT_ONCE", 1)
    with pytest.raises(CorpusError, match=r"train\.bin, token 0: a record of more than 5 bytes"):
        read(tmp_path / "train.bin", ids_document_end=9, max_record_bytes=5)


def test_uint32(tmp_path: Path) -> None:
    ids = [70_000 + i for i in range(100)]
    path = write_stream(tmp_path / "a.bin", ids, "<u4")
    with pytest.raises(CorpusError, match=r"seem to be uint32: say so, `fields\.ids_dtype=uint32`"):
        read(path, ids_window=4)
    assert ids_of(read(path, ids_window=100, ids_dtype="uint32")[0]) == ids
    write_stream(path, [i % 3 for i in range(100)])
    assert len(read(path, ids_window=100)) == 1
    path = write_stream(tmp_path / "b.bin", [*[i % 2 and i for i in range(100)][::-1], 0])
    assert len(read(path, ids_window=101, ids_dtype="uint16")) == 1
    with pytest.raises(CorpusError, match=r"token 0: \d+ is no token id: are the ids uint16"):
        read(write_stream(tmp_path / "c.bin", [40_000] * 10), ids_window=4, ids_dtype="uint32")


@pytest.mark.parametrize(("version", "dtype"), [(1, "<u2"), (7, "<u4")])
def test_files_of_llm_c(version: int, dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "val.bin"
    head = struct.pack("<256i", 20240520, version, len(IDS), *[0] * 253)
    path.write_bytes(head + np.array(IDS, dtype).tobytes())
    samples = read(path, ids_window=4)
    assert [ids_of(s) for s in samples] == [IDS[start : start + 4] for start in (0, 3, 6)]
    assert [s.id for s in samples] == ["val.bin:0", "val.bin:3", "val.bin:6"]
    with pytest.raises(UsageError, match="says that its ids are"):
        read(path, ids_window=4, ids_dtype="uint32" if version == 1 else "uint16")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorpusError, match="it says another number of ids than the"):
        read(path, ids_window=4)
    path.write_bytes(struct.pack("<256i", 20240520, 3, *[0] * 254))
    with pytest.raises(CorpusError, match="in version 3; known: 1"):
        read(path, ids_window=4)


def test_refused(tmp_path: Path) -> None:
    path = write_stream(tmp_path / "a.bin", IDS)
    with pytest.raises(UsageError, match=r"say how long a row is, `fields\.ids_window`"):
        list(Corpus.open(path).samples())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorpusError, match="19 bytes are no whole number of uint16 ids"):
        read(path, ids_window=4)
    path.write_bytes(b"")
    with pytest.raises(CorpusError, match="has no rows"):
        read(path, ids_window=4)
    with pytest.raises(UsageError, match="two ways to cut a stream"):
        Fields(ids_window=4, ids_document_end=9)
    for name, value in (("ids_window", 1), ("ids_document_end", -1), ("ids_dtype", "int8"), ("ids_window", "4")):
        with pytest.raises(UsageError, match=f"fields.{name}"):
            Fields(**{name: value})
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(UsageError, match=r"`fields\.ids_window=4` is for files of token ids alone"):
        Corpus.open(tmp_path / "a.txt", Fields(ids_window=4))


def test_shards(lab: Lab, tmp_path: Path) -> None:
    """As of Megatron's ids: the tokenizer that is given, and nothing guessed."""
    path = write_stream(tmp_path / "train.bin", [i % 50 for i in range(100)])
    words = ("tokenize", "--tokenizer", lab.checkpoint, "--data", path)
    refused = lab.run(*words, "--out", tmp_path / "shards")
    assert (refused.code, "--ids-window" in refused.err) == (2, True), refused.err
    told = lab.run(*words, "--out", tmp_path / "shards", "--ids-window", "12")
    assert told.code == 0, told.err
    shards = ghoststore.TokenShards.open(tmp_path / "shards")
    samples = read(path, ids_window=12)
    assert [shards.tokens_of(place).tolist() for place in range(shards.samples)] == list(map(ids_of, samples))
    stores = [tmp_path / "a", tmp_path / "b"]
    assert lab.build(stores[0], "--data", tmp_path / "shards").code == 0
    direct = ("--data", path, "--ids-window", "12", "--tokenizer", lab.checkpoint)
    assert lab.build(stores[1], *direct).code == 0
    parts = [ghoststore.Store.open(store).part() for store in stores]
    assert np.array_equal(*(part.read_rows("vectors", range(part.rows)) for part in parts))


def test_a_build_continues_and_is_repaired(tmp_path: Path) -> None:
    """The length of a window that was not given is that of the rows that are there."""
    checkpoint = save(gpt(), tmp_path / "ckpt.pt")
    data = write_stream(tmp_path / "train.bin", [i * 7 % 101 for i in range(200)])
    build: dict[str, Any] = {"checkpoint": checkpoint, "data": data, "store": tmp_path / "store", "span_rows": 5}
    ghoststore.build(**build)
    part = ghoststore.Store.open(tmp_path / "store").part()
    assert part.manifest["corpus"]["fields"]["ids_window"] == part.manifest["tokens"]["max_length"] == 16
    before = np.asarray(part.read_rows("vectors", range(part.rows)))
    damaged = sorted(path for path in part.path.glob("vectors/c/1/**/*") if path.is_file())[0]
    damaged.write_bytes(bytes(len(damaged.read_bytes())))
    ghoststore.repair(store=tmp_path / "store")
    assert ghoststore.build(**build).resumed_rows == part.rows
    part = ghoststore.Store.open(tmp_path / "store").part()
    assert np.array_equal(before, part.read_rows("vectors", range(part.rows)))
    with pytest.raises(GhostStoreError, match="max_length"):
        ghoststore.build(**build, max_length=8)


def test_documents_of_a_build(tmp_path: Path) -> None:
    checkpoint = save(gpt(), tmp_path / "ckpt.pt")
    data = write_stream(tmp_path / "train.bin", [*range(10, 15), 100, *range(20, 50), 100])
    fields = Fields(ids_document_end=100)
    report = ghoststore.build(
        checkpoint=checkpoint, data=data, store=tmp_path / "store", fields=fields, overlong="window"
    )
    assert report.rows == 1 + 2
    result = ghoststore.query(store=tmp_path / "store", val_set=data, fields=fields, max_samples=1, metric="cosine")
    assert result.results[0].hits[0].id == "train.bin:0"


def test_the_characters_of_a_meta_pkl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of docs/nanogpt.md save a tokenizer with nanoGPT's ids."""
    text = "First Citizen:\nBefore we proceed, hear me.\n"
    stoi = {character: place for place, character in enumerate(sorted(set(text)))}
    monkeypatch.chdir(tmp_path)
    Path("meta.pkl").write_bytes(pickle.dumps({"stoi": stoi}))
    page = (Path(__file__).parents[2] / "docs" / "nanogpt.md").read_text()
    blocks = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    exec(next(block for block in blocks if "meta.pkl" in block), {})
    tokenizer = load_tokenizer(Path("characters"))
    assert tokenizer(text)["input_ids"] == [stoi[character] for character in text]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    data = write_stream(tmp_path / "train.bin", [stoi[character] for character in text])
    checkpoint = save(gpt(vocab_size=len(stoi)), tmp_path / "ckpt.pt")
    ghoststore.build(checkpoint=checkpoint, data=data, store="store", tokenizer="characters")
    best = ghoststore.query(store="store", val_set=[text[:16]], metric="cosine").results[0].hits[0]
    assert best.id == "train.bin:0"
