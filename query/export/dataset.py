"""``ghoststore export --format datasets``: a folder of Hugging Face datasets, as ``save_to_disk`` writes it.

It is written here, and not by ``save_to_disk``, which wants all rows in a table first: a copy of all vectors in memory,
or a second one on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import xxhash

from ghoststore.errors import UsageError
from ghoststore.progress import Silent
from ghoststore.settings.store import ExportOptions
from ghoststore.store import Store
from ghoststore.store.base.new_files import check_new, new_files
from ghoststore.store.manage.arrow_tables import ArrowTables
from ghoststore.store.manage.export import ExportReport
from ghoststore.store.manage.exported import OfPart, dtype_name
from query.export.with_texts import WithTexts

SHARD_BYTES = 500 << 20
"""Bytes of a shard before the next one begins, as in ``save_to_disk``."""


def export_dataset(options: ExportOptions) -> ExportReport:
    """Write the rows of a part to a new folder; `query.export.export` says what. Some thousand rows are in memory at
    a time. The folder appears whole, or not at all.
    """
    out = Path(options.out)
    if out.suffix:
        raise UsageError(f"`out={out}`: a dataset is a folder; give a name without {out.suffix!r}")
    check_new(f"`out={out}`", out)
    part, progress = Store.open(options.store).part(options.part), options.progress or Silent()
    chosen = OfPart(part, stored=options.dtype == "stored", unusable=options.unusable, where=options.where)
    source = WithTexts(chosen, part, progress, options.data)
    with new_files(out) as (folder,), closing(progress.task("exporting", source.rows)) as task:
        folder.mkdir(exist_ok=True)
        _write(_counted(source, task), folder)
    files = sorted(path for path in out.iterdir() if path.is_file())
    return ExportReport(
        store=str(options.store),
        part=part.name,
        run=None,
        files=[str(out)],
        rows=source.rows,
        dimension=source.groups[-1][2],
        dtype=dtype_name(source),
        bytes=sum(path.stat().st_size for path in files),
        format=options.format,
    )


def _counted(source: WithTexts, task: Any) -> tuple[Any, Iterator[Any]]:
    """(schema, tables) of ``source``; ``task`` advances as they are taken."""
    tables = ArrowTables(source)

    def each() -> Iterator[Any]:
        for rows in source.pieces():
            if len(rows.vectors):
                yield tables.of(rows)
            task.advance(len(rows.vectors))

    return tables.schema, each()


def _write(rows: tuple[Any, Iterator[Any]], folder: Path) -> None:
    """Write the shards, and the two files that `load_from_disk` reads."""
    import datasets
    import pyarrow

    features = datasets.Features.from_arrow_schema(rows[0])
    schema, shards, writer = features.arrow_schema, list[Path](), None
    digest, written = xxhash.xxh3_64(), SHARD_BYTES
    try:
        for table in rows[1]:
            if written >= SHARD_BYTES:
                if writer is not None:
                    writer.close()
                shards.append(folder / f"{len(shards)}.arrow")
                writer, written = pyarrow.ipc.new_stream(str(shards[-1]), schema), 0
            assert writer is not None
            writer.write_table(table.cast(schema))
            written += table.nbytes
            for batch in table.to_batches():
                digest.update(batch.serialize())
        if not shards:
            shards.append(folder / "0.arrow")
            writer = pyarrow.ipc.new_stream(str(shards[0]), schema)
    finally:
        if writer is not None:
            writer.close()
    names = [f"data-{place:05d}-of-{len(shards):05d}.arrow" for place in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": digest.hexdigest(),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
