"""One record is bounded, however large its file is, or becomes when it is decompressed: refused before it is read."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ghoststore.corpus import Corpus, Fields
from ghoststore.corpus.formats.compressed import PIECE, ZstdReader
from ghoststore.errors import CorpusError
from ghoststore.settings.fields import LARGEST_RECORD
from tests.support.bounded import refused, run_bounded

if TYPE_CHECKING:
    from tests.conftest import Lab

BLOCK = 1 << 17
MAGIC = b"\x28\xb5\x2f\xfd"


def frame(*blocks: tuple[bytes, int], window_log: int = 17) -> bytes:
    """A zstd frame of bytes as they are (once), or of one byte again and again: four bytes for each 128 KiB."""
    pieces = [MAGIC, b"\x00", bytes([(window_log - 10) << 3])]
    for data, times in blocks:
        if times == 1:
            pieces += [(len(data) << 3).to_bytes(3, "little"), data]
        else:
            pieces.append(((BLOCK << 3 | 2).to_bytes(3, "little") + data) * (times // BLOCK))
    return b"".join([*pieces, b"\x01\x00\x00"])


BOMBS = {
    "line.jsonl.zst": frame((b'{"text": "', 1), (b"a", 9 << 30)),
    "line.txt.zst": frame((b"a", 9 << 30)),
}


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", [*BOMBS, "line.txt", "line.jsonl.gz"])
def test_a_record_without_end(lab: Lab, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "line.txt":
        with open(path, "wb") as file:
            file.truncate(3 << 30)  # sparse: zeros, and no line ends
    elif name.endswith(".gz"):
        with gzip.open(path, "wb", 1) as file:
            file.write(b'{"text": "')
            for _ in range(65):
                file.write(bytes(1 << 20).replace(b"\0", b"a"))
    else:
        path.write_bytes(BOMBS[name])
        assert path.stat().st_size < 300_000
    words = ["build", "--checkpoint", lab.checkpoint, "--data", path, "--store", tmp_path / "store", "--quiet"]
    refused(run_bounded(lab, *words), f"{path}, line ", "67,108,864 bytes", "--max-record-bytes", codes=(2,))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.jsonl.zst"])
def test_the_limit(tmp_path: Path, name: str) -> None:
    """A record may be as long as the limit says, its line ending included, and no longer."""
    path = tmp_path / name
    form = name.partition(".")[2].partition(".")[0]
    record = {"jsonl": '{"text": "%s"}\n', "txt": "%s\n", "csv": '"%s"\n'}[form] % ("word" * 20)
    head = "text\n" if form == "csv" else ""
    data = (head + record * 3).encode()
    path.write_bytes(zstandard.compress(data) if name.endswith("zst") else data)
    whole = list(Corpus.open(str(path), Fields(max_record_bytes=len(record))).samples())
    assert len(whole) == 3
    with pytest.raises(CorpusError, match=rf"line {2 if head else 1}: a record of more than {len(record) - 1} bytes"):
        list(Corpus.open(str(path), Fields(max_record_bytes=len(record) - 1)).samples())


def test_a_row_of_a_table(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["short", "long" * 1000, "short"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert len(list(Corpus.open(str(tmp_path / "a.parquet")).samples())) == 3
    with pytest.raises(CorpusError, match="row 2: a record of more than 1,000 bytes"):
        list(Corpus.open(str(tmp_path / "a.parquet"), Fields(max_record_bytes=1000)).samples())


@pytest.mark.slow
def test_a_dictionary(lab: Lab, tmp_path: Path) -> None:
    """A value that a dictionary has once may be that of all rows: a few are read at a time, however small the file
    is, and a dictionary is refused before it is read.
    """

    def write(path: Path, *texts: str) -> Path:
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100), list(texts))
        options = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, write_statistics=False, **options)
        return path

    path = write(tmp_path / "a.parquet", "a" * (32 << 20))
    assert path.stat().st_size < 100_000
    code = (
        "from itertools import islice\nimport pyarrow.parquet\nfrom ghoststore.corpus import Corpus, Position\n"
        "from tests.support.bounded import bound\nbound(2 << 30)\n"
        f"corpus = Corpus.open({str(path)!r})\n"
        "print(sum(len(sample.content) for sample in islice(corpus.samples(), 20)) >> 20)\n"
        "(sample,) = corpus.fetch([Position(source_row=99, file=0)]).values()\nprint(len(sample.content) >> 20)"
    )
    outcome = lab.run(code=code)
    assert outcome.out.split() == ["640", "32"], outcome.err
    path = write(tmp_path / "b.parquet", "a" * (40 << 20), "b" * (40 << 20))
    words = (
        r"row 1: the dictionary of 'text' has 83,886,088 bytes, at most 67,108,864 are read.*`fields.max_record_bytes`"
    )
    with pytest.raises(CorpusError, match=words):
        next(Corpus.open(str(path)).samples())
    assert len(next(Corpus.open(str(path), Fields(max_record_bytes=81 << 20)).samples()).texts()[0]) == 40 << 20


def test_a_window_of_zstd(tmp_path: Path) -> None:
    """Of `zstd --long=31`, which keeps 2 GiB in memory: the advice works."""
    path = tmp_path / "a.txt.zst"
    path.write_bytes(frame((b"one line\n", 1), window_log=31))
    with pytest.raises(CorpusError, match=r"`fields.max_record_bytes`.*2147483648"):
        list(Corpus.open(str(path)).samples())
    samples = Corpus.open(str(path), Fields(max_record_bytes=2147483648)).samples()
    assert [sample.content for sample in samples] == ["one line"]


def test_a_piece_is_all_that_is_decompressed_at_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BOMBS["line.txt.zst"])
    with open(tmp_path / "a", "rb") as file, ZstdReader(file) as reader:
        assert reader.readinto(bytearray(10)) == 10
        assert len(reader._ready) <= PIECE // 4 * BLOCK


def test_frames_and_pieces_of_any_length(tmp_path: Path) -> None:
    """What a reader gives does not depend on where the pieces of the compressed bytes end."""
    texts = [os.urandom(size).hex().encode() for size in (0, 1, 700, 5000, 40_000)]
    (tmp_path / "a").write_bytes(b"".join(map(zstandard.compress, texts)))
    with open(tmp_path / "a", "rb") as file, ZstdReader(file) as reader:
        assert reader.read() == b"".join(texts)


def test_a_quote_that_does_not_end(lab: Lab, tmp_path: Path) -> None:
    """A CSV record goes on over lines."""
    path = tmp_path / "quote.csv"
    path.write_text('text\nwhole\n"' + ("x" * 1000 + "\n") * 3000)
    words = ["build", "--checkpoint", lab.checkpoint, "--data", path, "--store", tmp_path / "store", "--quiet"]
    outcome = run_bounded(lab, *words, "--max-record-bytes", "1000000")
    refused(outcome, f"{path}, line 3", "1,000,000 bytes", codes=(2,))


def test_special_files(lab: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    os.mkfifo(folder / "a.jsonl")
    words = ["build", "--checkpoint", lab.checkpoint, "--store", tmp_path / "store", "--quiet", "--data"]
    refused(run_bounded(lab, *words, folder), "no data files", codes=(2,))
    refused(run_bounded(lab, *words, folder / "a.jsonl"), "device, pipe or socket", codes=(2,))


@pytest.mark.parametrize("field", ["text", "messages", "id"])
def test_a_row_that_nests(tmp_path: Path, field: str) -> None:
    path = tmp_path / "a.jsonl"
    for depth in (900, 100_000):
        row = {"text": '"a"', "id": "1"} | {field: "[" * depth + "]" * depth}
        if field == "messages":
            del row["text"]
        path.write_text("{" + ", ".join(f'"{name}": {value}' for name, value in row.items()) + "}\n")
        with pytest.raises(CorpusError, match="line 1"):
            list(Corpus.open(str(path)).samples())


def test_the_largest_record_by_default() -> None:
    assert Fields().max_record_bytes == LARGEST_RECORD == 64 << 20


@pytest.mark.parametrize("name", ["n" * 5000, "a\0b", "no/such:split", "\udce9.jsonl"])
def test_names_that_no_corpus_has(name: str) -> None:
    with pytest.raises(CorpusError):
        Corpus.open(name)
