"""A store that cannot be written is found out at once: no model is loaded, nothing is tokenized."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ghoststore.errors import StorageError
from ghoststore.store.base.writable import check_writable
from tests.support.harms import flip_middle

if TYPE_CHECKING:
    from tests.conftest import Lab


def on_a_read_only_disk(folder: Path, *args: str | Path) -> str:
    """Python for a process of its own: the command, with ``folder`` on a disk that is mounted read-only."""
    return f"""
import errno, os
real = os.open
def refusing(path, flags, *rest, **options):
    if flags & os.O_CREAT and os.fspath(path).startswith({str(folder)!r}):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
    return real(path, flags, *rest, **options)
def renaming(path, *rest, **options):
    if os.fspath(path).startswith({str(folder)!r}):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
    return rename(path, *rest, **options)
rename = os.rename
os.open, os.rename = refusing, renaming
from ghoststore.cli import main
main({[str(arg) for arg in args]!r})
"""


@pytest.fixture
def broken(lab: Lab, tmp_path: Path) -> Path:
    """A checkpoint that is found, and cannot be loaded."""
    model = Path(shutil.copytree(lab.checkpoint, tmp_path / "model"))
    config = model / "config.json"
    config.write_text(config.read_text().replace('"n_layer": 1', '"n_layer": 2'))
    return model


def test_build(lab: Lab, built: Path, broken: Path, tmp_path: Path) -> None:
    """Into a new store and into one that is there."""
    shutil.copytree(built, tmp_path / "there")
    for store in ("there", "new"):
        args = ("build", "--store", tmp_path / store, "--checkpoint", broken, "--data", lab.corpus, "--name", "other")
        outcome = lab.run(code=on_a_read_only_disk(tmp_path, *args))
        assert outcome.code == 6, outcome.err
        assert "Read-only file system; make it writable" in outcome.err
    assert not (tmp_path / "new").exists()


def test_train(lab: Lab, tmp_path: Path) -> None:
    options = ("--architecture", "GPT2-Tiny", "--tokenizer", lab.checkpoint, "--data", lab.corpus, "--max-steps", "1")
    where = ("--val-set", lab.corpus, "--store", tmp_path / "read/store", "--output-dir", tmp_path / "run")
    (tmp_path / "read").mkdir()
    outcome = lab.run(code=on_a_read_only_disk(tmp_path / "read", "train", *options, *where))
    assert outcome.code == 6, outcome.err
    assert "Read-only file system" in outcome.err
    assert not (tmp_path / "run").exists()


def test_index(lab: Lab, built: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(built, tmp_path / "store"))
    args = ("index", "--store", store, "--factory", "Flat")
    outcome = lab.run(code=on_a_read_only_disk(store, *args))
    assert outcome.code == 6, outcome.err
    assert "Read-only file system; make it writable. Nothing was changed: run the same command again" in outcome.err
    assert not (store / "parts/part/index").exists()


@pytest.mark.parametrize("command", ["rm --yes", "mv --to-name other"])
def test_removing_and_renaming(lab: Lab, built: Path, command: str, tmp_path: Path) -> None:
    """Neither resumes anything."""
    store = Path(shutil.copytree(built, tmp_path / "store"))
    args = (*command.split(), "--store", store, "--part", "part")
    outcome = lab.run(code=on_a_read_only_disk(store, *args))
    assert outcome.code == 6, outcome.err
    assert "Read-only file system; make it writable. Nothing was changed: run the same command again" in outcome.err
    assert lab.tree(store) == lab.tree(built)


def test_repair(lab: Lab, built: Path, tmp_path: Path) -> None:
    """Of what is sound: nothing needs writing. What is damaged needs it."""
    store = Path(shutil.copytree(built, tmp_path / "store"))
    args = ("repair", "--store", store, "--json", "--quiet")
    outcome = lab.run(code=on_a_read_only_disk(store, *args))
    assert outcome.code == 0, outcome.err
    assert (outcome.json["parts"], outcome.json["mended"]) == (["part"], [])
    flip_middle(store / "parts/part/loss/c/1")
    outcome = lab.run(code=on_a_read_only_disk(store, *args))
    assert outcome.code == 6, outcome.err
    assert "Read-only file system" in outcome.err


def test_a_complete_part_needs_no_writing(lab: Lab, built: Path, tmp_path: Path) -> None:
    """A query, and a build that finds nothing to do."""
    store = Path(shutil.copytree(built, tmp_path / "store"))
    query = ("query", "--store", store, "--val-set", lab.corpus, "--json")
    assert lab.run(code=on_a_read_only_disk(store, *query)).code == 0


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path / "a/b/c")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Not a directory"):
        check_writable(tmp_path / "file/store")
