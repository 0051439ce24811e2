"""Files of a part and of runs with journals harmed in turn: one repair mends it, or names it; a second one has
nothing to do. What a run had in two places is never lost.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore
from ghoststore.store import Store
from ghoststore.store.run import saver
from tests.support.damage_walk import HARMS
from tests.support.faulting import files_of
from tests.support.runs import JOURNALED, steps_of, train

if TYPE_CHECKING:
    from tests.conftest import Lab

pytestmark = pytest.mark.slow
EVERY = 3
"""Files of which one is harmed, those of the store itself aside."""
LASTING = {"zarr.json", "rows"}
"""Of a part or run: what says what it is, and the table of rows. They cannot be made again."""


@pytest.fixture(scope="module")
def sound(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part; a run whose journals are still beside their records; one that goes on, with a journal alone."""
    store = Path(shutil.copytree(built, tmp_path_factory.mktemp("sound") / "store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "remove", lambda journal: None)
        train(store, "both", JOURNALED)
    train(store, "open", JOURNALED, stop=20)
    return store


def test_one_repair(lab: Lab, sound: Path, tmp_path: Path) -> None:
    harms = [name for name in HARMS if name != "endless_instead"]  # a link: the user's
    random.Random(1).shuffle(harms)
    files = sorted(files_of(sound))
    for place, name in enumerate([*files[::EVERY], *(file for file in files if file.count("/") < 2)]):
        harm = harms[place % len(harms)]
        store = Path(shutil.copytree(sound, tmp_path / str(place)))
        HARMS[harm](store / name)
        owner, inside = name.split("/")[1:2], name.split("/")[2:3]
        report = ghoststore.repair(store=store, drop_damaged=True)
        what = f"{name}, {harm}: {report}"
        again = ghoststore.repair(store=store, drop_damaged=True)
        assert (again.mended, again.unmended) == ([], report.unmended), what
        if report.unmended:
            assert set(inside) <= LASTING, what
            continue
        assert ghoststore.verify(store).sound, what
        if name.startswith("parts/part/"):
            now = {file: data for file, data in lab.tree(store / "parts").items() if "moved-aside" not in file}
            assert now == lab.tree(sound / "parts"), what
        for run in ("both", "open"):
            steps = steps_of(Store.open(store).run(run))
            if run == "both" or owner != ["open"]:
                assert steps == list(range(23 if run == "both" else 20)), what
        shutil.rmtree(store)
