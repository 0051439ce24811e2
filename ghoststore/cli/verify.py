"""``ghoststore verify``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.errors import CorruptError
from ghoststore.settings.shared import Printing
from ghoststore.settings.store import VerifyOptions


@options.command(VerifyOptions, Printing)
def command(keywords: options.Keywords, printing: Printing) -> None:
    """Check every file of a store against what was written. Exit code 4 if anything is damaged: `ghoststore repair`.

    What writers had not finished, and files that ghoststore did not write, are listed: they are no damage.
    """
    report = options.run("verify", keywords, printing, _print)
    if not report.sound:
        raise CorruptError(
            f"{len(report.damage)} thing(s) in {report.store} are not as they were committed; "
            f"`ghoststore repair --store {report.store}` mends what can be mended"
        )


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, print_table, say

    for title, files in (("unknown files", report.unknown), ("leftovers of writers", report.leftovers)):
        if files:
            rows = [
                [
                    file.part or file.run or "",
                    file.file,
                    human_bytes(file.bytes),
                    "being written" if file.living else "",
                ]
                for file in files
            ]
            print_table(title, [("part or run", False), ("file", False), ("bytes", True), ("", False)], rows)
    if report.sound:
        runs = f"{len(report.runs)} run(s), " if report.runs else ""
        checked = f"{len(report.parts)} part(s), {runs}{report.spans} spans, {report.files} files"
        say(f"sound: {checked}, {human_bytes(report.bytes)}")
    else:
        rows = [[damage.part or damage.run or "", damage.file, damage.problem] for damage in report.damage]
        print_table("damaged", [("part or run", False), ("file", False), ("problem", False)], rows)
