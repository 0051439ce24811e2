"""Token shards: every token and every sample comes back, from wherever it came."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tokenizers
import transformers

import ghoststore
from ghoststore.checkpoint.load import load_tokenizer
from ghoststore.corpus import Corpus, Fields, Position, Tokenized
from ghoststore.errors import CorpusError, UsageError
from ghoststore.tokens.manifest import SAMPLE
from ghoststore.tokens.shards import TokenShards
from indexer.encode.tokens import Tokenizer
from tests.support.corpora import Write
from tests.support.shards import tokenize

if TYPE_CHECKING:
    from tests.conftest import Lab

TEXTS = [
    "the cat sees the moon",
    "",
    "ünïcødé 漢字 🐈",
    "two\nlines",
    "a",
    "x" * 300,
    "the old river runs under a stone",
]
DOMAINS = ["sky", None, "earth", "earth", "sky", None, "sky"]
ROWS = [{"id": f"ïd-{i}", "text": text, "domain": d} for i, (text, d) in enumerate(zip(TEXTS, DOMAINS, strict=True))]


def check(shards: TokenShards, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Everything of ``shards`` is that of ``corpus``, sample by sample, and leads back to it."""
    samples = list(corpus.samples())
    assert shards.samples == len(samples)
    encoded = [tokenizer.encode([sample])[0] for sample in samples]
    for number, (ids, first_target) in enumerate(encoded):
        found = shards.tokens_of(number)
        assert (found.dtype, found.tolist()) == (np.int32, ids.tolist())
        assert (shards.length[number], shards.first_target[number]) == (len(ids), first_target)
    names = [shards.domains[code] if code >= 0 else None for code in shards.domain]
    assert names == [sample.domain for sample in samples]
    assert shards.sample_id.tolist() == [sample.id for sample in samples]
    assert shards.source_row.tolist() == [sample.source_row for sample in samples]
    assert shards.tokens == sum(len(ids) for ids, _ in encoded)
    places = [
        Position(source_row=int(row), file=int(file), offset=int(offset))
        for row, file, offset in zip(shards.source_row, shards.source_file, shards.source_offset, strict=True)
    ]
    again = corpus.fetch(places)
    assert [again[place.source_row] for place in places] == samples
    assert shards.source_digest.tolist() == [sample.digest() for sample in samples]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv.zst", "parquet", "dataset", "folder-jsonl"])
def test_every_sample_comes_back_and_leads_back(lab: Lab, form: str, write: Write, tmp_path: Path) -> None:
    rows = [{**row, "domain": row["domain"] or ""} for row in ROWS] if "csv" in form else ROWS
    data = write(form, rows)
    shards = tokenize(lab, data, tmp_path / "out")
    check(shards, Corpus.open(data), Tokenizer(load_tokenizer(lab.checkpoint)))
    assert shards.source["data"] == data
    assert shards.source["form"] == Corpus.open(data).form
    assert shards.length[1] == 0, "an empty sample keeps its place"


@pytest.mark.parametrize("kind", ["prompt", "messages", "null"])
def test_every_kind_of_content(lab: Lab, kind: str, write: Write, tmp_path: Path) -> None:
    contents: dict[str, list[dict[str, Any]]] = {
        "prompt": [{"prompt": "the cat", "completion": " runs"}, {"prompt": "", "completion": ""}] * 3,
        "messages": [{"messages": [{"role": "user", "content": text}]} for text in ("hi", "the moon")] * 3,
        "null": [{"text": None}, {"text": "a"}, {"text": None}, {"text": None}, {"text": None}, {"text": None}],
    }

    def template(model: Any, tokenizer: Any) -> None:
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

    checkpoint = lab.model(tmp_path / "model", change=template)
    data = write("jsonl", contents[kind])
    ghoststore.tokenize(data=data, tokenizer=checkpoint, out=tmp_path / "out", shard_samples=2)
    tokenizer = Tokenizer(load_tokenizer(checkpoint))
    check(TokenShards.open(tmp_path / "out"), Corpus.open(data), tokenizer)
    shards = Corpus.open(str(tmp_path / "out"))
    assert [sample.preview() for sample in shards.samples()] == [
        tokenizer.tokenizer.decode(tokenizer.encode([sample])[0][0].tolist()) for sample in Corpus.open(data).samples()
    ]


def test_only_some_domains(lab: Lab, write: Write, tmp_path: Path) -> None:
    data = write("jsonl", ROWS)
    shards = tokenize(lab, data, tmp_path / "sky", domains=["sky"], shard_samples=2)
    assert (shards.domains, shards.source_row.tolist()) == (["sky"], [0, 4, 6])
    check(shards, Corpus.open(data).only(["sky"]), Tokenizer(load_tokenizer(lab.checkpoint)))
    first = tokenize(lab, data, tmp_path / "first", domains=["sky", "earth"], max_samples=3, shard_samples=2)
    assert first.source_row.tolist() == [0, 2, 3]
    assert first.source["only_domains"] == ["earth", "sky"]
    for domains, words in ((["sea"], "'sea'"), (["sky", "sea"], "--domain 'sea': no sample")):
        with pytest.raises(UsageError, match=words):
            tokenize(lab, data, tmp_path / "none", domains=domains)
    assert not (tmp_path / "none").exists()


def test_max_samples_reads_no_further(lab: Lab, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\nnonsense\n')
    assert tokenize(lab, data, tmp_path / "out", max_samples=3, shard_samples=2).samples == 3


@pytest.mark.slow
def test_a_large_vocabulary_is_uint32(write: Write, tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(65_537)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    data = write("jsonl", [{"text": "w7 w65536 w1"}])
    report = ghoststore.tokenize(data=data, tokenizer=tmp_path / "words", out=tmp_path / "out")
    assert (report.token_dtype, report.vocabulary) == ("uint32", 65_537)
    assert TokenShards.open(tmp_path / "out").tokens_of(0).tolist() == [7, 65_536, 1]


def test_files_are_plain_numpy(whole: Path) -> None:
    shards = TokenShards.open(whole)
    tokens = np.load(whole / "tokens-00000001.npy", mmap_mode="r")
    samples = np.load(whole / "samples-00000001.npy", mmap_mode="r")
    assert (tokens.dtype, samples.dtype) == (np.uint16, SAMPLE)
    third = samples[2]
    assert tokens[third["start"] : third["start"] + third["length"]].tolist() == shards.tokens_of(7).tolist()
    again = pickle.loads(pickle.dumps(shards))
    assert again.tokens_of(7).tolist() == shards.tokens_of(7).tolist()
    for outside in (-1, 27):
        with pytest.raises(IndexError, match=f"sample {outside} of 27"):
            shards.tokens_of(outside)


def test_shards_are_a_corpus(lab: Lab, whole: Path) -> None:
    corpus = Corpus.open(str(whole))
    samples = list(corpus.samples())
    assert (corpus.form, corpus.files) == ("token-shards", [whole])
    assert [(s.id, s.domain, s.preview()) for s in samples] == [(r["id"], r["domain"], r["text"]) for r in lab.rows]
    for sample in samples[::4]:
        place = Position(source_row=sample.source_row, file=0)
        assert list(corpus.samples(place)) == samples[sample.source_row :]
        assert corpus.fetch([place]) == {sample.source_row: sample}
    canonical = json.loads(samples[3].canonical())
    assert isinstance(samples[3].content, Tokenized)
    assert canonical["content"] == {"tokens": samples[3].content.ids.tolist(), "first_target": 1}
    with pytest.raises(UsageError, match=r"token shards have no fields to name; leave out `fields.text`"):
        list(Corpus.open(str(whole), Fields(text="text")).samples())
    with pytest.raises(CorpusError, match="a split is for a saved DatasetDict"):
        Corpus.open(f"{whole}:train")
    with pytest.raises(UsageError, match="holds tokens already"):
        ghoststore.tokenize(data=whole, tokenizer=lab.checkpoint, out=whole.with_name("again"))


@pytest.mark.thin(1)
@pytest.mark.parametrize("rows", ["text", "prompt"])
def test_build_and_query_from_shards(lab: Lab, rows: str, tmp_path: Path) -> None:
    """Vectors to the bit those of the corpus itself; results with the same ids, scores and texts."""
    contents = {
        "text": [*lab.rows[:12], {"id": "long", "text": "the cat " * 40, "domain": None}, {"id": "no", "text": ""}],
        "prompt": [{"prompt": row["text"], "completion": " the moon"[: i % 9]} for i, row in enumerate(lab.rows[:12])],
    }
    data = lab.write(tmp_path / "data.jsonl", [{"domain": None, **row} for row in contents[rows]])
    tokenize(lab, data, tmp_path / "shards", shard_samples=5)
    results, vectors = [], []
    for source in (data, tmp_path / "shards"):
        store = tmp_path / f"store-{source.name}"
        ghoststore.build(
            checkpoint=lab.checkpoint, data=source, store=store, span_rows=4, overlong="window", device="cpu"
        )
        part = ghoststore.Store.open(store).part()
        vectors.append([part.read(name, 0, part.rows).tolist() for name in ("vectors", "loss", "n_tokens", "status")])
        results.append(ghoststore.query(store=store, val_set=source, each=True, top_k=3, device="cpu").results)
    assert vectors[0] == vectors[1]
    assert results[0] == results[1]
    assert part.manifest["source"] | {"checkpoint": None} == {
        "checkpoint": None,
        "tokenizer": None,
        "data": str(tmp_path / "shards"),
        "form": "token-shards",
        "optimizer_state": None,
        "learning_rate": None,
    }


def test_texts_of_damaged_shards_are_not_shown(lab: Lab, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    ghoststore.build(checkpoint=lab.checkpoint, data=folder, store=store, device="cpu")
    (folder / "tokens-00000001.npy").unlink()
    outcome = lab.run("query", "--store", store, "--val-set", lab.corpus, "--quiet", "--json")
    assert outcome.code == 0, outcome.err
    assert "texts are not shown" in outcome.err
    assert "tokens-00000001.npy" in outcome.err
    assert {hit["text"] for hit in outcome.json["results"][0]["hits"]} == {None}
