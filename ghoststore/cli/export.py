"""``ghoststore export``."""

from __future__ import annotations

import shlex
from typing import Any

from ghoststore.cli import options
from ghoststore.settings.shared import Printing
from ghoststore.settings.store import ExportOptions


@options.command(ExportOptions, Printing, first="store part run out format where max_rows data")
def command(keywords: options.Keywords, printing: Printing) -> None:
    """Write the vectors of a part, or of a training run, with ids and fields, to safetensors, npy or parquet.

    A .parquet file holds all of it; beside a .safetensors or .npy file of vectors lies a .rows.jsonl file with a line a
    row. Memory does not grow with the part. Other formats write the texts, too: for datasets, or on a map for Embedding
    Atlas.

    \b
      ghoststore export --store ./store --out vectors.parquet
      ghoststore export --store ./store --part part --out vectors.npy
      ghoststore export --store ./store --run my-run --out gradients.parquet
      ghoststore export --store ./store --format datasets --out rows
      ghoststore export --store ./store --format embedding-atlas --out map.parquet
    """
    options.run("export", keywords, printing, _print)


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, print_facts, print_next

    of_map = report.format == "embedding-atlas"
    facts = [
        ("folder" if report.format == "datasets" else "files", ", ".join(report.files)),
        ("rows", f"{report.rows:,}"),
        ("vectors", f"on a map of {report.dimension:,}" if of_map else f"{report.dimension:,} × {report.dtype}"),
        ("on disk", human_bytes(report.bytes)),
        *([("opened by", f"datasets.load_from_disk({report.files[0]!r})")] if report.format == "datasets" else []),
    ]
    print_facts(f"exported {report.part or report.run}", facts)
    if of_map:
        (file,) = map(shlex.quote, report.files)
        print_next([f"embedding-atlas {file} --text text --x x --y y --neighbors neighbors"])
