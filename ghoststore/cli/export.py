"""``ghoststore export``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.settings.shared import Printing
from ghoststore.settings.store import ExportOptions


@options.command(ExportOptions, Printing)
def command(keywords: options.Keywords, printing: Printing) -> None:
    """Write the vectors of a part, or of a training run, with ids and fields, to safetensors, npy or parquet.

    A .parquet file holds all of it; beside a .safetensors or .npy file of vectors lies a .rows.jsonl file with a line a
    row. Memory does not grow with the part.

    \b
      ghoststore export --store ./store --out vectors.parquet
      ghoststore export --store ./store --part part --out vectors.npy
      ghoststore export --store ./store --run my-run --out gradients.parquet
    """
    options.run("export", keywords, printing, _print)


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, print_facts

    facts = [
        ("files", ", ".join(report.files)),
        ("rows", f"{report.rows:,}"),
        ("vectors", f"{report.dimension:,} × {report.dtype}"),
        ("on disk", human_bytes(report.bytes)),
    ]
    print_facts(f"exported {report.part or report.run}", facts)
