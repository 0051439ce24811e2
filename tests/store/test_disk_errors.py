"""A disk that is full or broken: exit code 6, what was committed intact, the same command resumes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore

if TYPE_CHECKING:
    from tests.conftest import Lab

PLACES = {
    # Where the error strikes, and how many spans are committed then; None: there is no part yet.
    "store": ("name", r"parts/zarr\.json$", None),
    "store-flush": ("fsync", r"store/parts$", None),
    "part": ("name", r"/norm/zarr\.json$", None),
    "part-flush": ("fsync", r"/norm$", None),
    "part-name": ("name", r"parts/part$", None),
    "chunk": ("name", r"vectors/c/2/0$", 2),
    "chunk-flush": ("fsync", r"commits/\.00000003\.sample_id\.", 3),
    "record": ("fsync", r"commits/\.00000001\.json", 1),
    "record-name": ("name", r"commits/00000004\.json$", 4),
}


def resumes(lab: Lab, store: Path, whole: dict[str, bytes], spans: int | None) -> None:
    """What is committed is intact, and the build ends as if nothing had happened. A span with an intent and no record
    is committed by whoever writes next, and not computed.
    """
    intents = list(store.glob("parts/part/commits/.*.intent"))
    decided = sum(not intent.with_name(f"{intent.name[1:9]}.json").exists() for intent in intents)
    if spans is not None:
        report = ghoststore.verify(store)
        assert (report.sound, report.spans) == (True, spans), report.damage
    resumed = lab.build(store, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["resumed_rows"] == min(((spans or 0) + decided) * 6, 27)
    found = lab.tree(store)
    assert [name for name in whole if found.get(name) != whole[name]] == []


@pytest.mark.kill
@pytest.mark.thin(2)
@pytest.mark.parametrize(("error", "words"), [("ENOSPC", "no space is left"), ("EIO", "Input/output error (errno 5)")])
@pytest.mark.parametrize("place", PLACES)
def test_error_of_the_disk(lab: Lab, built: Path, place: str, error: str, words: str, tmp_path: Path) -> None:
    call, path, spans = PLACES[place]
    store = tmp_path / "store"
    outcome = lab.build(store, fault={"call": call, "path": path, "when": "before", "act": error})
    assert outcome.code == 6, outcome.err
    assert words in outcome.err
    assert str(store) in outcome.err
    assert "the same command resumes" in outcome.err
    assert "Traceback" not in outcome.err
    resumes(lab, store, lab.tree(built), spans)


@pytest.mark.kill
def test_file_size_limit(lab: Lab, built: Path, tmp_path: Path) -> None:
    """EFBIG from the system itself: the limit is below a chunk of vectors and above everything else."""
    largest = (built / "parts/part/vectors/c/0/0").stat().st_size
    store = tmp_path / "store"
    words = ["build", "--checkpoint", str(lab.checkpoint), "--data", str(lab.corpus), "--store", str(store)]
    words += ["--name", "part", "--span-rows", "6", "--quiet"]
    code = (
        "import resource, ghoststore.cli\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest - 1}, {largest - 1}))\n"
        f"ghoststore.cli.main({words!r})"
    )
    outcome = lab.run(code=code)
    assert outcome.code == 6, outcome.err
    assert "File too large" in outcome.err
    resumes(lab, store, lab.tree(built), 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 560 KiB, where we may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=560k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.kill
def test_full_disk(lab: Lab, built: Path, small_disk: Path) -> None:
    """A real one, which fills in the middle of the build and is then enlarged."""
    store = small_disk / "store"
    outcome = lab.build(store)
    assert outcome.code == 6, outcome.err
    assert "no space is left" in outcome.err
    report = ghoststore.verify(store)
    assert report.sound
    assert 0 < report.spans < 5
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    resumes(lab, store, lab.tree(built), report.spans)


def test_a_complete_part_on_a_disk_that_is_read_alone(lab: Lab, built: Path, small_disk: Path) -> None:
    """There is nothing to write; of a part that is not complete it is said before anything is computed."""
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    shutil.copytree(built, small_disk / "store")
    shutil.copytree(built, small_disk / "half")
    (small_disk / "half/parts/part/commits/00000003.json").unlink()
    for chunk in (small_disk / "half/parts/part").rglob("c/3"):
        shutil.rmtree(chunk) if chunk.is_dir() else chunk.unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    complete = lab.build(small_disk / "store")
    assert complete.code == 0, complete.err
    half = lab.build(small_disk / "half")
    assert half.code == 6, half.err
    assert "Read-only file system; make it writable" in half.err


def test_store_that_cannot_be_made(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = lab.build(tmp_path / "file" / "store")
    assert outcome.code == 6, outcome.err
    assert str(tmp_path / "file" / "store") in outcome.err
