"""``export --format datasets``: what `datasets.load_from_disk` reads is what the part holds, with its texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest

import ghoststore
from ghoststore.errors import UsageError
from ghoststore.store import Part, Store
from query.export import dataset, with_texts
from tests.support.made_parts import ROWS, UNUSABLE, clustered, make_part
from tests.support.notes import Notes
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

USABLE = [row for row in range(ROWS) if row not in UNUSABLE]


def loaded(part: Part, out: Path, **options: Any) -> datasets.Dataset:
    report = ghoststore.export(store=part.path.parent.parent, format="datasets", out=out, **options)
    rows = datasets.load_from_disk(str(out))
    assert (report.rows, report.files) == (len(rows), [str(out)])
    assert report.bytes == sum(path.stat().st_size for path in out.iterdir())
    return rows


@pytest.mark.parametrize("shard_bytes", [dataset.SHARD_BYTES, 20_000])
def test_vectors_and_columns(tmp_path: Path, shard_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as in a .parquet file, in one shard and in several."""
    monkeypatch.setattr(dataset, "SHARD_BYTES", shard_bytes)
    part = make_part(tmp_path / "store", clustered())
    rows = loaded(part, tmp_path / "rows")
    assert len(rows.cache_files) == (1 if shard_bytes > 10**6 else 8)
    np.testing.assert_array_equal(np.array(rows["vector"], dtype=np.float32), vectors_of(part)[USABLE])
    assert rows.features["vector"] == datasets.List(datasets.Value("float32"), length=96)
    ghoststore.export(store=tmp_path / "store", out=tmp_path / "rows.parquet")
    other = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    for name in other.column_names:
        assert rows[name][:] == other[name][:], name
    assert set(rows.column_names) == {*other.column_names, "text"}


def test_the_same_call_writes_the_same_bytes(lab: Lab, tmp_path: Path) -> None:
    part = make_part(tmp_path / "store", clustered())
    for out in ("one", "two"):
        loaded(part, tmp_path / out, where="source_row > 100")
    assert lab.tree(tmp_path / "one") == lab.tree(tmp_path / "two")


def test_some_rows_and_stored_numbers(tmp_path: Path) -> None:
    part = make_part(tmp_path / "store", clustered(), dtype="int8")
    rows = loaded(part, tmp_path / "rows", where="source_row BETWEEN 90 AND 110", dtype="stored", unusable=True)
    assert rows["row"][:] == list(range(90, 111))
    np.testing.assert_array_equal(np.array(rows["vector"]), part.read("vectors", 90, 111))
    assert rows.features["vector"].feature == datasets.Value("int8")
    np.testing.assert_array_equal(np.array(rows["scale"], dtype=np.float32), part.read("scale", 90, 111))
    with pytest.raises(UsageError, match="no"):
        loaded(part, tmp_path / "none", where="source_row > 1000")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("at_once", [with_texts.TEXTS_AT_ONCE, 4])
def test_texts_and_fields(lab: Lab, tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(with_texts, "TEXTS_AT_ONCE", at_once)
    given = [row | {"source": f"s{place % 3}"} for place, row in enumerate(lab.rows)]
    data = lab.write(tmp_path / "train.jsonl", given)
    assert lab.build(tmp_path / "store", "--data", data, "--keep-fields", "source").code == 0
    part = Store.open(tmp_path / "store").part()
    rows = loaded(part, tmp_path / "rows", where="domain = 'sky'")
    of_sky = [row for row in given if row["domain"] == "sky"]
    assert [{name: row[name] for name in ("id", "text", "domain", "source")} for row in rows] == of_sky
    notes = Notes()
    lab.write(data, [row | {"text": row["text"].upper()} if place == 2 else row for place, row in enumerate(given)])
    changed = loaded(part, tmp_path / "changed", progress=notes)
    assert [place for place, text in enumerate(changed["text"]) if text is None] == [2]
    assert len(notes.said) == 1


def test_refusals_leave_nothing(lab: Lab, tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "rows"
    part = make_part(store, clustered())
    with pytest.raises(UsageError, match=r"a dataset is a folder; give a name without '.parquet'"):
        loaded(part, tmp_path / "rows.parquet")
    out.mkdir()
    with pytest.raises(UsageError, match="exists; nothing was written"):
        loaded(part, out)
    out.rmdir()
    chunk = part.path / "vectors/c/3/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    damaged = lab.run("export", "--store", store, "--format", "datasets", "--out", out)
    assert damaged.code not in (0, 1), damaged.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_the_command(lab: Lab, built: Path, tmp_path: Path) -> None:
    told = lab.run("export", "--store", built, "--format", "datasets", "--out", tmp_path / "rows")
    assert told.code == 0, told.err
    assert "datasets.load_from_disk(" in told.out
    said = lab.run("export", "--store", built, "--format", "datasets", "--out", tmp_path / "two", "--json")
    assert json.loads(said.out)["format"] == "datasets"
