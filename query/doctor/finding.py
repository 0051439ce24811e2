"""What a check is, and what it says: a status, one sentence, numbers, and advice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from query.doctor.subject import Subject


class Verdict(StrEnum):
    """How a check came out, from harmless to harmful."""

    OK = "ok"
    SKIPPED = "skipped"
    ADVICE = "advice"
    """A store would be right, but could be better or cheaper."""
    WRONG = "wrong"
    """A store would hold vectors that are not the samples' gradients, or none at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found."""

    status: Verdict
    summary: str
    """One sentence."""
    advice: tuple[str, ...] = ()
    """What to do, a sentence or two each."""
    details: dict[str, Any] = field(default_factory=dict)
    """The measured numbers: JSON, but that numbers may be NaN or infinite."""

    def to_json(self) -> dict[str, Any]:
        """JSON without NaN or infinity: null in their place."""
        return {
            "status": str(self.status),
            "summary": self.summary,
            "advice": list(self.advice),
            "details": _finite(self.details),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question that the doctor asks."""

    name: str
    asks: str
    run: Callable[[Subject], Finding]
    needs: tuple[str, ...] = ()
    """Checks before this one that must not have found anything wrong: without them its answer means nothing."""


GRADIENTS = ("randomness", "gradients")
"""What a check of gradients needs: that they are the same each time, and finite."""


def skipped(reason: str) -> Finding:
    """The check could not be done."""
    return Finding(status=Verdict.SKIPPED, summary=reason)


def right(summary: str, *advice: str, **details: Any) -> Finding:
    """A store would be right; with ``advice`` it could be better or cheaper."""
    status = Verdict.ADVICE if advice else Verdict.OK
    return Finding(status=status, summary=summary, advice=advice, details=details)


def wrong(summary: str, *advice: str, **details: Any) -> Finding:
    """A store would be wrong, unless the ``advice`` is followed."""
    return Finding(status=Verdict.WRONG, summary=summary, advice=advice, details=details)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
