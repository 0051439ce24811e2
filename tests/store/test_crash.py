"""A build that is killed at any moment leaves a store of what it had committed, and resumes to the same bytes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore.errors import UsageError

if TYPE_CHECKING:
    from tests.conftest import Lab

Fault = dict[str, Any]
UNFINISHED = re.compile(r"(^|/)\.[^/]*\.tmp(/|$)|\.partial$")
"""Files that a killed process had not given their names yet."""


def at(call: str, path: str, when: str, number: int = 1) -> Fault:
    return {"call": call, "path": path, "when": when, "number": number}


MOMENTS: dict[str, tuple[Fault, int | None]] = {
    # The fault, and how many of the five spans are committed then; None: there is no part yet.
    "store-begun": (at("name", r"parts/zarr\.json$", "after"), None),
    "store-unnamed": (at("name", r"store/zarr\.json$", "before"), None),
    "store-unflushed": (at("fsync", r"store/\.zarr\.json\.[^/]*\.tmp$", "before"), None),
    "part-arrays": (at("name", r"/loss/zarr\.json$", "before"), None),
    "part-unnamed": (at("name", r"parts/part$", "before"), None),
    "part-named": (at("name", r"parts/part$", "after"), 0),
    "first-chunk": (at("name", r"part/vectors/c/0/0$", "before"), 0),
    "staging": (at("fsync", r"commits/\.00000002\.status\.c\.2\.", "before"), 2),
    "undecided": (at("name", r"commits/\.00000001\.intent$", "before"), 1),
    "decided": (at("name", r"commits/\.00000001\.intent$", "after"), 1),
    "between-chunks": (at("name", r"part/status/c/2$", "after"), 2),
    "moved": (at("name", r"part/window_start/c/3$", "after"), 3),
    "folder-unflushed": (at("fsync", r"part/norm/c$", "before", number=2), 1),
    "record-unwritten": (at("fsync", r"commits/\.00000001\.json", "before"), 1),
    "record-unnamed": (at("name", r"commits/00000002\.json$", "before"), 2),
    "record-named": (at("name", r"commits/00000002\.json$", "after"), 3),
    "record-unflushed": (at("fsync", r"part/commits$", "before", number=4), 4),
    "last-chunk": (at("fsync", r"commits/\.00000004\.window_start\.c\.4\.", "after"), 4),
    "last-record": (at("name", r"commits/00000004\.json$", "after"), 5),
    "intent-stands": (at("unlink", r"commits/\.00000003\.intent$", "before"), 4),
    "intent-gone": (at("unlink", r"commits/\.00000003\.intent$", "after"), 4),
}
MOVING = {"first-chunk", "between-chunks", "moved", "folder-unflushed"}
DECIDED = {"decided", *MOVING, "record-unwritten", "record-unnamed"}
"""Moments at which a span has an intent and no record: whoever writes next commits it, and does not compute it."""
EACH_MOMENT = pytest.mark.parametrize("moment", MOMENTS)


@pytest.fixture(scope="session")
def whole(lab: Lab, built: Path) -> dict[str, bytes]:
    """Every file of an uninterrupted build."""
    return lab.tree(built)


def kill(lab: Lab, store: Path, moment: str) -> None:
    outcome = lab.build(store, fault=MOMENTS[moment][0] | {"act": "kill"})
    assert outcome.code == -9, outcome.err


def committed_only(lab: Lab, store: Path, spans: int | None) -> None:
    """Every way of reading shows the rows of ``spans`` spans and no others, or says that there is no part."""
    if spans is None:
        if (store / "zarr.json").exists():
            assert ghoststore.Store.open(store).part_names() == []
            assert ghoststore.info(store).parts == []
        with pytest.raises(UsageError, match=r"has no parts|there is no store"):
            ghoststore.query(store=store, val_set=lab.corpus, device="cpu")
        return
    rows = min(spans * 6, 27)
    part = ghoststore.Store.open(store).part()
    assert (part.rows, part.spans, part.complete) == (rows, list(range(spans)), spans == 5)
    assert ghoststore.info(store).parts[0].committed == rows
    report = ghoststore.verify(store)
    assert (report.sound, report.spans) == (True, spans), report.damage
    if not spans:
        with pytest.raises(UsageError, match="no committed rows yet"):
            ghoststore.query(store=store, val_set=lab.corpus, device="cpu")
        return
    found = ghoststore.query(store=store, val_set=lab.corpus, top_k=100, bottom_k=100, max_samples=3, device="cpu")
    for hits in (found.results[0].hits, found.results[0].bottom):
        assert sorted(hit.source_row for hit in hits) == list(range(rows))


@pytest.mark.kill
@pytest.mark.thin(2)
@EACH_MOMENT
def test_resumes_to_the_same_bytes(lab: Lab, whole: dict[str, bytes], moment: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    kill(lab, store, moment)
    committed_only(lab, store, MOMENTS[moment][1])
    resumed = lab.build(store, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["resumed_rows"] == min(((MOMENTS[moment][1] or 0) + (moment in DECIDED)) * 6, 27)
    found = {name: data for name, data in lab.tree(store).items() if not UNFINISHED.search(name)}
    assert found.keys() == whole.keys()
    assert [name for name in whole if found[name] != whole[name]] == []


@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize("moment", ["part-unnamed", "staging", "first-chunk", "record-unwritten", "record-named"])
def test_resuming_leaves_nothing_behind(lab: Lab, whole: dict[str, bytes], moment: str, tmp_path: Path) -> None:
    """Not even the files that the killed process had begun."""
    store = tmp_path / "store"
    kill(lab, store, moment)
    assert lab.build(store).code == 0
    assert sorted(lab.tree(store).keys() - whole.keys()) == []


@pytest.mark.slow
@pytest.mark.kill
def test_killed_again_and_again(lab: Lab, whole: dict[str, bytes], tmp_path: Path) -> None:
    store = tmp_path / "store"
    for moment in ("first-chunk", "record-unwritten", "record-named", "last-chunk"):
        kill(lab, store, moment)
        committed_only(lab, store, MOMENTS[moment][1])
    assert lab.build(store).code == 0
    found = lab.tree(store)
    assert [name for name in whole if found.get(name) != whole[name]] == []


@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize("moment", ["part-arrays", "between-chunks", "record-named"])
def test_interrupted(lab: Lab, whole: dict[str, bytes], moment: str, tmp_path: Path) -> None:
    """Control-C: exit code 130, a line that says how to go on, and nothing left lying about."""
    store = tmp_path / "store"
    outcome = lab.build(store, fault=MOMENTS[moment][0] | {"act": "interrupt"})
    assert outcome.code == 130
    assert outcome.err.strip() == "Interrupted. Whatever was committed is intact: the same command resumes."
    spans = len(list(store.glob("parts/part/commits/0*.json")))
    committed_only(lab, store, spans if (store / "parts" / "part").exists() else None)
    assert lab.build(store).code == 0
    assert lab.tree(store) == whole


def test_nothing_to_do_changes_nothing(lab: Lab, built: Path, whole: dict[str, bytes]) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in built.rglob("*") if path.is_file()}
    again = lab.build(built, "--json")
    assert (again.code, again.json["resumed_rows"]) == (0, 27)
    assert lab.tree(built) == whole
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*") if path.is_file()} == stamps


def test_all_is_on_the_disk_before_the_record_names_it(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of a span, and every folder that was made for one, is flushed before the record appears: a power
    cut after the record takes nothing with it.
    """
    flushed: set[Path] = set()
    unsafe: list[str] = []
    fsync, link = os.fsync, os.link

    def watched_fsync(handle: int) -> None:
        flushed.add(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def watched_link(source: Path, target: Path) -> None:
        if target.parent.name == "commits" and not target.name.startswith("."):
            part = target.parent.parent
            for key in json.loads(Path(source).read_bytes())["files"]:
                needed = [part / key, *(folder for folder in (part / key).parents if folder.is_relative_to(part))]
                unsafe.extend(str(path.relative_to(part)) for path in needed if path != part and path not in flushed)
        link(source, target)

    monkeypatch.setattr(os, "link", watched_link)
    store = tmp_path / "store"
    ghoststore.Store.create(store)
    rename = os.rename

    def watched_rename(source: Path, target: Path) -> None:
        rename(source, target)
        if source in flushed:
            flushed.add(target)
        flushed.difference_update(target.parents)  # the new name is not on the disk yet
        monkeypatch.setattr(os, "fsync", watched_fsync)  # what counts is flushed after the part has its name

    monkeypatch.setattr(os, "rename", watched_rename)
    ghoststore.build(checkpoint=lab.checkpoint, data=lab.corpus, store=store, name="part", span_rows=6, device="cpu")
    assert flushed
    assert sorted(set(unsafe)) == []
