"""``export --format embedding-atlas``: neighbours against brute force in float64, the map, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet
import pytest

import ghoststore
from ghoststore.errors import UsageError
from ghoststore.store import Part, Store
from query.export import atlas, neighbors
from tests.support.made_parts import ROWS, UNUSABLE, ZERO, clustered, make_part
from tests.support.notes import Notes
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

USABLE = [row for row in range(ROWS) if row not in UNUSABLE]


def table_of(part: Part, out: Path, **options: Any) -> Any:
    report = ghoststore.export(store=part.path.parent.parent, format="embedding-atlas", out=out, **options)
    table = pyarrow.parquet.read_table(out)
    assert report.rows == len(table)
    assert report.bytes == out.stat().st_size
    return table.to_pandas()


def cosines_of(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    unit = wide / np.where(length > 0, length, 1)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    return np.asarray(cosines)


@pytest.mark.thin
@pytest.mark.parametrize("dtype", ["float32", "onebit"])
@pytest.mark.parametrize("bytes_at_once", [None, 7 * 4 * 96])
def test_neighbors_are_the_nearest_rows(
    tmp_path: Path, dtype: str, bytes_at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rows in the file, by their places in it; also where few are looked for and compared at a time."""
    if bytes_at_once is not None:
        monkeypatch.setattr(neighbors, "QUERY_BYTES", bytes_at_once)
        monkeypatch.setattr(neighbors, "PAIRS", 100)
    part = make_part(tmp_path / "store", clustered(), dtype=dtype)
    frame = table_of(part, tmp_path / "map.parquet", neighbors=12)
    assert frame["row"].tolist() == USABLE
    cosines = cosines_of(vectors_of(part)[USABLE])
    for place, near in enumerate(frame["neighbors"]):
        ids, distances = near["ids"], near["distances"]
        assert len(set(ids.tolist())) == 12
        assert (np.diff(distances) >= 0).all()
        np.testing.assert_allclose(1 - distances, cosines[place, ids], atol=2e-6)
        np.testing.assert_allclose(1 - distances, np.sort(cosines[place])[::-1][:12], atol=2e-6)


def test_equal_rows_are_equally_near(tmp_path: Path) -> None:
    """The lower place comes first, and a row of length zero is as far from everything."""
    vectors = clustered(60)
    vectors[[5, 20, 41]] = vectors[30] * np.array([[1], [3], [0.5]], dtype=np.float32)
    vectors[ZERO] = 0
    frame = table_of(make_part(tmp_path / "store", vectors, unusable=()), tmp_path / "map.parquet", neighbors=4)
    assert frame["neighbors"][30]["ids"].tolist()[:3] == [5, 20, 41]
    assert frame["neighbors"][41]["ids"].tolist()[:3] == [5, 20, 30]
    assert frame["neighbors"][41]["distances"].tolist()[:3] == [0, 0, 0]
    assert frame["neighbors"][ZERO]["ids"].tolist() == [0, 1, 2, 3]
    assert frame["neighbors"][ZERO]["distances"].tolist() == [1, 1, 1, 1]


def test_clusters_lie_together_on_the_map(tmp_path: Path) -> None:
    """Nearest on the map are rows of one cluster, and the same call writes the same bytes; another seed another map."""
    rng = np.random.default_rng(1)
    centres, of = rng.standard_normal((5, 96)) * 4, rng.integers(0, 5, 200)
    part = make_part(tmp_path / "store", (centres[of] + rng.standard_normal((200, 96))).astype("f4"), unusable=())
    frame = table_of(part, tmp_path / "map.parquet")
    places = frame[["x", "y"]].to_numpy()
    assert np.isfinite(places).all()
    far = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(far, np.inf)
    assert (of[np.argsort(far, axis=1)[:, :5]] == of[:, None]).mean() > 0.98
    table_of(part, tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "map.parquet").read_bytes()
    other = table_of(part, tmp_path / "other.parquet", seed=1)
    assert not np.array_equal(other[["x", "y"]].to_numpy(), places)
    assert other["neighbors"][0]["ids"].tolist() == frame["neighbors"][0]["ids"].tolist()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
def test_few_rows(tmp_path: Path, rows: int) -> None:
    frame = table_of(make_part(tmp_path / "store", clustered(rows), unusable=()), tmp_path / "map.parquet")
    assert len(frame) == rows
    assert np.isfinite(frame[["x", "y"]].to_numpy()).all()
    assert all(len(near["ids"]) == len(near["distances"]) == min(15, rows - 1) for near in frame["neighbors"])


def test_a_random_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a map takes are refused, and both ways out of it work; neighbours are of the sample."""
    monkeypatch.setattr(atlas, "USUAL_ROWS", 100)
    part, out = make_part(tmp_path / "store", clustered()), tmp_path / "map.parquet"
    with pytest.raises(UsageError, match=r"396 rows for the map; .* `max_rows=100` .* `where`"):
        table_of(part, out)
    assert not out.exists()
    some = table_of(part, out, max_rows=100)
    assert len(some) == 100
    assert some["row"].is_monotonic_increasing
    assert set(some["row"]) <= set(USABLE)
    assert not some["row"].isin(range(150)).all()
    assert max(max(near["ids"]) for near in some["neighbors"]) < 100
    assert set(table_of(part, tmp_path / "other.parquet", max_rows=100, seed=3)["row"]) != set(some["row"])
    assert table_of(part, tmp_path / "where.parquet", where="source_row < 60")["row"].max() == 59
    with pytest.raises(UsageError, match="at most 100,000"):
        table_of(part, tmp_path / "all.parquet", max_rows=100_001)


def test_texts_and_fields_come_along(lab: Lab, tmp_path: Path) -> None:
    """A kept field that is called as a column of the map gets another name; without a corpus texts are missing."""
    rows = [row | {"x": f"s{place % 3}", "year": place} for place, row in enumerate(lab.rows)]
    data = lab.write(tmp_path / "train.jsonl", rows)
    assert lab.build(tmp_path / "store", "--data", data, "--keep-fields", "x,year").code == 0
    part = Store.open(tmp_path / "store").part()
    frame = table_of(part, tmp_path / "map.parquet")
    assert frame["text"].tolist() == [row["text"] for row in rows]
    assert frame["id"].tolist() == [row["id"] for row in rows]
    assert frame["domain"].tolist() == [row["domain"] for row in rows]
    assert frame["x_"].tolist() == [row["x"] for row in rows]
    assert frame["year"].tolist() == list(range(27))
    assert frame["x"].dtype == np.float32
    assert {"loss", "n_tokens", "source_row", "y", "neighbors"} <= set(frame.columns)
    assert "vector" not in frame
    data.rename(tmp_path / "moved.jsonl")
    moved = table_of(part, tmp_path / "moved.parquet", data=tmp_path / "moved.jsonl")
    assert moved["text"].tolist() == frame["text"].tolist()
    notes = Notes()
    gone = table_of(part, tmp_path / "gone.parquet", progress=notes)
    assert gone["text"].isna().all()
    assert len([note for note in notes.said if "texts are not shown" in note]) == 1


def test_refusals(tmp_path: Path) -> None:
    part, out = make_part(tmp_path / "store", clustered()), tmp_path / "map.parquet"
    with pytest.raises(UsageError, match=r"map.npy`: Embedding Atlas is given a .parquet file"):
        table_of(part, tmp_path / "map.npy")
    with pytest.raises(UsageError, match="`neighbors` must be at least 1"):
        table_of(part, out, neighbors=0)
    with pytest.raises(UsageError, match="neither `dtype` nor `unusable`"):
        table_of(part, out, unusable=True)
    with pytest.raises(UsageError, match="takes a part"):
        table_of(part, out, run="r")
    with pytest.raises(UsageError, match="`seed` belongs to `format=embedding-atlas`"):
        ghoststore.export(store=tmp_path / "store", out=out, seed=1)
    with pytest.raises(UsageError, match="`data` is for texts"):
        ghoststore.export(store=tmp_path / "store", out=out, data="x.jsonl")
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists; nothing was written"):
        table_of(part, out)
    assert out.read_text() == "mine"
