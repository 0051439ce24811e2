"""Checks and their findings. A finding has a status, one sentence, numbers, and advice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from query.doctor.subject import Subject


class Verdict(StrEnum):
    """The result of a check, from harmless to harmful."""

    OK = "ok"
    SKIPPED = "skipped"
    ADVICE = "advice"
    """A store would be right, but could be better or cheaper."""
    WRONG = "wrong"
    """A store would hold vectors that are not the gradients of the samples, or would hold no vectors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check, with a sentence, advice and numbers."""

    status: Verdict
    summary: str
    """One sentence."""
    advice: tuple[str, ...] = ()
    """What to do: each entry is one or two sentences."""
    details: dict[str, Any] = field(default_factory=dict)
    """The measured numbers, as JSON values except that numbers may be NaN or infinite."""

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON values, with None for NaN and infinity."""
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
    """Earlier checks that must not be wrong. If one is, this check would tell nothing."""


GRADIENTS = ("randomness", "gradients")
"""What a check of gradients needs: they must be the same each time, and finite."""


def skipped(reason: str) -> Finding:
    """The finding of a check that could not run."""
    return Finding(status=Verdict.SKIPPED, summary=reason)


def right(summary: str, *advice: str, **details: Any) -> Finding:
    """The finding that a store would be right. If there is ``advice``, it could be better or cheaper."""
    status = Verdict.ADVICE if advice else Verdict.OK
    return Finding(status=status, summary=summary, advice=advice, details=details)


def wrong(summary: str, *advice: str, **details: Any) -> Finding:
    """The finding that a store would be wrong unless the ``advice`` is followed."""
    return Finding(status=Verdict.WRONG, summary=summary, advice=advice, details=details)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
