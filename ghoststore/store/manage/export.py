"""``ghoststore.export`` of ``format="vectors"``: the vectors of a part or a run, with ids and fields.

Legend: R exported rows, D numbers of a vector, G blocks of columns.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from ghoststore.errors import UsageError
from ghoststore.progress import Silent
from ghoststore.settings.store import ExportOptions
from ghoststore.store.base.new_files import check_new, new_files
from ghoststore.store.manage.arrow_tables import ArrowTables
from ghoststore.store.manage.exported import OfPart, OfRun, Rows, Source, columns_of, dtype_name, dtype_of
from ghoststore.store.store import Store

FORMS = (".safetensors", ".npy", ".parquet")
ROWS_SUFFIX = ".rows.jsonl"
"""Suffix of the file beside a .safetensors or .npy file: a line of JSON for each row, in the order of the vectors."""
SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "uint8": "U8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """The result of ``export``."""

    store: str
    part: str | None
    """The part or the run; the other is None."""
    run: str | None
    files: list[str]
    """The last file is written last: if it exists, so do the others."""
    rows: int
    dimension: int
    dtype: str
    """dtype of the vectors in the file."""
    bytes: int
    format: str
    """As in the options."""

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore export --json`` prints."""
        return asdict(self)


class _Sink(Protocol):
    """A writer of one form of file."""

    def write(self, rows: Rows) -> None:
        """Append rows."""

    def close(self) -> None:
        """End the file."""


def export_vectors(options: ExportOptions) -> ExportReport:
    """Write the vectors of a part, or of a ``run`` that keeps gradients, to a new file: see `query.export.export`."""
    out = Path(options.out)
    beside = out.with_name(out.name + ROWS_SUFFIX)
    files = [out] if out.suffix == ".parquet" else [beside, out]
    source = _source(options)
    _refuse(source, options, out, files)
    # The vectors last: if they exist, so do their rows.
    with new_files(*files) as staged:
        main, lines = staged[-1], staged[0] if len(staged) > 1 else None
        progress = options.progress or Silent()
        with (
            closing(progress.task("exporting", source.rows)) as task,
            _sink(source, main, lines, tensors=out.suffix == ".safetensors") as sink,
        ):
            for rows in source.pieces():
                sink.write(rows)
                task.advance(len(rows.vectors))
    return ExportReport(
        store=str(options.store),
        part=source.name.get("part"),
        run=source.name.get("run"),
        files=[str(path) for path in files],
        rows=source.rows,
        dimension=source.groups[-1][2],
        dtype=dtype_name(source),
        bytes=sum(path.stat().st_size for path in files),
        format=options.format,
    )


def _source(options: ExportOptions) -> Source:
    store, stored = Store.open(options.store), options.dtype == "stored"
    if options.run is None:
        return OfPart(store.part(options.part), stored=stored, unusable=options.unusable, where=options.where)
    if options.part is not None:
        raise UsageError("give `part` or `run`: one of them, and not both")
    return OfRun(store.run(options.run), stored=stored, unusable=options.unusable, where=options.where)


def _refuse(source: Source, options: ExportOptions, out: Path, files: Sequence[Path]) -> None:
    if out.suffix not in FORMS:
        raise UsageError(f"`out={out}`: vectors are written as {', '.join(FORMS)}")
    for file in files:
        check_new(f"`out={out}`" if file is out else f"the rows beside `out={out}`, {file},", file, *files)
    if source.stored and source.encoding.scaled and out.suffix == ".npy":
        raise UsageError(
            f"`out={out}`: {source.encoding.name} codes have a scale for each row and block, which a .npy file has no "
            "place for; give a .safetensors or .parquet file, or `dtype=float32`"
        )


@contextmanager
def _sink(source: Source, path: Path, lines: Path | None, *, tensors: bool) -> Iterator[_Sink]:
    """The sink for ``path``: a table, or vectors with ``lines`` beside."""
    with ExitStack() as stack:
        sink: _Sink
        if lines is None:
            sink = _Parquet(path, source)
        else:
            vectors = stack.enter_context(open(path, "wb"))
            beside = stack.enter_context(open(lines, "w", encoding="utf-8"))
            scaled = source.stored and source.encoding.scaled
            scales = stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) if scaled else None
            sink = _Vectors(source, vectors, beside, scales, tensors=tensors)
        yield sink
        sink.close()


class _Vectors:
    """A .npy or .safetensors file, and the lines beside. ``scales`` is a temporary file for the tensor of scales."""

    def __init__(
        self, source: Source, file: IO[bytes], lines: IO[str], scales: IO[bytes] | None, *, tensors: bool
    ) -> None:
        self._file, self._lines, self._scales = file, lines, scales
        if tensors:
            file.write(_tensors_header(source, scaled=scales is not None))
        else:
            header = BytesIO()
            shape = {
                "descr": np.lib.format.dtype_to_descr(dtype_of(source)),
                "fortran_order": False,
                "shape": (source.rows, columns_of(source)),
            }
            np.lib.format.write_array_header_1_0(header, shape)
            file.write(header.getvalue())

    def write(self, rows: Rows) -> None:
        self._file.write(np.ascontiguousarray(rows.vectors).data)
        if self._scales is not None and rows.scale is not None:
            self._scales.write(np.ascontiguousarray(rows.scale).data)
        for values in zip(*(values.tolist() for values in rows.fields.values()), strict=True):
            line = dict(zip(rows.fields, values, strict=True))
            self._lines.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        if self._scales is not None:
            self._scales.seek(0)
            while piece := self._scales.read(1 << 20):
                self._file.write(piece)


def _tensors_header(source: Source, *, scaled: bool) -> bytes:
    """The header of a safetensors file with its length: ``vectors``, and ``scale`` if there is one."""
    size = source.rows * columns_of(source) * dtype_of(source).itemsize
    encoding = source.encoding.name if dtype_name(source) != "float32" else "float32"
    header: dict[str, Any] = {
        "__metadata__": {**source.name, "encoding": encoding, "manifest": json.dumps(source.storage)},
        "vectors": {
            "dtype": SAFETENSORS[dtype_name(source)],
            "shape": [source.rows, columns_of(source)],
            "data_offsets": [0, size],
        },
    }
    if scaled:
        end, groups = size + source.rows * len(source.groups) * 4, len(source.groups)
        header["scale"] = {"dtype": "F32", "shape": [source.rows, groups], "data_offsets": [size, end]}
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


class _Parquet:
    """A Parquet table."""

    def __init__(self, path: Path, source: Source) -> None:
        import pyarrow.parquet

        self._tables = ArrowTables(source)
        self._writer = pyarrow.parquet.ParquetWriter(path, self._tables.schema)

    def write(self, rows: Rows) -> None:
        if len(rows.vectors):
            self._writer.write_table(self._tables.of(rows))

    def close(self) -> None:
        self._writer.close()
