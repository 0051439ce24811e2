"""The fast reader against plain Zarr, and plain Zarr against the documented arrays."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zarr

import ghoststore
from ghoststore.errors import CorruptError, UsageError
from ghoststore.store.part.encoding import ENCODINGS
from ghoststore.store.spans.reader import READ_AHEAD, stream
from indexer.projection.calibration import ARRAYS

if TYPE_CHECKING:
    from tests.conftest import Lab

ROWS, GROUPS = 27, 4
D = GROUPS * 2048
SHAPES = {
    "vectors": ((ROWS, D // 8), "uint8"),
    "scale": ((ROWS, GROUPS), "float32"),
    "norm": ((ROWS, GROUPS), "float32"),
    "loss": ((ROWS,), "float32"),
    "n_tokens": ((ROWS,), "int32"),
    "status": ((ROWS,), "uint8"),
    "domain": ((ROWS,), "int16"),
    "source_row": ((ROWS,), "int64"),
    "source_file": ((ROWS,), "int32"),
    "source_offset": ((ROWS,), "int64"),
    "source_digest": ((ROWS,), "uint64"),
    "window_start": ((ROWS,), "int32"),
}
STRINGS = ("sample_id",)


def streamed(part: ghoststore.Part, name: str, spans: list[int] | None = None) -> np.ndarray:
    """All chunks of an array, copied: a chunk is valid until the next one is asked for."""
    return np.concatenate([chunk.data.copy() for chunk in stream(part, name, spans)])


@pytest.mark.thin(2)
@pytest.mark.parametrize("span_rows", [6, 8, 100])
@pytest.mark.parametrize("dtype", ENCODINGS)
def test_stream_is_what_zarr_reads(lab: Lab, tmp_path: Path, dtype: str, span_rows: int) -> None:
    store = tmp_path / "store"
    ghoststore.build(
        checkpoint=lab.checkpoint, data=lab.corpus, store=store, proj_dtype=dtype, span_rows=span_rows, device="cpu"
    )
    part = ghoststore.Store.open(store).part()
    group = zarr.open_group(part.path, mode="r")
    for name in SHAPES if part.encoding.scaled else SHAPES.keys() - {"scale"}:
        plain = np.asarray(group[name][...])
        found = streamed(part, name)
        assert found.dtype == plain.dtype
        np.testing.assert_array_equal(found, plain, err_msg=name)


@pytest.mark.thin(1)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_numbers_are_the_rounded_vectors(lab: Lab, tmp_path: Path, dtype: str) -> None:
    """Rounded to nearest even, as torch rounds; norms are those of the stored numbers."""
    import torch

    read = {}
    for name in ("float32", dtype):
        ghoststore.build(
            checkpoint=lab.checkpoint,
            data=lab.corpus,
            store=tmp_path / "store",
            name=name,
            proj_dtype=name,
            projection=ghoststore.ProjectionConfig(compress=256),
            device="cpu",
        )
        part = ghoststore.Store.open(tmp_path / "store").part(name)
        read[name] = part.encoding.decode(streamed(part, "vectors"))
    expected = torch.from_numpy(read["float32"]).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(read[dtype], expected)
    norms = [np.linalg.norm(expected[:, start:stop].astype(np.float64), axis=1) for _, start, stop in part.groups]
    np.testing.assert_allclose(streamed(part, "norm"), np.stack(norms, axis=1), rtol=1e-6)


def test_several_chunks_a_span(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks smaller than spans, which huge vectors have: more chunks than buffers, and a last one cut short."""
    monkeypatch.setattr("ghoststore.store.part.layout.CHUNK_BYTES", 2 * D)
    store = tmp_path / "store"
    ghoststore.build(checkpoint=lab.checkpoint, data=lab.corpus, store=store, span_rows=10, device="cpu")
    part = ghoststore.Store.open(store).part()
    assert (part.layout.span_rows, part.layout.chunk_rows) == (10, 2)
    chunks = [(chunk.start, chunk.stop) for chunk in stream(part, "vectors")]
    assert chunks == [(start, min(start + 2, ROWS)) for start in range(0, ROWS, 2)]
    assert len(chunks) > READ_AHEAD + 1
    np.testing.assert_array_equal(streamed(part, "vectors"), zarr.open_array(part.path / "vectors", mode="r")[...])
    some = streamed(part, "vectors", [1])
    np.testing.assert_array_equal(some, zarr.open_array(part.path / "vectors", mode="r")[10:20])
    assert ghoststore.verify(store).sound
    found = ghoststore.query(store=store, val_set=lab.corpus, each=True, top_k=1, device="cpu")
    assert [result.hits[0].source_row for result in found.results] == list(range(ROWS))


def test_a_reader_that_stops_early_leaves_no_thread(built: Path) -> None:
    import threading

    before = threading.active_count()
    chunks = stream(ghoststore.Store.open(built).part(), "vectors")
    next(chunks)
    chunks.close()
    assert threading.active_count() == before


def test_a_damaged_chunk_ends_the_stream_after_the_sound_ones(lab: Lab, built: Path, tmp_path: Path) -> None:
    import shutil

    store = Path(shutil.copytree(built, tmp_path / "store"))
    part = ghoststore.Store.open(store).part()
    (part.path / "vectors/c/3/0").unlink()
    chunks = stream(part, "vectors")
    assert [next(chunks).start for _ in range(3)] == [0, 6, 12]
    with pytest.raises(CorruptError, match=r"vectors/c/3/0 is missing"):
        next(chunks)


def test_plain_zarr_reads_the_store(lab: Lab, built: Path) -> None:
    """Without ghoststore: the documented paths, shapes and dtypes, no warnings, nothing unknown in a part."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = zarr.open(built, mode="r")
        assert root.attrs["ghoststore_format"] == 1
        assert sorted(name for name, _ in root.groups()) == ["parts", "runs"]
        part = root["parts/part"]
        arrays = dict(part.arrays())
        assert {name: (array.shape, str(array.dtype)) for name, array in arrays.items() if name in SHAPES} == SHAPES
        assert sorted(arrays) == sorted([*SHAPES, *STRINGS, "span_start", *ARRAYS[:4]])
        assert {name for name, _ in part.groups()} - {"second_moment", "index", "fidelity"} == {"commits"}
        assert list(arrays["sample_id"][...]) == [row["id"] for row in lab.rows]
        domains = part.attrs["manifest"]["corpus"]["domains"]
        assert [domains[code] for code in arrays["domain"][...]] == [row["domain"] for row in lab.rows]
        assert arrays["source_row"][...].tolist() == list(range(ROWS))
        assert (arrays["status"][...] == 0).all()
        assert (arrays["n_tokens"][...] > 1).all()


def test_caches_are_groups_to_plain_zarr(built: Path, tmp_path: Path) -> None:
    """What queries, indexes and measurements leave in a part makes no reader of Zarr stumble."""
    store = tmp_path / "store"
    shutil.copytree(built, store)
    ghoststore.self_influence(store=store, damping=1.0, device="cpu")
    ghoststore.index(store=store, factory="Flat")
    ghoststore.fidelity(store=store, rows=12, val_samples=2, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part = zarr.open(store, mode="r")["parts/part"]
        assert sorted(name for name, _ in part.groups()) == ["commits", "fidelity", "index", "second_moment"]


def test_offsets_lead_to_the_records(lab: Lab, built: Path) -> None:
    import json

    part = zarr.open_group(built / "parts/part", mode="r")
    data = lab.corpus.read_bytes()
    for row, offset in enumerate(part["source_offset"][...].tolist()):
        assert json.loads(data[offset:].split(b"\n", 1)[0]) == lab.rows[row]


@pytest.mark.kill
def test_rows_that_are_not_committed_are_not_read(lab: Lab, tmp_path: Path) -> None:
    """Also not where their chunks lie on the disk already."""
    store = tmp_path / "store"
    fault = {"call": "name", "path": r"00000002\.json$", "when": "before", "act": "kill"}
    assert lab.build(store, fault=fault).code == -9
    part = ghoststore.Store.open(store).part()
    assert (part.path / "vectors/c/2/0").exists()
    assert streamed(part, "source_row").tolist() == list(range(12))
    assert list(part.read("sample_id", 0, 12)) == [row["id"] for row in lab.rows[:12]]
    with pytest.raises(UsageError, match="are not committed"):
        part.read("sample_id", 0, 13)


def test_a_part_stays_as_it_was_opened(lab: Lab, tmp_path: Path) -> None:
    """Reading while writing gives the state of one moment."""
    store = tmp_path / "store"
    fault = {"call": "name", "path": r"00000002\.json$", "when": "before", "act": "EIO"}
    assert lab.build(store, fault=fault).code == 6
    early = ghoststore.Store.open(store).part()
    chunks = stream(early, "source_row")
    first = next(chunks).data.tolist()
    assert lab.build(store).code == 0
    assert first + [row for chunk in chunks for row in chunk.data.tolist()] == list(range(12))
    assert (early.rows, early.complete) == (12, False)
    assert ghoststore.Store.open(store).part().rows == ROWS
