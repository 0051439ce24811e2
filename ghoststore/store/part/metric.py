"""The metric that the vectors of a part are in: what their gradients were multiplied with before they were stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
