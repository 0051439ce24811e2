"""The demo's corpus keeps its promises, its tokenizer survives a folder."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from ghoststore.errors import UsageError
from query.demo.corpus import (
    DOMAINS,
    FACT_KINDS,
    FACTS_PER_KIND,
    DemoCorpus,
    FactKind,
    Row,
    make_corpus,
    write_jsonl,
)
from query.demo.tokenizer import END_OF_TEXT, train_tokenizer

# Words that carry no content: a query and its source may share them.
FUNCTION_WORDS = re.compile(
    r"\b(a|an|the|of|at|in|on|by|to|from|for|with|and|or|whose|who|that|which|is|was|are|were|be|it|its|she"
    r"|her|his|their|as|into|under|one|after|each)\b"
)


@pytest.fixture(scope="module")
def corpus() -> DemoCorpus:
    return make_corpus(0)


@pytest.fixture(scope="module")
def tokenizer(corpus: DemoCorpus) -> PreTrainedTokenizerFast:
    return train_tokenizer(row["text"] for row in corpus.train)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def content_stems(text: str) -> set[str]:
    """The first five letters of each word that carries content: inflections count as the same word."""
    return {word[:5] for word in words(text) if not FUNCTION_WORDS.fullmatch(word)}


# --- Corpus ---------------------------------------------------------------------------------------


def test_the_corpus_follows_from_the_seed(corpus: DemoCorpus) -> None:
    assert make_corpus(0) == corpus
    other = make_corpus(1)
    assert {row["text"] for row in other.train if row["domain"] == "facts"}.isdisjoint(
        row["text"] for row in corpus.train
    )
    assert other.train != corpus.train


def test_counts_and_fields(corpus: DemoCorpus) -> None:
    facts = len(FACT_KINDS) * FACTS_PER_KIND
    assert Counter(row["domain"] for row in corpus.train) == dict.fromkeys(DOMAINS, 600) | {"facts": facts}
    assert Counter(row["domain"] for row in corpus.val_domains) == dict.fromkeys(DOMAINS, 16)
    sets = (corpus.val_facts, corpus.val_facts_paraphrased, corpus.val_facts_inflected)
    assert {len(queries) for queries in sets} == {facts}
    assert all(row.keys() == {"id", "text", "domain"} for row in corpus.train + corpus.val_domains)
    queries = [query for queries in sets for query in queries]
    assert all(row.keys() == {"id", "prompt", "completion", "domain", "source_id"} for row in queries)
    domains = [row["domain"] for row in corpus.train]
    assert domains != sorted(domains, key=domains.index), "the rows are not shuffled"


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_row_counts_that_do_not_divide(rows: int) -> None:
    made = make_corpus(0, rows, rows_per_domain=0)
    ordinary = Counter(row["domain"] for row in made.train if row["domain"] != "facts")
    assert ordinary.total() == rows
    assert max(ordinary.values(), default=0) <= rows // len(DOMAINS) + 1
    assert made.val_domains == []


@pytest.mark.parametrize("seed", range(3))
def test_no_text_and_no_id_comes_twice(seed: int) -> None:
    made = make_corpus(seed)
    texts = [row["text"] for row in made.train + made.val_domains]
    assert len(set(texts)) == len(texts)
    everything = made.train + made.val_domains + made.val_facts + made.val_facts_paraphrased + made.val_facts_inflected
    assert len({row["id"] for row in everything}) == len(everything)


def test_rows_are_short_but_not_trivial(corpus: DemoCorpus, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = corpus.train + corpus.val_domains
    assert all(20 <= len(re.findall(r"\w+|[^\w\s]", row["text"])) <= 90 for row in rows)
    assert max(len(tokenizer(row["text"])["input_ids"]) for row in rows) < 128


@pytest.mark.parametrize("seed", range(3))
def test_each_fact_is_stated_in_exactly_one_row(seed: int) -> None:
    made = make_corpus(seed)
    sources = {row["id"]: row["text"] for row in made.train}
    facts = {row["id"] for row in made.train if row["domain"] == "facts"}
    for queries in (made.val_facts, made.val_facts_paraphrased):
        assert {query["source_id"] for query in queries} == facts
        for query in queries:
            assert query["completion"] in sources[query["source_id"]]
            stated_in = [row["id"] for row in made.train if query["completion"].strip() in row["text"]]
            assert stated_in == [query["source_id"]]


@pytest.mark.parametrize("seed", range(3))
def test_queries_share_the_words_they_should(seed: int) -> None:
    made = make_corpus(seed)
    sources = {row["id"]: row["text"] for row in made.train}
    for plain, paraphrased in zip(made.val_facts, made.val_facts_paraphrased, strict=True):
        source = sources[plain["source_id"]]
        assert plain["source_id"] == paraphrased["source_id"]
        assert plain["prompt"] not in source, "the query is the source, word for word"
        shared = content_stems(paraphrased["prompt"]) & content_stems(source)
        assert len(shared) == 1, "only the entity"
        assert shared < content_stems(plain["prompt"]) & content_stems(source)
        (entity,) = (word for word in words(paraphrased["prompt"]) if word[:5] in shared)
        assert [row["id"] for row in made.train if entity in row["text"].lower()] == [plain["source_id"]]


@pytest.mark.parametrize("seed", range(3))
def test_inflected_queries_share_no_word_of_content(seed: int) -> None:
    made = make_corpus(seed)
    sources = {row["id"]: row["text"] for row in made.train}
    for paraphrased, inflected in zip(made.val_facts_paraphrased, made.val_facts_inflected, strict=True):
        assert paraphrased["source_id"] == inflected["source_id"]
        source = {word for word in words(sources[inflected["source_id"]]) if not FUNCTION_WORDS.fullmatch(word)}
        assert source.isdisjoint(words(inflected["prompt"] + inflected["completion"]))


@pytest.mark.parametrize("kind", FACT_KINDS, ids=lambda kind: kind.paraphrase.split()[-1])
def test_paraphrases_avoid_every_word_of_their_kind(kind: FactKind) -> None:
    stated = content_stems(" ".join([kind.statement, *kind.details]))
    assert content_stems(kind.paraphrase) & stated == {"entit"}


def test_counts_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(UsageError, match="rows=-1"):
        make_corpus(0, -1)


def test_templates_that_run_dry_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DOMAINS, "recipe", lambda rng: "boil an egg")
    with pytest.raises(UsageError, match=r"'recipe': 2 different rows asked for, its templates gave 1"):
        make_corpus(0, 8, rows_per_domain=0)


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
    with pytest.raises(UsageError, match="at least 257; found 256"):
        train_tokenizer(["text"], 256)
