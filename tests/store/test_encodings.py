"""What each ``--proj-dtype`` keeps of a vector: error bounds, bits, and the way through a whole store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import ghoststore
from ghoststore import ProjectionConfig, Store
from ghoststore.cli.build import command
from ghoststore.errors import CorruptError
from ghoststore.store.part.encoding import ENCODINGS, Groups, encoding
from ghoststore.store.part.layout import PartLayout
from ghoststore.store.spans.layout import CHUNK_BYTES
from indexer.projection.calibration import ARRAYS
from query.search.vectors import PartVectors
from tests.support.harms import flip_middle
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

PLAIN = ProjectionConfig(rank_total=18)
"""Blocks of 4 × 4 numbers: several scales a row."""
UNEVEN = ProjectionConfig(compress=27)
"""Not a multiple of 8: the last byte of one-bit codes is padded."""
SCALED = [name for name, code in ENCODINGS.items() if code.scaled]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
Rows = tuple[NDArray[np.float32], Groups]


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """A few rows of one to four blocks; magnitudes differ between rows and blocks, and some blocks are zero."""
    widths = draw(st.lists(st.integers(1, 21), min_size=1, max_size=4))
    count, seed = draw(st.integers(1, 5)), draw(st.integers(0, 2**32 - 1))
    exponent = draw(st.integers(-30, 30))
    rng = np.random.default_rng(seed)
    stops = np.cumsum(widths).tolist()
    groups = [(f"b{place}", stop - width, stop) for place, (width, stop) in enumerate(zip(widths, stops, strict=True))]
    x = rng.standard_normal((count, stops[-1]))
    for _, start, stop in groups:
        x[:, start:stop] *= rng.choice([0.0, 1.0, 1e-3, 37.0], size=(count, 1)) * 10.0**exponent
    return x.astype(np.float32), groups


def spread(scale_RG: NDArray[np.float32], groups: Groups) -> NDArray[np.float64]:
    """(R, D): the scale of each number."""
    return np.repeat(scale_RG.astype(np.float64), [stop - start for _, start, stop in groups], axis=1)


def there_and_back(name: str, x: NDArray[np.float32], groups: Groups) -> NDArray[np.float32]:
    found = encoding(name).decode(*encoding(name).encode(x.copy(), groups), groups)
    assert found.dtype == np.float32
    return found


@settings(deadline=None)
@given(rows())
def test_int8_is_off_by_half_a_scale_at_most(drawn: Rows) -> None:
    x, groups = drawn
    codes, scale = encoding("int8").encode(x.copy(), groups)
    assert scale is not None
    assert (codes.dtype, codes.shape, scale.shape) == (np.int8, x.shape, (len(x), len(groups)))
    assert np.abs(codes.astype(int)).max() <= 127
    error = np.abs(x.astype(np.float64) - there_and_back("int8", x, groups))
    assert (error <= spread(scale, groups) / 2 * (1 + 1e-6)).all()
    for place, (_, start, stop) in enumerate(groups):
        largest = np.abs(x[:, start:stop]).max(1)
        np.testing.assert_allclose(scale[:, place], largest / 127, rtol=2e-5)


@settings(deadline=None)
@given(rows())
def test_onebit_keeps_signs_and_mean_magnitudes(drawn: Rows) -> None:
    x, groups = drawn
    bits, scale = encoding("onebit").encode(x.copy(), groups)
    assert scale is not None
    dimension = x.shape[1]
    assert (bits.dtype, bits.shape) == (np.uint8, (len(x), -(-dimension // 8)))
    unpacked = np.unpackbits(bits, axis=1, bitorder="little")
    np.testing.assert_array_equal(unpacked[:, :dimension], x >= 0)
    assert not unpacked[:, dimension:].any()
    decoded = there_and_back("onebit", x, groups)
    np.testing.assert_array_equal(decoded, np.where(x >= 0, 1, -1) * spread(scale, groups).astype(np.float32))
    for place, (_, start, stop) in enumerate(groups):
        magnitude = np.abs(x[:, start:stop])
        np.testing.assert_allclose(scale[:, place], magnitude.mean(1), rtol=1e-6)
        # No other scale comes nearer: the derivative of the squared error is zero.
        np.testing.assert_allclose((magnitude - scale[:, [place]]).sum(1), 0, atol=1e-5 * max(1e-30, magnitude.max()))


@settings(deadline=None)
@given(rows(), st.sampled_from(sorted(ENCODINGS)))
def test_what_was_decoded_encodes_to_itself(drawn: Rows, name: str) -> None:
    """Bit for bit, scales too."""
    x, groups = drawn
    with np.errstate(over="ignore", invalid="ignore"):
        once = there_and_back(name, x, groups)
        again = there_and_back(name, once, groups)
    np.testing.assert_array_equal(once, again)


@pytest.mark.parametrize("name", ENCODINGS)
def test_zero_blocks_stay_zero(name: str) -> None:
    x = np.zeros((3, 11), dtype=np.float32)
    x[1, :5] = np.linspace(-1, 1, 5)
    decoded = there_and_back(name, x, [("a", 0, 5), ("b", 5, 11)])
    assert not decoded[[0, 2]].any()
    assert not decoded[1, 5:].any()
    assert decoded[1].any()


@pytest.mark.parametrize("name", SCALED)
def test_the_ends_of_float32(name: str) -> None:
    """Neither the largest numbers nor those below the normal ones become infinite or NaN."""
    largest, smallest = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
    x = np.array([[largest, -largest], [largest, 0], [smallest, -smallest], [smallest * 190, 0]], dtype=np.float32)
    decoded = there_and_back(name, x, [("all", 0, 2)])
    assert np.isfinite(decoded).all()
    assert np.abs(decoded[0] / x[0] - 1).max() < 1e-4


@pytest.mark.thin(3)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("projection", [None, PLAIN, UNEVEN], ids=["sketched", "plain", "uneven"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_read_as_tensors_bit_for_bit(
    lab: Lab,
    tmp_path: Path,
    name: str,
    projection: ProjectionConfig | None,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a query reads is what was decoded, over several chunks a span and several spans; norms are its lengths."""
    monkeypatch.setattr("ghoststore.store.part.layout.CHUNK_BYTES", 1024)
    part = built(lab, tmp_path, name, projection=projection, span_rows=8)
    decoded = vectors_of(part, 0, 27)
    assert decoded.shape == (27, part.layout.dimension)
    streamed = [(piece.start, piece.rows_RD.cpu().clone().numpy()) for piece in PartVectors(part, device).stream()]
    assert [start for start, _ in streamed] == list(range(0, 27, part.layout.chunk_rows))
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in streamed]), decoded)
    wanted = [26, 0, 13, 13]
    np.testing.assert_array_equal(PartVectors(part, device).gather(wanted).cpu().numpy(), decoded[wanted])
    for place, (_, start, stop) in enumerate(part.groups):
        lengths = np.linalg.norm(decoded[:, start:stop].astype(np.float64), axis=1)
        np.testing.assert_allclose(part.read("norm", 0, 27)[:, place], lengths, rtol=1e-6)


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ENCODINGS)
def test_a_chunk_is_decoded_some_rows_at_a_time(
    lab: Lab, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = built(lab, tmp_path, name, projection=PLAIN)
    decoded = vectors_of(part, 0, 27)
    monkeypatch.setattr("query.search.vectors.DECODED_BYTES", 4 * 5 * part.layout.dimension)
    streamed = [(piece.start, piece.stop, piece.rows_RD.clone().numpy()) for piece in PartVectors(part).stream()]
    step = 27 if name == "float32" else 5
    assert [(start, stop) for start, stop, _ in streamed] == [(n, min(n + step, 27)) for n in range(0, 27, step)]
    np.testing.assert_array_equal(np.concatenate([rows for _, _, rows in streamed]), decoded)
    np.testing.assert_array_equal(PartVectors(part).gather([26, 0, 13, 13]).numpy(), decoded[[26, 0, 13, 13]])


def built(lab: Lab, folder: Path, name: str, **options: Any) -> ghoststore.Part:
    ghoststore.build(
        checkpoint=lab.checkpoint,
        data=lab.corpus,
        store=folder / "store",
        name=name,
        proj_dtype=name,
        device="cpu",
        **options,
    )
    return Store.open(folder / "store").part(name)


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", SCALED)
def test_a_flipped_byte_of_a_scale_is_found(lab: Lab, tmp_path: Path, name: str) -> None:
    part = built(lab, tmp_path, name, span_rows=6)
    flip_middle(part.path / "scale/c/1/0")
    (damage,) = ghoststore.verify(tmp_path / "store").damage
    assert damage.file == "scale/c/1/0"
    with pytest.raises(CorruptError, match="scale/c/1/0 is damaged"):
        ghoststore.query(store=tmp_path / "store", val_set=lab.corpus, max_samples=1, device="cpu")


def test_a_reader_that_does_not_know_the_encoding_names_it(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(lab, tmp_path, "int8")
    known = {name: code for name, code in ENCODINGS.items() if name != "int8"}
    monkeypatch.setattr("ghoststore.store.part.encoding.ENCODINGS", known)
    with pytest.raises(CorruptError, match="'int8' is unknown; known: float32, float16, bfloat16, onebit"):
        Store.open(tmp_path / "store").part("int8")


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.kill
@pytest.mark.parametrize("name", ENCODINGS)
def test_killed_and_resumed_to_the_same_bytes(lab: Lab, tmp_path: Path, name: str) -> None:
    options = ("--proj-dtype", name, "--proj-rank-total", "18")
    assert lab.build(tmp_path / "whole", *options).code == 0
    fault = {"call": "name", "path": r"commits/00000002\.json$", "when": "before", "number": 1, "act": "kill"}
    assert lab.build(tmp_path / "killed", *options, fault=fault).code == -9
    assert lab.build(tmp_path / "killed", *options).code == 0
    assert lab.tree(tmp_path / "killed") == lab.tree(tmp_path / "whole")


@pytest.mark.slow
def test_bytes_a_row(lab: Lab, tmp_path: Path) -> None:
    """What is announced, shown and on the disk."""
    layers = 4  # with a scale and a norm each
    scales = {"int8": 4 * layers, "onebit": 4 * layers}
    expected = {name: 256 * layers + scales.get(name, 0) for name in ENCODINGS}
    others = 43 + 4 * layers
    for name, size in expected.items():
        options = {"checkpoint": lab.checkpoint, "data": lab.corpus, "store": tmp_path / "store", "name": name}
        plan = ghoststore.build(**options, proj_dtype=name, device="cpu", dry_run=True)
        part = built(lab, tmp_path, name)
        assert part.layout.row_bytes == size + others
        found = ghoststore.info(tmp_path / "store", part=name).parts[0]
        assert found.row_bytes == size + others
        chunks = [path for path in part.path.glob("*/c/**/*") if path.is_file()]
        numbers = [
            path for path in chunks if path.relative_to(part.path).parts[0] not in ("sample_id", "span_start", *ARRAYS)
        ]
        assert plan.bytes_on_disk == sum(path.stat().st_size for path in numbers)
        assert f"{size + others:,}, ids" in lab.run("info", "--store", tmp_path / "store", "--part", name).out


@pytest.mark.parametrize("dimension", [1, 9, 1024, 100_000, 3_000_000])
@pytest.mark.parametrize("name", ENCODINGS)
def test_chunks_follow_the_stored_bytes(name: str, dimension: int) -> None:
    layout = PartLayout.choose(rows=10**6, dimension=dimension, groups=1, dtype=name, span_rows=None, store_text=False)
    (vectors,) = (spec for spec in layout.arrays() if spec.name == "vectors")
    assert vectors.width == encoding(name).columns(dimension)
    assert vectors.chunk_bytes <= CHUNK_BYTES or layout.chunk_rows == 1
    assert layout.chunk_rows * dimension * 4 <= 4 * CHUNK_BYTES or layout.chunk_rows == 1
    assert layout.span_rows % layout.chunk_rows == 0
    assert ("scale" in {spec.name for spec in layout.arrays()}) == encoding(name).scaled


def test_the_command_offers_every_encoding() -> None:
    (option,) = (option for option in command.params if option.name == "proj_dtype")
    assert list(option.type.choices) == list(ENCODINGS)  # type: ignore[attr-defined]
