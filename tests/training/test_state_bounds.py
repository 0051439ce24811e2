"""What a training resumes from names its own files alone, and is a file itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ghoststore.errors import CorruptError
from ghoststore.store.base.records import FileRecord, seal
from indexer.training.state import CHECKSUM, FORMAT, STATE, STATE_FILES, read_state


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint-1" / STATE).mkdir(parents=True)
    for name in STATE_FILES:
        (tmp_path / "checkpoint-1" / STATE / name).write_bytes(b"")
    return tmp_path / "checkpoint-1"


def write(checkpoint: Path, **files: FileRecord) -> Path:
    path = checkpoint / STATE / "state.json"
    entries = {name: record.to_json() for name, record in files.items()}
    value = {"format": FORMAT, "step": 1, "identity": {}, "scaler": {}, "software": {}, "files": entries}
    path.write_bytes(seal(value, CHECKSUM))
    return path


def own(checkpoint: Path) -> dict[str, FileRecord]:
    return {f"{STATE}/{name}": FileRecord.of(checkpoint / STATE / name) for name in STATE_FILES}


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a\0b", "n" * 5000])
def test_files_of_others(checkpoint: Path, name: str) -> None:
    write(checkpoint, **own(checkpoint))
    assert read_state(checkpoint).step == 1
    (checkpoint.parent / "outside").write_text("x")
    write(checkpoint, **own(checkpoint), **{name: FileRecord.of(checkpoint.parent / "outside")})
    with pytest.raises(CorruptError, match=r"remove .*checkpoint-1 to go on"):
        read_state(checkpoint)


def test_what_is_resumed_from_is_checked(checkpoint: Path) -> None:
    write(checkpoint)
    with pytest.raises(CorruptError, match=r"does not name optimizer\.safetensors"):
        read_state(checkpoint)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", ""])
def test_a_state_that_is_none(checkpoint: Path, text: str) -> None:
    write(checkpoint).write_text(text)
    with pytest.raises(CorruptError):
        read_state(checkpoint)


def test_a_pipe(checkpoint: Path) -> None:
    path = write(checkpoint)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CorruptError, match="is a pipe"):
        read_state(checkpoint)
