"""The status of a row. Every row of the corpus has one, with or without a vector."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

FIRST_UNUSABLE = 16
"""Rows with this status or a higher one have no vector (zeros), and are in no result and no index."""


class Status(IntEnum):
    """The ``status`` array of a part. Numbers are part of the format and never change."""

    OK = 0
    TRUNCATED = 1
    """Longer than ``max_length``: the vector is that of its first ``max_length`` tokens."""
    EMPTY = 16
    """No text, or a text without tokens."""
    TOO_SHORT = 17
    """One token: nothing to predict."""
    NO_TARGETS = 18
    """Every token that could be a target is masked (an empty completion, or a prompt that fills the row)."""
    TOO_LONG = 19
    """Longer than ``max_length``, under the policy ``skip``."""
    NOT_FINITE = 20
    """The loss or the gradient is NaN or infinite."""
    OUT_OF_RANGE = 21
    """The vector is finite but too large for the stored dtype (float16)."""

    @property
    def usable(self) -> bool:
        """Whether the row has a vector."""
        return self < FIRST_UNUSABLE


def counted(left_out: Mapping[str, int]) -> str:
    """How many rows have which status, by its name in lower case, for an error: ``2 empty, 1 too_short (…)``."""
    short = Status.TOO_SHORT.name.lower()
    why = {short: " (one token alone: nothing is predicted from it)"}
    return ", ".join(f"{count:,} {name}{why.get(name, '')}" for name, count in sorted(left_out.items()))
