"""A token that the model's embedding has no row for: refused before any work, with row, id and both sizes.

The tokenizer may have more tokens than the embedding has rows, as long as no row uses one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoModelForCausalLM

import ghoststore
from ghoststore.checkpoint.load import load_tokenizer
from ghoststore.corpus import Sample
from ghoststore.errors import UsageError
from ghoststore.store import Store
from indexer.encode.tokens import Tokenizer, TokenSettings, embedding_rows, rows_of

if TYPE_CHECKING:
    from tests.conftest import Lab, Outcome

NEW = "<new>"
ROW = 17
"""Of the corpus, and of the val set: the one that has the new token."""


@dataclass(frozen=True)
class Case:
    """A checkpoint whose tokenizer has one token more than the embedding has rows, and corpora with and without it."""

    checkpoint: Path
    embedding: int
    sound: Path
    bad: Path
    late: Path
    """The new token stands where a row is cut."""
    store: Path
    """Of the sound corpus."""

    def refused(self, outcome: Outcome, *, of_part: bool = False) -> None:
        assert (outcome.code, outcome.out) == (2, ""), f"{outcome.code}: {outcome.out}{outcome.err}"
        assert "Traceback" not in outcome.err
        size = self.embedding
        expected = rf"'row-{ROW}' \(row {ROW}\) has the token {size} \('{NEW}'\).* {size} rows.* up to {size}\b"
        assert re.search(expected, outcome.err), outcome.err
        if of_part:  # where no other tokenizer can be given
            assert "Leave this row out of the val set" in outcome.err
            assert "--tokenizer" not in outcome.err
        else:
            assert f"resize_token_embeddings({size + 1})" in outcome.err
            assert "(--tokenizer)" in outcome.err


@pytest.fixture(scope="module")
def case(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("beyond")

    def add(model: Any, tokenizer: Any) -> None:
        assert tokenizer.add_tokens([NEW]) == 1

    checkpoint = lab.model(folder / "model", change=add)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    embedding = model.get_input_embeddings().num_embeddings
    assert load_tokenizer(checkpoint).convert_tokens_to_ids(NEW) == embedding
    bad = [{**row, "text": f"{row['text']} {NEW}"} if at == ROW else row for at, row in enumerate(lab.rows)]
    late = [{**row, "text": "the cat " * 20 + NEW} if at == ROW else row for at, row in enumerate(lab.rows)]
    files = {
        name: lab.write(folder / f"{name}.jsonl", rows)
        for name, rows in (("sound", lab.rows), ("bad", bad), ("late", late))
    }
    store = folder / "store"
    outcome = lab.build(store, "--checkpoint", checkpoint, "--data", files["sound"])
    assert outcome.code == 0, outcome.err
    return Case(checkpoint=checkpoint, embedding=embedding, store=store, **files)


@pytest.mark.thin(2)
@pytest.mark.parametrize("options", [[], ["--proj-precondition", "none"], ["--overlong", "window"], ["--dry-run"]])
def test_build(case: Case, lab: Lab, options: list[str], tmp_path: Path) -> None:
    store = tmp_path / "store"
    case.refused(lab.build(store, "--checkpoint", case.checkpoint, "--data", case.bad, *options))
    assert not store.exists()


@pytest.mark.slow
def test_build_from_token_shards(case: Case, lab: Lab, tmp_path: Path) -> None:
    shards, store = tmp_path / "shards", tmp_path / "store"
    made = lab.run("tokenize", "--data", case.bad, "--tokenizer", case.checkpoint, "--out", shards)
    assert made.code == 0, made.err
    case.refused(lab.build(store, "--checkpoint", case.checkpoint, "--data", shards))
    assert not store.exists()
    first = lab.build(store, "--checkpoint", case.checkpoint, "--data", shards, "--max-samples", str(ROW))
    assert first.code == 0, first.err


@pytest.mark.slow
def test_a_token_that_is_cut_off_harms_nothing(case: Case, lab: Lab, tmp_path: Path) -> None:
    built = lab.build(tmp_path / "store", "--checkpoint", case.checkpoint, "--data", case.late)
    assert built.code == 0, built.err
    assert Store.open(tmp_path / "store").part("part").complete
    whole = lab.build(tmp_path / "other", "--checkpoint", case.checkpoint, "--data", case.late, "--overlong", "window")
    case.refused(whole)


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    "words",
    [
        ["query"],
        ["query", "--each"],
        ["select", "--fraction", "0.5", "--out", "{out}"],
        ["fidelity", "--rows", "11", "--val-samples", "1"],  # another row than the bad one is drawn
        ["plot-error", "--rows", "11", "--val-samples", "1", "--out", "{out}.png"],
        ["evaluate", "--out", "{out}"],
    ],
)
def test_questions(case: Case, lab: Lab, words: list[str], tmp_path: Path) -> None:
    """The val set has the token; the part was built soundly."""
    given = [word.format(out=tmp_path / "out") for word in words]
    case.refused(lab.run(*given, "--store", case.store, "--val-set", case.bad, "--quiet"), of_part=True)
    assert not (tmp_path / "out").exists(), "nothing was done"
    sound = lab.run("query", "--store", case.store, "--val-set", case.sound, "--quiet")
    assert sound.code == 0, sound.err


def test_full_gradients_and_doctor(case: Case, lab: Lab, tmp_path: Path) -> None:
    given = ["--checkpoint", case.checkpoint, "--data", case.bad, "--quiet"]
    case.refused(lab.run("full-gradients", *given, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    case.refused(lab.run("doctor", *given))


@pytest.mark.thin(1)
@pytest.mark.parametrize("place", ["data", "shards", "val-set"])
def test_train(case: Case, lab: Lab, place: str, tmp_path: Path) -> None:
    data = case.sound if place == "val-set" else case.bad
    if place == "shards":
        data = tmp_path / "shards"
        made = lab.run("tokenize", "--data", case.bad, "--tokenizer", case.checkpoint, "--out", data)
        assert made.code == 0, made.err
    val = case.bad if place == "val-set" else case.sound
    out, store = tmp_path / "out", tmp_path / "store"
    outcome = lab.run(
        "train",
        "--checkpoint",
        case.checkpoint,
        "--data",
        data,
        "--val-set",
        val,
        "--store",
        store,
        "--output-dir",
        out,
        "--max-steps",
        "2",
        "--quiet",
    )
    case.refused(outcome)
    assert not store.exists()
    assert not list(out.glob("checkpoint-*"))


def test_train_where_no_row_uses_the_token(case: Case, tmp_path: Path) -> None:
    for data in (case.sound, case.late):
        report = ghoststore.train(
            checkpoint=case.checkpoint,
            data=data,
            output_dir=tmp_path / data.stem,
            method="Regular",
            max_steps=1,
            overlong="truncate",
            batch_size=2,
            device="cpu",
        )
        assert report.steps == 1


def test_tokens_that_a_row_has_are_compared_with_the_embedding(case: Case) -> None:
    model = AutoModelForCausalLM.from_pretrained(case.checkpoint)
    tokenizer = Tokenizer(load_tokenizer(case.checkpoint), vocabulary=embedding_rows(model))
    assert (tokenizer.vocabulary, tokenizer.size, tokenizer.exceeds) == (case.embedding, case.embedding + 1, True)
    settings = TokenSettings(max_length=32)
    sample = Sample(4, "four", None, f"the {NEW} cat", -1, 0)
    with pytest.raises(UsageError, match=r"'four' \(row 4\) has the token"):
        list(rows_of([sample], tokenizer, settings))
    model.resize_token_embeddings(tokenizer.size)
    enough = Tokenizer(tokenizer.tokenizer, vocabulary=embedding_rows(model))
    assert not enough.exceeds
    ((row,),) = enough.rows([sample], settings)
    # A row that is never given to the model may have any token.
    (unused,) = rows_of([Sample(0, "0", None, NEW, -1, 0)], tokenizer, settings)
    assert case.embedding in row.tokens
    assert not unused.status.usable
