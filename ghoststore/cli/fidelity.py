"""``ghoststore fidelity``."""

from __future__ import annotations

from typing import Any

import click

from ghoststore.cli import options


@click.command("fidelity", short_help="how far a store's rankings are from those of the exact gradients")
@options.store
@click.option("--part", metavar="NAME", help="Part to measure (default: the only one).")
@click.option("--val-set", metavar="PATH", help="Draw the val samples here (default: among the part's own rows).")
@click.option("--rows", type=int, default=200, show_default=True, help="Rows that are ranked, drawn at random.")
@click.option("--val-samples", type=int, default=20, show_default=True, help="Val samples they are ranked for.")
@click.option("--metric", type=click.Choice(["cosine", "dot"]), default="cosine", show_default=True, help="The score.")
@click.option("--layers", callback=options.patterns, help="Scores of these layers only (parts of plain blocks).")
@click.option("--exclude-layers", callback=options.patterns, help="Scores without these layers.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option("--checkpoint", metavar="PATH", help="Another path to the checkpoint the part was built from.")
@options.device
@options.fields
@options.common
def command(**values: Any) -> None:
    """Compute a few exact gradients again, and compare the rankings by them with those by the stored vectors.

    Against exact gradients of the projected layers: what the projection costs. Against those of all parameters: what
    the choice of layers costs, too. The part keeps the result; info and query show it.

    \b
      ghoststore fidelity --store ./store
      ghoststore fidelity --store ./store --val-set val.jsonl --rows 500 --metric dot
    """
    from ghoststore.cli.terminal import listener, print_json
    from ghoststore.lazy import load

    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    report = load("fidelity")(progress=listener(quiet), **options.take_fields(values))
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import print_table

    columns = [
        ("against exact gradients of", False),
        ("Spearman", True),
        ("same sign", True),
        ("recall", True),
        ("relative error", True),
    ]
    references = [("the layers", report.layers), ("all parameters", report.all)]
    rows = [
        [name, *(_interval(one) for one in (found.spearman, found.sign, found.recall, found.relative_error))]
        for name, found in references
        if found is not None
    ]
    title = f"{report.part}: {report.rows:,} rows × {report.val_samples:,} val samples by {report.metric}"
    print_table(f"{title}; recall@{report.layers.at}, 95 % intervals", columns, rows)
    if report.all is None:
        why = f"the part is in a metric of its layers alone ({report.own_metric})"
        click.echo(f"against all parameters: not known, {why}")
    click.echo(f"{'kept in the part' if report.kept else 'not kept in the part'}, {report.seconds:,.1f} s", err=True)


def _interval(estimate: Any) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
