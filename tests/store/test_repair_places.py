"""Something else stands where a folder or a file of a part or run belongs: it is named, moved out of the way by a
repair, and never removed; what is of no span of the part or run is put aside, and goes with `gc`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore
from ghoststore.errors import CorruptError
from ghoststore.store import Run, RunWriter, Store
from ghoststore.store.run.journal import journal_path
from tests.support.runs import JOURNALED, files, steps_of, train

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A run of one committed span and a journal."""
    train(tmp_path / "store", layout=JOURNALED, stop=20)
    return tmp_path / "store"


def folder(store: Path) -> Path:
    return store / "runs" / "run"


def file_instead(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.write_text("mine")


def folder_instead(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "mine").write_text("mine")


def pipe_instead(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


Place = Callable[[Path], None]
PLACES: dict[str, tuple[str, Place, list[int]]] = {
    # A place in the run, what comes there, and the steps that are left.
    "commits": ("commits", file_instead, list(range(20))),
    "journal": ("journal", file_instead, list(range(15))),
    "writers": (".writers", file_instead, list(range(20))),
    "withdrawn": (".withdrawn", file_instead, list(range(20))),
    "record": ("commits/00000000.json", folder_instead, list(range(20))),
    "metadata": ("commits/zarr.json", folder_instead, list(range(20))),
    "array": ("journal/zarr.json", pipe_instead, list(range(20))),
    "skipped": ("journal/skipped.json", folder_instead, list(range(20))),
    "log": ("journal/00000001.log", pipe_instead, list(range(15))),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("place", PLACES)
def test_something_else_in_a_run(store: Path, place: str) -> None:
    name, put, left = PLACES[place]
    put(folder(store) / name)
    there = lambda: [path for path in folder(store).rglob("*") if "moved-aside" in path.name]  # noqa: E731
    if place != "withdrawn":  # which nobody needs
        assert not ghoststore.verify(store).sound
    repaired = ghoststore.repair(store=store)
    assert repaired.sound, repaired.unmended
    assert any("something else stood there" in mended.how for mended in repaired.mended)
    (aside,) = there()
    assert aside.name == f"{Path(name).name.lstrip('.')}.moved-aside"
    report = ghoststore.verify(store)
    assert report.sound
    assert [file.file.partition("/mine")[0] for file in report.unknown] == [str(aside.relative_to(folder(store)))]
    assert steps_of(Store.open(store).run()) == left
    before = files(store)
    ghoststore.gc(store)
    assert there() == [aside]
    assert files(store) == before
    train(store, layout=JOURNALED, start=left[-1] + 1)
    assert Store.open(store).run().complete


def test_something_else_a_second_time(store: Path) -> None:
    """What is aside already is not written over."""
    for text in ("first", "second"):
        (folder(store) / ".writers").write_text(text)
        assert ghoststore.repair(store=store).sound
    texts = {path.read_text() for path in folder(store).glob("writers.moved-aside*")}
    assert texts == {"first", "second"}


@pytest.mark.slow
def test_nobody_writes_where_the_folder_of_writers_is_a_file(lab: Lab, built: Path, tmp_path: Path) -> None:
    """A build says so, and what mends it."""
    store = Path(shutil.copytree(built, tmp_path / "store"))
    (store / "parts/part/.writers").write_text("mine")
    outcome = lab.build(store)
    assert outcome.code == 4
    assert ".writers: no folder" in outcome.err
    assert f"ghoststore repair --store {store} --part part" in outcome.err
    assert lab.run("repair", "--store", store).code == 0
    assert lab.build(store).code == 0


@pytest.mark.parametrize("name", ["zarr.json", "runs/zarr.json", "parts/zarr.json"])
def test_something_else_in_a_store(store: Path, name: str) -> None:
    """It is no part or run afterwards: a second repair has nothing to do."""
    before = files(store)
    folder_instead(store / name)
    assert ghoststore.repair(store=store).sound
    again = ghoststore.repair(store=store)
    assert (again.mended, again.unmended, again.runs) == ([], [], ["run"])
    assert ghoststore.verify(store).sound
    now = files(store)
    assert now.pop(f"{name}.moved-aside/mine") == b"mine"
    assert now == before


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    "name", ["commits", "loss", "loss/c", "vectors/c/1", "commits/00000002.json", "span_start/c/0", "projection_in"]
)
def test_something_else_in_a_part(lab: Lab, built: Path, tmp_path: Path, name: str) -> None:
    """One repair, and the part is what it was."""
    store = Path(shutil.copytree(built, tmp_path / "store"))
    place = store / "parts/part" / name
    (folder_instead if place.is_file() else file_instead)(place)
    outcome = lab.run("verify", "--store", store)
    assert outcome.code == 4, outcome.out
    outcome = lab.run("repair", "--store", store)
    assert outcome.code == 0, outcome.out
    tree = lab.tree(store)
    (aside,) = {path for path in tree if "moved-aside" in path}
    assert tree.pop(aside) == b"mine"
    assert tree == lab.tree(built)


def test_what_is_of_no_span_is_put_aside(store: Path) -> None:
    """A journal and a record of spans that the run does not have: named, aside after a repair, gone after `gc`."""
    before = files(store)
    shutil.copy(folder(store) / "commits/00000000.json", folder(store) / "commits/00000009.json")
    shutil.copy(journal_path(folder(store), 1), journal_path(folder(store), 7))
    with pytest.raises(CorruptError, match=r"a journal of span 7.*ghoststore repair --store .* --run run"):
        Run(folder(store))
    report = ghoststore.verify(store)
    assert "a journal of span 7, but there are 2 spans" in report.damage[0].problem
    assert "ghoststore repair" in ghoststore.gc(store).skipped[0].why
    repaired = ghoststore.repair(store=store)
    assert [(mended.file, mended.how) for mended in repaired.mended] == [
        ("commits/00000009.json", "moved aside: there are 2 spans"),
        ("journal/00000007.log", "moved aside: there are 2 spans"),
    ]
    assert repaired.sound
    with RunWriter(Run(folder(store))):
        pass
    assert [file.file for file in ghoststore.gc(store).removed] == [".withdrawn/foreign"]
    assert files(store) == before
