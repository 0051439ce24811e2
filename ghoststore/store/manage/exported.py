"""The rows of a part or a run that are exported: their vectors, decoded or as stored, and the fields beside them.

Legend: R exported rows, D numbers of a vector, G blocks of columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ghoststore.store.part.encoding import Encoding, Groups
from ghoststore.store.part.kept import FieldType, python_values, read_field
from ghoststore.store.part.part import Part
from ghoststore.store.part.status import Status
from ghoststore.store.run.run import Run
from ghoststore.store.run.visits import Visits, kept_of, stream_visits
from ghoststore.store.spans.reader import read_span, stream
from ghoststore.store.where.rows import part_matches, run_matches

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

    @property
    def rows(self) -> int:
        """Their number."""

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


class OfPart:
    """The rows of ``part`` that are exported."""

    def __init__(self, part: Part, *, stored: bool, unusable: bool, where: str | None) -> None:
        self._part, self.stored = part, stored
        self.fields = {**FIELDS_OF_PART, **{field.name: ARROW_TYPES[field.type] for field in part.layout.fields}}
        self.encoding = part.encoding
        self.groups: Groups = part.groups
        self.name, self.storage = {"part": part.name}, part.manifest["storage"]
        part.bear_out()  # before allocating a flag for each row
        self.chosen: NDArray[np.bool_] = np.ones(part.rows, dtype=bool) if unusable else part.usable()
        """(rows,): which of the committed rows are exported."""
        if where is not None:
            matches = part_matches(part, where)
            matches.among(part, self.chosen, "rows" if unusable else "usable rows")
            self.chosen &= matches.mask[part.row_numbers]

    @property
    def rows(self) -> int:
        """Their number."""
        return int(self.chosen.sum())

    def pieces(self) -> Iterator[Rows]:
        """All rows, a chunk at a time."""
        part, done, span, fields, scale = self._part, 0, -1, dict[str, Any](), None
        for chunk in stream(part, "vectors"):
            if chunk.start // part.layout.span_rows != span:
                span = chunk.start // part.layout.span_rows
                fields = self._fields(span)
                scale = read_span(part, "scale", span) if part.encoding.scaled else None
            count = chunk.stop - chunk.start
            chosen = self.chosen[done : done + count]
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
