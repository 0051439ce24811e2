"""``ghoststore doctor``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.errors import UnsoundError
from ghoststore.settings.measure import DoctorOptions
from ghoststore.settings.shared import Printing


@options.command(
    DoctorOptions,
    Printing,
    first="checkpoint data store samples max_length device model_dtype attn_implementation projection.layers",
)
def command(keywords: options.Keywords, printing: Printing) -> None:
    """Would a store of this model, built on this machine, be right? Looks before you build.

    Asks whether a forward pass is the same each time, causal, and independent of batch mates and padding with each
    attention kernel; whether the vectors are what autograd gives; whether bfloat16 keeps the ranking; how much of the
    gradient the chosen layers see; and what FAISS, disk and machine can do. Exit code 7 if something would make a
    store wrong.

    \b
      ghoststore doctor --checkpoint ./model --data train.jsonl --store ./store
    """
    report = options.run("doctor", keywords, printing, _print)
    if report.wrong:
        raise UnsoundError(f"a store of {report.model} would be wrong: {', '.join(report.wrong)}")


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import print_table, say

    render = options.renderer()
    columns = [("check", False), ("verdict", False), ("found", False)]
    rows = [[name, str(finding.status), render(finding.summary)] for name, finding in report.findings.items()]
    print_table(report.model, columns, rows)
    for name, finding in report.findings.items():
        for sentence in finding.advice:
            say(f"{name}: {render(sentence)}")
