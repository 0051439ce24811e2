"""``ghoststore repair``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.errors import CorruptError
from ghoststore.settings.shared import Printing
from ghoststore.settings.store import RepairOptions


@options.command(RepairOptions, Printing, first="store part run checkpoint data drop_damaged")
def command(keywords: options.Keywords, printing: Printing) -> None:
    """Verify a store and mend what is damaged. Exit code 4 if anything still is.

    Damaged spans of a part are computed again from its checkpoint and corpus, and nothing else is; metadata are written
    again, damaged caches removed. Steps that a training run lost are named: nothing can compute them again.

    \b
      ghoststore repair --store ./store
      ghoststore repair --store ./store --part part --checkpoint ./model --data train.jsonl
      ghoststore repair --store ./store --run run --drop-damaged
    """
    report = options.run("repair", keywords, printing, _print)
    if not report.sound:
        raise CorruptError(f"{len(report.unmended)} thing(s) in {report.store} are still damaged")


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import print_table, say

    render = options.renderer()
    where = ("part or run", False)
    if report.mended:
        rows = [[mended.part or mended.run or "", mended.file, mended.how] for mended in report.mended]
        print_table("mended", [where, ("file", False), ("how", False)], rows)
    if report.unmended:
        rows = [
            [damage.part or damage.run or "", damage.file, damage.problem, render(damage.why)]
            for damage in report.unmended
        ]
        print_table("still damaged", [where, ("file", False), ("problem", False), ("why", False)], rows)
    if report.sound:
        say(f"sound: {len(report.parts)} part(s), {len(report.runs)} run(s), {len(report.mended)} thing(s) mended")
