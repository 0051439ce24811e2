"""``ghoststore plot-error``."""

from __future__ import annotations

from typing import Any

import click

from ghoststore.cli import options


@click.command("plot-error", short_help="error of inner products against the numbers of a vector")
@options.store
@click.option("--out", required=True, metavar="FILE", help="New .png, .pdf or .svg; numbers go to a .json beside it.")
@click.option(
    "--part",
    multiple=True,
    metavar="NAME",
    callback=options.one_or_several,
    help="A point of the curve; repeatable (default: every part; all of one checkpoint, corpus and choice of layers).",
)
@click.option(
    "--reference",
    default="full_layers",
    show_default=True,
    metavar="WHAT",
    help="full_layers: exact gradients of the projected layers; full: of all parameters; rank=N: the part built with "
    "--proj-rank-total N; naive_proj_layers=N: a dense projection of the layers' exact gradients to N numbers.",
)
@click.option("--val-set", metavar="PATH", help="Draw the val samples here (default: among the parts' own rows).")
@click.option("--rows", type=int, default=200, show_default=True, help="Rows that are ranked, drawn at random.")
@click.option("--val-samples", type=int, default=20, show_default=True, help="Val samples they are ranked for.")
@click.option(
    "--metric",
    type=click.Choice(["cosine", "dot"]),
    default="cosine",
    show_default=True,
    help="The score of rank correlation and recall; errors are those of inner products.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option("--checkpoint", metavar="PATH", help="Another path to the checkpoint the parts were built from.")
@options.device
@options.fields
@options.common
def command(**values: Any) -> None:
    """Draw how the error of inner products, rank correlation and recall fall and rise with the numbers of a vector.

    Parts are found by their manifests, whatever their names. The theoretical curve stands beside the measured one.

    \b
      ghoststore plot-error --store ./store --out error.png
      ghoststore plot-error --store ./store --out error.pdf --reference full --val-set val.jsonl
    """
    from ghoststore.cli.terminal import listener, print_json
    from ghoststore.lazy import load

    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    curve = load("plot_error")(progress=listener(quiet), **options.take_fields(values))
    click.echo(f"wrote {curve.plot} and {curve.numbers_file}", err=True)
    if as_json:
        print_json(curve.to_json())
    else:
        _print(curve)


def _print(curve: Any) -> None:
    from ghoststore.cli.terminal import print_table

    columns = [
        ("part", False),
        ("numbers", True),
        ("mean error", True),
        ("dense theory", True),
        ("rms error", True),
        ("its theory", True),
        ("Spearman", True),
        ("recall", True),
    ]
    rows = [
        [
            point.part,
            f"{point.numbers:,}",
            _interval(point.mean_error),
            f"{point.theory_dense:.4f}",
            _interval(point.rms_error),
            "–" if point.theory_rms is None else f"{point.theory_rms:.4f}",
            _interval(point.agreement.spearman),
            _interval(point.agreement.recall),
        ]
        for point in curve.points
    ]
    title = f"against {curve.reference}: {curve.rows:,} rows × {curve.val_samples:,} val samples"
    print_table(f"{title}; errors ÷ (|g||h|), 95 % intervals", columns, rows)


def _interval(estimate: Any) -> str:
    return f"{estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"
