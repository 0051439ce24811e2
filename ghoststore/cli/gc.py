"""``ghoststore gc``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.settings.shared import Printing
from ghoststore.settings.store import GcOptions


@options.command(GcOptions, Printing)
def command(keywords: options.Keywords, printing: Printing) -> None:
    """Remove what no record names: what writers that are dead had begun.

    Never what a living writer owns, nor anything in a damaged part or run: repair that first.

    \b
      ghoststore gc --store ./store --dry-run
    """
    options.run("gc", keywords, printing, _print)


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, print_table, say

    if report.removed:
        rows = [[file.part or file.run or "", file.file, human_bytes(file.bytes)] for file in report.removed]
        title = "would be removed" if report.dry_run else "removed"
        print_table(title, [("part or run", False), ("file", False), ("bytes", True)], rows)
    for skipped in report.skipped:
        say(f"left alone: {skipped.part or skipped.run}: {skipped.why}")
    verb = "would be removed" if report.dry_run else "removed"
    say(f"{len(report.removed)} file(s) and folder(s), {human_bytes(report.bytes)}, {verb}")
