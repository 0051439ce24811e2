"""``ghoststore.export``: the vectors of a part, with ids and fields, as files that other tools read.

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
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.progress import Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.store import ExportOptions
from ghoststore.store.base.new_files import check_new, new_files
from ghoststore.store.part.part import Part
from ghoststore.store.part.status import Status
from ghoststore.store.spans.reader import read_span, stream
from ghoststore.store.store import Store

FORMS = (".safetensors", ".npy", ".parquet")
ROWS_SUFFIX = ".rows.jsonl"
"""Of the file beside a .safetensors or .npy file: a line of JSON a row, in the order of the vectors."""
SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "uint8": "U8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was exported."""

    store: str
    part: str
    files: list[str]
    """The one that says that the others are complete is the last."""
    rows: int
    dimension: int
    dtype: str
    """Of the numbers of the vectors in the file."""
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore export --json`` prints."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of the part, in order."""

    vectors: NDArray[Any]
    """(R, D) float32; or as stored, (R, columns)."""
    scale: NDArray[np.float32] | None
    """(R, G), with vectors as they are stored where there is one."""
    fields: dict[str, Any]
    """One value a row each: row, source_row, id, domain, loss, n_tokens, status; and norm, (R, G)."""


class _Sink(Protocol):
    """A form of file."""

    def write(self, rows: Rows) -> None:
        """Append rows."""

    def close(self) -> None:
        """The last were written."""


@takes(ExportOptions)
def export(options: ExportOptions) -> ExportReport:
    """Write the vectors of a part, decoded to float32, with id, domain, source row, loss, tokens and norms of each row,
    to a new file: ``.parquet`` (all in one table), ``.safetensors`` or ``.npy`` (the vectors, with a ``.rows.jsonl`` of
    the rest beside).

    Rows without a vector are left out, unless ``unusable``; each row has its ``source_row``. ``dtype="stored"`` writes
    the numbers as the store has them: bfloat16 as such in safetensors and as its bits (uint16) elsewhere, codes of int8
    and onebit with the ``scale`` of each row and block (not to ``.npy``, which has no place for it). Some thousand rows
    are in memory at a time. Files appear whole or not at all.

    UsageError for an unknown form or a file that exists, CorruptError if what is read is damaged, StorageError if the
    disk refuses.
    """
    out = Path(options.out)
    part = Store.open(options.store).part(options.part)
    beside = out.with_name(out.name + ROWS_SUFFIX)
    files = [out] if out.suffix == ".parquet" else [beside, out]
    _refuse(part, options, out, files)
    exporting = _Export(part, options)
    # The vectors last: who finds them finds their rows beside them.
    with new_files(*files) as staged:
        main, lines = staged[-1], staged[0] if len(staged) > 1 else None
        progress = options.progress or Silent()
        with (
            closing(progress.task(f"exporting {part.name}", exporting.rows)) as task,
            exporting.sink(main, lines) as sink,
        ):
            for rows in exporting.pieces():
                sink.write(rows)
                task.advance(len(rows.vectors))
    return ExportReport(
        store=str(options.store),
        part=part.name,
        files=[str(path) for path in files],
        rows=exporting.rows,
        dimension=part.layout.dimension,
        dtype=exporting.dtype_name,
        bytes=sum(path.stat().st_size for path in files),
    )


def _refuse(part: Part, options: ExportOptions, out: Path, files: Sequence[Path]) -> None:
    if out.suffix not in FORMS:
        raise UsageError(f"`out={out}`: vectors are written as {', '.join(FORMS)}")
    for file in files:
        check_new(f"`out={out}`" if file is out else f"the rows beside `out={out}`, {file},", file, *files)
    if options.dtype == "stored" and part.encoding.scaled and out.suffix == ".npy":
        raise UsageError(
            f"`out={out}`: {part.layout.dtype} codes have a scale for each row and block, which a .npy file has no "
            "place for; give a .safetensors or .parquet file, or `dtype=float32`"
        )


class _Export:
    """The rows of ``part`` that are exported."""

    def __init__(self, part: Part, options: ExportOptions) -> None:
        self._part, self._stored, self._form = part, options.dtype == "stored", Path(options.out).suffix
        part.bear_out()  # before memory for a flag of each row is asked for
        self._chosen = np.ones(part.rows, dtype=bool) if options.unusable else part.usable()
        self.rows = int(self._chosen.sum())

    @property
    def dtype_name(self) -> str:
        """Of the numbers of a vector."""
        code = self._part.encoding
        return "float32" if not self._stored else {"onebit": "uint8"}.get(code.name, code.name)

    @property
    def dtype(self) -> np.dtype[Any]:
        """As numpy has them."""
        return self._part.encoding.stored if self._stored else np.dtype("<f4")

    @property
    def columns(self) -> int:
        """Numbers of a row of the file."""
        layout = self._part.layout
        return self._part.encoding.columns(layout.dimension) if self._stored else layout.dimension

    def pieces(self) -> Iterator[Rows]:
        """All of them, a chunk at a time."""
        part, done, span, fields, scale = self._part, 0, -1, dict[str, Any](), None
        for chunk in stream(part, "vectors"):
            if chunk.start // part.layout.span_rows != span:
                span = chunk.start // part.layout.span_rows
                fields = self._fields(span)
                scale = read_span(part, "scale", span) if part.encoding.scaled else None
            count = chunk.stop - chunk.start
            chosen = self._chosen[done : done + count]
            done += count
            inside = slice(chunk.start - span * part.layout.span_rows, chunk.stop - span * part.layout.span_rows)
            own = None if scale is None else scale[inside][chosen]
            stored = chunk.data[chosen]
            if not self._stored:
                vectors = part.encoding.decode(stored, own, part.groups)
                yield Rows(vectors, None, {name: values[inside][chosen] for name, values in fields.items()})
            else:
                yield Rows(stored, own, {name: values[inside][chosen] for name, values in fields.items()})

    def _fields(self, span: int) -> dict[str, Any]:
        part = self._part
        start, stop = part.layout.span_of(span)
        names = np.array([*part.domains, None], dtype=object)  # -1, no domain, is the last
        return {
            "row": np.arange(start, stop),
            "source_row": read_span(part, "source_row", span).copy(),
            "id": part.read("sample_id", start, stop),
            "domain": names[read_span(part, "domain", span)],
            "loss": read_span(part, "loss", span).copy(),
            "n_tokens": read_span(part, "n_tokens", span).copy(),
            "status": np.array([Status(code).name.lower() for code in read_span(part, "status", span)], dtype=object),
            "norm": read_span(part, "norm", span).copy(),
        }

    @contextmanager
    def sink(self, path: Path, lines: Path | None) -> Iterator[_Sink]:
        """What writes to ``path`` in the form that was asked for: a table, or vectors with ``lines`` beside."""
        with ExitStack() as stack:
            sink: _Sink
            if lines is None:
                sink = _Parquet(path, self, self._part)
            else:
                vectors = stack.enter_context(open(path, "wb"))
                beside = stack.enter_context(open(lines, "w", encoding="utf-8"))
                scaled = self._stored and self._part.encoding.scaled
                scales = stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) if scaled else None
                sink = _Vectors(self, self._part, vectors, beside, scales, tensors=self._form == ".safetensors")
            yield sink
            sink.close()


class _Vectors:
    """A .npy or .safetensors file, and the lines beside. ``scales`` is a nameless file for what follows behind the
    vectors.
    """

    def __init__(
        self, of: _Export, part: Part, file: IO[bytes], lines: IO[str], scales: IO[bytes] | None, *, tensors: bool
    ) -> None:
        self._file, self._lines, self._scales = file, lines, scales
        if tensors:
            file.write(_tensors_header(of, part, scaled=scales is not None))
        else:
            header = BytesIO()
            shape = {
                "descr": np.lib.format.dtype_to_descr(of.dtype),
                "fortran_order": False,
                "shape": (of.rows, of.columns),
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


def _tensors_header(of: _Export, part: Part, *, scaled: bool) -> bytes:
    """The length, and what the tensors of a safetensors file are: ``vectors``, and ``scale`` where there is one."""
    size = of.rows * of.columns * of.dtype.itemsize
    header: dict[str, Any] = {
        "__metadata__": {
            "part": part.name,
            "encoding": part.layout.dtype if of.dtype_name != "float32" else "float32",
            "manifest": json.dumps(part.manifest["storage"]),
        },
        "vectors": {
            "dtype": SAFETENSORS[of.dtype_name],
            "shape": [of.rows, of.columns],
            "data_offsets": [0, size],
        },
    }
    if scaled:
        end = size + of.rows * part.layout.groups * 4
        header["scale"] = {"dtype": "F32", "shape": [of.rows, part.layout.groups], "data_offsets": [size, end]}
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


class _Parquet:
    """One table."""

    def __init__(self, path: Path, of: _Export, part: Part) -> None:
        import pyarrow
        import pyarrow.parquet

        self._arrow = pyarrow
        self._columns, self._groups = of.columns, part.layout.groups
        number = pyarrow.from_numpy_dtype(of.dtype)
        fields = {
            "row": pyarrow.int64(),
            "source_row": pyarrow.int64(),
            "id": pyarrow.string(),
            "domain": pyarrow.string(),
            "loss": pyarrow.float32(),
            "n_tokens": pyarrow.int32(),
            "status": pyarrow.string(),
            "norm": pyarrow.list_(pyarrow.float32(), self._groups),
            "vector": pyarrow.list_(number, self._columns),
        }
        if of.dtype_name != "float32" and part.encoding.scaled:
            fields["scale"] = pyarrow.list_(pyarrow.float32(), self._groups)
        self._schema = pyarrow.schema(fields)
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)

    def write(self, rows: Rows) -> None:
        if not len(rows.vectors):
            return
        arrow = self._arrow
        values = {**rows.fields, "vector": rows.vectors}
        if rows.scale is not None:
            values["scale"] = rows.scale
        arrays = []
        for field in self._schema:
            given = values[field.name]
            if arrow.types.is_fixed_size_list(field.type):
                flat = arrow.array(np.ascontiguousarray(given).reshape(-1), type=field.type.value_type)
                arrays.append(arrow.FixedSizeListArray.from_arrays(flat, type=field.type))
            else:
                arrays.append(arrow.array(given.tolist() if given.dtype == object else given, type=field.type))
        self._writer.write_table(arrow.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()
