"""The demo's corpus keeps its promises, its tokenizer survives a folder, its training loop learns."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from ghoststore.errors import CorpusError, UsageError
from ghoststore.showcase.corpus import (
    DOMAINS,
    FACT_KINDS,
    FACTS_PER_KIND,
    DemoCorpus,
    FactKind,
    Row,
    make_corpus,
    write_jsonl,
)
from ghoststore.showcase.tokenizer import END_OF_TEXT, train_tokenizer
from ghoststore.showcase.training import IGNORED, StepReport, _pad, save_checkpoint, train_model

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


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> GPT2Config:
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_layer=2,
        n_embd=32,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


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
    assert len(corpus.val_facts) == len(corpus.val_facts_paraphrased) == facts
    assert all(row.keys() == {"id", "text", "domain"} for row in corpus.train + corpus.val_domains)
    queries = corpus.val_facts + corpus.val_facts_paraphrased
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
    everything = made.train + made.val_domains + made.val_facts + made.val_facts_paraphrased
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


# --- Training -------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_can_be_repeated(
    corpus: DemoCorpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def train(seed: int) -> tuple[GPT2LMHeadModel, list[StepReport]]:
        reports: list[StepReport] = []
        model = train_model(
            corpus.train[:64],
            tokenizer,
            steps=20,
            batch_size=8,
            seed=seed,
            max_length=48,
            config=tiny_config(tokenizer),
            on_step=reports.append,
        )
        return model, reports

    before = torch.random.get_rng_state()
    model, reports = train(0)
    assert torch.equal(torch.random.get_rng_state(), before), "torch's own generator was moved"
    assert not model.training
    assert [report.step for report in reports] == list(range(1, 21))
    assert reports[-1].loss < reports[0].loss - 0.5
    assert reports[0].learning_rate == max(report.learning_rate for report in reports)

    again, reports_again = train(0)
    assert [r.loss for r in reports_again] == [r.loss for r in reports]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert train(1)[1][0].loss != reports[0].loss

    save_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", local_files_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert (tmp_path / "checkpoint" / "tokenizer.json").exists()
    assert (tmp_path / "checkpoint" / "model.safetensors").exists()


def test_the_model_learns_the_next_token_not_the_one_after(tokenizer: PreTrainedTokenizerFast) -> None:
    letters = tokenizer("abcd")["input_ids"]
    assert len(set(letters)) == 4, "each letter is its own token"
    rows = [{"id": str(i), "text": ("abcd" * 12)[i:]} for i in range(4)]
    model = train_model(rows, tokenizer, steps=60, batch_size=4, seed=0, max_length=40, config=tiny_config(tokenizer))
    input_ids_BT = torch.tensor([tokenizer(rows[0]["text"])["input_ids"][:32]])
    with torch.no_grad():
        predicted_T = model(input_ids=input_ids_BT).logits[0].argmax(-1)
    assert torch.equal(predicted_T[4:-1], input_ids_BT[0, 5:])
    assert not torch.equal(predicted_T[4:-2], input_ids_BT[0, 6:])


def test_padding_is_left_out_and_the_end_of_text_is_not() -> None:
    input_ids_BT, labels_BT, mask_BT = _pad([[5, 6, 0], [7, 0], [8, 9, 3, 0]], 0)
    assert input_ids_BT.tolist() == [[5, 6, 0, 0], [7, 0, 0, 0], [8, 9, 3, 0]]
    assert labels_BT.tolist() == [[5, 6, 0, IGNORED], [7, 0, IGNORED, IGNORED], [8, 9, 3, 0]]
    assert mask_BT.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rows": []}, CorpusError, "no rows"),
        ({"rows": [{"id": "x", "text": ""}]}, CorpusError, r"row 0 \(id 'x'\)"),
        ({"steps": 0}, UsageError, "found 0, 2 and 16"),
        ({"max_length": 65}, UsageError, "65 is more than the model's 64 positions"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tokenizer: PreTrainedTokenizerFast, changed: dict[str, object], error: type[Exception], message: str
) -> None:
    settings: dict[str, object] = {
        "rows": [{"id": "a", "text": "some text"}],
        "steps": 1,
        "batch_size": 2,
        "seed": 0,
        "max_length": 16,
        "config": tiny_config(tokenizer),
    }
    settings |= changed
    with pytest.raises(error, match=message):
        train_model(settings.pop("rows"), tokenizer, **settings)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is missing")
def test_a_missing_device_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="finds no CUDA device"):
        train_model([{"text": "a"}], tokenizer, steps=1, batch_size=1, seed=0, max_length=8, device="cuda")
