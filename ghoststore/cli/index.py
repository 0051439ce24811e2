"""``ghoststore index``."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from ghoststore.cli import options
from ghoststore.errors import UsageError


@click.command("index", short_help="a FAISS index of a part, its recall measured")
@options.store
@click.option("--part", metavar="NAME", help="Part to index (default: the only one).")
@click.option(
    "--factory", metavar="STRING", help="FAISS's factory string, such as IVF4096,SQ8 (default: by rows and dimension)."
)
@click.option("--metric", type=click.Choice(["cosine", "dot"]), default="cosine", show_default=True, help="The score.")
@click.option("--name", metavar="NAME", help="Name of the index (default: metric and factory string).")
@click.option(
    "--dimension",
    metavar="D|none|auto",
    default="auto",
    show_default=True,
    callback=options.number_or("none", "auto"),
    help="Sketch vectors to D numbers before FAISS sees them; auto: 1,024 for vectors of more than 2,048.",
)
@click.option(
    "--target-recall",
    type=float,
    default=0.97,
    show_default=True,
    help="Tune the search until it finds this share of the exact ten best of sample queries.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N (with a faiss for GPUs).")
@click.option("--rebuild", is_flag=True, help="Build again what is there already.")
@click.option("--list", "list_them", is_flag=True, help="Show the indexes that there are, build nothing.")
@click.option("--remove", metavar="NAME", help="Delete an index, build nothing.")
@options.common
def command(list_them: bool, remove: str | None, **values: Any) -> None:
    """Build a FAISS index of a part, or find that a current one is there.

    An index is a cache: rows that are committed later make it stale, and it is refused until this command has built it
    again. Its candidates are scored exactly against the stored vectors.

    \b
      ghoststore index --store ./store
      ghoststore index --store ./store --metric dot --factory IVF1024,SQ8
      ghoststore index --store ./store --list
    """
    from ghoststore.cli.terminal import listener, print_json
    from ghoststore.lazy import load

    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    if list_them or remove is not None:
        _refuse_options()
        _manage(values["store"], values["part"], remove, as_json)
        return
    report = load("index")(progress=listener(quiet), **values)
    if as_json:
        print_json(report.to_json())
    else:
        _print(
            f"{report.name}, {report.manifest.rows:,} rows of {report.part}", [[report.name, *_cells(report.manifest)]]
        )


def _refuse_options() -> None:
    """UsageError for options of building beside --list or --remove."""
    context = click.get_current_context()
    building = ("factory", "metric", "name", "dimension", "target_recall", "device", "rebuild")
    for name in building:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"--list and --remove build nothing: leave out --{name.replace('_', '-')}")


def _manage(store: str, part: str | None, remove: str | None, as_json: bool) -> None:
    from ghoststore.cli.terminal import print_json
    from ghoststore.store.part.indexes import index_states, remove_index
    from ghoststore.store.store import Store

    opened = Store.open(store).part(part)
    if remove is not None:
        remove_index(opened, remove)
    states = index_states(opened)
    if as_json:
        print_json({"store": store, "part": opened.name, "indexes": [state.to_json() for state in states]})
        return
    rows = [
        [one.name, *(_cells(one.manifest) if one.manifest else [""] * (len(COLUMNS) - 2)), one.state] for one in states
    ]
    _print(f"{len(states)} index(es) of {opened.name}", rows)


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


def _cells(found: Any) -> list[str]:
    """Of a manifest; the recall of single rows and of means."""
    from ghoststore.cli.terminal import human_bytes

    recalls = [[f"{getattr(recall, at):.3f}" for recall in found.recall.values()] for at in ("at_10", "at_100")]
    return [
        found.factory,
        found.metric,
        f"{found.front_dimension:,}",
        human_bytes(found.size),
        f"{found.size / found.rows:,.0f}",
        f"{found.seconds:.1f}",
        f"{found.candidates:,}",
        *(" / ".join(recall) for recall in recalls),
    ]


def _print(title: str, rows: list[list[str]]) -> None:
    from ghoststore.cli.terminal import print_table

    columns = COLUMNS if all(len(row) == len(COLUMNS) for row in rows) else COLUMNS[:-1]
    print_table(f"{title}; recall of single rows / means", columns, rows)
