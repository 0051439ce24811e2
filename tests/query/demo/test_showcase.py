"""The demo's corpus keeps its promises, its tokenizer survives a folder."""

from __future__ import annotations

import gzip
import json
import re
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ghoststore.errors import UsageError
from query.demo import corpus as reader
from query.demo.corpus import DOMAINS, MOST_ROWS, DemoCorpus, Row, read_corpus, write_jsonl
from query.demo.tokenizer import END_OF_TEXT, train_tokenizer

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "demo_corpus.py"
FACTS = 40
# Words that carry no content: a query and its source may share them.
FUNCTION_WORDS = re.compile(
    r"\b(a|an|the|of|at|in|on|by|to|from|for|with|and|or|whose|who|that|which|is|was|are|were|be|it|its|she"
    r"|her|his|their|as|into|under|one|after|each)\b"
)


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """What the script that writes the corpus defines."""
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def corpus() -> DemoCorpus:
    return read_corpus()


@pytest.fixture(scope="module")
def tokenizer(corpus: DemoCorpus) -> PreTrainedTokenizerFast:
    return train_tokenizer(row["text"] for row in corpus.train)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def content_stems(text: str) -> set[str]:
    """The first five letters of each word that carries content: inflections count as the same word."""
    return {word[:5] for word in words(text) if not FUNCTION_WORDS.fullmatch(word)}


# --- Corpus ---------------------------------------------------------------------------------------


def test_the_script_writes_the_file(script: dict[str, Any]) -> None:
    file = Path(reader.__file__).with_name(script["DATA"].name)
    # What is compressed, not how: that differs between zlib and what replaces it.
    assert gzip.decompress(file.read_bytes()) == script["corpus"]().encode()


def test_counts_and_fields(corpus: DemoCorpus) -> None:
    assert Counter(row["domain"] for row in corpus.train) == dict.fromkeys(DOMAINS, 600) | {"facts": FACTS}
    assert Counter(row["domain"] for row in corpus.val_domains) == dict.fromkeys(DOMAINS, 16)
    sets = (corpus.val_facts, corpus.val_facts_paraphrased, corpus.val_facts_inflected)
    assert {len(queries) for queries in sets} == {FACTS}
    assert all(row.keys() == {"id", "text", "domain"} for row in corpus.train + corpus.val_domains)
    queries = [query for queries in sets for query in queries]
    assert all(row.keys() == {"id", "prompt", "completion", "domain", "source_id"} for row in queries)
    domains = [row["domain"] for row in corpus.train]
    assert domains != sorted(domains, key=domains.index), "the rows are not shuffled"


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_row_counts_that_do_not_divide(corpus: DemoCorpus, rows: int) -> None:
    fewer = read_corpus(rows)
    ordinary = Counter(row["domain"] for row in fewer.train if row["domain"] != "facts")
    assert ordinary.total() == rows
    assert max(ordinary.values(), default=0) <= rows // len(DOMAINS) + 1
    assert len(fewer.train) == rows + FACTS
    remaining = iter(corpus.train)
    assert all(row in remaining for row in fewer.train), "in the order of the file"
    assert fewer.val_domains == corpus.val_domains


def test_no_text_and_no_id_comes_twice(corpus: DemoCorpus) -> None:
    texts = [row["text"] for row in corpus.train + corpus.val_domains]
    queries = corpus.val_facts + corpus.val_facts_paraphrased + corpus.val_facts_inflected
    assert len(set(texts)) == len(texts)
    rows = corpus.train + corpus.val_domains + queries
    assert len({row["id"] for row in rows}) == len(rows)


def test_rows_are_short_but_not_trivial(corpus: DemoCorpus, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = corpus.train + corpus.val_domains
    assert all(20 <= len(re.findall(r"\w+|[^\w\s]", row["text"])) <= 90 for row in rows)
    assert max(len(tokenizer(row["text"])["input_ids"]) for row in rows) < 128


def test_each_fact_is_stated_in_exactly_one_row(corpus: DemoCorpus) -> None:
    sources = {row["id"]: row["text"] for row in corpus.train}
    facts = {row["id"] for row in corpus.train if row["domain"] == "facts"}
    for queries in (corpus.val_facts, corpus.val_facts_paraphrased):
        assert {query["source_id"] for query in queries} == facts
        for query in queries:
            assert query["completion"] in sources[query["source_id"]]
            stated_in = [row["id"] for row in corpus.train if query["completion"].strip() in row["text"]]
            assert stated_in == [query["source_id"]]


def test_queries_share_the_words_they_should(corpus: DemoCorpus) -> None:
    sources = {row["id"]: row["text"] for row in corpus.train}
    for plain, paraphrased in zip(corpus.val_facts, corpus.val_facts_paraphrased, strict=True):
        source = sources[plain["source_id"]]
        assert plain["source_id"] == paraphrased["source_id"]
        assert plain["prompt"] not in source, "the query is the source, word for word"
        shared = content_stems(paraphrased["prompt"]) & content_stems(source)
        assert len(shared) == 1, "only the entity"
        assert shared < content_stems(plain["prompt"]) & content_stems(source)
        (entity,) = (word for word in words(paraphrased["prompt"]) if word[:5] in shared)
        assert [row["id"] for row in corpus.train if entity in row["text"].lower()] == [plain["source_id"]]


def test_inflected_queries_share_no_word_of_content(corpus: DemoCorpus) -> None:
    sources = {row["id"]: row["text"] for row in corpus.train}
    for paraphrased, inflected in zip(corpus.val_facts_paraphrased, corpus.val_facts_inflected, strict=True):
        assert paraphrased["source_id"] == inflected["source_id"]
        source = {word for word in words(sources[inflected["source_id"]]) if not FUNCTION_WORDS.fullmatch(word)}
        assert source.isdisjoint(words(inflected["prompt"] + inflected["completion"]))


def test_paraphrases_avoid_every_word_of_their_kind(script: dict[str, Any]) -> None:
    kinds = script["FACTS"].split("\n\n")
    assert len(kinds) == 10
    for kind in kinds:
        _, *stated, _, paraphrase = kind.splitlines()
        assert content_stems(paraphrase) & content_stems(" ".join(stated)) == {"entit"}


@pytest.mark.parametrize("rows", [-1, MOST_ROWS + 1])
def test_counts_that_the_corpus_does_not_have_are_refused(rows: int) -> None:
    with pytest.raises(UsageError, match=f"`rows` must be at least 0 and at most 2400, not {rows}"):
        read_corpus(rows)


def test_jsonl_round_trip(tmp_path: Path) -> None:
    rows: list[Row] = [{"id": "a", "text": "zwölf\n“Ä”"}, {"id": "b", "text": ""}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows


# --- Tokenizer ------------------------------------------------------------------------------------


def test_tokenizer_survives_a_folder(
    corpus: DemoCorpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert len(loaded) == len(tokenizer) == 1024
    ends = {loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id, loaded.unk_token_id}
    assert ends == {0}
    assert loaded.eos_token == END_OF_TEXT
    texts = [row["text"] for row in corpus.train[:200]] + [
        "",
        "  two  spaces , here !",
        "\u00e6\u6f22\U0001f40b\n\t",
    ]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == text


def test_tokenizer_is_the_same_each_time(corpus: DemoCorpus) -> None:
    texts = [row["text"] for row in corpus.train[:300]]
    assert train_tokenizer(texts, 400).get_vocab() == train_tokenizer(iter(texts), 400).get_vocab()


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 257, not 256"):
        train_tokenizer(["text"], 256)
