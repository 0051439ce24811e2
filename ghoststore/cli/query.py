"""``ghoststore query``."""

from __future__ import annotations

from typing import Any

import click

from ghoststore.cli import options


@click.command("query", short_help="a val set to the nearest training samples")
@options.question
@click.option("--top-k", type=int, default=10, show_default=True, help="Rows with the highest scores.")
@click.option("--bottom-k", type=int, default=0, show_default=True, help="Rows with the lowest scores.")
@click.option(
    "--mean/--each",
    "mean",
    default=True,
    show_default=True,
    help="One ranking for the val set's mean gradient, or one for each val sample.",
)
@click.option("--no-text", "text", flag_value=False, default=True, help="Do not look up texts.")
@click.option("--out", metavar="FILE", help="Write results to a new .json, .jsonl, .csv or .parquet file.")
@options.common
def command(**values: Any) -> None:
    """The training samples whose gradients point the same way as those of a val set.

    \b
      ghoststore query --store ./store --val-set val.jsonl
      ghoststore query --store ./store --val-set val.jsonl --each --top-k 5 --json
      ghoststore query --store ./store --val-set val.jsonl --with-scores my-run --score-weight 0.3
    """  # fmt: skip
    from ghoststore.cli.terminal import listener, print_json
    from ghoststore.lazy import load

    as_json, quiet, out = values.pop("as_json"), values.pop("quiet"), values.pop("out")
    if out:
        from query.results import check_output

        check_output(out)
    values["each"] = not values.pop("mean")
    result = load("query")(progress=listener(quiet), **options.take_fields(values))
    if out:
        result.write(out)
        click.echo(f"wrote {out}", err=True)
    if as_json:
        print_json(result.to_json())
    elif not out:
        _print(result)


def _print(result: Any) -> None:
    from ghoststore.cli.terminal import preview, print_table

    metric, blended = result.settings["metric"], "with_scores" in result.settings
    scores = [("blend", True), (metric, True), ("Σ η·score", True)] if blended else [(metric, True)]
    columns = [("rank", True), *scores, ("id", False), ("row", True), ("domain", False), ("text", False)]
    for query in result.results:
        for title, hits in (("nearest to", query.hits), ("farthest from", query.bottom)):
            rows = []
            for hit in hits:
                numbers = [hit.score, hit.similarity, hit.value] if blended else [hit.score]
                shown = ["–" if number is None else f"{number:.4g}" for number in numbers]
                rows.append(
                    [str(hit.rank), *shown, hit.id, str(hit.source_row), hit.domain or "", preview(hit.text)]
                )  # fmt: skip
            if rows:
                print_table(f"{title} {query.query}", columns, rows, fold=False)
