"""``ghoststore export --format embedding-atlas``: a table of texts with their places on a map and their neighbours.

Embedding Atlas (https://apple.github.io/embedding-atlas) reads x and y from two columns and the neighbours from one of
``{"ids": […], "distances": […]}``: places of rows in the file, counted from 0, the nearest first.
"""

from __future__ import annotations

from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.store import ExportOptions
from ghoststore.store import Part, Store
from ghoststore.store.base.new_files import check_new, new_file
from ghoststore.store.manage.arrow_tables import ArrowTables
from ghoststore.store.manage.export import ExportReport
from ghoststore.store.manage.exported import OfPart
from indexer.projection import draws
from query.export.layout import neighbors_needed, places_on_map
from query.export.neighbors import nearest, sketched
from query.export.with_texts import WithTexts

USUAL_ROWS, MOST_ROWS = 20_000, 100_000
"""Rows of a map: as many as are taken without being asked for, and at all. Time grows with their square."""
SKETCH = 64
"""Numbers of the sketches that the map begins with."""
COLUMNS = ("x", "y", "neighbors")
LEFT_OUT = ("status", "norm")
"""Columns that say nothing to somebody who looks at a map."""


def export_atlas(options: ExportOptions) -> ExportReport:
    """Write the usable rows of a part with their places on a map; `query.export.export` says what.

    Neighbours are found among the rows that are written, by comparing all: cosines of the stored vectors, in the metric
    that the part was built in. Distances are 1 − cosine. In memory are about 1.5 KB for each row, and half a GiB.
    """
    out = Path(options.out)
    if out.suffix != ".parquet":
        raise UsageError(f"`out={out}`: Embedding Atlas is given a .parquet file")
    check_new(f"`out={out}`", out)
    if find_spec("sklearn") is None:
        raise UsageError("the map is made by scikit-learn, not installed here: pip install 'ghoststore[export]'")
    part, progress = Store.open(options.store).part(options.part), options.progress or Silent()
    # Vectors are not written, so they are not decoded.
    source = OfPart(part, stored=True, unusable=False, where=options.where)
    source.fields = {name: kind for name, kind in source.fields.items() if name not in LEFT_OUT}
    _choose(source, part, options)
    if not source.rows:
        raise UsageError(f"part {part.name!r} has no usable rows to export")
    rows = part.row_numbers[source.chosen]
    k = min(options.neighbors, len(rows) - 1)
    with closing(progress.task("nearest rows", len(rows))) as task:
        places, cosines = nearest(part, rows, max(k, neighbors_needed(len(rows))), task)
    with closing(progress.task("map", len(rows))) as task:
        matrix = draws.gaussian(f"ghoststore/1|map|seed={options.seed}", SKETCH, part.layout.dimension)
        sketches = sketched(part, rows, torch.from_numpy(matrix).T)
        map_N2 = places_on_map(places, cosines, sketches, options.seed)
        task.advance(len(rows))
    with new_file(out) as staged:
        texts = WithTexts(source, part, progress, options.data)
        _write(staged, texts, map_N2, places[:, :k], np.round(1 - cosines[:, :k], 6), progress)
    return ExportReport(
        store=str(options.store),
        part=part.name,
        run=None,
        files=[str(out)],
        rows=len(rows),
        dimension=part.layout.dimension,
        dtype="none",
        bytes=out.stat().st_size,
        format=options.format,
    )


def _choose(source: OfPart, part: Part, options: ExportOptions) -> None:
    """Leave a random ``max_rows`` of the rows of ``source``. UsageError for too many."""
    count, most = source.rows, options.max_rows
    if most is not None and most > MOST_ROWS:
        raise UsageError(f"`max_rows={most}`: a map takes at most {MOST_ROWS:,} rows, since all pairs are compared")
    if count > (most or USUAL_ROWS):
        if most is None:
            raise UsageError(
                f"part {part.name!r} has {count:,} rows for the map; without `max_rows` it takes at most "
                f"{USUAL_ROWS:,}, since all pairs are compared. Give `max_rows={USUAL_ROWS}` for a random sample of "
                f"them (at most {MOST_ROWS:,}), or choose some by `where`"
            )
        # The rows with the lowest lots: who is among them depends on its number and the seed alone.
        chosen = np.flatnonzero(source.chosen)
        lots = draws.permutation(f"ghoststore/1|map rows|seed={options.seed}", len(chosen))
        source.chosen = np.zeros_like(source.chosen)
        source.chosen[chosen[np.sort(lots[:most])]] = True


def _write(
    path: Path,
    source: WithTexts,
    map_N2: NDArray[np.float32],
    places: NDArray[np.int64],
    distances: NDArray[np.float64],
    progress: Progress,
) -> None:
    import pyarrow
    import pyarrow.parquet

    tables = ArrowTables(source, vectors=False)
    # A kept field may have the name of a column of the map.
    taken = {name.lower() for name in tables.schema.names}
    renamed = [_free(name, taken) if name.lower() in COLUMNS else name for name in tables.schema.names]
    with_map = pyarrow.schema(
        [
            *(field.with_name(name) for field, name in zip(tables.schema, renamed, strict=True)),
            ("x", pyarrow.float32()),
            ("y", pyarrow.float32()),
            (
                "neighbors",
                pyarrow.struct({"ids": pyarrow.list_(pyarrow.int64()), "distances": pyarrow.list_(pyarrow.float64())}),
            ),
        ]
    )
    done = 0
    with (
        pyarrow.parquet.ParquetWriter(str(path), with_map) as writer,
        closing(progress.task("exporting", source.rows)) as task,
    ):
        for rows in source.pieces():
            count = len(rows.vectors)
            of_rows = slice(done, done + count)
            done += count
            if count:
                columns: list[Any] = [*tables.of(rows).columns, map_N2[of_rows, 0], map_N2[of_rows, 1]]
                near = pyarrow.StructArray.from_arrays(
                    [_lists(places[of_rows], pyarrow), _lists(distances[of_rows], pyarrow)], names=["ids", "distances"]
                )
                writer.write_table(pyarrow.Table.from_arrays([*columns, near], schema=with_map))
            task.advance(count)


def _lists(values: NDArray[Any], pyarrow: Any) -> Any:
    """(R, K) numbers as a column of R lists."""
    offsets = np.arange(0, values.size + 1, values.shape[1] or 1, dtype=np.int32)
    if not values.shape[1]:
        offsets = np.zeros(len(values) + 1, dtype=np.int32)
    return pyarrow.ListArray.from_arrays(offsets, np.ascontiguousarray(values).reshape(-1))


def _free(name: str, taken: set[str]) -> str:
    """``name`` with as many underscores as make it free."""
    while name.lower() in taken or name.lower() in COLUMNS:
        name += "_"
    taken.add(name.lower())
    return name
