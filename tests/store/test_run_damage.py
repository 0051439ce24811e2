"""One flipped bit in a training run: `verify` names the file, and what is read is never other data."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import ghoststore
from ghoststore.errors import CorruptError, GhostStoreError, MismatchError
from ghoststore.store import Run, Store
from tests.support.harms import CHANGES, Harm, delete, empty, flip, flip_middle, truncate
from tests.support.runs import LAYOUT, row_table

if TYPE_CHECKING:
    from tests.conftest import Lab

ARRAYS = {spec.name: spec for spec in LAYOUT.arrays()}
STEP_CHUNKS = [LAYOUT.chunk_keys(spec, 1)[0] for spec in ARRAYS.values()]
ROW_CHUNKS = [f"{spec.name}/c/0" for spec in LAYOUT.row_arrays()]
COLUMNS = [spec.name.removeprefix("rows/") for spec in LAYOUT.row_arrays()]
METADATA = ["zarr.json", "score/zarr.json", "rows/zarr.json", "rows/domain/zarr.json", "commits/zarr.json"]


HARMS: list[Harm] = [*CHANGES, delete]


def folder(store: Path) -> Path:
    return store / "runs/run"


def read_steps(run: Run, array: str) -> list[np.ndarray]:
    """In both ways."""
    return [run.read(array, 5, 10), run.read_committed(array, [1])]


@pytest.mark.thin(2)
@pytest.mark.parametrize("harm", HARMS)
def test_verify_names_every_damaged_file(lab: Lab, run_store: Path, harm: Harm) -> None:
    """All of them at once: nothing hides behind the first."""
    harmed = [*STEP_CHUNKS, *ROW_CHUNKS, "score/zarr.json", "rows/domain/zarr.json", "rows/zarr.json"]
    for file in harmed:
        harm(folder(run_store) / file)
    damage = ghoststore.verify(run_store).damage
    assert sorted(one.file for one in damage) == sorted(harmed)
    assert {(one.part, one.run) for one in damage} == {(None, "run")}
    outcome = lab.run("verify", "--store", run_store, "--run", "run", "--json")
    assert outcome.code == 4
    assert {one["run"] for one in outcome.json["damage"]} == {"run"}
    assert "run" in lab.run("verify", "--store", run_store).out


@pytest.mark.thin
@pytest.mark.parametrize("file", [*METADATA, "commits/00000003.json"])
@pytest.mark.parametrize("harm", [flip_middle, truncate, empty])
def test_verify_names_one_damaged_file(run_store: Path, file: str, harm: Harm) -> None:
    harm(folder(run_store) / file)
    report = ghoststore.verify(run_store)
    assert not report.sound
    assert any(file in one.file + one.problem for one in report.damage)


@pytest.mark.thin(3)
@pytest.mark.parametrize("harm", HARMS)
def test_damaged_steps_are_not_read(run_store: Path, harm: Harm) -> None:
    """The error names the array; other spans are read as before, and all is well when the file is whole again."""
    for file, array in zip(STEP_CHUNKS, ARRAYS, strict=True):
        path = folder(run_store) / file
        whole = path.read_bytes()
        sound = read_steps(Store.open(run_store).run(), array)
        harm(path)
        run = Store.open(run_store).run()
        for start in (5, 9):
            with pytest.raises(CorruptError, match=f"/{array}[/, ]"):
                run.read(array, start, 10)
        with pytest.raises(CorruptError, match=f"/{array}/c/1"):
            run.read_committed(array)
        run.read(array, 0, 5)
        run.read_committed(array, [0, 2])
        path.write_bytes(whole)
        for now, before in zip(read_steps(run, array), sound, strict=True):
            np.testing.assert_array_equal(now, before)


@pytest.mark.thin(3)
@pytest.mark.parametrize("harm", HARMS)
def test_damaged_rows_are_not_read(run_store: Path, harm: Harm) -> None:
    for file, column in zip(ROW_CHUNKS, COLUMNS, strict=True):
        path = folder(run_store) / file
        whole = path.read_bytes()
        harm(path)
        rows = Store.open(run_store).run().rows
        for _ in range(2):  # a file that was found damaged is looked at again
            with pytest.raises(CorruptError, match=file):
                rows.read(column, 0, 1)
            with pytest.raises(CorruptError, match=file):
                rows.read_rows(column, [39])
        path.write_bytes(whole)
        assert rows.read(column, 0, 40).tolist() == getattr(row_table(), column).tolist()


def test_every_bit_of_a_chunk_counts(run_store: Path) -> None:
    path = folder(run_store) / "score/c/1/0/0"
    whole = path.read_bytes()
    run = Store.open(run_store).run()
    for place in range(len(whole)):
        flip(path, place, place % 8)
        with pytest.raises(CorruptError):
            run.read("score", 5, 10)
        with pytest.raises(CorruptError):
            run.read_committed("score", [1])
        path.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["score/zarr.json", "rows/sample_id/zarr.json", "zarr.json"])
def test_a_bit_in_the_metadata_is_never_other_data(run_store: Path, file: str) -> None:
    path = folder(run_store) / file
    whole = path.read_bytes()
    before = Store.open(run_store).run()
    sound = (before.read("score", 0, 23), before.rows.read("sample_id", 0, 40))
    unseen = []
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        flip(path, place)
        with suppress(MismatchError):  # the format version itself was hit
            if ghoststore.verify(run_store).sound:
                unseen.append(place)
        with suppress(GhostStoreError):
            run = Store.open(run_store).run()
            np.testing.assert_array_equal(run.read("score", 0, 23), sound[0])
            assert run.rows.read("sample_id", 0, 40).tolist() == sound[1].tolist()
        path.write_bytes(whole)
    assert unseen == []


def test_damaged_records(run_store: Path) -> None:
    record = folder(run_store) / "commits/00000001.json"
    shutil.copy(folder(run_store) / "commits/00000002.json", record)
    with pytest.raises(CorruptError, match=r"00000001\.json is the record of span 2, not 1"):
        ghoststore.info(run_store)
    assert [one.file for one in ghoststore.verify(run_store).damage] == ["commits/00000001.json"]
    shutil.copy(folder(run_store) / "commits/00000002.json", folder(run_store) / "commits/00000005.json")
    with pytest.raises(CorruptError, match="records of spans"):
        Store.open(run_store).run()
    shutil.rmtree(folder(run_store) / "commits")
    with pytest.raises(CorruptError, match="no commits folder"):
        Store.open(run_store).run()
