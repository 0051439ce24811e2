"""``ghoststore rm``."""

from __future__ import annotations

import sys

import click

from ghoststore.cli import options
from ghoststore.errors import UsageError
from ghoststore.lazy import load
from ghoststore.settings.shared import AsJson
from ghoststore.settings.store import RemoveOptions, Yes


@options.command(RemoveOptions, AsJson, Yes)
def command(keywords: options.Keywords, printing: AsJson, consent: Yes) -> None:
    """Remove a part or a training run, with its indexes and caches. It is gone in one step.

    \b
      ghoststore rm --store ./store --part old
    """
    from ghoststore.cli.terminal import human_bytes, print_json, say
    from ghoststore.store.manage.held import existing
    from ghoststore.store.store import Store

    existing(Store.open(keywords["store"]), RemoveOptions(**keywords))  # refuse before asking
    what = " ".join(f"{kind} {keywords[kind]}" for kind in ("part", "run") if kind in keywords)
    if not consent.yes:
        if not sys.stdin.isatty():
            raise UsageError(f"this removes {what} for good: give `yes`, for there is no terminal to ask at")
        if not click.confirm(f"Remove {what} of {keywords['store']} for good?", err=True):
            raise UsageError("nothing was removed")
    report = load("remove")(**keywords)
    options.log_result(report)
    if printing.as_json:
        print_json(report.to_json())
    else:
        say(f"removed {what}, {human_bytes(report.bytes)}")
