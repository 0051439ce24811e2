"""``ghoststore index``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import click
from click.core import ParameterSource

from ghoststore.cli import options
from ghoststore.errors import UsageError
from ghoststore.settings.shared import Printing
from ghoststore.settings.store import IndexOptions, ManageIndexes


@options.command(
    IndexOptions, Printing, ManageIndexes, first="store part metric factory target_recall name rebuild list_them remove"
)
def command(keywords: options.Keywords, printing: Printing, manage: ManageIndexes) -> None:
    """Build a FAISS index of a part, or find that a current one is there.

    An index is a cache: rows that are committed later make it stale, and it is refused until this command has built it
    again. Its candidates are scored exactly against the stored vectors.

    \b
      ghoststore index --store ./store
      ghoststore index --store ./store --metric dot --factory IVF1024,SQ8
      ghoststore index --store ./store --list
    """
    if manage.list_them or manage.remove is not None:
        _refuse_options()
        _manage(keywords["store"], keywords.get("part"), manage.remove, printing.as_json)
    else:
        options.run("index", keywords, printing, _print_built)


def _refuse_options() -> None:
    """UsageError for options of building beside --list or --remove."""
    context = click.get_current_context()
    for spec in fields(IndexOptions):
        was_given = context.get_parameter_source(spec.name) is ParameterSource.COMMANDLINE
        if was_given and spec.name not in ("store", "part"):
            raise UsageError(f"`list_them` and `remove` build nothing: leave out `{spec.name}`")


def _manage(store: str, part: str | Sequence[str] | None, remove: str | None, as_json: bool) -> None:
    from ghoststore.cli.terminal import print_json
    from ghoststore.store.part.indexes import index_states, remove_index
    from ghoststore.store.store import Store

    named = [part] if part is None or isinstance(part, str) else part
    if len(named) > 1:
        raise UsageError("`list_them` and `remove` are about one `part`: the index of a union lies with the first")
    stored_part = Store.open(store).part(named[0])
    if remove is not None:
        remove_index(stored_part, remove)
    states = index_states(stored_part)
    if as_json:
        print_json({"store": store, "part": stored_part.name, "indexes": [state.to_json() for state in states]})
        return
    rows = [
        [state.name, *(_cells(state.manifest) if state.manifest else [""] * (len(COLUMNS) - 2)), state.state]
        for state in states
    ]
    _print(f"{len(states)} index(es) of {stored_part.name}", rows)


def _print_built(report: Any) -> None:
    _print(f"{report.name}, {report.manifest.rows:,} rows of {report.part}", [[report.name, *_cells(report.manifest)]])


COLUMNS = [
    ("name", False),
    ("factory", False),
    ("metric", False),
    ("numbers", True),
    ("bytes", True),
    ("bytes/row", True),
    ("seconds", True),
    ("scored", True),
    ("recall@10", True),
    ("recall@100", True),
    ("state", False),
]


def _cells(manifest: Any) -> list[str]:
    """The cells of an index, with its recall of single rows and of means."""
    from ghoststore.cli.terminal import human_bytes

    recalls = [[f"{getattr(recall, at):.3f}" for recall in manifest.recall.values()] for at in ("at_10", "at_100")]
    return [
        manifest.factory,
        manifest.metric,
        f"{manifest.front_dimension:,}",
        human_bytes(manifest.size),
        f"{manifest.size / manifest.rows:,.0f}",
        f"{manifest.seconds:.1f}",
        f"{manifest.candidates:,}",
        *(" / ".join(recall) for recall in recalls),
    ]


def _print(title: str, rows: list[list[str]]) -> None:
    from ghoststore.cli.terminal import print_table

    columns = COLUMNS if all(len(row) == len(COLUMNS) for row in rows) else COLUMNS[:-1]
    print_table(f"{title}; recall of single rows / means", columns, rows)
