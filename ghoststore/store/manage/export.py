"""``ghoststore.export``: writes the vectors of a part or a run, with ids and fields, for other tools.

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
from ghoststore.store.part.encoding import Encoding, Groups
from ghoststore.store.part.kept import FieldType, python_values, read_field
from ghoststore.store.part.part import Part
from ghoststore.store.part.status import Status
from ghoststore.store.run.run import Run
from ghoststore.store.run.visits import Visits, kept_of, stream_visits
from ghoststore.store.spans.reader import read_span, stream
from ghoststore.store.store import Store
from ghoststore.store.where.rows import part_matches, run_matches

FORMS = (".safetensors", ".npy", ".parquet")
ROWS_SUFFIX = ".rows.jsonl"
"""Suffix of the file beside a .safetensors or .npy file: a line of JSON for each row, in the order of the vectors."""
FIELDS_OF_PART = {
    "row": "int64",
    "source_row": "int64",
    "id": "string",
    "domain": "string",
    "loss": "float32",
    "n_tokens": "int32",
    "status": "string",
    "norm": "float32",
}
FIELDS_OF_RUN = {
    "step": "int64",
    "rank": "int64",
    "place": "int64",
    "row": "int64",
    "source_row": "int64",
    "id": "string",
    "domain": "string",
    "loss": "float32",
    "score": "float32",
    "learning_rate": "float64",
}
ARROW_TYPES: dict[FieldType, str] = {
    "string": "string",
    "int": "int64",
    "float": "float64",
    "bool": "bool_",
    "date": "string",
    "timestamp": "string",
}
"""Types of kept fields in a table; dates and times are ISO 8601."""
WEIGHT_OF_RUN = {"weight": "float32"}
"""Of a run that chose among candidates: 0 where its step did not train on the sample."""
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

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore export --json`` prints."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a part, or samples of the steps of a run, in order."""

    vectors: NDArray[Any]
    """(R, D) float32; (R, columns) if they are exported as stored."""
    scale: NDArray[np.float32] | None
    """(R, G), of vectors that are exported as stored in an encoding with scales."""
    fields: dict[str, Any]
    """One value a row, by the names in :attr:`Source.fields`."""


class Source(Protocol):
    """The rows of a part or a run that are exported."""

    rows: int
    stored: bool
    """Whether vectors are exported as stored."""
    encoding: Encoding
    groups: Groups
    name: dict[str, str]
    """``part`` or ``run``, with its name."""
    storage: dict[str, Any]
    """The storage section of its manifest."""
    fields: dict[str, str]
    """The fields beside the vectors, in order, with their types in a table; ``norm`` has G numbers."""

    def pieces(self) -> Iterator[Rows]:
        """All rows, some at a time."""


def dtype_name(source: Source) -> str:
    """Name of the dtype of the exported numbers."""
    return "float32" if not source.stored else {"onebit": "uint8"}.get(source.encoding.name, source.encoding.name)


def dtype_of(source: Source) -> np.dtype[Any]:
    """NumPy dtype of the exported numbers."""
    return source.encoding.stored if source.stored else np.dtype("<f4")


def columns_of(source: Source) -> int:
    """Numbers of a vector in the file."""
    dimension = source.groups[-1][2]
    return source.encoding.columns(dimension) if source.stored else dimension


class _Sink(Protocol):
    """A writer of one form of file."""

    def write(self, rows: Rows) -> None:
        """Append rows."""

    def close(self) -> None:
        """End the file."""


@takes(ExportOptions)
def export(options: ExportOptions) -> ExportReport:
    """Write the vectors of a part, or of a ``run`` that keeps gradients, to a new file.

    They are decoded to float32, with id, domain, source row, loss, tokens and norms of each row. A ``.parquet`` file
    holds all in one table; beside a ``.safetensors`` or ``.npy`` file of vectors, a ``.rows.jsonl`` file has the rest.
    For a run each row is a sample of a step, with ``step``, ``rank``, ``place``, score, loss and learning rate. Where
    a step chose among candidates, ``weight`` says how each counted: 0, it was not trained on. Rows without a vector are
    left out, unless ``unusable``, and so are those that do not match ``where``, an SQL condition on the columns that
    ``ghoststore.query`` lists. Fields that the part keeps are written with the others.

    ``dtype="stored"`` writes the numbers as stored: bfloat16 as such in safetensors and as its bits (uint16) elsewhere,
    codes of int8 and onebit with the ``scale`` of each row and block (not to ``.npy``, which cannot hold it). Some
    thousand rows are in memory at a time. Files appear whole or not at all.

    UsageError for an unknown form or a file that exists, CorruptError if what is read is damaged, StorageError if the
    disk refuses.
    """
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


class OfPart:
    """The rows of ``part`` that are exported."""

    def __init__(self, part: Part, *, stored: bool, unusable: bool, where: str | None) -> None:
        self._part, self.stored = part, stored
        self.fields = {**FIELDS_OF_PART, **{field.name: ARROW_TYPES[field.type] for field in part.layout.fields}}
        self.encoding = part.encoding
        self.groups: Groups = part.groups
        self.name, self.storage = {"part": part.name}, part.manifest["storage"]
        part.bear_out()  # before allocating a flag for each row
        self._chosen = np.ones(part.rows, dtype=bool) if unusable else part.usable()
        if where is not None:
            matches = part_matches(part, where)
            matches.among(part, self._chosen, "rows" if unusable else "usable rows")
            self._chosen &= matches.mask[part.row_numbers]
        self.rows = int(self._chosen.sum())

    def pieces(self) -> Iterator[Rows]:
        """All rows, a chunk at a time."""
        part, done, span, fields, scale = self._part, 0, -1, dict[str, Any](), None
        for chunk in stream(part, "vectors"):
            if chunk.start // part.layout.span_rows != span:
                span = chunk.start // part.layout.span_rows
                fields = self._fields(span)
                scale = read_span(part, "scale", span) if part.encoding.scaled else None
            count = chunk.stop - chunk.start
            chosen = self._chosen[done : done + count]
            done += count
            in_span = slice(chunk.start - span * part.layout.span_rows, chunk.stop - span * part.layout.span_rows)
            chunk_scale = None if scale is None else scale[in_span][chosen]
            stored = chunk.data[chosen]
            of_rows = {name: values[in_span][chosen] for name, values in fields.items()}
            if self.stored:
                yield Rows(stored, chunk_scale, of_rows)
            else:
                yield Rows(part.encoding.decode(stored, chunk_scale, part.groups), None, of_rows)

    def _fields(self, span: int) -> dict[str, Any]:
        part = self._part
        start, stop = part.layout.span_of(span)
        names = np.array([*part.domains, None], dtype=object)  # index -1, no domain, is the last
        kept = {
            field.name: python_values(*read_field(part, place, span), field.type)
            for place, field in enumerate(part.layout.fields)
        }
        return {
            "row": np.arange(start, stop),
            "source_row": read_span(part, "source_row", span).copy(),
            "id": part.read("sample_id", start, stop),
            "domain": names[read_span(part, "domain", span)],
            "loss": read_span(part, "loss", span).copy(),
            "n_tokens": read_span(part, "n_tokens", span).copy(),
            "status": np.array([Status(code).name.lower() for code in read_span(part, "status", span)], dtype=object),
            "norm": read_span(part, "norm", span).copy(),
            **kept,
        }


class OfRun:
    """The samples of the steps of ``run`` that keep their gradients."""

    def __init__(self, run: Run, *, stored: bool, unusable: bool, where: str | None) -> None:
        kept, _ = kept_of(run)
        self._matches: NDArray[np.bool_] | None = None
        if where is not None:
            matches = run_matches(run, where)
            matches.among(run, np.ones(len(run.rows), dtype=bool), "rows")
            self._matches = matches.mask
        self._run, self.stored, self._all = run, stored, unusable
        self.fields = {**FIELDS_OF_RUN, **WEIGHT_OF_RUN} if run.layout.weights else FIELDS_OF_RUN
        self.encoding = kept.encoding
        self.groups: Groups = kept.groups
        self.name, self.storage = {"run": run.name}, run.manifest["storage"]
        self.rows = sum(int(self._chosen(visits).sum()) for visits in stream_visits(run, run.ranges))

    def _chosen(self, visits: Visits) -> NDArray[np.bool_]:
        chosen = np.isfinite(visits.vectors).all(axis=1) | self._all
        if self._matches is not None:
            chosen &= self._matches[visits.row]
        return np.asarray(chosen, dtype=bool)

    def pieces(self) -> Iterator[Rows]:
        """All rows, some steps at a time."""
        run, names = self._run, np.array([*self._run.domains, None], dtype=object)
        for visits in stream_visits(run, run.ranges, also=("loss", "score")):
            chosen = self._chosen(visits)
            row = visits.row[chosen]
            fields = {
                "step": visits.step[chosen],
                "rank": visits.rank[chosen],
                "place": visits.place[chosen],
                "row": row,
                "source_row": run.rows.read_rows("source_row", row),
                "id": run.rows.read_rows("sample_id", row),
                "domain": names[run.rows.read_rows("domain", row)],
                "loss": visits.data["loss"][chosen],
                "score": visits.data["score"][chosen],
                "learning_rate": visits.learning_rate[chosen],
            }
            if run.layout.weights:
                fields["weight"] = visits.weight[chosen].astype(np.float32)
            if self.stored:
                yield Rows(visits.stored[chosen], None if visits.scale is None else visits.scale[chosen], fields)
            else:
                yield Rows(visits.vectors[chosen], None, fields)


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
        import pyarrow
        import pyarrow.parquet

        self._arrow = pyarrow
        groups = len(source.groups)
        fields = {name: getattr(pyarrow, kind)() for name, kind in source.fields.items()}
        if "norm" in fields:
            fields["norm"] = pyarrow.list_(pyarrow.float32(), groups)
        fields["vector"] = pyarrow.list_(pyarrow.from_numpy_dtype(dtype_of(source)), columns_of(source))
        if source.stored and source.encoding.scaled:
            fields["scale"] = pyarrow.list_(pyarrow.float32(), groups)
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
            column = values[field.name]
            if arrow.types.is_fixed_size_list(field.type):
                flat = arrow.array(np.ascontiguousarray(column).reshape(-1), type=field.type.value_type)
                arrays.append(arrow.FixedSizeListArray.from_arrays(flat, type=field.type))
            else:
                arrays.append(arrow.array(column.tolist() if column.dtype == object else column, type=field.type))
        self._writer.write_table(arrow.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()
