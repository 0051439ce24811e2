"""``ghoststore doctor``."""

from __future__ import annotations

from typing import Any

import click

from ghoststore.cli import options
from ghoststore.errors import UnsoundError


@click.command("doctor", short_help="would a store of this model, on this machine, be right?")
@click.option("--checkpoint", required=True, metavar="PATH", help="Folder in transformers' format, or a hub id.")
@click.option("--data", metavar="PATH", help="Corpus to draw a few samples from (default: built-in sentences).")
@click.option(
    "--store",
    default=".",
    show_default=True,
    metavar="PATH",
    help="Folder whose disk is measured; nothing in it is changed.",
)
@click.option("--tokenizer", metavar="PATH", help="Folder of the tokenizer (default: the checkpoint's).")
@click.option("--exclude-layers", callback=options.patterns, help="Layers to leave out of --proj-layers.")
@options.projection
@options.loss_reduction
@click.option("--samples", type=int, default=16, show_default=True, help="Samples to look at, at least 3.")
@click.option("--max-length", type=int, metavar="TOKENS", help="Longest sample (default: the model's, at most 128).")
@options.device
@options.model_dtype
@click.option(
    "--attn-implementation",
    metavar="NAME",
    help="The attention kernel to examine (default: eager, sdpa and, on CUDA, flash_attention_2 where it is there).",
)
@options.fields
@options.common
def command(**values: Any) -> None:
    """Would a store of this model, built on this machine, be right? Looks before you build.

    Asks whether a forward pass is the same each time, causal, and independent of batch mates and padding with each
    attention kernel; whether the vectors are what autograd gives; whether bfloat16 keeps the ranking; how much of the
    gradient the chosen layers see; and what FAISS, disk and machine can do. Exit code 7 if something would make a
    store wrong.

    \b
      ghoststore doctor --checkpoint ./model --data train.jsonl --store ./store
    """
    from ghoststore.cli.terminal import listener, print_json
    from ghoststore.lazy import load

    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    values = options.take_fields(values)
    config = options.take_projection(values, values.pop("exclude_layers"))
    report = load("doctor")(projection=config, progress=listener(quiet), **values)
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)
    if report.wrong:
        raise UnsoundError(f"a store of {report.model} would be wrong: {', '.join(report.wrong)}")


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import print_table

    columns = [("check", False), ("verdict", False), ("found", False)]
    rows = [[name, str(finding.status), finding.summary] for name, finding in report.findings.items()]
    print_table(report.model, columns, rows)
    for name, finding in report.findings.items():
        for sentence in finding.advice:
            click.echo(f"{name}: {sentence}")
