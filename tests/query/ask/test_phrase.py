"""`--phrase A:B`: ranking by some words of the val sample alone, against autograd of their loss; and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.corpus import Fields, open_corpus
from ghoststore.errors import UsageError
from ghoststore.progress import Silent
from ghoststore.store import Store
from query.ask.encoder import PartEncoder
from query.ask.phrase import Phrase
from tests.support.oracle import naive, relative_error
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

TEXT = "the old dog 𝔘 runs to the sea"
PAIR = {"prompt": "the old dog", "completion": " runs to the sea"}
ROWS = 20


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phrase")
    lab.write(folder / "train.jsonl", lab.sample_rows(ROWS, 1))
    for name, options in {
        "mean": {},
        "sum": {"loss_reduction": "sum"},
        "windows": {"max_length": 12, "overlong": "window"},
        "cut": {"max_length": 12, "overlong": "truncate"},
    }.items():
        ghoststore.build(
            checkpoint=lab.checkpoint,
            data=folder / "train.jsonl",
            store=folder / "store",
            name=name,
            projection=ProjectionConfig(precondition="none", rank_total=16),
            proj_dtype="float32",
            device="cpu",
            **{"max_length": 32, **options},
        )
    return folder / "store"


def ask(store: Path, part: str = "mean", val_set: Any = TEXT, **options: Any) -> ghoststore.QueryResult:
    rows = val_set if isinstance(val_set, list) else [{"text": val_set}]
    wanted = {"top_k": ROWS, "metric": "dot", "device": "cpu"} | options
    return ghoststore.query(store=store, part=part, val_set=rows, **wanted)


def span(text: str, words: str) -> str:
    start = text.index(words)
    return f"{start}:{start + len(words)}"


def by_hand(encoder: PartEncoder, row: dict[str, str], words: str, reduction: str) -> Tensor:
    """(1, D): the vector of the loss of ``words`` alone, by autograd in float64; tokens are found by their bytes."""
    text = row.get("text") or row["prompt"] + row["completion"]
    ids = encoder._tokenizer.tokenizer(text)["input_ids"]
    pieces = encoder._tokenizer.tokenizer.convert_ids_to_tokens(ids)
    start = len(text[: text.index(words)].encode())
    stop, read, inside = start + len(words.encode()), 0, []
    for piece in pieces:  # one character of a token of bytes stands for one byte
        inside.append(read < stop and read + len(piece) > start)
        read += len(piece)
    assert read == len(text.encode())

    def loss_of(model: nn.Module, _: int) -> Tensor:
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        losses = torch.stack([-log_p[t - 1, ids[t]] for t in range(1, len(ids)) if inside[t]])
        return losses.mean() if reduction == "mean" else losses.sum()

    return naive(encoder.model.double(), encoder._encoder.engine.projection, 1, loss_of).vectors


@pytest.mark.thin(4)
@pytest.mark.parametrize("part", ["mean", "sum"])
@pytest.mark.parametrize(
    ("row", "words"),
    [({"text": TEXT}, "dog"), ({"text": TEXT}, "𝔘"), ({"text": TEXT}, "runs to the"), (PAIR, "runs"), (PAIR, "sea")],
    ids=["word", "character of many tokens", "words", "completion", "end"],
)
def test_equals_autograd_of_the_phrase(store: Path, part: str, row: dict[str, str], words: str) -> None:
    text = row.get("text") or row["prompt"] + row["completion"]
    encoder = PartEncoder(Store.open(store).part(part), device="cpu")
    with open_corpus([row], Fields(), Silent()) as corpus:
        found = encoder.encode_val_set(corpus, "mean", None, span(text, words)).vectors
    expected = by_hand(encoder, row, words, part)
    assert relative_error(found, expected) < 1e-4
    answer = ask(store, part, [row], phrase=span(text, words))
    scores = {hit.source_row: hit.score for hit in answer[0]}
    products = vectors_of(encoder.part).astype(np.float64) @ expected[0].numpy()
    np.testing.assert_allclose([scores[row] for row in range(ROWS)], products, atol=1e-4 * np.abs(products).max())
    assert answer.settings["phrase"] == span(text, words)
    assert scores != {hit.source_row: hit.score for hit in ask(store, part, [row])[0]}


def test_the_whole_of_the_targets_is_the_question_itself(store: Path) -> None:
    targets = f"{len(PAIR['prompt'])}:{sum(map(len, PAIR.values()))}"
    assert ask(store, val_set=[PAIR], phrase=targets).results == ask(store, val_set=[PAIR]).results
    for options in ({"tokens": True}, {"rerank": ROWS}, {"each": True}):
        of_all, of_phrase = (ask(store, val_set=[PAIR], **options, **more)[0] for more in ({}, {"phrase": targets}))
        assert of_all == of_phrase
    spaces = f"{TEXT.index(' runs')}:{TEXT.index(' to')}"  # those at the ends are not asked for
    assert ask(store, phrase=spaces).results == ask(store, phrase=span(TEXT, "runs")).results


def test_stages_and_tokens_are_of_the_phrase_too(store: Path) -> None:
    """The scores of all three agree: of a float32 part they are the same gradients."""
    phrase = span(TEXT, "dog")
    hits = {hit.id: hit for hit in ask(store, phrase=phrase)[0]}
    size = max(abs(hit.score) for hit in hits.values())
    for hit in ask(store, phrase=phrase, rerank=ROWS, rerank_with="vectors", tokens=True)[0]:
        assert hit.score == pytest.approx(hits[hit.id].score, abs=1e-4 * size)
        assert hit.recomputed == pytest.approx(hits[hit.id].score, abs=1e-4 * size)
        assert hit.val_sample is not None
        assert hit.val_sample.score == pytest.approx(hit.recomputed, abs=1e-4 * size)
        after = [token.score for token in hit.val_sample.tokens if (token.start or 0) >= TEXT.index("dog") + 3]
        assert not any(after), "what comes after the phrase is not read for its loss"
    whole = {hit.id: hit.score for hit in ask(store, rerank=ROWS)[0]}
    assert whole != {hit.id: hit.score for hit in ask(store, rerank=ROWS, phrase=phrase)[0]}


def test_a_phrase_in_a_later_window(store: Path) -> None:
    words = "sea"
    assert ask(store, "windows", phrase=span(TEXT, words)).settings["val_rows"] == 1
    with pytest.raises(UsageError, match="not all of it are targets of one row"):
        ask(store, "windows", phrase=f"2:{len(TEXT)}")
    with pytest.raises(UsageError, match="what is cut off"):
        ask(store, "cut", phrase=span(TEXT, words))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"phrase": "dog"}, "expected A:B, the characters from A"),
    ({"phrase": "5:5"}, "expected A:B"),
    ({"phrase": "-5:-1"}, "expected A:B"),
    ({"phrase": "4:900"}, f"has {len(TEXT)} characters"),
    ({"phrase": "3:4"}, "nothing but spaces"),
    ({"phrase": "0:7"}, "its targets begin at character 1"),
    ({"phrase": "0:20", "val_set": [PAIR]}, "its targets begin at character 11"),
    ({"phrase": "4:7", "val_set": [{"text": TEXT}, {"text": TEXT}]}, "give a val set of one sample"),
    ({"phrase": "4:7", "lexical": 0.5}, "ranks by the words of whole val samples"),
    ({"phrase": "4:7", "group_field": "text"}, "`group_field` divides several"),
    ({"phrase": "4:7", "run": "r", "val_set": None}, "`phrase` is for a val set"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(store: Path, options: dict[str, Any], message: str) -> None:
    part = None if "run" in options else "mean"
    wanted = {"store": store, "part": part, "val_set": [{"text": TEXT}], "device": "cpu"} | options
    with pytest.raises(UsageError, match=message):
        ghoststore.query(**wanted)


def test_the_advice_works(store: Path) -> None:
    assert ask(store, phrase="1:7")[0]
    assert ask(store, val_set=[PAIR], phrase="11:20")[0]
    assert ask(store, val_set=[{"text": TEXT}] * 2, phrase="4:7", max_samples=1)[0]


def test_tokens_without_places_are_refused(store: Path) -> None:
    encoder = PartEncoder(Store.open(store).part("mean"), device="cpu")
    with open_corpus([{"text": TEXT}], Fields(), Silent()) as corpus:
        rows = list(encoder.rows(corpus.samples()))
    with pytest.raises(UsageError, match="give its words as `prompt` and `completion`"):
        Phrase(4, 7).rows(rows, lambda row: [("?", None, None)] * len(row.tokens))


def test_the_command_and_select(lab: Lab, store: Path, tmp_path: Path) -> None:
    val = lab.write(tmp_path / "val.jsonl", [{"text": TEXT}])
    words = ["--store", store, "--part", "mean", "--val-set", val, "--phrase", span(TEXT, "dog")]
    done = lab.run("query", *words, "--metric", "dot", "--top-k", ROWS, "--json")
    assert done.json["results"] == ask(store, phrase=span(TEXT, "dog")).to_json()["results"]
    out = tmp_path / "out.jsonl"
    report = lab.run("select", *words, "--metric", "dot", "--count", "3", "--out", out, "--json").json
    best = [hit.id for hit in ask(store, phrase=span(TEXT, "dog"), top_k=3)[0]]
    assert {json.loads(line)["id"] for line in out.read_text().splitlines()} == set(best)
    assert report["settings"]["phrase"] == span(TEXT, "dog")
