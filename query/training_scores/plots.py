"""Pictures of the scores of a run: over its steps, the mean score and the sum Σ weight·score of each domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.settings.shared import STEP_WEIGHT_SYMBOLS, WeightOption
from ghoststore.shown import picture_label
from ghoststore.store import Run
from ghoststore.store.run.ranges import inside
from query.common.output import check_picture, save_picture
from query.training_scores.curves import STEP_ARRAYS, Curves
from query.training_scores.steps import choose_column, end_of, stream_steps, window_of
from query.training_scores.sums import ScoreSums, Units
from query.training_scores.weights import StepWeight, StepWeights

BINS = 48
FEWEST_BINS = 12
SMOOTH = 16
LINES = 8
"""Most domains with a line of their own; the others share one line."""
COLORS = ("#1f5fa8", "#d1662b", "#2f8f5b", "#8a4fa3", "#b8912f", "#c43d5e", "#4aa3b5", "#6b6b6b", "#a8a8a8")


def plot_scores(
    run: Run,
    path: str | Path,
    *,
    steps: str | slice | None = None,
    group: str | None = None,
    layers: Sequence[str] = (),
    exclude_layers: Sequence[str] = (),
    candidates: bool = False,
    weight: StepWeight = WeightOption.weight,
    title: str | None = None,
    over: bool = True,
) -> None:
    """Two panels for ``run``, written to ``path``: .png, .pdf or .svg.

    What stands there is replaced, unless ``over`` is False.

    Left: the mean score of each domain in equal bins of steps, with its standard error as a band. Right: Σ
    weight·score of each domain's samples up to each step. The other parameters are those of :func:`ghoststore.scores`.
    UsageError as there, StorageError if it cannot be written.
    """
    from matplotlib.figure import Figure

    target = Path(path)
    if not over or not target.exists():
        check_picture(target, "path")
    column, window = choose_column(run, group, layers, exclude_layers), window_of(run, steps)
    weights = StepWeights(run, weight, window)
    curves, sums, units = Curves(run, BINS), ScoreSums(len(run.rows)), Units(run, "window")
    ranges = inside(run.ranges, window)
    for piece in stream_steps(run, column, ranges, also=STEP_ARRAYS, candidates=candidates, weights=weights):
        curves.add(piece, sums.add(piece.places, units.of(piece.places.row)))
    if not sums.tally.scored:
        raise UsageError(f"run {run.name!r} has no finite score in steps {window[0]:,} to {window[1] - 1:,}")
    lines = _lines(curves)
    _smooth(curves, len(lines))
    figure = Figure(figsize=(12, 5.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_means(left, curves, lines)
    _draw_sums(right, curves, lines, window)
    left.set(
        title=f"Mean score of a sample when it is {'a candidate' if candidates else 'trained on'}",
        xlabel=f"step (bins of {curves.width:,})" if curves.width > 1 else "step",
        ylabel="⟨∇ℓ sample, ∇L val⟩   in (nats a token)² / weight²",
    )
    symbol, unit = STEP_WEIGHT_SYMBOLS[weight], "in steps" if weight == "unit" else "in nats a token"
    right.set(title=f"What it adds up to: Σ {symbol} · score", xlabel="step", ylabel=f"Σ {symbol} · score   {unit}")
    for axes in (left, right):
        axes.axhline(0, color="black", linewidth=0.7)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(window)
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.6g}" if step < 1e6 else f"{step / 1e6:g} M")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(5, len(labels)),
        frameon=False,
        fontsize=9,
        title="domain (number of scores)",
        title_fontsize=9,
    )
    figure.suptitle(picture_label(title or _title(run, group, layers, exclude_layers, sums)), fontsize=11)
    save_picture(figure, target, dpi=130, over=over)


def _smooth(curves: Curves, lines: int) -> None:
    """Merge bins until they hold SMOOTH scores of each line on average, or only FEWEST_BINS bins are filled."""
    times = curves.domain_sums("times")
    while (filled := int(times.any(1).sum())) > FEWEST_BINS and times.sum() < SMOOTH * filled * lines:
        curves.fold()


Lines = list[tuple[str, list[int]]]
"""For each line (label, places of the domains that it sums)."""


def _lines(curves: Curves) -> Lines:
    """One line for each of the domains with most scores; the domains beyond LINES share one."""
    times = curves.domain_sums("times").sum(0)
    order = [int(place) for place in np.argsort(-times, kind="stable") if times[place]]
    separate, others = (order, []) if len(order) <= LINES + 1 else (order[:LINES], order[LINES:])
    only = len(order) == 1 and curves.names[order[0]] is None
    lines = [
        ("all samples" if only else picture_label(curves.names[place] or "(none)"), [place])
        for place in sorted(separate)
    ]
    return lines + ([(f"{len(others)} others", others)] if others else [])


def _draw_means(axes: Any, curves: Curves, lines: Lines) -> None:
    highest, lowest = [], []
    for color, (label, columns) in zip(COLORS, lines, strict=False):
        mean, error = curves.mean_scores(columns)
        count = int(curves.domain_sums("times")[:, columns].sum())
        axes.plot(
            curves.centres,
            mean,
            color=color,
            linewidth=1.7,
            label=f"{label} ({count:,})",
            marker="o" if np.isfinite(mean).sum() == 1 else None,
        )
        axes.fill_between(curves.centres, mean - error, mean + error, color=color, alpha=0.18, linewidth=0)
        highest += mean[np.isfinite(mean)].tolist()
        lowest += (mean - np.nan_to_num(error))[np.isfinite(mean)].tolist()
    _limit(axes, np.array(lowest), np.array(highest))


def _limit(axes: Any, lowest: NDArray[np.float64], highest: NDArray[np.float64]) -> None:
    """Cut a few large values off at the top of the axes if they would flatten all others: the first scores
    are large.
    """
    if len(highest) < 20:
        return
    low, high = min(0.0, float(np.quantile(lowest, 0.01))), max(0.0, float(np.quantile(highest, 0.97)))
    if high > 0 and highest.max() > 3 * high:
        axes.set_ylim(low - 0.1 * (high - low), high + 0.15 * (high - low))
        axes.annotate(
            f"↑ up to {highest.max():.3g}",
            (0.14, 0.985),
            xycoords="axes fraction",
            va="top",
            fontsize=8,
            color="0.35",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )


def _draw_sums(axes: Any, curves: Curves, lines: Lines, window: tuple[int, int]) -> None:
    weighted = curves.domain_sums("weighted")
    inside = (curves.ends > window[0]) & (curves.ends - curves.width < window[1])
    ends = np.concatenate([[window[0]], np.minimum(curves.ends[inside], window[1])])
    reached = []
    for color, (_, columns) in zip(COLORS, lines, strict=False):
        sums = np.concatenate([[0.0], np.cumsum(weighted[inside][:, columns].sum(1))])
        axes.plot(ends, sums, color=color, linewidth=1.7)
        reached.append(float(sums[-1]))
    low, high = axes.get_ylim()
    for color, (label, _), height in zip(COLORS, lines, _apart(reached, 0.05 * (high - low)), strict=False):
        axes.annotate(
            label,
            (ends[-1], height),
            color=color,
            fontsize=9,
            va="center",
            annotation_clip=False,
            xytext=(5, 0),
            textcoords="offset points",
        )


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """``heights``, moved until any two are ``least`` apart. Their order stays, and roughly their mean."""
    order = np.argsort(heights, kind="stable")
    moved = np.array(heights, dtype=np.float64)[order]
    for _ in range(len(moved) ** 2):
        close = np.flatnonzero(np.diff(moved) < least * 0.999)
        if not len(close):
            break
        for place in close:
            push = (least - (moved[place + 1] - moved[place])) / 2
            moved[place] -= push
            moved[place + 1] += push
    apart = np.empty_like(moved)
    apart[order] = moved
    return [float(height) for height in apart]


def _title(run: Run, group: str | None, layers: Sequence[str], exclude_layers: Sequence[str], sums: ScoreSums) -> str:
    pieces = [f"{run.name}: {sums.tally.scored:,} scores, {sums.tally.negative_share or 0:.1%} negative"]
    if end_of(run) < run.layout.steps:
        pieces.append(f"{run.steps:,} of {run.layout.steps:,} steps")
    if group is not None:
        pieces.append(f"val group {group}")
    if layers or exclude_layers:
        pieces.append(
            f"layers {', '.join(layers) or 'all'}" + f" without {', '.join(exclude_layers)}" * bool(exclude_layers)
        )
    return "   ·   ".join(pieces)
