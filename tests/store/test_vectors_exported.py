"""`ghoststore export`: the files that numpy, safetensors and pyarrow read hold what the part holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import ghoststore
from ghoststore.errors import UsageError
from ghoststore.store import Part
from tests.support.made_parts import ROWS, UNUSABLE, clustered, make_part
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

USABLE = [row for row in range(ROWS) if row not in UNUSABLE]


@pytest.fixture
def part(tmp_path: Path) -> Part:
    return make_part(tmp_path / "store", clustered())


def facts(part: Part, rows: list[int]) -> list[dict[str, Any]]:
    """What is known of ``rows``, read row by row from the part."""
    columns = {
        name: part.read(name, 0, part.rows)
        for name in ("source_row", "sample_id", "domain", "loss", "n_tokens", "norm")
    }
    return [
        {
            "row": row,
            "source_row": int(columns["source_row"][row]),
            "id": str(columns["sample_id"][row]),
            "domain": part.domains[columns["domain"][row]],
            "loss": float(columns["loss"][row]),
            "n_tokens": int(columns["n_tokens"][row]),
            "norm": columns["norm"][row].tolist(),
        }
        for row in rows
    ]


def lines_of(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path(f"{path}.rows.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("status")
    return lines


def export(part: Part, out: Path, **options: Any) -> Path:
    report = ghoststore.export(store=part.path.parent.parent, out=out, **options)
    assert report.bytes == sum(path.stat().st_size for path in out.parent.glob(f"{out.name}*"))
    return out


def test_npy(part: Part, tmp_path: Path) -> None:
    out = export(part, tmp_path / "vectors.npy")
    np.testing.assert_array_equal(np.load(out), vectors_of(part)[USABLE])
    assert lines_of(out) == facts(part, USABLE)


def test_safetensors(part: Part, tmp_path: Path) -> None:
    out = export(part, tmp_path / "vectors.safetensors")
    np.testing.assert_array_equal(load_file(out)["vectors"], vectors_of(part)[USABLE])
    assert lines_of(out) == facts(part, USABLE)
    with safe_open(out, framework="numpy") as file:
        assert file.metadata()["part"] == "part"


def test_parquet(part: Part, tmp_path: Path) -> None:
    out = export(part, tmp_path / "vectors.parquet")
    table = pyarrow.parquet.read_table(out).to_pylist()
    np.testing.assert_array_equal(
        np.array([row.pop("vector") for row in table], dtype=np.float32), vectors_of(part)[USABLE]
    )
    assert {row.pop("status") for row in table} == {"ok"}
    assert table == facts(part, USABLE)
    assert list(tmp_path.glob("*.jsonl")) == []


@pytest.mark.parametrize("form", ["npy", "safetensors", "parquet"])
def test_all_rows(part: Part, tmp_path: Path, form: str) -> None:
    """Those without a vector, too: zeros, with their status."""
    out = export(part, tmp_path / f"vectors.{form}", unusable=True)
    if form == "parquet":
        rows = pyarrow.parquet.read_table(out, columns=["status", "vector"]).to_pylist()
        statuses, vectors = [row["status"] for row in rows], np.array([row["vector"] for row in rows])
    else:
        statuses = [json.loads(line)["status"] for line in Path(f"{out}.rows.jsonl").read_text().splitlines()]
        vectors = np.load(out) if form == "npy" else load_file(out)["vectors"]
    assert [row for row, status in enumerate(statuses) if status == "empty"] == list(UNUSABLE)
    np.testing.assert_array_equal(vectors, vectors_of(part))


@pytest.mark.thin(1)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "onebit"])
def test_as_stored(tmp_path: Path, dtype: str) -> None:
    """The very numbers of the store, with their scales; decoded, the same as by default."""
    import torch
    from safetensors.torch import load_file as load_tensors

    part = make_part(tmp_path / "store", clustered(), dtype=dtype)
    stored = part.read("vectors", 0, part.rows)[USABLE]
    tensors = load_tensors(export(part, tmp_path / "stored.safetensors", dtype="stored"))
    vectors = tensors["vectors"]
    vectors = vectors.view(torch.uint16) if dtype == "bfloat16" else vectors
    np.testing.assert_array_equal(vectors.numpy(), stored)
    table = pyarrow.parquet.read_table(export(part, tmp_path / "stored.parquet", dtype="stored"))
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), dtype=stored.dtype), stored)
    assert ("scale" in tensors) == ("scale" in table.column_names) == part.encoding.scaled
    if part.encoding.scaled:
        scale = part.read("scale", 0, part.rows)[USABLE]
        np.testing.assert_array_equal(tensors["scale"].numpy(), scale)
        np.testing.assert_array_equal(np.array(table["scale"].to_pylist(), dtype=np.float32), scale)
        with pytest.raises(UsageError, match=r"a scale for each row and block"):
            export(part, tmp_path / "stored.npy", dtype="stored")
    else:
        np.testing.assert_array_equal(np.load(export(part, tmp_path / "stored.npy", dtype="stored")), stored)
    np.testing.assert_array_equal(np.load(export(part, tmp_path / "plain.npy")), vectors_of(part)[USABLE])


def test_some_spans(tmp_path: Path) -> None:
    """Committed rows are exported, each with its own number."""
    part = make_part(tmp_path / "store", clustered(), spans=[1, 6])
    out = export(part, tmp_path / "vectors.npy")
    rows = [row for row in [*range(50, 100), *range(300, 350)] if row not in UNUSABLE]
    assert [line["row"] for line in lines_of(out)] == rows
    np.testing.assert_array_equal(
        np.load(out),
        np.concatenate([vectors_of(part, 50, 100), vectors_of(part, 300, 350)])[
            [r - 50 if r < 100 else r - 250 for r in rows]
        ],
    )


def test_nothing_is_overwritten(part: Part, tmp_path: Path) -> None:
    (tmp_path / "vectors.npy").write_text("mine")
    for out, words in (
        ("vectors.npy", "exists"),
        ("vectors.txt", "are written as"),
        ("no/vectors.npy", "does not exist"),
    ):
        with pytest.raises(UsageError, match=words):
            ghoststore.export(store=part.path.parent.parent, out=tmp_path / out)
    assert (tmp_path / "vectors.npy").read_text() == "mine"


@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize("act", ["kill", "ENOSPC"])
def test_whole_or_not_at_all(lab: Lab, part: Part, tmp_path: Path, act: str) -> None:
    """The vectors are the last to appear, and the same command works."""
    out = tmp_path / "vectors.npy"
    command = ("export", "--store", part.path.parent.parent, "--out", out, "--quiet")
    fault = {"call": "name", "path": r"/vectors\.npy$", "when": "before", "act": act}
    assert lab.run(*command, fault=fault).code == (-9 if act == "kill" else 6)
    assert not out.exists()
    assert lab.run(*command).code == 0
    np.testing.assert_array_equal(np.load(out), vectors_of(part)[USABLE])


def test_the_command(lab: Lab, built: Path, tmp_path: Path) -> None:
    outcome = lab.run("export", "--store", built, "--out", tmp_path / "v.parquet", "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    table = pyarrow.parquet.read_table(tmp_path / "v.parquet")
    assert outcome.json["rows"] == table.num_rows
    assert table["id"].to_pylist()[:2] == [lab.rows[0]["id"], lab.rows[1]["id"]]
