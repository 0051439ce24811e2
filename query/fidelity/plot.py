"""The picture of `ghoststore.plot_error`: error, rank correlation and recall over the numbers of a vector."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from ghoststore.shown import picture_label
from query.fidelity.theory import MEAN_OF_NORMAL, dense_error

COLORS = ("#1f5fa8", "#d1662b", "#2f8f5b", "#8a4fa3", "#b8912f", "#c43d5e", "#4aa3b5")
THEORY = "#6b6b6b"
TITLES = {
    "full": "exact gradients of all parameters",
    "full_layers": "exact gradients of the projected layers",
    "rank": "the part of that rank",
    "naive_proj_layers": "a dense projection of the layers' exact gradients",
}


def draw_errors(curve: dict[str, Any], path: Path, reference_numbers: int | None) -> None:
    """Draw the JSON of an `ErrorCurve` in three panels and save them to ``path``, in the format of its suffix."""
    from matplotlib.figure import Figure

    points = curve["points"]
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    error, spearman, recall = figure.subplots(1, 3)
    for color, (label, line_points) in zip(cycle(COLORS), series(points).items(), strict=False):
        _draw_measured(error, line_points, "mean_error", color, label)
        _draw_measured(spearman, line_points, "spearman", color, label)
        _draw_measured(recall, line_points, "recall", color, label)
    _draw_theory(error, points, reference_numbers)
    at = points[0]["agreement"]["at"] if points else 0
    error.set(ylabel="mean |error| ÷ (|g||h|)", title="Error of inner products", yscale="log")
    spearman.set(ylabel=f"Spearman, {curve['metric']}", title="Rank correlation")
    recall.set(ylabel=f"recall@{at}, {curve['metric']}", title="Best rows found", ylim=(0, 1.03))
    for axes in (error, spearman, recall):
        axes.set(xlabel="numbers of a vector", xscale="log")
        axes.margins(x=0.14)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    error.legend(frameon=False, fontsize=9)
    title = TITLES[curve["reference"].split("=")[0]]
    figure.suptitle(
        f"Against {curve['reference']}: {title}   ·   {curve['rows']:,} rows × {curve['val_samples']:,} val samples, "
        "95 % intervals",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


def series(points: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The points of each line, by its label. A line has one kind of matrices, plain or sketched, and one dtype."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        label = f"{point['kind']} blocks{', sketched' if point['compress'] else ''}, {point['dtype']}"
        by_label.setdefault(label, []).append(point)
    return by_label


def _draw_theory(axes: Any, points: list[dict[str, Any]], reference_numbers: int | None) -> None:
    """Draw the theoretical error of a dense projection as a curve, and that of each part's ranks as a dash."""
    shown = [point for point in points if _has_error(point)]
    if not shown:
        return
    numbers = np.geomspace(shown[0]["numbers"] * 0.8, shown[-1]["numbers"] * 1.25, 50)
    dense = [dense_error(k, reference_numbers) for k in numbers]
    axes.plot(numbers, dense, color=THEORY, linestyle="--", linewidth=1.4, label="theory: dense, √(2 / πk)")
    with_ranks = [point for point in shown if point["theory_rms"] is not None]
    if with_ranks:
        heights = [MEAN_OF_NORMAL * point["theory_rms"] for point in with_ranks]
        axes.plot(
            [point["numbers"] for point in with_ranks],
            heights,
            color=THEORY,
            linestyle="none",
            marker="_",
            markersize=22,
            markeredgewidth=2,
            label="theory: these blocks, √(2/π) σ",
        )


def _has_error(point: dict[str, Any]) -> bool:
    """Whether the error can be drawn on a logarithmic axis. At full rank there is only rounding."""
    return bool(point["mean_error"]["value"] > 1e-6)


def _draw_measured(axes: Any, points: list[dict[str, Any]], measure: str, color: str, label: str) -> None:
    """Draw ``measure`` of ``points`` with its intervals."""
    points = [point for point in points if measure != "mean_error" or _has_error(point)]
    values = [point[measure] if measure in point else point["agreement"][measure] for point in points]
    middle = np.array([value["value"] for value in values])
    spread = [
        np.maximum(0, middle - np.array([value["low"] for value in values])),
        np.maximum(0, np.array([value["high"] for value in values]) - middle),
    ]
    numbers = [point["numbers"] for point in points]
    axes.errorbar(numbers, middle, yerr=spread, color=color, marker="o", capsize=3, linewidth=1.5, label=label)
    for point, height in zip(points, middle, strict=True):
        axes.annotate(
            picture_label(point["part"]),
            (point["numbers"], height),
            xytext=(7, -3),
            textcoords="offset points",
            fontsize=8,
            color=color,
        )
