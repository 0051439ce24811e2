"""`query --engine ray`: the answers of a search in one process, to the bit, also where an actor or a node dies."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import ghoststore
from ghoststore.errors import StorageError, UsageError
from ghoststore.progress import Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.question import QueryOptions
from ghoststore.store import Store
from ghoststore.store.spans.layout import CRC_BYTES
from ghoststore.store.spans.reader import WarmChunks, chunks_of, read_chunk
from query.answer.query import answer
from query.search.on_ray import Searcher, _asked, _ranges, searching_on_ray
from query.search.part_score import Term
from query.search.parts import open_parts
from tests.support.parts import unbuild
from tests.support.ray_clusters import Striking, kill_one
from tests.support.ray_clusters import cluster as cluster

if TYPE_CHECKING:
    from tests.conftest import Lab

SPAN = 4
ROWS = 38
TWINS = (3, 9, 30, 31)
"""Rows with the text of row 0: equal scores."""


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole``; ``first`` and ``second``, which together have its rows; ``late``, of another checkpoint."""
    folder = tmp_path_factory.mktemp("on-ray")
    rows = [dict(row) | {"source": f"s{place % 3}"} for place, row in enumerate(lab.sample_rows(ROWS, 1))]
    for place in TWINS:
        rows[place]["text"] = rows[0]["text"]
    rows[17]["text"] = ""
    lab.write(folder / "val.jsonl", [row | {"task": ("a", "b")[i % 2]} for i, row in enumerate(lab.sample_rows(4, 3))])
    lab.write(folder / "far.jsonl", lab.sample_rows(2, 5))
    cut = 5 * SPAN
    files = {
        name: lab.write(folder / f"{name}.jsonl", some)
        for name, some in (("whole", rows), ("first", rows[:cut]), ("second", rows[cut:]))
    }
    where: dict[str, Any] = {"store": folder / "store", "device": "cpu"}
    projection = ghoststore.ProjectionConfig(compress=512, calibration_samples=10)
    common = {"span_rows": SPAN, "projection": projection, "keep_fields": ("source",), "proj_dtype": "int8"}
    ghoststore.build(checkpoint=lab.checkpoint, data=files["whole"], name="whole", **common, **where)
    for name in ("first", "second"):
        ghoststore.build(like="whole", data=files[name], name=name, **where)
    plain = {"span_rows": SPAN, "projection": ghoststore.ProjectionConfig(rank_total=16, compress=None)}
    other = lab.model(folder / "other", seed=7)
    for name, checkpoint in (("early", lab.checkpoint), ("late", other)):
        ghoststore.build(checkpoint=checkpoint, data=files["whole"], name=name, **plain, **where)
    return folder


def ask(folder: Path, part: Any = "whole", by: Any = ghoststore.query, **settings: Any) -> ghoststore.QueryResult:
    settings = {"top_k": 12, "bottom_k": 5, "device": "cpu"} | settings
    if settings.get("minus"):
        settings["minus"] = folder / "far.jsonl"
    return by(store=folder / "store", val_set=folder / "val.jsonl", part=part, **settings)


def fields(result: ghoststore.QueryResult) -> Any:
    """All that is in an answer, numbers to the bit."""
    return [
        [[dataclasses.asdict(hit) for hit in hits] for hits in (one.hits, one.bottom)] for one in result.results
    ], result.settings


CASES: list[tuple[Any, dict[str, Any]]] = [
    ("whole", {}),
    ("whole", {"metric": "cosine", "each": True}),
    ("whole", {"top_k": ROWS, "bottom_k": ROWS}),
    ("whole", {"top_k": 0, "bottom_k": 3, "group_field": "task"}),
    ("whole", {"group_field": "task", "combine": "max"}),
    ("whole", {"where": "source = 's1' OR n_tokens > 14", "top_k": 5}),
    ("whole", {"minus": True, "metric": "cosine"}),
    ("whole", {"precondition": "second-moment", "metric": "dot"}),
    ("whole", {"rerank": 20, "top_k": 5, "bottom_k": 2}),
    ("whole", {"tokens": True, "top_k": 2, "bottom_k": 0}),
    (("first", "second"), {}),
    (("first", "second"), {"metric": "cosine", "where": "source <> 's0'", "each": True}),
    (("early", "late"), {"part_weights": (0.5, 2.0)}),
    (("early", "late"), {"part_weights": "equal", "layers": ("mlp",), "metric": "cosine"}),
]


@pytest.mark.slow
@pytest.mark.ddp
def test_as_in_one_process(folder: Path, cluster: Any) -> None:
    """A whole query, and others by actors that stay, as those of a session do."""
    with pytest.raises(UsageError, match="has joined another cluster"):
        ask(folder, engine="ray", ray_address="127.0.0.1:1")
    assert fields(ask(folder, engine="ray")) == fields(ask(folder))

    @takes(QueryOptions)
    def ask_actors(options: QueryOptions) -> ghoststore.QueryResult:
        return answer(options, searching=lambda parts: nullcontext(find))

    with searching_on_ray(None, [Store.open(folder / "store").part("whole")]) as find:
        for part, settings in CASES:
            by_actors = ask(folder, part, by=ask_actors, engine="ray", **settings)
            assert fields(by_actors) == fields(ask(folder, part, **settings)), settings
        tied = [hit.source_row for hit in ask(folder, by=ask_actors, engine="ray", top_k=ROWS).results[0].hits]
    at = tied.index(0)
    assert tied[at : at + 1 + len(TWINS)] == [0, *TWINS]


@pytest.mark.slow
@pytest.mark.kill
def test_a_session_outlives_actors_and_nodes(lab: Lab, folder: Path, cluster: Any, tmp_path: Path) -> None:
    """The last node but one dies in mid-question, and so does an actor; rows that are committed meanwhile are seen."""
    expected = fields(ask(folder, each=True))
    settings = {"top_k": 12, "bottom_k": 5, "each": True}
    with ghoststore.open(folder / "store", part="whole", device="cpu", engine="ray") as session:
        assert fields(session.query(folder / "val.jsonl", **settings)) == expected
        node = next(iter(cluster.worker_nodes))
        for strike in (
            lambda: kill_one(b"ray::Searcher"),
            lambda: cluster.remove_node(node, allow_graceful=False),
        ):
            listener = Striking(strike, at="searching")
            assert fields(session.query(folder / "val.jsonl", progress=listener, **settings)) == expected
            assert listener.strike is None
        assert fields(session.query(folder / "val.jsonl", **settings)) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"index": "ann"}, "`index=ann` needs something else"),
        ({"lexical": 0.2}, "`lexical` needs"),
        ({"with_scores": "run"}, "`with_scores` needs"),
        ({"group_field": "task", "combine": "rank-fusion"}, "`combine=rank-fusion` needs"),
        ({"report": "page.html"}, "`report` needs"),
        ({"run": "run"}, "`run` needs"),
        ({"histogram": True}, "`histogram` needs"),
        ({"precondition": "second-moment", "metric": "cosine"}, "give `metric=dot`"),
        ({"engine": None, "ray_address": "here:1"}, "`ray_address` belongs to `engine=ray`"),
    ],
)
def test_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ask(folder, **({"engine": "ray"} | settings))


def question(folder: Path, part: str = "whole") -> tuple[dict[str, Any], list[Term]]:
    """What actors are told of a search for the sum of all numbers of a row."""
    (opened,), _ = open_parts(folder / "store", part, None, Silent())
    terms = [Term.of(opened, torch.ones(1, opened.layout.dimension), metric="dot")]
    return _asked(terms, 3, 0, None, None), terms


def said(answer: Any, message: str) -> None:
    assert isinstance(answer, StorageError)
    assert message in str(answer)
    assert "All nodes must see the store" in str(answer)


def test_another_store_on_a_node_is_refused(lab: Lab, folder: Path, built: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    asked, _ = question(folder)
    said(Searcher(str(folder / "nowhere")).search(asked, [0]), "there is no store")
    asked["terms"][0]["members"] = [("early", asked["terms"][0]["members"][0][1])]
    said(Searcher(str(folder / "store")).search(asked, [0]), "'early' is another one there")


def test_rows_committed_since_are_seen(lab: Lab, folder: Path, tmp_path: Path) -> None:
    """An actor opens a part anew when it is asked for a span that was not there, and says so if it still is not."""
    shutil.copytree(folder / "store", tmp_path / "store")
    put_back = unbuild(Store.open(tmp_path / "store").part("whole"), 2)
    asked, _ = question(folder)
    actor = Searcher(str(tmp_path / "store"))
    assert not isinstance(actor.search(asked, [0, 1]), Exception)
    said(actor.search(asked, [1, 2]), "span 2 of part 'whole' is not committed there")
    put_back()
    (rows, _, _), _ = actor.search(asked, [2])  # type: ignore[misc]
    assert len(rows) == 3
    assert set(rows.tolist()) <= set(range(2 * SPAN, 3 * SPAN))


def test_ranges_are_the_same_for_any_question() -> None:
    everything = _ranges(50, range(50), 3)
    assert sorted(span for ranges in everything for spans in ranges for span in spans) == list(range(50))
    some = _ranges(50, range(10, 20), 3)
    for place, ranges in enumerate(some):
        for spans in ranges:
            assert any(set(spans) <= set(whole) for whole in everything[place])


def test_warm_chunks_are_read_once(folder: Path) -> None:
    """What is kept has the bytes that were read, whatever a caller does with them, and no more than there is room."""
    part = Store.open(folder / "store").part("whole")
    spec = part.spec("vectors")
    size = spec.chunk_bytes + CRC_BYTES
    paths = [path for path, _, _ in chunks_of(part, spec, part.spans)]
    warm = WarmChunks(2 * size)
    first = [read_chunk(path, size) for path in paths]
    for path in paths:
        warm.read(path, size, within=part.path)[:] = 0
        warm.read(path, size, np.empty(size, dtype=np.uint8))[:] = 0
    for path, data in zip(paths, first, strict=True):
        assert np.array_equal(warm.read(path, size), data)
    assert len(warm._chunks) == 2
