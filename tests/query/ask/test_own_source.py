"""A store from elsewhere names a checkpoint and a corpus: nothing is fetched or opened because it says so."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ghoststore.store import Store
from ghoststore.store.base.own import is_own, own_folder
from tests.support.bounded import refused, reseal, run_bounded

if TYPE_CHECKING:
    from tests.conftest import Lab, Outcome


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    """The store of a part, moved."""
    return Path(shutil.copytree(built, tmp_path / "moved"))


def name_in(store: Path, **source: Any) -> None:
    """What somebody else may write into a manifest."""
    reseal(store / "parts/part", lambda attributes: attributes["manifest"]["source"].update(source))


def query(lab: Lab, store: Path, *words: str | Path) -> Outcome:
    return run_bounded(lab, "query", "--store", store, "--val-set", lab.corpus, "--json", "--quiet", *words)


def texts(outcome: Outcome) -> list[str | None]:
    assert outcome.code == 0, outcome.err
    return [hit["text"] for hit in outcome.json["results"][0]["hits"]]


def test_ones_own_store_needs_no_words_wherever_it_is_moved(lab: Lab, store: Path) -> None:
    assert all(texts(query(lab, store)))


@pytest.mark.thin(1)
@pytest.mark.parametrize("checkpoint", ["org/model", "gpt2", "relative/model", "/etc", "a\0b", "\ud800", "m" * 5000])
def test_a_checkpoint_that_a_manifest_names(lab: Lab, store: Path, checkpoint: str) -> None:
    name_in(store, checkpoint=checkpoint)
    outcome = query(lab, store)
    refused(outcome, "part 'part' names", "as its checkpoint", "--checkpoint", codes=(2,))
    assert "hub does not give" not in outcome.err
    assert texts(query(lab, store, "--checkpoint", lab.checkpoint)) == [None] * 10


@pytest.mark.thin(1)
@pytest.mark.parametrize("data", ["org/data:train", "data.jsonl", "/etc/hostname"])
def test_a_corpus_that_a_manifest_names(lab: Lab, store: Path, data: str) -> None:
    name_in(store, data=data)
    outcome = query(lab, store, "--checkpoint", lab.checkpoint)
    assert texts(outcome) == [None] * 10
    assert "texts are not shown: part 'part' names" in outcome.err
    assert f"--data {data}" in outcome.err
    assert all(texts(query(lab, store, "--checkpoint", lab.checkpoint, "--data", lab.corpus)))


@pytest.mark.slow
def test_a_tokenizer_that_a_manifest_names(lab: Lab, store: Path) -> None:
    """It is looked for beside the checkpoint, and compared anyway; or the user names it."""
    name_in(store, tokenizer="org/tokenizer")
    assert len(texts(query(lab, store, "--checkpoint", lab.checkpoint))) == 10
    assert len(texts(query(lab, store, "--checkpoint", lab.checkpoint, "--tokenizer", lab.checkpoint))) == 10


def test_a_pipe_that_a_manifest_names(lab: Lab, store: Path, tmp_path: Path) -> None:
    """Opening it would wait without end."""
    (tmp_path / "model").mkdir()
    for name in ("model/config.json", "corpus.jsonl"):
        os.mkfifo(tmp_path / name)
    name_in(store, checkpoint=str(tmp_path / "model"), data=str(tmp_path / "corpus.jsonl"))
    refused(query(lab, store), "--checkpoint", codes=(2,))
    assert texts(query(lab, store, "--checkpoint", lab.checkpoint)) == [None] * 10
    refused(query(lab, store, "--checkpoint", tmp_path / "model"), "config.json", codes=(2,))


def test_select_names_the_option(lab: Lab, store: Path, tmp_path: Path) -> None:
    name_in(store, data="org/data:train")
    words = ["select", "--store", store, "--val-set", lab.corpus, "--checkpoint", lab.checkpoint, "--count", "3"]
    refused(run_bounded(lab, *words, "--out", tmp_path / "a.jsonl"), "--data org/data:train", codes=(2,))
    outcome = run_bounded(lab, *words, "--data", lab.corpus, "--leaks", "keep", "--out", tmp_path / "b.jsonl")
    assert outcome.code == 0, outcome.err
    assert len((tmp_path / "b.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_going_on_with_a_store_from_elsewhere_does_not_make_it_ones_own(lab: Lab, store: Path, tmp_path: Path) -> None:
    name_in(store, checkpoint="/etc/somebody")
    outcome = lab.build(store)
    assert outcome.code == 0, outcome.err
    refused(query(lab, store), "as its checkpoint", codes=(2,))
    assert not is_own(Store.open(store).part().manifest)


def test_the_same_command_again_makes_it_ones_own(lab: Lab, store: Path) -> None:
    """As it does for a store that was built before this was remembered, or where it could not be."""
    assert is_own(Store.open(store).part().manifest)
    held = {path: path.read_text() for path in own_folder().iterdir()}
    for path in held:
        path.unlink()
    try:
        refused(query(lab, store), "no build of yours on this machine", codes=(2,))
        assert lab.build(store).code == 0
        assert all(texts(query(lab, store)))
    finally:
        for path, text in held.items():
            path.write_text(text)


@pytest.mark.thin(1)
@pytest.mark.parametrize("state", ["/proc/none", "file"])
def test_where_nothing_can_be_remembered(lab: Lab, tmp_path: Path, state: str) -> None:
    """A home that cannot be written: the build says so, and the query asks for the path."""
    (tmp_path / "file").write_text("")
    place = state if state.startswith("/") else str(tmp_path / state)
    words = ["build", "--checkpoint", lab.checkpoint, "--data", lab.corpus, "--store", tmp_path / "store", "--quiet"]
    code = "import os; os.environ['XDG_STATE_HOME'] = {!r}; import ghoststore.cli; ghoststore.cli.main({!r})"
    outcome = lab.run(code=code.format(place, [str(word) for word in words]))
    assert outcome.code == 0, outcome.err
    assert "cannot be remembered" in outcome.err
    asked = ["query", "--store", str(tmp_path / "store"), "--val-set", str(lab.corpus), "--quiet"]
    outcome = lab.run(code=code.format(place, asked))
    refused(outcome, f"--checkpoint {lab.checkpoint}", codes=(2,))
