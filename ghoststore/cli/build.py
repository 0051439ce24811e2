"""``ghoststore build``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.settings.build import BuildOptions
from ghoststore.settings.shared import Printing


@options.command(
    BuildOptions,
    Printing,
    first="checkpoint data store name max_length batch_tokens projection.layers proj_dtype device dry_run",
)
def command(keywords: options.Keywords, printing: Printing) -> None:
    """Each sample's projected gradient at a checkpoint, for every sample of a corpus, into a store.

    Run it again to continue: what is committed is not computed twice.

    \b
      ghoststore build --checkpoint ./model --data train.jsonl --store ./store
    """
    options.run("build", keywords, printing, _print)


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
        facts.append(("time", _times(report)))
    print_facts("dry run" if report.dry_run else "built", facts)


def _times(report: Any) -> str:
    """The split between learning and building; of a dry run an estimate."""
    from ghoststore.cli.terminal import duration

    learning, computing = report.seconds.get("learning", 0.0), report.seconds["compute"]
    if report.dry_run:
        split = f"learning the projection {duration(learning)}, " if learning else ""
        return f"about {duration(learning + computing)}: {split}building {duration(computing)}"
    new = report.rows - report.resumed_rows
    rate = f" ({new / computing:,.1f} rows/s)" if computing else ""
    split = f"learning the projection {duration(learning)}, " if new and learning >= 0.05 else ""
    text = f"{duration(report.seconds['total'])}: {split}building {duration(computing)}{rate}"
    if split and learning > computing:
        text += ". This corpus is small: plain gradients (--proj-precondition none) take no learning, and rank worse"
    return text
