"""What could mend a span of a run stays until that was read whole: a journal beside a record, what was withdrawn."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import ghoststore
from ghoststore.errors import CorruptError
from ghoststore.store import Run, RunWriter, Store
from ghoststore.store.run import saver
from ghoststore.store.run.journal import journal_path
from tests.support.harms import delete, flip, flip_middle, truncate
from tests.support.runs import JOURNALED, files, steps_of, train

STEPS = list(range(JOURNALED.steps))
CHUNK = "score/c/0/0/0"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("whole") / "store"
    train(store, layout=JOURNALED)
    return store


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose writer was killed each time before it removed a journal whose span has its record."""
    store = tmp_path_factory.mktemp("beside") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "remove", lambda journal: None)
        train(store, layout=JOURNALED)
    return store


@pytest.fixture
def store(beside: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(beside, tmp_path / "store"))


def folder(store: Path) -> Path:
    return store / "runs" / "run"


def journals(store: Path) -> list[str]:
    return sorted(path.name for path in (folder(store) / "journal").glob("*.log"))


def test_a_sound_span_needs_no_journal(store: Path, whole: Path) -> None:
    assert journals(store) == ["00000000.log", "00000001.log"]
    removed = ghoststore.gc(store).removed
    assert [file.file for file in removed] == ["journal/00000000.log", "journal/00000001.log"]
    assert files(store) == files(whole)


def test_a_damaged_span_keeps_its_journal(store: Path, whole: Path) -> None:
    """`gc` and a training leave it, and say what mends the run; `repair` does, and then it goes."""
    flip_middle(folder(store) / CHUNK)
    harmed = files(store)
    collected = ghoststore.gc(store)
    assert collected.removed == []
    assert f"{CHUNK}: its SHA-256 is not that of what was written" in collected.skipped[0].why
    with pytest.raises(CorruptError, match=r"ghoststore repair --store .* --run run"), RunWriter(Run(folder(store))):
        pass
    assert files(store) == harmed
    repaired = ghoststore.repair(store=store)
    assert [(mended.file, mended.how) for mended in repaired.mended] == [
        ("commits/00000000.json", "rebuilt from its journal")
    ]
    assert repaired.sound
    assert journals(store) == ["00000001.log"]
    ghoststore.gc(store)
    assert files(store) == files(whole)


HARMS: dict[str, Callable[[Path], None]] = {
    "chunk and record": lambda run: (flip_middle(run / CHUNK), flip_middle(run / "commits/00000000.json")),
    "chunk and lost record": lambda run: (truncate(run / CHUNK), delete(run / "commits/00000000.json")),
    "lost record": lambda run: delete(run / "commits/00000000.json"),
    "metadata and chunk": lambda run: (truncate(run / "score/zarr.json"), delete(run / CHUNK)),
    "every chunk": lambda run: [
        delete(path) for path in run.rglob("c/0") if path.is_file() and "rows" not in path.parts
    ],
    "records": lambda run: shutil.rmtree(run / "commits"),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("harm", HARMS)
def test_a_journal_mends_its_span(store: Path, whole: Path, harm: str) -> None:
    """Whatever is damaged of it, in one repair."""
    HARMS[harm](folder(store))
    assert not ghoststore.verify(store).sound
    assert ghoststore.repair(store=store).sound
    ghoststore.gc(store)
    assert files(store) == files(whole)


def test_a_journal_that_is_damaged_too(store: Path) -> None:
    """Nothing is restored from it; what of it holds is there when the damaged span is taken out."""
    flip_middle(folder(store) / CHUNK)
    flip(journal_path(folder(store), 0), 700)
    repaired = ghoststore.repair(store=store)
    assert [left.file for left in repaired.unmended] == [CHUNK]
    assert journals(store)[0] == "00000000.log"
    repaired = ghoststore.repair(store=store, drop_damaged=True)
    assert [mended.how for mended in repaired.mended] == ["taken out: steps 1 to 5 are lost"]
    assert repaired.sound
    assert steps_of(Store.open(store).run()) == STEPS[5:]
    assert ghoststore.verify(store).sound


def test_withdrawn_files_stay_beside_a_damaged_span(store: Path, whole: Path) -> None:
    """A repair was killed when it had made a span again, and that is damaged since."""
    ghoststore.gc(store)
    aside = folder(store) / ".withdrawn/00000000"
    aside.mkdir(parents=True)
    (aside / "record.json").write_text("{}")
    flip_middle(folder(store) / CHUNK)
    assert ghoststore.gc(store).removed == []
    assert not ghoststore.repair(store=store).sound
    assert aside.is_dir()
    flip_middle(folder(store) / CHUNK)
    assert [file.file for file in ghoststore.gc(store).removed] == [".withdrawn/00000000"]
    assert files(store) == files(whole)


@pytest.mark.thin(1)
@pytest.mark.parametrize("moved", [4, 1])
def test_a_span_that_was_half_taken_out_is_put_back(store: Path, moved: int) -> None:
    """`repair --drop-damaged` was killed in the middle: without it, the span is as before, and its damage named."""
    from ghoststore.store.spans import withdrawn

    ghoststore.gc(store)
    flip_middle(folder(store) / CHUNK)
    harmed = files(store)
    run = Run(folder(store))
    to = withdrawn.withdrawn_folder(run, 0)
    to.mkdir(parents=True)
    (folder(store) / "commits/00000000.json").rename(to / "record.json")
    for key in run.layout.span_keys(0)[: moved - 1]:
        (run.path / key).rename(to / key.replace("/", "+"))
    repaired = ghoststore.repair(store=store)
    assert [left.file for left in repaired.unmended] == [CHUNK]
    assert files(store) == harmed
