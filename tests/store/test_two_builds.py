"""Two builds of one part at once: one truth, and the other is refused or finds the work done."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore
from ghoststore.errors import BusyError
from ghoststore.store.spans.writer import writing

if TYPE_CHECKING:
    from tests.conftest import Lab


def command(lab: Lab, store: Path) -> list[str]:
    return [
        "build",
        "--checkpoint",
        str(lab.checkpoint),
        "--data",
        str(lab.corpus),
        "--store",
        str(store),
        "--span-rows",
        "6",
        "--name",
        "part",
        "--quiet",
    ]


def test_second_is_refused(lab: Lab, built: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    half = lab.build(store, fault={"call": "name", "path": r"00000002\.json$", "when": "before", "act": "EIO"})
    assert half.code == 6
    with writing(ghoststore.Store.open(store).part()):  # commits span 2, whose intent stands
        before = lab.tree(store)
        outcome = lab.build(store)
        assert outcome.code == 5, outcome.err
        assert "part 'part' is being written by another process" in outcome.err
        assert f"It is process {os.getpid()} on " in outcome.err
        assert lab.tree(store) == before
        with pytest.raises(BusyError):
            ghoststore.build(
                checkpoint=lab.checkpoint, data=lab.corpus, store=store, name="part", span_rows=6, device="cpu"
            )
        assert ghoststore.query(store=store, val_set=lab.corpus, device="cpu").settings["rows"] == 18
        assert lab.run("verify", "--store", store).code == 0
    assert lab.build(store).code == 0
    assert [name for name, data in lab.tree(built).items() if lab.tree(store).get(name) != data] == []


@pytest.mark.slow
def test_at_the_same_time(lab: Lab, built: Path, tmp_path: Path) -> None:
    """Three builds started together on a store that is there: nothing is lost whoever wins."""
    store = tmp_path / "store"
    ghoststore.Store.create(store)
    started = [lab.start(*command(lab, store)) for _ in range(3)]
    outcomes = [lab.wait(pid) for pid in started]
    assert {outcome.code for outcome in outcomes} <= {0, 5}, [outcome.err for outcome in outcomes]
    assert 0 in {outcome.code for outcome in outcomes}
    assert lab.tree(store) == lab.tree(built)


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("call", "path"),
    [
        ("name", r"parts/zarr\.json$"),
        ("name", r"store/zarr\.json$"),
        ("name", r"parts/\.part.*/norm/zarr\.json$"),
        ("name", r"parts/part$"),
        ("fsync", r"commits/\.00000000\.vectors\."),
    ],
    ids=["store-begun", "store-unnamed", "part-begun", "part-unnamed", "span"],
)
def test_overtaken(lab: Lab, built: Path, call: str, path: str, tmp_path: Path) -> None:
    """A second build does everything that it may while the first stands at one place."""
    store = tmp_path / "store"
    first = lab.start(*command(lab, store), fault={"call": call, "path": path, "when": "before", "act": "stop"})
    lab.stopped(first)
    second = lab.run(*command(lab, store))
    os.kill(first, signal.SIGCONT)
    outcomes = [lab.wait(first), second]
    assert [outcome.code for outcome in outcomes] in ([0, 0], [0, 5]), [outcome.err for outcome in outcomes]
    assert lab.tree(store) == lab.tree(built)


@pytest.mark.slow
@pytest.mark.parametrize("place", [r"parts/\.part.*/norm/zarr\.json$", r"parts/part$"])
def test_overtaken_by_another_part(lab: Lab, place: str, tmp_path: Path) -> None:
    """The same name with other settings: one is built, the other is refused, with both values or as busy."""
    store = tmp_path / "store"
    first = lab.start(*command(lab, store), fault={"call": "name", "path": place, "when": "before", "act": "stop"})
    lab.stopped(first)
    second = lab.run(*command(lab, store), "--proj-seed", "77")
    os.kill(first, signal.SIGCONT)
    outcome = lab.wait(first)
    assert (outcome.code, second.code) in ((3, 0), (0, 5)), second.err + outcome.err
    assert outcome.code == 0 or "other settings" in outcome.err
    (part,) = ghoststore.info(store).parts
    assert part.complete
    assert part.manifest["projection"]["seed"] == (0 if outcome.code == 0 else 77)
    assert ghoststore.verify(store).sound
