"""Parts of one projection and several corpora, ranked as one: to the bit as one part of all rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import MismatchError, UsageError
from ghoststore.progress import Silent
from ghoststore.store import Store
from ghoststore.store.part.indexes import index_states
from ghoststore.store.part.united import UnitedPart
from query.search.parts import open_parts
from query.search.vectors import PartVectors
from tests.support.parts import unbuild, vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

SPAN = 8
CUTS = (0, 16, 24, 30)
"""Rows where the corpora begin. All but the last part are whole spans."""
NAMES = ("first", "second", "third")
DTYPES = ("float32", "int8", "onebit")
PROJECTION = ProjectionConfig(compress=512, calibration_samples=10)


def corpus_rows(lab: Lab) -> list[dict[str, Any]]:
    """Rows with a field, an empty row, and domains that not every corpus has."""
    rows = [dict(row) | {"source": f"s{place % 3}"} for place, row in enumerate(lab.sample_rows(CUTS[-1], 1))]
    rows[17]["text"] = ""
    for place in (20, 25, 27):
        rows[place]["domain"] = "cloud"
    return rows


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store a dtype, with ``first``, ``second`` and ``third``, and ``whole`` of their rows, like the first."""
    folder = tmp_path_factory.mktemp("unions")
    rows = corpus_rows(lab)
    bounds = zip(NAMES, CUTS, CUTS[1:], strict=False)
    files = [lab.write(folder / f"{name}.jsonl", rows[start:stop]) for name, start, stop in bounds]
    everything = lab.write(folder / "whole.jsonl", rows)
    lab.write(folder / "val.jsonl", [row | {"task": ("a", "b")[i % 2]} for i, row in enumerate(lab.sample_rows(4, 3))])
    lab.write(folder / "far.jsonl", lab.sample_rows(2, 5))
    for dtype in DTYPES:
        where: dict[str, Any] = {"store": folder / dtype, "device": "cpu"}
        ghoststore.build(
            checkpoint=lab.checkpoint,
            data=files[0],
            name="first",
            span_rows=SPAN,
            projection=PROJECTION,
            proj_dtype=dtype,
            keep_fields=("source",),
            **where,
        )
        for name, data in ((NAMES[1], files[1]), (NAMES[2], files[2]), ("whole", everything)):
            ghoststore.build(like="first", data=data, name=name, **where)
    return folder


def ask(folder: Path, part: Any, dtype: str = "onebit", **settings: Any) -> Any:
    settings = {"top_k": CUTS[-1], "device": "cpu"} | settings
    return ghoststore.query(store=folder / dtype, val_set=folder / "val.jsonl", part=part, **settings)


def same(folder: Path, dtype: str, **settings: Any) -> None:
    """The union answers as the part of all rows, bit for bit, and says where each row is."""
    if settings.get("minus"):
        settings["minus"] = folder / "far.jsonl"
    found, whole = (ask(folder, part, dtype, **settings) for part in (NAMES, "whole"))
    assert found.settings["united"] == list(NAMES)
    assert found.settings["unit"] == whole.settings["unit"]
    assert found.settings["rows"] == whole.settings["rows"] == CUTS[-1]
    places = dict(zip(NAMES, CUTS, strict=False))
    for mine, theirs in zip(found.results, whole.results, strict=True):
        assert (mine.query, len(mine.hits)) == (theirs.query, len(theirs.hits))
        assert len(mine.hits) > 3
        for one, other in zip([*mine.hits, *mine.bottom], [*theirs.hits, *theirs.bottom], strict=True):
            one, other = vars_of(one), vars_of(other)
            one["source_row"] += places[one.pop("part")]
            assert other.pop("part") is None
            assert one == other


def vars_of(hit: Any) -> dict[str, Any]:
    return {name: getattr(hit, name) for name in hit.__dataclass_fields__}


SETTINGS: list[dict[str, Any]] = [
    {},
    {"bottom_k": 5, "top_k": 7},
    {"each": True},
    {"group_field": "task"},
    {"group_field": "task", "combine": "max"},
    {"group_field": "task", "combine": "rank-fusion"},
    {"precondition": "second-moment"},
    {"each": True, "precondition": "second-moment", "damping": 1.0},
    {"minus": True},
    {"where": "domain = 'cloud' OR source = 's1'"},
    {"where": "n_tokens > 14 AND status = 'ok'"},
    {"lexical": 0.4},
    {"lexical": 0.4, "minus": True},
    {"layers": ("mlp",)},
    {"rerank": 20, "top_k": 5, "bottom_k": 3},
    {"rerank": 20, "top_k": 5, "rerank_with": "vectors"},
    {"rerank": 12, "top_k": 5, "rerank_with": "ekfac", "rerank_samples": 10},
]
CASES = [
    # Every setting by both metrics, each on a dtype, and so that they go round; the plain question on all.
    *(
        (DTYPES[(place + step) % 3], metric, settings)
        for place, settings in enumerate(SETTINGS)
        for step, metric in enumerate(("dot", "cosine"))
    ),
    *(
        (dtype, metric, {})
        for dtype, metric in (("int8", "dot"), ("onebit", "dot"), ("float32", "cosine"), ("onebit", "cosine"))
    ),
]


@pytest.mark.parametrize(
    ("dtype", "metric", "settings"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}-{case[1]}-{'-'.join(map(str, case[2].values()))}",
            marks=[] if place % 9 == 0 else [pytest.mark.slow],
        )
        for place, case in enumerate(CASES)
    ],
)
def test_equals_one_part_of_all_rows(folder: Path, dtype: str, metric: str, settings: dict[str, Any]) -> None:
    same(folder, dtype, metric=metric, **settings)


@pytest.mark.thin
@pytest.mark.parametrize("dtype", ["float32", "onebit"])
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_by_an_index_of_all_rows(folder: Path, dtype: str, metric: str) -> None:
    """It lies with the first part, where neither that part nor another order of the parts takes it for its own."""
    store = folder / dtype
    for part in (NAMES, "whole"):
        report = ghoststore.index(store=store, part=part, metric=metric, factory="Flat")
        assert report.built
        assert report.manifest.rows == CUTS[-1] - 1
    assert not ghoststore.index(store=store, part=NAMES, metric=metric, factory="Flat").built
    for settings in ({"top_k": 9}, {"top_k": 5, "bottom_k": 3, "each": True}, {"where": "source = 's1'"}):
        same(folder, dtype, metric=metric, index="ann", **settings)
    same(folder, dtype, metric=metric, index="ann", rerank=12, top_k=4)
    found = ask(folder, NAMES, dtype, metric=metric, index="ann", index_name=f"{metric}-Flat", top_k=3)
    assert found.settings["index_name"].startswith(f"{metric}-Flat-union-")
    with pytest.raises(UsageError, match=f"ghoststore index --part first --metric {metric}"):
        ask(folder, "first", dtype, metric=metric, index="ann")
    with pytest.raises(UsageError, match=f"ghoststore index --part third --part first --metric {metric}"):
        ask(folder, ["third", "first"], dtype, metric=metric, index="ann")
    first = Store.open(store).part("first")
    states = {state.name: state.state for state in index_states(first)}
    assert states[found.settings["index_name"]] == "of a union"
    assert ghoststore.gc(store=store, caches=True).removed == []
    assert ghoststore.verify(store=store).sound


def test_an_index_of_a_union_that_has_changed_is_refused(folder: Path) -> None:
    store = folder / "int8"
    ghoststore.index(store=store, part=NAMES[:2], metric="dot", factory="Flat")
    put_back = unbuild(Store.open(store).part("second"), 0)
    try:
        with pytest.raises(UsageError, match="no committed rows"):
            ask(folder, NAMES[:2], "int8", metric="dot", index="ann")
    finally:
        put_back()
    put_back = unbuild(Store.open(store).part("first"), 1)
    try:
        with pytest.raises(MismatchError, match="is stale"):
            ask(folder, NAMES[:2], "int8", metric="dot", index="ann")
    finally:
        put_back()


def test_with_conjugate_gradients(folder: Path) -> None:
    same(folder, "onebit", rerank=12, top_k=5, rerank_with="cg", cg_steps=2, rerank_samples=10)


def test_with_tokens(folder: Path) -> None:
    found, whole = (ask(folder, part, tokens=True, top_k=5) for part in (NAMES, "whole"))
    for one, other in zip(found.results[0].hits, whole.results[0].hits, strict=True):
        assert (one.id, one.score, one.recomputed) == (other.id, other.score, other.recomputed)
        assert one.tokens == other.tokens


def test_the_page(folder: Path, tmp_path: Path) -> None:
    ask(folder, NAMES, report=tmp_path / "page.html")
    assert "cloud" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_the_command_line_says_the_part(folder: Path, lab: Lab) -> None:
    words: list[str | Path] = [
        "query",
        "--store",
        folder / "int8",
        "--val-set",
        folder / "val.jsonl",
        "--device",
        "cpu",
    ]
    parts = [word for name in NAMES for word in ("--part", name)]
    shown = lab.run(*words, *parts)
    assert shown.code == 0, shown.err
    assert all(name in shown.out for name in ("part", "second", "third"))
    one = lab.run(*words, "--part", "first")
    assert "part" not in one.out.splitlines()[2]
    hits = lab.run(*words, *parts, "--json").json["results"][0]["hits"]
    assert {hit["part"] for hit in hits} <= set(NAMES)
    assert "part" not in lab.run(*words, "--part", "first", "--json").json["results"][0]["hits"][0]


def test_what_a_union_reads(folder: Path) -> None:
    """Numbers of rows, columns, rows at random places, vectors: part after part, each from a whole span on."""
    store = Store.open(folder / "int8")
    members = [store.part(name) for name in NAMES]
    united, whole = UnitedPart(members), store.part("whole")
    assert united.row_numbers.tolist() == list(range(CUTS[-1]))
    assert (united.rows, united.planned_rows, united.layout.spans) == (CUTS[-1], CUTS[-1], whole.layout.spans)
    assert united.domains == whole.domains
    for name in ("source_row", "n_tokens", "status", "loss", "norm", "source_digest", "domain"):
        np.testing.assert_array_equal(united.column(name), whole.column(name))
    rows = [29, 0, 16, 15, 24, 24]
    for name in ("sample_id", "source_row", "domain"):
        assert united.read_rows(name, rows) == whole.read_rows(name, rows)
    np.testing.assert_array_equal(PartVectors(united).gather(rows), PartVectors(whole).gather(rows))
    chunks = [(chunk.start, chunk.stop, chunk.rows_RD.clone()) for chunk in PartVectors(united).stream()]
    for start, stop, rows_RD in chunks:
        np.testing.assert_array_equal(rows_RD, vectors_of(whole, start, stop))
    backwards = UnitedPart(members[::-1])  # the part of six rows comes first, and leaves a gap of two numbers
    assert backwards.row_numbers.tolist() == [*range(6), *range(8, 32)]
    assert backwards.read_rows("sample_id", [0, 16]) == whole.read_rows("sample_id", [24, 0])
    assert backwards.column("source_row").tolist() == list(range(CUTS[-1]))


@pytest.mark.slow
def test_in_any_order(folder: Path) -> None:
    """Only where scores are equal does the order of the parts count."""
    for settings in ({}, {"precondition": "second-moment"}, {"lexical": 0.3}, {"where": "source = 's1'"}):
        found = [ask(folder, part, metric="dot", **settings) for part in (NAMES, NAMES[::-1])]
        for number in ("score",) if "precondition" in settings else ("score", "nats"):
            by_id = [{hit.id: getattr(hit, number) for hit in result.results[0].hits} for result in found]
            assert by_id[0] == pytest.approx(by_id[1], rel=1e-9)
        assert len(by_id[0]) > 3


def test_an_incomplete_part(folder: Path) -> None:
    """What is committed is searched; the rest is not there."""
    part = Store.open(folder / "int8").part("first")
    put_back = unbuild(part, 1)
    try:
        found = ask(folder, NAMES, "int8")
        assert found.settings["rows"] == CUTS[-1] - SPAN
        by_row = {hit.source_row for hit in found.results[0].hits if hit.part == "first"}
        assert by_row == set(range(SPAN))
    finally:
        put_back()


@pytest.mark.slow
def test_a_part_of_one_short_span(folder: Path, lab: Lab, tmp_path: Path) -> None:
    """Its span, and its chunks, are shorter than those of the others: read all the same, wherever it stands."""
    rows = corpus_rows(lab)
    where: dict[str, Any] = {"store": tmp_path / "store", "device": "cpu"}
    data = [lab.write(tmp_path / f"{place}.jsonl", part) for place, part in enumerate((rows[:3], rows[3:], rows))]
    ghoststore.build(
        checkpoint=lab.checkpoint, data=data[0], name="small", proj_dtype="float32", projection=PROJECTION, **where
    )
    ghoststore.build(like="small", data=data[1], name="large", span_rows=SPAN, **where)
    ghoststore.build(like="small", data=data[2], name="all", span_rows=SPAN, **where)
    for metric in ("dot", "cosine"):
        answers = [
            ghoststore.query(val_set=folder / "val.jsonl", part=part, top_k=40, metric=metric, **where)
            for part in (["small", "large"], ["large", "small"], "all")
        ]
        by_id = [{hit.id: hit.score for hit in answer.results[0].hits} for answer in answers]
        assert by_id[0] == by_id[1] == pytest.approx(by_id[2], rel=1e-4)


@pytest.mark.slow
def test_grown_at_its_end(folder: Path, lab: Lab, tmp_path: Path) -> None:
    """One file for both parts: places are those in the file, texts are read from it."""
    rows, data = corpus_rows(lab), tmp_path / "data.jsonl"
    where: dict[str, Any] = {"store": tmp_path / "store", "device": "cpu"}
    lab.write(data, rows[:16])
    ghoststore.build(checkpoint=lab.checkpoint, data=data, name="old", **where)
    lab.write(data, rows)
    ghoststore.build(like="old", data=data, name="new", skip_samples=16, **where)
    for settings in ({}, {"lexical": 0.5}, {"rerank": 30}):
        found = ghoststore.query(val_set=folder / "val.jsonl", part=["old", "new"], top_k=30, **where, **settings)
        for hit in found.results[0].hits:
            assert hit.text == rows[hit.source_row]["text"]
            assert hit.part == ("old" if hit.source_row < 16 else "new")
        assert len(found.results[0].hits) == 29


@pytest.fixture(scope="module")
def checkpoints(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``a1``, ``a2`` of one checkpoint and ``b1``, ``b2`` of another, each of two corpora, and ``a``, ``b`` of all."""
    folder = tmp_path_factory.mktemp("checkpoints")
    rows = corpus_rows(lab)
    data = {"1": rows[:16], "2": rows[16:], "": rows}
    for letter, seed in (("a", 1), ("b", 2)):
        model = lab.model(folder / letter, seed=seed)
        for name, of_name in data.items():
            settings: dict[str, Any] = {"like": f"{letter}1"}
            if name == "1":
                settings = {"checkpoint": model, "span_rows": SPAN, "projection": PROJECTION}
            path = lab.write(folder / f"{name}.jsonl", of_name)
            ghoststore.build(data=path, store=folder / "store", name=f"{letter}{name}", device="cpu", **settings)
    return folder


def test_a_sum_over_checkpoints_of_unions(checkpoints: Path, folder: Path) -> None:
    """In whatever order the parts are named."""
    settings: dict[str, Any] = {"store": checkpoints / "store", "val_set": folder / "val.jsonl", "device": "cpu"}
    for weights in ("equal", (0.5, 2.0)):
        expected = ghoststore.query(part=["a", "b"], part_weights=weights, top_k=30, **settings)
        for names in (["a1", "a2", "b1", "b2"], ["a1", "b2", "b1", "a2"]):
            found = ghoststore.query(part=names, part_weights=weights, top_k=30, **settings)
            assert found.settings["united"] == ["a1", "a2"]
            by_id = [{hit.id: hit.score for hit in answer.results[0].hits} for answer in (found, expected)]
            assert by_id[0] == by_id[1]
            assert len(by_id[0]) == 29


@pytest.mark.parametrize(
    ("names", "settings", "error", "message"),
    [
        (["a1", "a2", "b1"], {}, MismatchError, "their corpora are not the same"),
        (["a1", "b2"], {}, MismatchError, "cannot be summed: corpus"),
        (["a1", "a"], {}, MismatchError, "both have samples 0 to"),
        (["a1", "a2", "a"], {}, MismatchError, "both have samples 0 to"),
        (["a1", "a2"], {"part_weights": "equal"}, UsageError, "one part, or union"),
        (["a1", "a2", "b1", "b2"], {"part_weights": (1.0, 1.0, 1.0, 1.0)}, UsageError, "one for each checkpoint"),
        (["a1", "a2", "b1", "b2"], {"part_weights": "equal", "rerank": 20}, UsageError, "summed"),
        (["a1", "a2"], {"data": "x.jsonl"}, UsageError, "name one of them"),
        (["a1", "a2"], {"with_scores": "run"}, UsageError, "name one of them|run"),
    ],
)
def test_refused(
    checkpoints: Path, folder: Path, names: list[str], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ghoststore.query(
            store=checkpoints / "store", val_set=folder / "val.jsonl", part=names, device="cpu", **settings
        )


@pytest.mark.parametrize("missing", [("whole", 0), ("first", 0), ("first", 1)])
def test_rows_that_are_in_two_incomplete_parts(folder: Path, missing: tuple[str, int]) -> None:
    """Whatever spans are missing, as those of workers are: rows that are there twice are refused."""
    store = Store.open(folder / "int8")
    put_back = unbuild(store.part(missing[0]), missing[1])
    try:
        for names in (["first", "whole"], ["whole", "first"], ["second", "first", "whole"]):
            with pytest.raises(MismatchError, match="both have samples"):
                ask(folder, names, "int8")
    finally:
        put_back()


def test_parts_with_no_committed_row_in_common(folder: Path) -> None:
    store = Store.open(folder / "int8")
    put_back = [unbuild(store.part("whole"), 0, 2, 3), unbuild(store.part("first"), 1)]
    try:
        hits = ask(folder, ["first", "whole"], "int8").results[0].hits
        assert sorted(hit.source_row for hit in hits) == list(range(16))
    finally:
        for put in put_back:
            put()


def test_parts_that_are_not_alike(folder: Path, lab: Lab, tmp_path: Path) -> None:
    """Of one checkpoint and two corpora, but with projections that each learned: refused, with the way that works."""
    where: dict[str, Any] = {"checkpoint": lab.checkpoint, "store": tmp_path / "store", "device": "cpu"}
    for name in NAMES[:2]:
        ghoststore.build(data=folder / f"{name}.jsonl", name=name, **where)
    with pytest.raises(MismatchError, match=r"projection\.calibration.*`ghoststore build --like first --data"):
        ghoststore.query(store=tmp_path / "store", val_set=folder / "val.jsonl", part=NAMES[:2], device="cpu")


def test_other_kept_fields_are_refused(folder: Path, lab: Lab, tmp_path: Path) -> None:
    """Of parts whose projections are equal without `like`: no condition could be asked of both."""
    where: dict[str, Any] = {"store": tmp_path / "store", "device": "cpu"}
    build = {"checkpoint": lab.checkpoint, "projection": ProjectionConfig(rank_total=16, precondition="none"), **where}
    for name, keep in (("first", ("source",)), ("second", ())):
        ghoststore.build(data=folder / f"{name}.jsonl", name=name, keep_fields=keep, **build)
    with pytest.raises(MismatchError, match=r"cannot be ranked as one: storage\.fields is .*'source'"):
        ghoststore.query(val_set=folder / "val.jsonl", part=NAMES[:2], **where)


@pytest.mark.slow
def test_one_of_them_keeps_texts(folder: Path, lab: Lab, tmp_path: Path) -> None:
    """Texts are then in that part, those of the other in its corpus; a condition on all of them is refused."""
    rows, where = corpus_rows(lab), {"store": tmp_path / "store", "device": "cpu"}
    data = [lab.write(tmp_path / f"{place}.jsonl", part) for place, part in enumerate((rows[:8], rows[8:16]))]
    ghoststore.build(checkpoint=lab.checkpoint, data=data[0], name="old", store_text=True, **where)
    ghoststore.build(like="old", data=data[1], name="new", store_text=False, **where)
    data[0].unlink()
    for names in (["old", "new"], ["new", "old"]):
        hits = ghoststore.query(val_set=folder / "val.jsonl", part=names, top_k=20, **where).results[0].hits
        assert {(hit.part, hit.source_row): hit.text for hit in hits} == {
            (name, row): rows[first + row]["text"] for name, first in (("old", 0), ("new", 8)) for row in range(8)
        }
        with pytest.raises(UsageError, match="does not keep texts"):
            ghoststore.query(val_set=folder / "val.jsonl", part=names, where="text LIKE '%a%'", **where)


def test_a_damaged_row_is_named(folder: Path) -> None:
    part = Store.open(folder / "int8").part("second")
    chunk = part.path / part.layout.chunk_keys(part.spec("vectors"), 0)[0]
    before = chunk.read_bytes()
    try:
        chunk.write_bytes(before[:5] + bytes([before[5] ^ 1]) + before[6:])
        with pytest.raises(ghoststore.errors.CorruptError, match=str(chunk)):
            ask(folder, NAMES, "int8")
    finally:
        chunk.write_bytes(before)


def test_caches_are_apart(folder: Path) -> None:
    """The second moment of a union lies with the first part, and neither takes the other's."""
    ask(folder, NAMES, "float32", precondition="second-moment")
    ask(folder, "first", "float32", precondition="second-moment")
    records = list((folder / "float32" / "parts" / "first" / "second_moment").glob("*moment*.json"))
    covers = {json.loads(path.read_text())["covers"] for path in records if path.name != "zarr.json"}
    united, _ = open_parts(folder / "float32", NAMES, None, Silent())
    assert covers >= {united[0].fingerprint(), Store.open(folder / "float32").part("first").fingerprint()}
    assert ghoststore.verify(store=folder / "float32").sound
