"""Parts and runs removed, renamed and copied; leftovers collected."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore
from ghoststore.errors import BusyError, CorruptError, UsageError
from ghoststore.store import Store
from ghoststore.store.base.disk import exclusive
from ghoststore.store.base.writers import FOLDER, living, unfinished
from ghoststore.store.part.indexes import building
from tests.support.harms import delete, flip_middle, truncate
from tests.support.runs import train
from tests.support.writers import record

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    """With a part and a run."""
    shutil.copytree(built, tmp_path / "store")
    train(tmp_path / "store")
    return tmp_path / "store"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def old(path: Path) -> Path:
    """As if it had been written an hour ago."""
    stamp = path.stat().st_mtime - 3600
    os.utime(path, (stamp, stamp))
    return path


def write(path: Path, data: bytes = b"half") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# rm


def test_remove(lab: Lab, store: Path) -> None:
    flip_middle(store / "parts/part/zarr.json")  # however damaged
    outcome = lab.run("rm", "--store", store, "--part", "part", "--yes", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["bytes"] > 10_000
    assert Store.open(store).part_names() == []
    assert ghoststore.remove(store, run="run").run == "run"
    assert not [path for path in store.rglob("*") if path.is_file() and path.name != "zarr.json"]


def test_remove_asks(lab: Lab, store: Path) -> None:
    """On a terminal; where there is none, it wants to be told."""
    before = tree(store)
    outcome = lab.run("rm", "--store", store, "--part", "part")
    assert outcome.code == 2
    assert "--yes" in outcome.err
    assert tree(store) == before


@pytest.mark.kill
def test_remove_killed(lab: Lab, store: Path) -> None:
    """It is gone, or it is there; what was left to delete, `gc` removes."""
    fault = {"call": "name", "path": r"parts/part -> ", "when": "after", "act": "kill"}
    assert lab.run("rm", "--store", store, "--part", "part", "--yes", fault=fault).code == -9
    assert Store.open(store).part_names() == []
    report = ghoststore.verify(store)
    assert report.sound
    assert [file.file.startswith("parts/.part.") for file in report.leftovers] == [True]
    removed = ghoststore.gc(store)
    assert removed.bytes == sum(file.bytes for file in report.leftovers)
    assert list((store / "parts").iterdir()) == [store / "parts/zarr.json"]


@pytest.mark.parametrize("act", ["remove", "rename"])
def test_not_while_it_is_written(store: Path, act: str) -> None:
    more = {"to_name": "other"} if act == "rename" else {}
    with exclusive(store / "parts/part", "part"), pytest.raises(BusyError, match="part 'part'"):
        getattr(ghoststore, act)(store, part="part", **more)
    assert Store.open(store).part_names() == ["part"]


@pytest.mark.parametrize("act", ["remove", "rename"])
def test_not_while_an_index_of_it_is_built(store: Path, act: str) -> None:
    """Not by a process of this machine, nor by one of another, which alone its record tells of."""
    more = {"to_name": "other"} if act == "rename" else {}

    def refused(words: str) -> None:
        with pytest.raises(BusyError, match=rf"index 'flat' of part 'part' is being written .*{words}.*, since "):
            getattr(ghoststore, act)(store, part="part", **more)

    with building(Store.open(store).part("part"), "flat"):
        refused(rf"process {os.getpid()} on ")
    path = record(store / "parts/part/index/flat", "node7-4711-0123abcd")
    refused("process 4711 on node7")
    assert Store.open(store).part_names() == ["part"]
    old(path)
    getattr(ghoststore, act)(store, part="part", **more)


@pytest.mark.parametrize("command", ["rm", "mv", "repair", "gc", "index --remove flat", "build"])
def test_advice_of_the_busy_can_be_followed(lab: Lab, store: Path, command: str) -> None:
    """No option is named that the command does not have, or that would not help."""
    part = store / "parts/part"
    if command.startswith("index"):
        part = write(part / "index/flat/index.json", b"{}").parent
    words, given = command.split(), {"rm": ["--part", "part", "--yes"], "mv": ["--part", "part", "--to-name", "other"]}
    with exclusive(part, "it"):
        outcome = lab.build(store) if command == "build" else lab.run(*words, "--store", store, *given.get(command, []))
    text = outcome.err + outcome.out
    assert outcome.code == (0 if command == "gc" else 5), text
    assert "is being written by another process; wait for it" in " ".join(text.split())
    assert "`" not in text
    assert ("or choose another --name" in text) == (command == "build")
    assert ("choose another" in text) == (command == "build")


def test_one_part_or_one_run(store: Path) -> None:
    for names in ({}, {"part": "part", "run": "run"}):
        with pytest.raises(UsageError, match="`part` or `run`"):
            ghoststore.remove(store, **names)
    with pytest.raises(UsageError, match=r"no part 'other'; it has: part"):
        ghoststore.remove(store, part="other")
    with pytest.raises(UsageError, match="cannot name a part"):
        ghoststore.rename(store, part="part", to_name="../part")


# mv


def test_rename(lab: Lab, store: Path) -> None:
    """The folder as it is, indexes and caches with it."""
    query = ("--store", store, "--val-set", lab.corpus, "--precondition", "second-moment", "--json", "--quiet")
    first = lab.run("query", *query).json
    before = tree(store / "parts/part")
    outcome = lab.run("mv", "--store", store, "--part", "part", "--to-name", "other", "--json")
    assert outcome.json["to_name"] == "other"
    assert tree(store / "parts/other") == before
    assert lab.run("query", *query).json["results"] == first["results"]
    assert ghoststore.rename(store, run="run", to_name="run-2").to_name == "run-2"
    assert ghoststore.verify(store).sound
    assert lab.build(store, "--name", "other").code == 0


def test_rename_onto_another(store: Path) -> None:
    ghoststore.copy(store, part="part", to_name="other")
    before = tree(store)
    with pytest.raises(UsageError, match=r"has a part 'other' already"):
        ghoststore.rename(store, part="part", to_name="other")
    assert tree(store) == before


# cp


def test_copy(lab: Lab, built: Path, store: Path, tmp_path: Path) -> None:
    """To another store, which is made; byte for byte, but for caches."""
    write(store / "parts/part/mine.txt")
    outcome = lab.run("cp", "--store", store, "--part", "part", "--to-store", tmp_path / "other", "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    assert (outcome.json["complete"], outcome.json["spans"]) == (True, 5)
    assert tree(tmp_path / "other") == tree(built)
    report = ghoststore.copy(store, run="run", to_store=tmp_path / "other", to_name="run-2")
    assert tree(tmp_path / "other/runs/run-2") == tree(store / "runs/run")
    assert report.bytes == sum(map(len, tree(store / "runs/run").values()))
    with pytest.raises(UsageError, match="already"):
        ghoststore.copy(store, part="part", to_store=tmp_path / "other")


def test_a_copy_of_what_is_committed(lab: Lab, built: Path, store: Path) -> None:
    """A part that is not complete; the copy goes on by itself."""
    for path in [path for path in (store / "parts/part").rglob("*") if path.parent.name == "c" and path.name == "4"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    delete(store / "parts/part/commits/00000004.json")
    write(store / "parts/part/.staged.tmp")
    report = ghoststore.copy(store, part="part", to_name="copy")
    assert (report.complete, report.spans) == (False, 4)
    assert not (store / "parts/copy/.staged.tmp").exists()
    assert lab.build(store, "--name", "copy").code == 0
    assert tree(store / "parts/copy") == tree(built / "parts/part")


@pytest.mark.parametrize("file", ["vectors/c/1/0", "commits/00000002.json", "sample_id/zarr.json", "span_start/c/0/0"])
def test_damage_is_not_copied(store: Path, tmp_path: Path, file: str) -> None:
    flip_middle(store / "parts/part" / file)
    with pytest.raises(CorruptError, match=file.split("/")[-1]):
        ghoststore.copy(store, part="part", to_store=tmp_path / "other")
    assert Store.open(tmp_path / "other").part_names() == []
    assert list((tmp_path / "other/parts").iterdir()) == [tmp_path / "other/parts/zarr.json"]


@pytest.mark.kill
def test_copy_killed(lab: Lab, built: Path, store: Path, tmp_path: Path) -> None:
    """Whole or not at all, and again it works."""
    copy = ("cp", "--store", store, "--part", "part", "--to-store", tmp_path / "other", "--quiet")
    for fault in (
        {"call": "fsync", "path": r"norm/c/2/0$", "when": "before", "act": "kill"},
        {"call": "name", "path": r"parts/part$", "when": "before", "act": "kill"},
    ):
        assert lab.run(*copy, fault=fault).code == -9
        assert Store.open(tmp_path / "other").part_names() == []
    assert lab.run(*copy).code == 0
    assert tree(tmp_path / "other") == tree(built)


# gc and what verify lists


def test_unknown_files_are_listed_and_left_alone(lab: Lab, store: Path) -> None:
    """Nothing hides: in the store, between parts, in a part, among chunks and caches."""
    unknown = {
        "README": None,
        "parts/notes.txt": None,
        "parts/not a part/file": None,
        "mine/file": "part",
        "vectors/c/99/0": "part",
        "vectors/c/1/extra": "part",
        "commits/one.json": "part",
        "index/flat/notes": "part",
        "second_moment/notes": "part",
    }
    for name, owner in unknown.items():
        write(store / ("parts/part" if owner else "") / name)
    report = ghoststore.verify(store)
    assert report.sound or {damage.file for damage in report.damage} <= {"index/zarr.json", "second_moment/zarr.json"}
    listed = {(file.file, file.part) for file in report.unknown}
    assert listed == {(name.removesuffix("/file") if "not a part" in name else name, o) for name, o in unknown.items()}
    assert "vectors/c/99/0" in lab.run("verify", "--store", store).out
    before = tree(store)
    ghoststore.gc(store)
    assert tree(store) == before


def test_leftovers_are_collected(lab: Lab, store: Path) -> None:
    """What dead writers had begun, anywhere; a dry run lists the same and removes nothing."""
    before = tree(store)
    part = store / "parts/part"
    leftovers = [
        store / ".zarr.json.12.tmp",
        store / "parts/.begun.tmp/zarr.json",
        store / "runs/.run.host-1-00000000.0.tmp/zarr.json",
        part / "vectors/c/1/.0.host-1-ab.staged",
        part / "commits/.00000001.intent",
        part / "commits/.00000002.recorded",
        part / "commits/.00000001.json.1.tmp",
        part / ".withdrawn/00000002/record.json",
        part / f"loss/c/1.{'0' * 32}.partial",
        part / "index/flat/begun.faiss",
        part / "index/flat/zarr.json",
        part / "second_moment/.second_moment.1.tmp",
        part / "second_moment/second_moment-0123456789abcdef.safetensors",
        store / "runs/run/score/c/.0.tmp",
    ]
    for path in leftovers:
        old(write(path))
        if path.name == "zarr.json" and path.parent.name.startswith("."):
            old(path.parent)
    for folder in ("index", "second_moment"):
        write(part / folder / "zarr.json", b'{"attributes": {}, "zarr_format": 3, "node_type": "group"}')
    before |= {
        f"parts/part/{folder}/zarr.json": tree(store)[f"parts/part/{folder}/zarr.json"]
        for folder in ("index", "second_moment")
    }
    report = ghoststore.verify(store)
    assert report.sound, report.damage
    assert report.unknown == []
    assert len(report.leftovers) == len(leftovers)
    full = tree(store)
    dry = lab.run("gc", "--store", store, "--dry-run", "--json", "--quiet").json
    assert tree(store) == full
    done = lab.run("gc", "--store", store, "--json", "--quiet").json
    assert (dry["removed"], dry["bytes"]) == (done["removed"], done["bytes"])
    assert done["bytes"] == sum(len(full[name]) for name in full.keys() - before.keys())
    assert tree(store) == before
    assert ghoststore.gc(store).removed == []


def test_a_living_writers_files_are_not_collected(lab: Lab, store: Path) -> None:
    """Neither in a part that it writes, nor what has its name, nor what is young and nobody's."""
    part = store / "parts/part"
    staged = old(write(part / "commits/.00000001.loss.c.1.tmp"))
    begun = unfinished(store / "parts/begun")
    write(begun / "zarr.json")
    young = write(part / "second_moment/.second_moment.1.tmp")
    with exclusive(part, "part"):
        report = ghoststore.gc(store)
    assert report.removed == []
    assert [skipped.part for skipped in report.skipped] == ["part"]
    assert str(os.getpid()) in report.skipped[0].why
    assert [file.file for file in ghoststore.gc(store).removed] == ["commits/.00000001.loss.c.1.tmp"]
    assert (staged.exists(), begun.exists(), young.exists()) == (False, True, True)


def test_a_writer_that_comes_while_the_dead_are_collected_stays(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another machine, where no lock holds it back: its record is what keeps others out."""
    folder = store / "parts/part"
    dead = record(folder, "node7-1-0123abcd", 3600)

    def coming(*arguments: object) -> set[int]:
        record(folder, "node8-1-0123abcd")
        return set()

    monkeypatch.setattr("ghoststore.store.manage.gc.undecided", coming)
    report = ghoststore.gc(store, part="part")
    assert [file.file for file in report.removed] == [f"{FOLDER}/{dead.name}"]
    assert not dead.exists()
    assert [writer.host for writer in living(folder)] == ["node8"]


def test_a_damaged_part_is_not_collected(store: Path) -> None:
    """Its leftovers, and chunks without a record, may be what a repair needs."""
    staged = old(write(store / "parts/part/vectors/c/1/.0.host-1-ab.staged"))
    delete(store / "parts/part/commits/00000001.json")
    before = tree(store)
    report = ghoststore.gc(store)
    assert report.removed == []
    assert "ghoststore repair" in report.skipped[0].why
    assert tree(store) == before
    assert staged.exists()


def test_what_is_decided_is_not_collected(store: Path) -> None:
    """An intent without a record may still be finished, with the files that are staged."""
    old(write(store / "parts/part/vectors/c/1/.0.host-1-ab.staged"))
    record = store / "parts/part/commits/00000001.json"
    record.rename(record.with_name(".00000001.intent"))
    before = tree(store)
    report = ghoststore.gc(store)
    assert report.removed == []
    assert "span 1 is decided" in report.skipped[0].why
    assert tree(store) == before


@pytest.mark.slow
@pytest.mark.kill
def test_nobody_begins_while_leftovers_are_collected(lab: Lab, store: Path) -> None:
    """Where locks do nothing, too: what a writer has just put there would be taken for a dead one's."""
    no_lock = "import fcntl\nfcntl.flock = lambda *_: None\n"
    old(write(store / "runs/run/score/c/.0.tmp"))
    words = ["gc", "--store", str(store), "--run", "run"]
    stop = {"call": "unlink", "path": r"score/c/\.0\.tmp$", "when": "before", "act": "stop"}
    gc = lab.start(code=f"{no_lock}import ghoststore.cli\nghoststore.cli.main({words!r})", fault=stop)
    lab.stopped(gc)
    train = "import pathlib, runs\nruns.train(pathlib.Path({!r}))"
    outcome = lab.run(code=no_lock + train.format(str(store)))
    assert "BusyError" in outcome.err, outcome.err
    os.kill(gc, signal.SIGCONT)
    assert lab.wait(gc).code == 0
    assert not (store / "runs/run/.writers").exists()


def test_a_run_that_is_committed_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its journal is gone when the copy begins: the copy has the span."""
    from ghoststore.store.manage import copy as copying
    from tests.support.runs import JOURNALED, steps_of, train

    store = tmp_path / "store"
    train(store, layout=JOURNALED, stop=12)
    real = copying.create_whole

    def later(path: Path, fill: Callable[[Path], None]) -> None:
        train(store, layout=JOURNALED, start=10, stop=20)
        real(path, fill)

    monkeypatch.setattr(copying, "create_whole", later)
    copied = ghoststore.copy(store=store, run="run", to_name="copy")
    assert copied.spans == 1
    assert steps_of(Store.open(store).run("copy")) == list(range(20))
    assert ghoststore.verify(store).sound


@pytest.mark.slow
def test_stale_caches(lab: Lab, store: Path) -> None:
    """Only where that is asked for, and never current ones."""
    asked = ["--precondition", "second-moment", "--metric", "cosine", "--quiet"]
    query = ("query", "--store", store, "--val-set", lab.corpus, *asked)
    part = store / "parts/part"
    aside = store.parent / "aside"
    for path in [path for path in part.rglob("*") if path.parent.name == "c" and path.name == "4"]:
        (aside / path.relative_to(part)).parent.mkdir(parents=True, exist_ok=True)
        path.rename(aside / path.relative_to(part))
    (part / "commits/00000004.json").rename(aside / "record")
    assert lab.run(*query).code == 0
    assert ghoststore.gc(store, caches=True).removed == []
    for path in list(aside.rglob("4")):
        path.rename(part / path.relative_to(aside))
    (aside / "record").rename(part / "commits/00000004.json")
    assert ghoststore.gc(store).removed == []
    assert [file.file for file in ghoststore.gc(store, caches=True).removed] == [
        "second_moment/second_moment.json",
        "second_moment/self_influence-0.1.json",
    ]
    assert list((part / "second_moment").iterdir()) == [part / "second_moment/zarr.json"]


def test_a_part_that_lies_elsewhere_is_removed_from_the_store_alone(lab: Lab, built: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(built, tmp_path / "store"))
    (store / "parts/part").rename(tmp_path / "elsewhere")
    (store / "parts/part").symlink_to(tmp_path / "elsewhere")
    before = lab.tree(tmp_path / "elsewhere")
    assert lab.run("rm", "--store", store, "--part", "part", "--yes").code == 0
    assert Store.open(store).part_names() == []
    assert lab.tree(tmp_path / "elsewhere") == before


def test_a_part_of_another_format_stops_nobody(lab: Lab, built: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(built, tmp_path / "store"))
    shutil.copytree(store / "parts/part", store / "parts/later")
    group = store / "parts/later/zarr.json"
    group.write_text(group.read_text().replace('"ghoststore_format": 1', '"ghoststore_format": 99'))
    truncate(store / "parts/part/loss/c/1")
    assert lab.run("gc", "--store", store).code == 0
    outcome = lab.run("repair", "--store", store, "--json", "--quiet")
    assert outcome.code == 4
    assert [one["part"] for one in outcome.json["unmended"]] == ["later"]
    assert [one["how"] for one in outcome.json["mended"]] == ["rebuilt"]
