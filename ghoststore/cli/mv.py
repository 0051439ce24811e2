"""``ghoststore mv``."""

from __future__ import annotations

from ghoststore.cli import options
from ghoststore.lazy import load
from ghoststore.settings.shared import AsJson
from ghoststore.settings.store import RenameOptions


@options.command(RenameOptions, AsJson)
def command(keywords: options.Keywords, printing: AsJson) -> None:
    """Give a part or a training run another name, in one step. Indexes and caches go along.

    A build or training that goes on must be given the new name (--name).

    \b
      ghoststore mv --store ./store --part part --to-name gpt2-wiki
    """
    from ghoststore.cli.terminal import print_json, say

    report = load("rename")(**keywords)
    options.log_result(report)
    if printing.as_json:
        print_json(report.to_json())
    else:
        say(f"renamed {report.part or report.run} to {report.to_name}")
