"""``ghoststore full-gradients``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.settings.measure import FullGradientsOptions
from ghoststore.settings.shared import Printing


@options.command(
    FullGradientsOptions,
    Printing,
    first="checkpoint data out parameters proj_layers max_samples max_length dtype device dry_run",
)
def command(keywords: options.Keywords, printing: Printing) -> None:
    """The exact gradient of each of a few samples' own loss, not projected: safetensors and a manifest.

    One sample takes as many bytes as the model: --dry-run says how many. Run it again to continue.

    \b
      ghoststore full-gradients --checkpoint ./model --data train.jsonl --out ./gradients --dry-run
      ghoststore full-gradients --checkpoint ./model --data train.jsonl --out ./gradients --parameters projected
    """
    options.run("full_gradients", keywords, printing, _print)


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
