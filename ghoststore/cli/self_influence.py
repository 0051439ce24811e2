"""``ghoststore self-influence``."""

from __future__ import annotations

from typing import Any

import click

from ghoststore.cli import options


@click.command("self-influence", short_help="the samples that are unlike the rest")
@options.store
@click.option("--part", metavar="NAME", help="Part to rank (default: the only one).")
@click.option("--top-k", type=int, default=10, show_default=True, help="Rows with the highest self-influence.")
@click.option("--bottom-k", type=int, default=0, show_default=True, help="Rows with the lowest.")
@click.option("--layers", callback=options.patterns, help="These layers only (parts of plain blocks).")
@click.option("--exclude-layers", callback=options.patterns, help="Without these layers.")
@click.option("--damping", type=float, help="Relative to the mean eigenvalue of the second moment (default: 0.1).")
@options.device
@click.option("--no-text", "text", flag_value=False, default=True, help="Do not look up texts.")
@click.option("--out", metavar="FILE", help="Write results to a new .json, .jsonl, .csv or .parquet file.")
@options.common
def command(**values: Any) -> None:
    """The training samples that most change their own loss: rare, noisy or mislabelled ones.

    The score of a row with gradient g is g·(H + λI)⁻¹·g, H the second moment of the part's rows. No model is loaded.

    \b
      ghoststore self-influence --store ./store --top-k 20
    """
    from ghoststore.cli.query import answer
    from ghoststore.lazy import load

    answer(load("self_influence"), values)
