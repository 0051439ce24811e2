"""Rows of a corpus, written again: every field of every row, whatever the form."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from ghoststore.corpus import Corpus, Position
from ghoststore.corpus.export import check_export, write_export
from ghoststore.corpus.source_rows import SourceRows
from ghoststore.errors import CorpusError, MismatchError, UsageError
from tests.support.corpora import FORMS, Write

ROWS = [
    {"id": f"r{i}", "text": f'line {i}, "quoted", süß\nand a second line', "domain": "ab"[i % 2], "note": f"n{i}"}
    for i in range(11)
]
NESTED = [
    {"text": f"text {i}", "tags": ["x"] * (i % 3), "meta": {"n": i, "x": i / 4}, "big": 2**60 + i, "none": None}
    for i in range(11)
]
CHOSEN = [0, 3, 4, 7, 10]
SUFFIX = {
    "parquet": ".parquet",
    "csv": ".csv",
    "tsv": ".tsv",
    "dataset": "",
    "txt": ".txt",
    "jsonl": ".jsonl",
    "json": ".json",
    "arrow": ".arrow",
    "feather": ".feather",
}


def source_rows(source: str | Path, rows: Sequence[int] = CHOSEN) -> SourceRows:
    corpus = Corpus.open(str(source))
    chosen = [sample for sample in corpus.samples() if sample.source_row in rows]
    places = [Position(source_row=s.source_row, file=s.file, offset=s.offset) for s in chosen]
    return SourceRows(corpus, places, [sample.digest() for sample in chosen])


def exported(source: str | Path, out: Path, rows: Sequence[int] = CHOSEN, order: list[int] | None = None) -> Path:
    found = source_rows(source, rows)
    check_export(str(source), found.corpus.form, out)
    write_export(found, out, order)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    return out


def read(path: Path) -> list[dict[str, Any]]:
    """All fields of all rows, by the libraries that users read them with."""
    if path.is_dir():
        return datasets.load_from_disk(str(path)).to_list()
    if path.suffix == ".arrow":
        return pyarrow.ipc.open_stream(str(path)).read_all().to_pylist()
    if path.suffix == ".feather":
        return pyarrow.feather.read_table(path).to_pylist()
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [row for _, row in Corpus.open(str(path))._form.rows(path, None, 0)]


@pytest.mark.thin
@pytest.mark.parametrize("order", [None, [4, 0, 2, 1, 3]], ids=["corpus", "score"])
@pytest.mark.parametrize("form", FORMS)
def test_own_form(write: Write, tmp_path: Path, form: str, order: list[int] | None) -> None:
    """Every field of each row; a folder of several files becomes one."""
    source = write(form, ROWS)
    suffix = next((end for kind, end in SUFFIX.items() if kind in form), ".jsonl")
    out = exported(source, tmp_path / f"out{suffix}", order=order)
    assert read(out) == [ROWS[CHOSEN[place]] for place in order or range(len(CHOSEN))]
    again = exported(source, tmp_path / f"again{suffix}", order=order)
    if out.is_dir():
        assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}
    else:
        assert out.read_bytes() == again.read_bytes()


@pytest.mark.thin
@pytest.mark.parametrize(
    "form", ["jsonl", "jsonl.zst", "json", "parquet", "feather", "dataset", "folder-parquet", "csv"]
)
@pytest.mark.parametrize(
    "out", ["out.jsonl", "out.ndjson.gz", "out.jsonl.zst", "out.json", "out.parquet", "out.arrow", "out"]
)
def test_another_form(write: Write, tmp_path: Path, form: str, out: str) -> None:
    """Every value stays what it was."""
    rows = ROWS if form == "csv" else NESTED
    made = exported(write(form, rows), tmp_path / out)
    assert read(made) == [rows[row] for row in CHOSEN]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("form", "lines"),
    [
        ("jsonl", [b'{"text": "a",   "b":1.10}\n', b'{"b":[ ] ,"text":"\\u00fc"}\r\n', b'{"text": "c"}']),
        ("txt", ["säge\n".encode(), b"two\r\n", b"three"]),
        ("csv", [b"text,n\r\n", b'"a\nb",1\r\n', b'c,"2"\n', b"d,3"]),
    ],
)
def test_lines_keep_their_bytes(tmp_path: Path, form: str, lines: list[bytes], packing: str) -> None:
    """Spaces, escapes, line endings; a last line without an ending gets one, and a BOM is no part of a row."""
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing]
    source = tmp_path / f"in.{form}{packing}"
    source.write_bytes(pack(b"\xef\xbb\xbf" + b"".join(lines)))
    header, records = (lines[:1], lines[1:]) if form == "csv" else ([], lines)
    for rows in ([0, 2], [0, 1, 2], [1]):
        out = exported(source, tmp_path / f"{len(rows)}.{form}", rows)
        expected = [record if record.endswith(b"\n") else record + b"\n" for record in records]
        assert out.read_bytes() == b"".join(header + [expected[row] for row in rows])
    out = exported(source, tmp_path / f"score.{form}", [0, 2], [1, 0])
    assert out.read_bytes() == b"".join([*header, expected[2], expected[0]])


def test_the_same_bytes_when_packed(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for suffix in ("gz", "zst"):
        one, two = (exported(source, tmp_path / f"{name}.jsonl.{suffix}") for name in "ab")
        assert one.read_bytes() == two.read_bytes()
        assert read(one) == [ROWS[row] for row in CHOSEN]


def test_parquet_keeps_schema_and_metadata(tmp_path: Path) -> None:
    schema = pyarrow.schema(
        [
            pyarrow.field("text", pyarrow.large_string(), nullable=False, metadata={"unit": "words"}),
            ("when", pyarrow.timestamp("us", tz="UTC")),
            ("price", pyarrow.decimal128(9, 2)),
            ("kind", pyarrow.dictionary(pyarrow.int8(), pyarrow.string())),
            ("raw", pyarrow.binary()),
        ],
        metadata={"made": "by hand"},
    )
    table = pyarrow.table(
        {
            "text": [f"t{i}" for i in range(11)],
            "when": list(range(11)),
            "price": list(range(11)),
            "kind": pyarrow.array(list("abcabcabcab")).dictionary_encode().cast(schema.field("kind").type),
            "raw": [bytes([i]) for i in range(11)],
        },
        schema=schema,
    )
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=4)
    for name, order in (("corpus", None), ("score", [4, 3, 2, 1, 0])):
        out = exported(tmp_path / "in.parquet", tmp_path / f"{name}.parquet", order=order)
        found = pyarrow.parquet.read_table(out)
        assert found.schema.equals(schema, check_metadata=True)
        assert found.equals(table.take([CHOSEN[place] for place in order or range(5)]))
    with pytest.raises(UsageError, match=r"a row holds a value that JSON lacks .* give `out` a .parquet file"):
        exported(tmp_path / "in.parquet", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_parquet_has_no_tiny_row_groups(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows out of many groups of the source are gathered, up to a size."""
    source = write("parquet", ROWS)  # groups of 3
    assert pyarrow.parquet.ParquetFile(exported(source, tmp_path / "a.parquet")).num_row_groups == 1
    monkeypatch.setattr("ghoststore.corpus.export.GROUP_BYTES", 1)
    out = exported(source, tmp_path / "b.parquet")
    assert pyarrow.parquet.ParquetFile(out).num_row_groups == 4
    assert read(out) == [ROWS[row] for row in CHOSEN]


def test_a_dataset_keeps_its_features(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "pair": datasets.List(datasets.Value("int16"), length=2),
        }
    )
    rows = [{"text": f"t{i}", "label": i % 2, "pair": [i, i]} for i in range(11)]
    whole = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows, features=features)})
    whole.save_to_disk(str(tmp_path / "in"))
    for out in ("out", "out.parquet"):
        made = exported(f"{tmp_path / 'in'}:train", tmp_path / out)
        found = datasets.load_from_disk(str(made)) if made.is_dir() else datasets.Dataset.from_parquet(str(made))
        assert found.features == features
        assert found.to_list() == [rows[row] for row in CHOSEN]


@pytest.mark.parametrize("out", ["out.jsonl", "out.parquet", "out"])
def test_fields_that_only_some_rows_have(tmp_path: Path, out: str) -> None:
    """In a table a missing field is null; the others stay."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n{"text": "b", "late": {"x": 1}}\n{"text": "c", "late": {"y": [2]}}\n')
    found = read(exported(source, tmp_path / out, [0, 1, 2]))
    if out.endswith(".jsonl"):
        assert found == [json.loads(line) for line in source.read_text().splitlines()]
    else:
        assert found == [
            {"text": "a", "late": None},
            {"text": "b", "late": {"x": 1, "y": None}},
            {"text": "c", "late": {"x": None, "y": [2]}},
        ]


def test_values_that_no_table_holds(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    for other in ('"words"', str(2**70)):
        source.write_text(f'{{"text": "a", "x": 1}}\n{{"text": "b", "x": {other}}}\n')
        with pytest.raises(UsageError, match=r"do not fit a table, .* give `out` a .jsonl file"):
            exported(source, tmp_path / "out.parquet", [0, 1])
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_files_of_a_folder_that_do_not_go_together(tmp_path: Path) -> None:
    for form, data in (("csv", (b"text,n\na,1\n", b"n,text\n1,a\n")), ("parquet", ({"text": ["a"]}, {"text": [None]}))):
        folder = tmp_path / f"in-{form}"
        folder.mkdir()
        for name, content in zip("ab", data, strict=True):
            path = folder / f"{name}.{form}"
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                pyarrow.parquet.write_table(pyarrow.table(content), path)
        with pytest.raises(CorpusError, match=rf"b\.{form}: expected .*one file cannot hold both: give `out` a .jsonl"):
            exported(folder, tmp_path / f"out.{form}", [0, 1])
        assert len(read(exported(folder, tmp_path / f"{form}.jsonl", [0, 1]))) == 2


@pytest.mark.parametrize("form", ["jsonl", "csv.gz", "parquet", "dataset"])
def test_another_digest(write: Write, tmp_path: Path, form: str) -> None:
    source = write(form, ROWS)
    found = source_rows(source)
    wrong = SourceRows(found.corpus, found.places, [1, 2, 3, 4, 5])
    for out in ("out.jsonl", "out.parquet", "out"):
        with pytest.raises(
            MismatchError, match=r"row 0 of the corpus is not the one .* digest 0000000000000001, found"
        ):
            write_export(wrong, tmp_path / out, None)
        assert not (tmp_path / out).exists()


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_row_that_is_gone(write: Write, tmp_path: Path, form: str) -> None:
    found = source_rows(write(form, ROWS))
    write(form, ROWS[:8])
    with pytest.raises(MismatchError, match="row 10 of the corpus is no longer there"):
        write_export(found, tmp_path / "out.jsonl", None)


@pytest.mark.parametrize(
    ("form", "out", "message"),
    [
        ("jsonl", "out.csv", r"out\.csv`: rows of data \(jsonl\) cannot be written as csv; give .jsonl, .parquet or"),
        ("csv", "out.txt", r"cannot be written as txt; give .jsonl, .parquet or a folder, or .csv"),
        ("parquet", "out.orc", r"out\.orc`: expected a name that ends in .jsonl, .jsonl.gz"),
        ("token-shards", "out.jsonl", "data holds token shards: .* Build a part of the corpus itself"),
    ],
)
def test_forms_that_cannot_be(form: str, out: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_export("data", form, Path(out))
