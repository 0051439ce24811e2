"""Arrow's own files: streams and files with a footer, whoever wrote them; what is cut short or damaged is refused."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pytest

from ghoststore.corpus import Corpus, Fields, Position
from ghoststore.corpus.formats import arrow_file
from ghoststore.errors import CorpusError, CorruptError
from tests.support.corpora import write_arrow

ROWS: list[dict[str, Any]] = [
    {"id": i, "text": f"text {i} ü" * i, "meta": {"source": "ab"[i % 2], "none": None}, "tags": ["x"] * i}
    for i in range(11)
]


def contents(source: Path) -> list[Any]:
    corpus = Corpus.open(str(source), Fields(domain="meta.source"))
    samples = list(corpus.samples())
    places = [Position(source_row=s.source_row, file=s.file, offset=s.offset) for s in samples]
    assert corpus.fetch([places[10], places[0], places[4]]) == {row: samples[row] for row in (0, 4, 10)}
    assert list(corpus.samples(places[7])) == samples[7:]
    return [(s.id, s.content, s.domain) for s in samples]


EXPECTED = [(str(row["id"]), row["text"], row["meta"]["source"]) for row in ROWS]
TABLE = pa.Table.from_pylist(ROWS)


def test_files_of_each_writer(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    pd.DataFrame({"text": ["a", "b"]}).to_feather(tmp_path / "pandas.feather")
    assert [s.content for s in Corpus.open(str(tmp_path / "pandas.feather")).samples()] == ["a", "b"]
    for compression in ("lz4", "zstd", "uncompressed"):
        pyarrow.feather.write_feather(TABLE, tmp_path / "a.feather", compression=compression, chunksize=4)
        assert contents(tmp_path / "a.feather") == EXPECTED
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert contents(arrow) == EXPECTED
    for name in ("b.ipc", "b.arrow"):
        write_arrow(tmp_path / name, ROWS)
        assert contents(tmp_path / name) == EXPECTED


def test_dictionaries(tmp_path: Path) -> None:
    """Also ones that come before each batch."""
    column = pa.chunked_array([pa.array(["x", "y"]).dictionary_encode(), pa.array(["z"]).dictionary_encode()])
    table = pa.table({"text": column})
    for name, new in (("a.arrow", pa.ipc.new_stream), ("a.feather", pa.ipc.new_file)):
        options = pa.ipc.IpcWriteOptions(unify_dictionaries=name == "a.feather")
        with new(str(tmp_path / name), table.schema, options=options) as writer:
            writer.write_table(table)
        assert [s.content for s in Corpus.open(str(tmp_path / name)).samples()] == ["x", "y", "z"]


def test_no_rows(tmp_path: Path) -> None:
    write_arrow(tmp_path / "a.arrow", [{"text": "a"}])
    with pa.ipc.new_stream(str(tmp_path / "b.arrow"), pa.schema([("text", pa.string())])):
        pass
    with pytest.raises(CorpusError, match="has no rows"):
        list(Corpus.open(str(tmp_path / "b.arrow")).samples())


@pytest.mark.parametrize("name", ["a.arrow", "a.feather"])
def test_cut_at_any_byte(name: str, tmp_path: Path) -> None:
    """A stream may seem to end after each batch."""
    write_arrow(tmp_path / name, ROWS)
    whole = (tmp_path / name).read_bytes()
    for end in sorted({0, 3, 8, len(whole) // 2, len(whole) - 8, *random.Random(0).sample(range(len(whole)), 60)}):
        (tmp_path / name).write_bytes(whole[:end])
        with pytest.raises(CorpusError, match=r"cut short|damaged"):
            list(Corpus.open(str(tmp_path / name)).samples())


@pytest.mark.parametrize("name", ["a.arrow", "a.feather"])
def test_a_byte_that_is_another(name: str, tmp_path: Path) -> None:
    """An error of the corpus, or rows; never anything else."""
    write_arrow(tmp_path / name, ROWS)
    whole, draw = (tmp_path / name).read_bytes(), random.Random(1)
    for _ in range(150):
        place = draw.randrange(len(whole))
        (tmp_path / name).write_bytes(whole[:place] + bytes([draw.randrange(256)]) + whole[place + 1 :])
        try:
            list(Corpus.open(str(tmp_path / name), Fields(text="text", domain="meta.source")).samples())
        except CorpusError as error:
            assert name in str(error)  # noqa: PT017


def test_offsets_beyond_the_data(tmp_path: Path) -> None:
    """Text that would be read from outside the batch."""
    write_arrow(tmp_path / "a.arrow", [{"text": "a"}, {"text": "bcd"}])
    whole, offsets = (tmp_path / "a.arrow").read_bytes(), struct.pack("<3i", 0, 1, 4)
    assert whole.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(whole.replace(offsets, struct.pack("<3i", 0, 1, 1 << 30)))
    with pytest.raises(CorpusError, match=r"a\.arrow: damaged"):
        list(Corpus.open(str(tmp_path / "a.arrow")).samples())


def test_a_large_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its size once it is decompressed."""
    table = pa.table({"text": ["a" * 1000] * 100})
    pyarrow.feather.write_feather(table, tmp_path / "a.feather", compression="zstd")
    assert (tmp_path / "a.feather").stat().st_size < 5000
    monkeypatch.setattr(arrow_file, "LARGEST_BATCH", 90_000)
    with pytest.raises(CorpusError, match=r"a batch of 100,\d+ bytes in memory, at most 90,000 are read"):
        list(Corpus.open(str(tmp_path / "a.feather"), Fields(max_record_bytes=1)).samples())
    pyarrow.feather.write_feather(table, tmp_path / "a.feather", compression="zstd", chunksize=10)
    assert len(list(Corpus.open(str(tmp_path / "a.feather")).samples())) == 100


def test_a_batch_that_claims_to_be_huge(tmp_path: Path) -> None:
    pyarrow.feather.write_feather(pa.table({"text": ["a" * 1000] * 100}), tmp_path / "a.feather", compression="zstd")
    whole = (tmp_path / "a.feather").read_bytes()
    size = struct.pack("<q", 100_000)
    assert whole.count(size) == 1
    (tmp_path / "a.feather").write_bytes(whole.replace(size, struct.pack("<q", 1 << 40)))
    with pytest.raises(CorpusError, match=r"a batch of 1,099,511,\d+,\d+ bytes in memory, at most 1,073,741,824"):
        list(Corpus.open(str(tmp_path / "a.feather")).samples())


def test_a_large_row(tmp_path: Path) -> None:
    write_arrow(tmp_path / "a.arrow", [{"text": "short"}, {"text": "long" * 1000}])
    with pytest.raises(CorpusError, match="row 2: a record of more than 1,000 bytes"):
        list(Corpus.open(str(tmp_path / "a.arrow"), Fields(max_record_bytes=1000)).samples())


def test_what_is_no_arrow_file(tmp_path: Path) -> None:
    for data, words in ((b"", "is empty"), (b"FEA1" + bytes(100), "first version of Feather"), (b"x" * 100, "damaged")):
        (tmp_path / "a.feather").write_bytes(data)
        with pytest.raises(CorpusError, match=words):
            list(Corpus.open(str(tmp_path / "a.feather")).samples())
    (tmp_path / "a.arrow").mkdir()
    with pytest.raises((CorpusError, CorruptError)):
        arrow_file.ArrowForm().count(tmp_path / "a.arrow")
