"""Every file of a small store (part, run, index, caches, fidelity) flipped, cut, gone, or something else than a file.

``verify`` names it and ends with 4; a query or scores never return it as data: exit code 4, or the answer of the whole
store. All within bounded memory and time. Here each file with one harm; ``make soak`` does every harm to every file.
"""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.support.damage_walk import HARMS, walk_in_children
from tests.support.faulting import UNFINISHED, files_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.faulting import Faults

pytestmark = pytest.mark.slow


def test_every_file(faults: Faults, tmp_path: Path) -> None:
    store = shutil.copytree(faults.base("store") / "store", tmp_path / "store")
    files = [file for file in files_of(store) if not UNFINISHED.search(file)]
    harms = list(HARMS)
    random.Random(0).shuffle(harms)
    cases = [(file, harms[place % len(harms)]) for place, file in enumerate(files)]
    tried, wrong = walk_in_children(faults, store, cases)
    assert tried == len(cases)
    assert wrong == [], "\n".join(wrong)
