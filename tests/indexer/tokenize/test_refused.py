"""Refused: another tokenizer, corpus or settings, folders of something else, shards that are not all there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore.checkpoint.load import load_tokenizer
from ghoststore.corpus import Corpus, Fields
from ghoststore.errors import CorpusError, MismatchError, UsageError
from ghoststore.tokens.shards import TokenShards
from indexer.encode.tokens import Tokenizer
from tests.support.shards import tokenize

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_another_tokenizer_is_refused(lab: Lab, built: Path, folder: Path, tmp_path: Path) -> None:
    def other(model: Any, tokenizer: Any) -> None:
        tokenizer.add_tokens(["<other>"])

    checkpoint = lab.model(tmp_path / "model", change=other)
    theirs = TokenShards.open(folder).tokenizer_identity["fingerprint"]
    ours = Tokenizer(load_tokenizer(checkpoint)).identity["fingerprint"]
    outcome = lab.build(tmp_path / "store", "--checkpoint", checkpoint, "--data", folder)
    assert outcome.code == 3, outcome.err
    assert theirs in outcome.err
    assert ours in outcome.err
    assert "tokenizer.added_tokens.290: stored None, found {'content': '<other>'" in outcome.err
    assert not list(tmp_path.glob("store/parts/*/zarr.json"))
    ghoststore.tokenize(data=lab.corpus, tokenizer=checkpoint, out=tmp_path / "others")
    with pytest.raises(MismatchError, match=ours):
        ghoststore.query(store=built, val_set=tmp_path / "others", device="cpu")
    with pytest.raises(MismatchError, match=rf"tokenizer\.fingerprint: stored '{theirs}', asked for '{ours}'"):
        ghoststore.tokenize(data=lab.corpus, tokenizer=checkpoint, out=folder, shard_samples=5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"shard_samples": 4}, "storage.shard_samples: stored 5, asked for 4"),
        ({"max_samples": 20}, "corpus.max_samples: stored None, asked for 20"),
        ({"domains": ["sky"]}, r"corpus.only_domains: stored None, asked for \['sky'\]"),
        ({"fields": Fields(text="id")}, "corpus.fingerprint: stored"),
    ],
)
def test_other_settings_are_refused(lab: Lab, folder: Path, more: dict[str, Any], words: str) -> None:
    before = lab.tree(folder)
    with pytest.raises(MismatchError, match=words):
        tokenize(lab, lab.corpus, folder, **{"shard_samples": 5, **more})
    assert lab.tree(folder) == before


def test_another_corpus_is_refused(lab: Lab, folder: Path, tmp_path: Path) -> None:
    changed = lab.write(tmp_path / "changed.jsonl", [*lab.rows[:-1], {**lab.rows[-1], "text": "x"}])
    with pytest.raises(MismatchError, match=r"corpus\.fingerprint: stored .*, asked for"):
        tokenize(lab, changed, folder, shard_samples=5)


def test_nothing_to_do_changes_nothing(lab: Lab, whole: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    report = ghoststore.tokenize(data=lab.corpus, tokenizer=lab.checkpoint, out=whole, shard_samples=5)
    assert (report.resumed_samples, report.written_tokens) == (27, 0)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == stamps


def test_folders_of_something_else(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UsageError, match="holds no token shards; give a new folder"):
            tokenize(lab, lab.corpus, out)
    (tmp_path / "empty").mkdir()
    assert tokenize(lab, lab.corpus, tmp_path / "empty").samples == 27
    with pytest.raises(CorpusError, match=r"holds no token shards \(it has no shards\.json\)"):
        TokenShards.open(tmp_path)


def test_an_incomplete_folder_is_refused(lab: Lab, folder: Path) -> None:
    (folder / "commits/00000002.json").unlink()
    for opened in (TokenShards.open, lambda path: Corpus.open(str(path))):
        with pytest.raises(CorpusError, match=r"incomplete: 5 of 6 shards are there; run `ghoststore tokenize` again"):
            opened(folder)
