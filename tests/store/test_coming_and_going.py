"""Other processes come and go as writers while one reads, or comes itself: their folder is there, and is not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore
from ghoststore.errors import StorageError
from ghoststore.store import Store
from ghoststore.store.base.disk import exclusive
from ghoststore.store.base.opening import is_other
from ghoststore.store.base.writers import FOLDER, at_work
from ghoststore.store.manage.mend import make_way
from ghoststore.store.part.caches import SECOND_MOMENT
from ghoststore.store.spans.soundness import writers_problem
from query.search.part_cache import keep_newest
from tests.support.coming import coming_and_going
from tests.support.made_parts import clustered, make_part
from tests.support.runs import make, run_of
from tests.support.shards import tokenize

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_one_comes_while_another_goes(tmp_path: Path) -> None:
    with coming_and_going([tmp_path]):
        for _ in range(400):
            with at_work(tmp_path, "it"):
                pass


def test_a_store_is_sound(tmp_path: Path) -> None:
    store = tmp_path / "store"
    make_part(store, clustered(40))
    make(store)
    with coming_and_going([store, store / "parts/part", run_of(store).path]):
        for _ in range(60):
            report = ghoststore.verify(store)
            assert report.sound, report.damage
    assert Store.open(store).part_names() == ["part"]


def test_what_stands_in_the_way_of_a_writer(tmp_path: Path) -> None:
    """Its folder is looked at once: there and gone is not there and no folder."""
    with coming_and_going([tmp_path]):
        for _ in range(5000):
            assert writers_problem(tmp_path) is None
            assert make_way(tmp_path, f"{FOLDER}/", {}) == []
    shutil.rmtree(tmp_path / FOLDER, ignore_errors=True)
    assert not is_other(tmp_path / FOLDER, folder=True)


@pytest.mark.parametrize("other", ["a file", "a link to nothing", "a link to a file"])
def test_something_else_in_the_place_of_writers(other: str, tmp_path: Path) -> None:
    """It is named, and nobody waits for it to go."""
    (tmp_path / "file").write_text("x")
    if other == "a file":
        (tmp_path / FOLDER).write_text("x")
    else:
        (tmp_path / FOLDER).symlink_to("file" if other == "a link to a file" else "gone")
    assert is_other(tmp_path / FOLDER, folder=True)
    assert "no folder" in str(writers_problem(tmp_path))
    with pytest.raises(StorageError, match="File exists"), exclusive(tmp_path, "it"):
        pass
    (moved,) = make_way(tmp_path, f"{FOLDER}/", {})
    assert moved.file == FOLDER
    with exclusive(tmp_path, "it"):
        pass


def test_the_record_of_a_cache_goes(tmp_path: Path) -> None:
    """As if another question had removed it between its listing and its reading: a link to nothing."""
    part = make_part(tmp_path / "store", clustered(40))
    folder = part.caches / SECOND_MOMENT
    folder.mkdir(parents=True)
    (folder / "a-1.json").symlink_to("gone")
    for name in ("a-2.json", "a-3.json"):
        (folder / name).write_text("{}")
        os.utime(folder / name, (2, int(name[2])))
    keep_newest(part, "a-*", 1)
    assert {path.name for path in folder.iterdir()} == {"a-1.json", "a-3.json"}


def test_complete_shards_are_asked_for(lab: Lab, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tokens = tokenize(lab, lab.corpus, out).tokens
    with coming_and_going([out]):
        for _ in range(60):
            assert tokenize(lab, lab.corpus, out).tokens == tokens
