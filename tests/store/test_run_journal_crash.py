"""A run that is killed, or whose disk refuses, at any write of its journal, and where the journal becomes chunks: at
most the last save interval is lost, and a second writer ends with the same bytes.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore.store import Store
from ghoststore.store.run.journal import journal_damage
from tests.store.test_run_crash import files
from tests.support.runs import JOURNALED, steps_of, train

if TYPE_CHECKING:
    from tests.conftest import Lab

HERE = Path(__file__).parent.parent.parent
MOMENTS: dict[str, tuple[str, str, str, int, int]] = {
    # call, path, when, which, and how many steps are committed then.
    "first-entry-unflushed": ("fsync", r"00000000\.log", "before", 1, 0),
    "first-trailer-unwritten": ("fsync", r"00000000\.log", "after", 1, 0),
    "first-trailer-unflushed": ("fsync", r"00000000\.log", "before", 2, 5),
    "folder-unflushed": ("fsync", r"run/journal$", "before", 1, 5),
    "second-entry-unflushed": ("fsync", r"00000000\.log", "before", 3, 5),
    "second-trailer-unwritten": ("fsync", r"00000000\.log", "after", 3, 5),
    "second-trailer-flushed": ("fsync", r"00000000\.log", "after", 4, 10),
    "span-full": ("fsync", r"00000000\.log", "after", 6, 15),
    "a-chunk": ("fsync", r"run/(\.[^/]*/)?(tokens/c/|.*tokens)", "before", 1, 15),
    "record-unnamed": ("name", r"commits/00000000\.json$", "before", 1, 15),
    "record-named": ("name", r"commits/00000000\.json$", "after", 1, 15),
    "journal-removed": ("fsync", r"run/journal$", "before", 2, 15),
    "second-journal": ("fsync", r"00000001\.log", "after", 1, 15),
    "last-interval": ("fsync", r"00000001\.log", "after", 4, 23),
    "last-record-unnamed": ("name", r"commits/00000001\.json$", "before", 1, 23),
    "last-journal-removed": ("fsync", r"run/journal$", "after", 4, 23),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of an uninterrupted run."""
    store = tmp_path_factory.mktemp("whole") / "store"
    train(store, layout=JOURNALED)
    return files(store)


def code(store: Path) -> str:
    """Python for a process of its own that trains."""
    return (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport pathlib\nfrom tests.support import runs\n"
        f"runs.train(pathlib.Path({str(store)!r}), layout=runs.JOURNALED)"
    )


def fault(moment: str, act: str) -> dict[str, Any]:
    call, path, when, number, _ = MOMENTS[moment]
    return {"call": call, "path": path, "when": when, "number": number, "act": act}


def whole_until(store: Path, steps: int) -> None:
    """The run has these steps and no others, all of them sound."""
    run = Store.open(store).run()
    assert steps_of(run) == list(range(steps))
    assert journal_damage(run) == []
    assert ghoststore.verify(store).sound
    assert ghoststore.info(store).runs[0].committed == steps


@pytest.mark.kill
@pytest.mark.thin(2)
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(lab: Lab, whole: dict[str, bytes], moment: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    outcome = lab.run(code=code(store), fault=fault(moment, "kill"))
    assert outcome.code == -9, outcome.err
    whole_until(store, MOMENTS[moment][4])
    train(store, layout=JOURNALED)
    assert files(store) == whole


@pytest.mark.kill
@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 130, 5))
def test_killed_at_any_flush(lab: Lab, whole: dict[str, bytes], number: int, tmp_path: Path) -> None:
    store = tmp_path / "store"
    outcome = lab.run(code=code(store), fault={"call": "fsync", "path": r"runs/run/", "number": number, "act": "kill"})
    if outcome.code:
        assert outcome.code == -9, outcome.err
        assert len(steps_of(Store.open(store).run())) in (0, 5, 10, 15, 20, 23)
    train(store, layout=JOURNALED)
    assert files(store) == whole


# Every error is one class and one sentence, wherever it comes: each moment has one of them.
@pytest.mark.kill
@pytest.mark.thin(2)
@pytest.mark.parametrize(("moment", "error"), list(zip(MOMENTS, cycle(["ENOSPC", "EIO", "EROFS", "EDQUOT"]))))
def test_the_disk_refuses(lab: Lab, whole: dict[str, bytes], moment: str, error: str, tmp_path: Path) -> None:
    """A StorageError in one sentence; what is committed is read, and the same goes on when the disk does."""
    store = tmp_path / "store"
    outcome = lab.run(code=code(store), fault=fault(moment, error))
    assert outcome.code == 1, outcome.err
    assert outcome.err.strip().splitlines()[-1].startswith("ghoststore.errors.StorageError: cannot write")
    whole_until(store, MOMENTS[moment][4])
    train(store, layout=JOURNALED)
    assert files(store) == whole


WRITES = """
import os
real = os.pwrite
count = 0

def pwrite(handle, data, place):
    global count
    count += 1
    if count < {number}:
        return real(handle, data, place)
    {act}

os.pwrite = pwrite
"""


@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize("number", [1, 2, 14, 27, 28, 29, 40, 57, 70, 85])
@pytest.mark.parametrize("act", ["die", "short"])
def test_killed_at_any_write(lab: Lab, whole: dict[str, bytes], number: int, act: str, tmp_path: Path) -> None:
    """Between two writes, or after half of one; a system that takes a byte at a time is no error."""
    store = tmp_path / "store"
    acts = {
        "die": "real(handle, data[: len(data) // 2], place); os.kill(os.getpid(), 9)",
        "short": "return real(handle, data[: max(1, len(data) // 2)], place)",
    }
    outcome = lab.run(code=WRITES.format(number=number, act=acts[act]) + code(store))
    assert outcome.code == {"die": -9, "short": 0}[act], outcome.err
    steps = len(steps_of(Store.open(store).run()))
    assert steps == {"die": (number - 1) // 29 * 5, "short": 23}[act]
    assert journal_damage(Store.open(store).run()) == []
    train(store, layout=JOURNALED)
    assert files(store) == whole
