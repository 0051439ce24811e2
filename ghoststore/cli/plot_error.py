"""``ghoststore plot-error``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.settings.measure import PlotErrorOptions
from ghoststore.settings.shared import Printing


@options.command(
    PlotErrorOptions, Printing, first="store out part reference val_set rows val_samples metric checkpoint device"
)
def command(keywords: options.Keywords, printing: Printing) -> None:
    """Draw how the error of inner products, rank correlation and recall fall and rise with the numbers of a vector.

    Parts are found by their manifests, whatever their names. The theoretical curve stands beside the measured one.

    \b
      ghoststore plot-error --store ./store --out error.png
      ghoststore plot-error --store ./store --out error.pdf --reference full --val-set val.jsonl
    """
    options.run("plot_error", keywords, printing, _print)


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
