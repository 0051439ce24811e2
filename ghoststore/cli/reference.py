"""The command reference, written from the commands: ``python -m ghoststore.cli.reference docs/cli.md``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ghoststore.cli import COMMANDS, cli
from ghoststore.store.base.new_files import new_file

HEAD = """# Commands

Written by `make docs` from the commands themselves; do not edit.

Data go to stdout, progress and notes to stderr. Exit codes: 0 done, 1 unexpected (a bug, or memory ran out), 2 usage
(an input or an option cannot be used, a file cannot be opened), 3 mismatch (what is stored is of another build,
checkpoint or format), 4 corrupt, 5 busy (another process is writing), 6 the disk refuses (no space, an input or output
error, a stdout that is closed or full), 7 unsound (`doctor` found what would make a store wrong), 130 interrupted, 141
the reader of stdout has gone, 143 terminated.

Every command has `--log-json`: events for programs on stderr, one JSON object a line ([output.md](output.md)). Files of
results appear whole or not at all, several of one command together; a command that was killed can be run again.
"""


def reference() -> str:
    """The text of ``docs/cli.md``."""
    pieces = [HEAD]
    width: dict[str, Any] = {"max_content_width": 100, "terminal_width": 100}
    context = click.Context(cli, info_name="ghoststore", **{**cli.context_settings, **width})
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        sub = click.Context(command, info_name=name, parent=context, **width)
        pieces.append(f"## ghoststore {name}\n\n```text\n{command.get_help(sub)}\n```\n")
    return "\n".join(pieces)


if __name__ == "__main__":
    with new_file(Path(sys.argv[1]), over=True) as temporary:
        temporary.write_text(reference(), encoding="utf-8")
