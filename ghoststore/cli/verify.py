"""``ghoststore verify``."""

from __future__ import annotations

import click

from ghoststore.cli import options
from ghoststore.errors import CorruptError


@click.command("verify", short_help="check every byte that was committed")
@options.store
@click.option("--part", metavar="NAME", help="Only this part.")
@click.option("--run", metavar="NAME", help="Only this training run.")
@options.common
def command(store: str, part: str | None, run: str | None, as_json: bool, quiet: bool) -> None:
    """Check every byte that was committed against its record. Exit code 4 if anything is damaged."""
    from ghoststore.cli.terminal import human_bytes, listener, print_json, print_table
    from ghoststore.lazy import load

    report = load("verify")(store, part=part, run=run, progress=listener(quiet))
    if as_json:
        print_json(report.to_json())
    elif report.sound:
        runs = f"{len(report.runs)} run(s), " if report.runs else ""
        checked = f"{len(report.parts)} part(s), {runs}{report.spans} spans, {report.files} files"
        click.echo(f"sound: {checked}, {human_bytes(report.bytes)}")
    else:
        rows = [[damage.part or damage.run, damage.file, damage.problem] for damage in report.damage]
        print_table("damaged", [("part or run", False), ("file", False), ("problem", False)], rows)
    if not report.sound:
        raise CorruptError(f"{len(report.damage)} thing(s) in {store} are not as they were committed")
