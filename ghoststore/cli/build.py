"""``ghoststore build``."""

from __future__ import annotations

from typing import Any

import click

from ghoststore.cli import options


@click.command("build", short_help="a checkpoint and a corpus to a part of a store")
@click.option("--checkpoint", required=True, metavar="PATH", help="Folder in transformers' format, or a hub id.")
@click.option(
    "--data", required=True, metavar="PATH", help="Corpus: jsonl, gz, zst, parquet, csv, txt, a folder, or -."
)
@options.store
@click.option("--name", metavar="NAME", help="Name of the part (default: checkpoint and corpus).")
@click.option("--tokenizer", metavar="PATH", help="Folder of the tokenizer (default: the checkpoint's).")
@click.option("--exclude-layers", callback=options.patterns, help="Layers to leave out of --proj-layers.")
@options.projection
@options.learned_projection
@click.option(
    "--proj-dtype",
    type=click.Choice(["float32", "float16", "bfloat16", "int8", "onebit"]),
    default="float32",
    show_default=True,
    help="Numbers in the store; int8 takes a quarter of float32, onebit (signs) a thirtieth.",
)
@options.loss_reduction
@click.option("--max-length", type=int, metavar="TOKENS", help="Longest row (default: the model's, at most 1024).")
@click.option(
    "--overlong",
    type=click.Choice(["truncate", "window", "skip", "error"]),
    default="truncate",
    show_default=True,
    help="What becomes of longer samples; window: one row a window.",
)
@click.option("--max-samples", type=int, help="Only the first samples of the corpus.")
@click.option("--batch-tokens", type=int, help="Padded tokens of a batch (default: 2048 on a CPU, 16384 on CUDA).")
@click.option("--span-rows", type=int, help="Rows committed together (default: about 8 MiB of vectors).")
@click.option("--store-text", is_flag=True, help="Keep the texts in the store.")
@options.device
@options.model_dtype
@click.option(
    "--attn-implementation", metavar="NAME", help="Attention kernel: sdpa, eager, … (default: transformers')."
)
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory for about a third more time.")
@click.option(
    "--optimizer-state",
    metavar="PATH",
    help="A training checkpoint (of `ghoststore train` or transformers' Trainer) whose second moment of Adam scales "
    "the gradients: scores then tell what a step of Adam does.",
)
@click.option("--dry-run", is_flag=True, help="Print rows, tokens, D, bytes and memory; build nothing.")
@options.fields
@options.common
def command(**values: Any) -> None:
    """Each sample's projected gradient at a checkpoint, for every sample of a corpus, into a store.

    Run it again to continue: what is committed is not computed twice.

    \b
      ghoststore build --checkpoint ./model --data train.jsonl --store ./store
    """
    from ghoststore.cli.terminal import listener, print_json
    from ghoststore.lazy import load

    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    values = options.take_fields(values)
    exclude = values.pop("exclude_layers")
    config = options.take_projection(values, exclude)
    report = load("build")(projection=config, progress=listener(quiet), **values)
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, print_facts

    unit = "would take" if report.dry_run else "take"
    facts = [
        ("part", f"{report.part} in {report.store}"),
        ("rows", f"{report.rows:,}" + (f" ({report.resumed_rows:,} were there)" if report.resumed_rows else "")),
        *((f"  {status.replace('_', ' ')}", f"{count:,}") for status, count in report.statuses.items()),
        ("tokens", f"{report.tokens:,}" if report.tokens is not None else "not counted"),
        ("layers", f"{report.layers}, {report.coverage:.1%} of the model's parameters"),
        ("dimension (D)", f"{report.dimension:,}"),
        ("on disk", f"vectors and numbers {unit} {human_bytes(report.bytes_on_disk)}"),
    ]
    if report.dry_run:
        facts.append(("memory", f"about {human_bytes(report.memory_bytes)} beside the model and its activations"))
    if report.seconds:
        computing = report.seconds["compute"]
        rate = f" ({(report.rows - report.resumed_rows) / computing:,.1f} rows/s while computing)" if computing else ""
        facts.append(("time", f"{report.seconds['total']:,.1f} s{rate}"))
    print_facts("dry run" if report.dry_run else "built", facts)
