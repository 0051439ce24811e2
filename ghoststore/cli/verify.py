"""``ghoststore verify``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.errors import CorruptError
from ghoststore.settings.shared import Printing
from ghoststore.settings.store import VerifyOptions


@options.command(VerifyOptions, Printing)
def command(keywords: options.Keywords, printing: Printing) -> None:
    """Check every byte that was committed against its record. Exit code 4 if anything is damaged."""
    report = options.run("verify", keywords, printing, _print)
    if not report.sound:
        raise CorruptError(f"{len(report.damage)} thing(s) in {report.store} are not as they were committed")


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, print_table, say

    if report.sound:
        runs = f"{len(report.runs)} run(s), " if report.runs else ""
        checked = f"{len(report.parts)} part(s), {runs}{report.spans} spans, {report.files} files"
        say(f"sound: {checked}, {human_bytes(report.bytes)}")
    else:
        rows = [[damage.part or damage.run, damage.file, damage.problem] for damage in report.damage]
        print_table("damaged", [("part or run", False), ("file", False), ("problem", False)], rows)
