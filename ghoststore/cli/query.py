"""``ghoststore query``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
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
@click.option(
    "--index",
    type=click.Choice(["exact", "ann"]),
    default="exact",
    show_default=True,
    help="Read every vector, or take candidates from a FAISS index (`ghoststore index`) and score these exactly.",
)
@click.option("--index-name", metavar="NAME", help="Index of --index ann (default: the only one for the metric).")
@click.option(
    "--rerank",
    type=int,
    metavar="N",
    help="Compute the gradients of the N best rows again and rank these by exact scores: for parts of int8 or onebit.",
)
@click.option("--no-text", "text", flag_value=False, default=True, help="Do not look up texts.")
@click.option("--out", metavar="FILE", help="Write results to a new .json, .jsonl, .csv or .parquet file.")
@click.option(
    "--report", metavar="FILE", help="Write a new .html file: one page with texts, histograms, domains, layers."
)
@options.common
def command(**values: Any) -> None:
    """The training samples whose gradients point the same way as those of a val set.

    \b
      ghoststore query --store ./store --val-set val.jsonl --report out.html
      ghoststore query --store ./store --val-set val.jsonl --each --top-k 5 --json
      ghoststore query --store ./store --val-set val.jsonl --with-scores my-run --score-weight 0.3
    """
    from ghoststore.lazy import load

    values["each"] = not values.pop("mean")
    answer(load("query"), options.take_fields(values))


def answer(function: Callable[..., Any], values: dict[str, Any]) -> None:
    """Call a function that gives a QueryResult with ``values``, and show or write that."""
    from ghoststore.cli.terminal import listener, print_json

    as_json, quiet, out = values.pop("as_json"), values.pop("quiet"), values.pop("out")
    if out:
        from query.common.output import check_output

        check_output(out)
    result = function(progress=listener(quiet), **values)
    if out:
        result.write(out)
        click.echo(f"wrote {out}", err=True)
    if values.get("report"):
        click.echo(f"wrote {values['report']}", err=True)
    if as_json:
        print_json(result.to_json())
    elif not out:
        _print(result)


def _print(result: Any) -> None:
    from ghoststore.cli.terminal import preview, print_table

    metric, blended = result.settings["metric"], "with_scores" in result.settings
    scores = [("blend", True), (metric, True), ("Σ η·score", True)] if blended else [(metric, True)]
    columns = [("rank", True), *scores, ("id", False), ("row", True), ("domain", False), ("text", False)]
    titles = ("nearest to {0}", "farthest from {0}") if metric in ("cosine", "dot") else ("highest {1}", "lowest {1}")
    times = Counter(query.query for query in result.results)
    for query in result.results:
        name = query.query if times[query.query] == 1 else f"{query.query} (val row {query.val_row})"
        for title, hits in zip(titles, (query.hits, query.bottom), strict=True):
            rows = []
            for hit in hits:
                numbers = [hit.score, hit.similarity, hit.value] if blended else [hit.score]
                shown = ["–" if number is None else f"{number:.4g}" for number in numbers]
                rows.append([str(hit.rank), *shown, hit.id, str(hit.source_row), hit.domain or "", preview(hit.text)])
            if rows:
                print_table(title.format(name, metric), columns, rows, fold=False)
    if result.settings.get("index") == "ann":
        recall = result.settings["recall"]
        told = ", ".join(f"{one['at_10']:.3f} for {kind}s" for kind, one in recall.items())
        click.echo(f"Found by index {result.settings['index_name']}; its recall@10 when it was built: {told}.")
    if result.settings.get("fidelity"):
        from ghoststore.store.part.fidelity import fidelity_line

        click.echo(f"fidelity: {fidelity_line(result.settings['fidelity'])}")
