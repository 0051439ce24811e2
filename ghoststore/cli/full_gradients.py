"""``ghoststore full-gradients``."""

from __future__ import annotations

from typing import Any

import click

from ghoststore.cli import options


@click.command("full-gradients", short_help="exact gradients of a few samples, in full")
@click.option("--checkpoint", required=True, metavar="PATH", help="Folder in transformers' format, or a hub id.")
@click.option(
    "--data", required=True, metavar="PATH", help="Corpus: jsonl, gz, zst, parquet, csv, txt, a folder, or -."
)
@click.option("--out", required=True, metavar="FOLDER", help="New folder, or one to go on with.")
@click.option(
    "--parameters",
    type=click.Choice(["all", "projected"]),
    default="all",
    show_default=True,
    help="Of the whole model, or of the layers that a build projects.",
)
@click.option(
    "--proj-layers",
    callback=options.patterns,
    help="Layers of --parameters projected (default: mlp,attn), as of build.",
)
@click.option("--exclude-layers", callback=options.patterns, help="Layers to leave out of --proj-layers.")
@click.option("--include-embeddings", is_flag=True, help="The embedding layers, too.")
@click.option("--tokenizer", metavar="PATH", help="Folder of the tokenizer (default: the checkpoint's).")
@click.option("--max-samples", type=int, default=64, show_default=True, help="Only the first samples of the corpus.")
@click.option("--max-length", type=int, metavar="TOKENS", help="Longest row (default: the model's, at most 1024).")
@click.option(
    "--overlong",
    type=click.Choice(["truncate", "window", "skip", "error"]),
    default="truncate",
    show_default=True,
    help="What becomes of longer samples; window: one row a window.",
)
@click.option(
    "--loss-reduction",
    type=click.Choice(["mean", "sum"]),
    default="mean",
    show_default=True,
    help="A sample's loss over its own targets.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Numbers in the files.",
)
@options.device
@click.option(
    "--model-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Numbers the model computes with.",
)
@click.option(
    "--attn-implementation", metavar="NAME", help="Attention kernel: sdpa, eager, … (default: transformers')."
)
@click.option("--dry-run", is_flag=True, help="Print rows, numbers, bytes and memory; write nothing.")
@options.fields
@options.common
def command(**values: Any) -> None:
    """The exact gradient of each of a few samples' own loss, not projected: safetensors and a manifest.

    One sample takes as many bytes as the model: --dry-run says how many. Run it again to continue.

    \b
      ghoststore full-gradients --checkpoint ./model --data train.jsonl --out ./gradients --dry-run
      ghoststore full-gradients --checkpoint ./model --data train.jsonl --out ./gradients --parameters projected
    """
    from ghoststore.cli.terminal import listener, print_json
    from ghoststore.lazy import load

    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    report = load("full_gradients")(progress=listener(quiet), **options.take_fields(values))
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, print_facts

    unit = "would take" if report.dry_run else "take"
    there = f" ({report.resumed_files:,} were there)" if report.resumed_files else ""
    facts = [
        ("folder", report.out),
        ("rows", f"{report.rows:,} of {report.samples:,} samples, {report.tokens:,} tokens"),
        *((f"  {status.replace('_', ' ')}", f"{count:,}") for status, count in report.statuses.items()),
        ("a gradient", f"{report.numbers:,} numbers of {report.parameters:,} parameters, {report.dtype}"),
        ("on disk", f"{unit} {report.bytes_on_disk:,} bytes ({human_bytes(report.bytes_on_disk)})"),
        ("files", f"{report.files:,}{there}"),
        ("memory", f"{human_bytes(report.memory_bytes)} beside the model and its activations"),
    ]
    if not report.dry_run:
        facts.append(("time", f"{report.seconds:,.1f} s"))
    print_facts("dry run" if report.dry_run else "written", facts)
