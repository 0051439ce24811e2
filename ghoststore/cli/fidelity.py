"""``ghoststore fidelity``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.settings.measure import FidelityOptions
from ghoststore.settings.shared import Printing


@options.command(
    FidelityOptions,
    Printing,
    first="store part val_set rows val_samples metric layers exclude_layers checkpoint device",
)
def command(keywords: options.Keywords, printing: Printing) -> None:
    """Compute a few exact gradients again, and compare the rankings by them with those by the stored vectors.

    Against exact gradients of the projected layers: what the projection costs. Against those of all parameters: what
    the choice of layers costs, too. The part keeps the result; info and query show it.

    \b
      ghoststore fidelity --store ./store
      ghoststore fidelity --store ./store --val-set val.jsonl --rows 500 --metric dot
    """
    options.run("fidelity", keywords, printing, _print)


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import notify, print_table, say

    columns = [
        ("against exact gradients of", False),
        ("Spearman", True),
        ("same sign", True),
        ("recall", True),
        ("relative error", True),
    ]
    references = [("the layers", report.layers), ("all parameters", report.all)]
    rows = [
        [name, *map(_interval, (agreement.spearman, agreement.sign, agreement.recall, agreement.relative_error))]
        for name, agreement in references
        if agreement is not None
    ]
    title = f"{report.part}: {report.rows:,} rows × {report.val_samples:,} val samples by {report.metric}"
    print_table(f"{title}; recall@{report.layers.at}, 95 % intervals", columns, rows)
    if report.all is None:
        why = f"the part is in a metric of its layers alone ({report.own_metric})"
        say(f"against all parameters: not known, {why}")
    notify(f"{'kept in the part' if report.kept else 'not kept in the part'}, {report.seconds:,.1f} s")


def _interval(estimate: Any) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
