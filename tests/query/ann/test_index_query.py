"""``query --index ann``: the rows of exact search where recall is 1, and a refusal where an index cannot answer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.cli.query import print_hits
from ghoststore.errors import MismatchError, UsageError
from tests.support.parts import unbuild

if TYPE_CHECKING:
    from tests.conftest import Lab

ROWS = 300


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts of the same rows; the first has an index by either metric."""
    folder = tmp_path_factory.mktemp("index-query")
    data = lab.write(folder / "train.jsonl", lab.sample_rows(ROWS, 1))
    lab.write(folder / "val.jsonl", lab.sample_rows(5, 3))
    for name in ("one", "two"):
        ghoststore.build(
            checkpoint=lab.checkpoint,
            data=data,
            store=folder / "store",
            name=name,
            device="cpu",
            projection=ProjectionConfig(rank_total=16),
            span_rows=64,
        )
    for metric in ("cosine", "dot"):
        ghoststore.index(store=folder / "store", part="one", metric=metric, factory="Flat")
    return folder / "store"


def ask(store: Path, index: str, **settings: Any) -> Any:
    settings = {"part": "one", "top_k": 7, "bottom_k": 2, "device": "cpu"} | settings
    return ghoststore.query(store=store, val_set=store.parent / "val.jsonl", index=index, **settings)


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"each": True},
        {"metric": "cosine"},
        {"group_field": "domain"},
        {"metric": "dot", "layers": ["mlp"]},
        {"metric": "dot", "precondition": "second-moment"},
        {"rerank": 20},
    ],
    ids=str,
)
def test_the_rows_of_exact_search(store: Path, settings: dict[str, Any]) -> None:
    exact, found = ask(store, "exact", **settings), ask(store, "ann", **settings)
    assert found.settings["index"] == "ann"
    assert found.settings["factory"] == "Flat"
    assert found.settings["recall"]["row"]["at_10"] == 1.0
    assert exact.settings["index"] == "exact"
    for mine, theirs in zip(found.results, exact.results, strict=True):
        assert mine.query == theirs.query
        for one, other in ((mine.hits, theirs.hits), (mine.bottom, theirs.bottom)):
            assert [hit.id for hit in one] == [hit.id for hit in other]
            assert [hit.score for hit in one] == pytest.approx([hit.score for hit in other], rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"metric": "cosine", "layers": ["mlp"]}, UsageError, "ranks whole vectors"),
        ({"metric": "cosine", "precondition": "second-moment"}, UsageError, "knows no preconditioned lengths"),
        ({"part": ["one", "two"], "part_weights": "equal"}, UsageError, "summed over 2"),
        ({"part": ["two", "one"], "part_weights": "equal"}, UsageError, "summed over 2"),  # "two" has no index
        ({"group_field": "domain", "combine": "max"}, UsageError, "`combine=max` needs the scores of all rows"),
        ({"part": "two"}, UsageError, "no index"),
        ({"index_name": "other"}, UsageError, "no index 'other'"),
        ({"index_name": "cosine-Flat"}, MismatchError, "not dot"),
    ],
)
def test_refused(store: Path, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    """Before a model is looked for."""
    with pytest.raises(error, match=message):
        ask(store, "ann", checkpoint="nowhere", **settings)


def test_unknown_words(store: Path) -> None:
    with pytest.raises(UsageError, match="'fast' is unknown"):
        ask(store, "fast")
    with pytest.raises(UsageError, match="belongs to `index=ann`"):
        ask(store, "exact", index_name="cosine")


def test_more_rows_than_there_are(store: Path) -> None:
    exact, found = (ask(store, index, top_k=10 * ROWS) for index in ("exact", "ann"))
    assert [hit.id for hit in found.results[0].hits] == [hit.id for hit in exact.results[0].hits]
    assert len(found.results[0].hits) == ROWS


def test_as_many_rows_as_are_asked_for(
    lab: Lab, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lists that the index looks at hold fewer; what is said of its recall is for so many rows, too."""
    shutil.copy(store.parent / "val.jsonl", tmp_path)
    store = Path(shutil.copytree(store, tmp_path / "store"))
    made = ghoststore.index(store=store, part="two", factory="IVF40,Flat", target_recall=0.1).manifest
    assert made.effort == 1
    for rows, at in ((8, 10), (250, 100)):
        found = ask(store, "ann", part="two", top_k=rows, bottom_k=rows, each=True)
        for result in found.results:
            assert (len(result.hits), len(result.bottom)) == (rows, rows)
        print_hits(found)
        shown, recall = capsys.readouterr().out, found.settings["recall"]["row"][f"at_{at}"]
        assert f"its recall@{at} when it was built: {recall:.3f} for rows" in shown
        assert ("of so many it was not measured" in shown) == (rows > 100)
        assert "asked for" not in shown
        assert "without" not in shown
    far = lab.write(tmp_path / "far.jsonl", lab.sample_rows(2, 9))
    print_hits(ask(store, "ann", part="two", top_k=2, where="n_tokens > 1", minus=far))
    assert "for means, without --minus and --where." in capsys.readouterr().out


def test_stale(lab: Lab, store: Path, tmp_path: Path) -> None:
    """Rows that were committed since are not silently left out."""
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    put_back = unbuild(ghoststore.Store.open(copy).part("one"), 1)
    lab.write(tmp_path / "val.jsonl", lab.sample_rows(5, 3))
    with pytest.raises(MismatchError, match=r"stale: .* `ghoststore index` builds it again"):
        ask(copy, "ann")
    put_back()
    assert ask(copy, "ann").results[0].hits
