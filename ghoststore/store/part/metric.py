"""The metric that the vectors of a part are in: what their gradients were multiplied with before they were stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ghoststore.errors import UsageError
from ghoststore.settings.shared import Metric
from ghoststore.store.part.part import Part

LEARNED = {"kronecker": "the Kronecker factors"}
"""By the preconditioner of a manifest, its name in a sentence."""


def part_metric(projection: Mapping[str, Any]) -> str | None:
    """A phrase for the metric of a part, from ``projection`` of its manifest, such as "preconditioned by the Kronecker
    factors learned at build". None for plain gradients.
    """
    if projection["optimizer_state"] is not None:
        return "scaled by the optimizer state given at build"
    kind = projection["precondition"]
    if kind == "none":
        return None
    return f"preconditioned by {LEARNED.get(kind, kind)} learned at build"


def default_metric(projection: Mapping[str, Any]) -> Metric:
    """The score that a part was made for, from ``projection`` of its manifest.

    With Kronecker factors or Adam's second moment the inner product is what the theory asks for, and it predicts
    trainings better than the cosine (``benchmarks/results/lds.md``, ``frontier-real.md``). Of plain gradients neither
    does; the cosine keeps a few long gradients from winning every query (LESS, Xia et al. 2024).
    """
    return "cosine" if part_metric(projection) is None else "dot"


def metric_for(metric: Metric | None, parts: Sequence[Part]) -> Metric:
    """``metric``, or where it is None the one that all ``parts`` were made for. UsageError if they disagree."""
    if metric is not None:
        return metric
    metrics = {part.name: default_metric(part.manifest["projection"]) for part in parts}
    first, *others = metrics
    for other in others:
        if metrics[other] != metrics[first]:
            raise UsageError(
                f"part {first!r} was made for {metrics[first]}, and part {other!r} for {metrics[other]}: give "
                "`metric=dot` or `metric=cosine` for both"
            )
    return metrics[first]
