"""A session: the answers of ``ghoststore.query``, bit for bit, with the model loaded once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.checkpoint import load
from ghoststore.errors import MismatchError, UsageError
from ghoststore.store import Store
from tests.support.notes import Notes
from tests.support.parts import unbuild, vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

PROJECTION = ProjectionConfig(precondition="none", rank_total=16)


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one part of 40 rows in spans of 16."""
    folder = tmp_path_factory.mktemp("session")
    data = lab.write(folder / "train.jsonl", lab.sample_rows(40, 1))
    settings: dict[str, Any] = {"checkpoint": lab.checkpoint, "span_rows": 16, "device": "cpu"}
    ghoststore.build(data=data, store=folder / "store", name="part", projection=PROJECTION, **settings)
    return folder / "store"


@pytest.fixture(scope="module")
def model(lab: Lab) -> Any:
    return AutoModelForCausalLM.from_pretrained(lab.checkpoint)


@pytest.fixture(scope="module")
def tokenizer(lab: Lab) -> Any:
    return AutoTokenizer.from_pretrained(lab.checkpoint)


@pytest.fixture(scope="module")
def session(store: Path) -> Iterator[ghoststore.Session]:
    with ghoststore.open(store) as session:
        session.query(["another question"])
        yield session


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are loaded."""
    loaded: list[str] = []
    real = load.refuse_lookahead
    monkeypatch.setattr(load, "refuse_lookahead", lambda model, where: (loaded.append(str(where)), real(model, where)))
    return loaded


def rows(count: int, seed: int = 3) -> list[dict[str, Any]]:
    from tests.conftest import sample_rows

    return sample_rows(count, seed)


QUESTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "each": {"each": True, "top_k": 3, "bottom_k": 2},
    "dot of some layers": {"metric": "dot", "layers": ["attn"]},
    "where": {"where": "domain = 'sky'", "top_k": 100},
    "groups": {"group_field": "domain", "combine": "rank-fusion"},
    "preconditioned": {"precondition": "second-moment", "metric": "dot"},
    "reranked": {"rerank": 20, "top_k": 4, "text": False},
    "reranked by vectors": {"rerank": 20, "rerank_with": "vectors", "top_k": 4},
    "tokens": {"tokens": True, "top_k": 2},
    "lexical": {"lexical": 0.5},
    "minus": {"minus": rows(2, 9), "metric": "dot"},
    "mean once more": {},
}


def test_one_model_for_many_questions(lab: Lab, store: Path, tmp_path: Path, loads: list[str]) -> None:
    """Rows in a file and in memory have the same answer, but for what the val set is called."""
    val = lab.write(tmp_path / "val.jsonl", rows(4))
    with ghoststore.open(store) as session:
        assert not loads
        answers = [session.query(source).to_json() for source in (val, rows(4))]
    assert len(loads) == 1
    assert [answer["settings"].pop("val_set") for answer in answers] == [str(val), "4 rows in memory"]
    assert answers[0] == answers[1]
    assert answers[0]["results"][0]["hits"][0]["text"] is not None


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", QUESTIONS)
def test_answers_are_those_of_query(store: Path, session: ghoststore.Session, name: str) -> None:
    """To the bit, with all settings. The session has answered other questions before."""
    options = QUESTIONS[name]
    assert (
        session.query(rows(4), **options).to_json()
        == ghoststore.query(store=store, val_set=rows(4), **options).to_json()
    )


def test_a_pattern_alone_is_a_list_of_one(session: ghoststore.Session) -> None:
    one, several = (session.query(rows(4), metric="dot", layers=layers) for layers in ("attn", ["attn"]))
    assert one.to_json() == several.to_json()
    with pytest.raises(UsageError, match="layer pattern 'nope' matches no layer"):
        session.query(rows(4), exclude_layers="nope")


def test_a_loaded_model_answers_as_its_folder(lab: Lab, store: Path, model: Any, tokenizer: Any) -> None:
    """Its part was built from the folder."""
    there = ghoststore.query(store=store, val_set=rows(4), checkpoint=lab.checkpoint).to_json()
    with ghoststore.open(store, checkpoint=model, tokenizer=tokenizer) as session:
        here = session.query(rows(4)).to_json()
        assert repr(session) == f"<ghoststore session of part 'part' in {store}, model on cpu>"
    assert here["settings"]["checkpoint"] == "the GPT2LMHeadModel in memory"
    for answer in (here, there):
        answer["settings"]["checkpoint"] = None
    assert here == there


def test_changed_weights_are_refused(lab: Lab, store: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint)
    with ghoststore.open(store, checkpoint=model, tokenizer=tokenizer) as session:
        session.query(["a text"])
        with torch.no_grad():
            model.transformer.wte.weight.mul_(1.5)
        with pytest.raises(MismatchError, match="have changed since the session was opened"):
            session.query(["a text"])
    with (
        ghoststore.open(store, checkpoint=model, tokenizer=tokenizer) as session,
        pytest.raises(MismatchError, match=r"other weights than those in the GPT2LMHeadModel in memory \(float32\)"),
    ):
        session.query(["a text"])


def test_rows_that_are_committed_meanwhile_are_seen(lab: Lab, store: Path, tmp_path: Path) -> None:
    ghoststore.copy(store, part="part", to_store=str(tmp_path / "copy"))
    part = Store.open(tmp_path / "copy").part()
    put_back = unbuild(part, 1, 2)
    notes = Notes()
    with ghoststore.open(tmp_path / "copy", checkpoint=lab.checkpoint, progress=notes) as session:
        assert (len(session), len(session.query(rows(4), top_k=100, text=False)[0])) == (16, 16)
        put_back()
        whole = session.query(rows(4), top_k=100, text=False)
        assert (len(session), len(whole[0])) == (40, 40)
        reranked = session.query(rows(4), rerank=40, top_k=40)  # the model reads rows that were not there
    assert whole.results == ghoststore.query(store=store, val_set=rows(4), top_k=100, text=False).results
    assert reranked.results == ghoststore.query(store=store, val_set=rows(4), rerank=40, top_k=40).results


@pytest.mark.slow
def test_a_part_that_took_its_place_is_refused(lab: Lab, store: Path, tmp_path: Path) -> None:
    place = tmp_path / "store"
    settings: dict[str, Any] = {"checkpoint": lab.checkpoint, "store": place, "name": "part", "device": "cpu"}
    ghoststore.build(data=["one text", "another text"], projection=PROJECTION, **settings)
    with ghoststore.open(place) as session:
        session.query(["one"])
        ghoststore.remove(place, part="part")
        ghoststore.build(data=["one text", "a third text"], projection=PROJECTION, **settings)
        with pytest.raises(MismatchError, match="was removed, and built anew"):
            session.query(["one"])


def test_vectors(store: Path) -> None:
    part = Store.open(store).part()
    with ghoststore.open(store) as session:
        every, some = session.vectors(), session.vectors(where="domain = 'sky'")
        with pytest.raises(UsageError, match="nothing"):
            session.vectors(where="nothing = 3")
    assert np.array_equal(np.asarray(every), vectors_of(part))
    assert every.rows.tolist() == list(range(40))
    assert every.ids == part.read_rows("sample_id", range(40))
    assert some.rows.tolist() == list(range(0, 40, 2))
    assert torch.equal(some.to_torch(), every.to_torch()[::2])
    assert some.to_numpy().dtype == np.float32
    assert (len(some), repr(some)) == (20, f"<vectors of 20 rows, {part.layout.dimension} numbers each>")


@pytest.mark.slow
def test_questions_of_threads_wait_for_each_other(store: Path) -> None:
    answers: dict[int, Any] = {}
    with ghoststore.open(store) as session:
        alone = [session.query(rows(3, seed), text=False).to_json() for seed in range(4)]

        def ask(seed: int) -> None:
            answers[seed] = session.query(rows(3, seed), text=False).to_json()

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [answers[seed] for seed in range(4)] == alone


def test_what_a_session_refuses(store: Path) -> None:
    with pytest.raises(UsageError, match="has no part 'other'; it has: part"):
        ghoststore.open(store, part="other")
    with ghoststore.open(str(store)) as session:
        with pytest.raises(UsageError, match=r"`checkpoint` is an option of the session: give it to `ghoststore.open`"):
            session.query(["a"], checkpoint="x")
        with pytest.raises(UsageError, match="`run` is not about one part"):
            session.query(["a"], run="x")
        with pytest.raises(TypeError, match=r"query\(\) has no keyword 'topk'; the nearest is 'top_k'"):
            session.query(["a"], topk=3)
        with pytest.raises(UsageError, match="`metric` 'l2' is unknown"):
            session.query(["a"], metric="l2")
        with pytest.raises(UsageError, match="is the val set itself"):
            session.query(["a"], minus=["a"])
        assert "part" in session._repr_html_()
        assert bool(session)
    assert "closed" in repr(session)
    with pytest.raises(UsageError, match="this session is closed"):
        session.query(["a"])


def test_a_text_that_is_not_in_a_list(store: Path, tmp_path: Path) -> None:
    """It is taken for a path, and the error says how to give it."""
    with ghoststore.open(store) as session, pytest.raises(UsageError, match=r"a text in memory is given in a list"):
        session.query("how do clouds form")
