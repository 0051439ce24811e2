"""``ghoststore cp``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.settings.shared import Printing
from ghoststore.settings.store import CopyOptions


@options.command(CopyOptions, Printing)
def command(keywords: options.Keywords, printing: Printing) -> None:
    """Copy a part or a training run, in one store or to another; every byte is checked on the way.

    The copy appears whole or not at all. It has the spans that are committed now, even while a process goes on writing.
    Indexes and caches are left behind: they can be made again.

    \b
      ghoststore cp --store ./store --part part --to-store /backup/store
    """
    options.run("copy", keywords, printing, _print)


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, say

    all_of_it = "all of it" if report.complete else f"{report.spans} committed spans"
    copied = f"{report.files:,} files, {human_bytes(report.bytes)}"
    say(f"copied {report.part or report.run} to {report.to_store} as {report.to_name}: {all_of_it}, {copied}")
