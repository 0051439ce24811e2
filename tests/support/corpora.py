"""The same rows written in every form, by the libraries that users write them with."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

FORMS = (
    "jsonl",
    "ndjson",
    "jsonl.gz",
    "jsonl.zst",
    "csv",
    "csv.gz",
    "csv.zst",
    "json",
    "json.gz",
    "json-data",
    "json-objects",
    "tsv",
    "jsonl-utf16",
    "csv-utf16",
    "parquet",
    "arrow",
    "feather",
    "dataset",
    "folder-jsonl",
    "folder-zst",
    "folder-parquet",
)
Rows = list[dict[str, Any]]
Write = Callable[[str, Rows], str]


def jsonl_bytes(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def json_bytes(rows: Rows, kind: str = "json") -> bytes:
    """A document: an array in one line, an object with it, or one object after another over several lines."""
    match kind:
        case "json-data":
            return json.dumps(
                {"version": [1, {"]": '"}'}], "data": rows, "more": {"rows": len(rows)}}, indent=1
            ).encode()
        case "json-objects":
            return "\n".join(json.dumps(row, indent=2, ensure_ascii=False) for row in rows).encode()
        case _:
            return json.dumps(rows, ensure_ascii=False).encode()


def csv_bytes(rows: Rows, delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write_parquet(path: Path, rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)


def write_arrow(path: Path, rows: Rows) -> None:
    """A stream as datasets writes it, or a compressed file with a footer, in batches of three rows."""
    import pyarrow

    table = pyarrow.Table.from_pylist(rows)
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd" if path.suffix == ".feather" else None)
    new = pyarrow.ipc.new_stream if path.suffix == ".arrow" else pyarrow.ipc.new_file
    with new(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=3)


def packed(data: bytes, suffix: str) -> bytes:
    match suffix:
        case "gz":
            return gzip.compress(data)
        case "zst":
            half = len(data) // 2
            return zstandard.compress(data[:half]) + zstandard.compress(data[half:])
        case _:
            return data


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(form, rows)`` gives the source of a corpus of these rows."""

    def write(form: str, rows: Rows) -> str:
        import datasets

        kind, _, packing = form.partition(".")
        place = tmp_path / f"corpus.{form if kind.startswith('folder') else form.partition('-')[0]}"
        match kind:
            case "json" | "json-data" | "json-objects":
                place.write_bytes(packed(json_bytes(rows, kind), packing))
            case "jsonl-utf16":
                place.write_bytes(jsonl_bytes(rows).decode().encode("utf-16"))
            case "csv-utf16":
                place.write_bytes(csv_bytes(rows).decode().encode("utf-16"))
            case "tsv":
                place.write_bytes(csv_bytes(rows, "\t"))
            case "arrow" | "feather":
                write_arrow(place, rows)
            case "jsonl" | "ndjson":
                place.write_bytes(packed(jsonl_bytes(rows), packing))
            case "csv":
                place.write_bytes(packed(csv_bytes(rows), packing))
            case "parquet":
                write_parquet(place, rows)
            case "dataset":
                datasets.disable_progress_bars()
                datasets.Dataset.from_list(rows).save_to_disk(str(place))
            case _:
                place.mkdir()
                (place / "README.md").write_text("not data")
                cut = len(rows) // 3
                for name, part in (("b", rows[cut:]), ("a", rows[:cut])):
                    if kind == "folder-parquet":
                        write_parquet(place / f"{name}.parquet", part)
                    elif kind == "folder-zst":
                        (place / f"{name}.jsonl.zst").write_bytes(packed(jsonl_bytes(part), "zst"))
                    else:
                        (place / f"{name}.jsonl").write_bytes(jsonl_bytes(part))
        return str(place)

    return write
