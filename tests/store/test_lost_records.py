"""A commit record that went missing, or that names other files, is damage: whoever meets it names it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore
from ghoststore.errors import CorruptError
from ghoststore.store import Store
from ghoststore.store.base.records import seal
from ghoststore.store.spans.commits import commit_path, read_commit
from tests.support.harms import delete, truncate
from tests.support.parts import unbuild

if TYPE_CHECKING:
    from tests.conftest import Lab

SPANS = 5


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "store"))


def part(store: Path) -> Path:
    return store / "parts" / "part"


@pytest.mark.parametrize("span", [1, SPANS - 1])
def test_a_lost_record_is_named(lab: Lab, store: Path, span: int) -> None:
    """In the middle, or the last: every command ends with 4 and names what mends it."""
    delete(commit_path(part(store), span))
    report = ghoststore.verify(store)
    assert [damage.file for damage in report.damage] == [f"commits/{span:08d}.json"]
    before = lab.tree(store)
    for outcome in (
        lab.build(store),
        lab.run("query", "--store", store, "--val-set", lab.corpus),
        lab.run("info", "--store", store),
        lab.run("self-influence", "--store", store),
        lab.run("index", "--store", store),
    ):
        assert (outcome.code, outcome.out) == (4, ""), outcome.err
        assert f"commits/{span:08d}.json" in outcome.err
        assert f"ghoststore repair --store {store} --part part" in outcome.err
    assert lab.tree(store) == before


@pytest.mark.parametrize("record", ["lost", "damaged"])
def test_chunks_without_a_record_are_held_against_their_own_checksums(store: Path, record: str) -> None:
    """Damage behind damage is named, too: numbers, texts, and what is missing."""
    path = commit_path(part(store), 1)
    delete(path) if record == "lost" else path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    for name in ("norm/c/1/0", "sample_id/c/1"):
        chunk = part(store) / name
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 4
        chunk.write_bytes(data)
    delete(part(store) / "loss/c/1")
    found = {damage.file: damage.problem for damage in ghoststore.verify(store).damage}
    assert found.keys() == {"commits/00000001.json", "norm/c/1/0", "sample_id/c/1", "loss/c/1"}
    assert "crc32c" in found["norm/c/1/0"]
    assert "missing" in found["loss/c/1"]


def test_all_records_lost(store: Path) -> None:
    for span in range(SPANS):
        delete(commit_path(part(store), span))
    with pytest.raises(CorruptError, match=r"commits/00000000\.json"):
        Store.open(store).part()
    assert len(ghoststore.verify(store).damage) == SPANS


def test_one_chunk_is_enough(store: Path) -> None:
    """Whatever else is gone with the record."""
    delete(commit_path(part(store), 2))
    for path in part(store).rglob("c/2"):
        if "norm" not in path.parts:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CorruptError, match=r"commits/00000002\.json"):
        Store.open(store).part()


def test_a_span_without_record_and_chunks_is_not_built_yet(lab: Lab, built: Path, store: Path) -> None:
    """Which workers on every N-th span leave, too. An empty folder is no chunk."""
    for span in (1, 4):
        delete(commit_path(part(store), span))
        for path in part(store).rglob(f"c/{span}"):
            (path / "0" if path.is_dir() else path).unlink()
    assert ghoststore.verify(store).sound
    assert Store.open(store).part().spans == [0, 2, 3]
    assert lab.build(store).code == 0
    assert lab.tree(store) == lab.tree(built)


def test_chunks_under_an_intent_are_a_writers(store: Path) -> None:
    """Between the decision and the record: nothing is lost, and nothing is committed."""
    record = commit_path(part(store), 3)
    record.rename(record.with_name(".00000003.intent"))
    assert Store.open(store).part().spans == [0, 1, 2, 4]
    report = ghoststore.verify(store)
    assert report.sound
    assert "vectors/c/3/0" in {file.file for file in report.leftovers}


@pytest.mark.kill
def test_a_record_that_is_lost_beside_its_intent(lab: Lab, built: Path, tmp_path: Path) -> None:
    """The writer was killed when the record stood and its intent did, too: without the record, it is named; before it
    stood, nothing was lost.
    """
    store = tmp_path / "store"
    fault = {"call": "unlink", "path": r"\.00000003\.intent$", "when": "before", "act": "kill"}
    assert lab.build(store, fault=fault).code == -9
    assert ghoststore.verify(store).sound
    delete(commit_path(part(store), 3))
    assert [damage.file for damage in ghoststore.verify(store).damage] == ["commits/00000003.json"]
    before = lab.tree(store)
    for outcome in (
        lab.build(store),
        lab.run("query", "--store", store, "--val-set", lab.corpus),
        lab.run("info", "--store", store),
    ):
        assert (outcome.code, outcome.out) == (4, ""), outcome.err
        assert "commits/00000003.json" in outcome.err
        assert f"ghoststore repair --store {store} --part part" in outcome.err
    assert ghoststore.gc(store).removed == []
    assert lab.tree(store) == before
    outcome = lab.run("repair", "--store", store, "--json", "--quiet")
    assert outcome.code == 0, outcome.out
    assert [(one["file"], one["how"]) for one in outcome.json["mended"]] == [
        ("commits/00000003.json", "restored from its intent")
    ]
    assert lab.build(store).code == 0
    assert lab.tree(store) == lab.tree(built)


def test_an_intent_beyond_a_gap(tmp_path: Path) -> None:
    """A slow writer made it when others had committed the span: the next writer removes it."""
    from ghoststore.store import RunWriter
    from tests.support.runs import files, train

    run = train(tmp_path / "store", stop=10)
    before = files(tmp_path / "store")
    record = commit_path(run.path, 1)
    shutil.copy(record, record.with_name(".00000001.1.intent"))
    shutil.copy(record, record.with_name(".00000000.recorded"))
    with RunWriter(run):
        pass
    assert files(tmp_path / "store") == before


def rewritten(store: Path, span: int, **changes: object) -> None:
    """The record of ``span``, sealed again with other entries."""
    commit = read_commit(part(store), span).to_json()
    commit_path(part(store), span).write_bytes(seal({**commit, **changes}))


def test_a_record_that_is_not_of_its_span(lab: Lab, store: Path) -> None:
    """Its seal holds, and it names no files, other files, too few, other sizes, or other rows."""
    honest = read_commit(part(store), 1).to_json()
    files = honest["files"]
    other = read_commit(part(store), 2).to_json()["files"]
    fewer = dict(list(files.items())[1:])
    longer = {**files, "vectors/c/1/0": {**files["vectors/c/1/0"], "bytes": 7}}
    for changes in (
        {"files": {}},
        {"files": other},
        {"files": fewer},
        {"files": {**files, "vectors/c/2/0": files["vectors/c/1/0"]}},
        {"files": longer},
        {"rows": [0, 6]},
        {"rows": [6, 13]},
    ):
        rewritten(store, 1, **changes)
        assert any(damage.file == "commits/00000001.json" for damage in ghoststore.verify(store).damage), changes
        with pytest.raises(CorruptError, match=r"00000001\.json is not the record of its span"):
            ghoststore.info(store)
        outcome = lab.build(store)
        assert outcome.code == 4
        assert "commits/00000001.json" in outcome.err


def test_building_on_a_damaged_part(lab: Lab, store: Path) -> None:
    """What a look at each file tells is told before anything is computed."""
    delete(part(store) / "loss/c/0")
    truncate(part(store) / "vectors/c/3/0")
    truncate(part(store) / "norm/zarr.json")
    before = lab.tree(store)
    outcome = lab.build(store)
    assert outcome.code == 4
    for file in ("loss/c/0", "vectors/c/3/0", "norm/zarr.json"):
        assert file in outcome.err
    assert f"ghoststore repair --store {store} --part part" in outcome.err
    assert lab.tree(store) == before


@pytest.mark.parametrize("complete", [True, False])
def test_building_on_a_flipped_byte(lab: Lab, store: Path, complete: bool) -> None:
    """What is committed is read before the rest is built, also where there is no rest."""
    if not complete:
        unbuild(Store.open(store).part(), SPANS - 1)
    chunk = part(store) / "vectors/c/1/0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    before = lab.tree(store)
    outcome = lab.build(store)
    assert outcome.code == 4
    assert "vectors/c/1/0" in outcome.err
    assert f"ghoststore repair --store {store} --part part" in outcome.err
    assert lab.tree(store) == before


def test_a_lost_record_of_a_run(lab: Lab, tmp_path: Path) -> None:
    from tests.support.runs import make, train

    train(tmp_path / "store")
    delete(tmp_path / "store/runs/run/commits/00000002.json")
    for outcome in (
        lab.run("scores", "--store", tmp_path / "store"),
        lab.run("info", "--store", tmp_path / "store"),
        lab.run("watch", "--store", tmp_path / "store", "--once"),
    ):
        assert outcome.code == 4, outcome.out
        assert f"ghoststore repair --store {tmp_path / 'store'} --run run" in outcome.err
    assert [one.file for one in ghoststore.verify(tmp_path / "store").damage] == ["commits/00000002.json"]
    assert make(tmp_path / "other").spans == []


def test_steps_that_a_run_left_out_are_no_damage(tmp_path: Path) -> None:
    from ghoststore.store import RunWriter
    from tests.support.runs import make, values

    run = make(tmp_path / "store")
    with RunWriter(run) as writer:
        writer.skip_to(10)
        for step in range(10, 15):
            writer.append(step, values(step))
    assert Store.open(tmp_path / "store").run().spans == [2]
    assert ghoststore.verify(tmp_path / "store").sound


def test_verify_goes_on_where_a_file_cannot_be_read(store: Path) -> None:
    """Whatever the error: each file is one entry, and all of them are there."""
    unreadable = [
        "commits/00000001.json",
        "commits/00000003.json",
        "vectors/c/0/0",
        "loss/c/2",
        "norm/zarr.json",
        "span_start/c/0/0",
    ]
    for name in unreadable:
        path = part(store) / name
        path.unlink()
        path.symlink_to(path)
    report = ghoststore.verify(store)
    assert sorted(damage.file for damage in report.damage) == sorted(unreadable)


def test_a_training_does_not_go_on_in_a_damaged_run(tmp_path: Path) -> None:
    """Before its first step."""
    from types import SimpleNamespace

    from indexer.session.run_plan import RunPlan
    from tests.support.runs import LAYOUT, manifest, row_table, train

    rows = SimpleNamespace(table=row_table)
    plan = RunPlan(
        store=tmp_path / "store", name="run", layout=LAYOUT, manifest=manifest(), rows=rows, on_store_error="stop"
    )
    train(tmp_path / "store", stop=15)
    assert plan.open()[0].spans == [0, 1, 2]
    truncate(tmp_path / "store/runs/run/loss/c/1/0/0")
    with pytest.raises(CorruptError, match=r"loss/c/1/0/0.*ghoststore repair --store .* --run run"):
        plan.open()
