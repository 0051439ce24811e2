"""What is asked of a store, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ghoststore.corpus import Fields
from ghoststore.errors import UsageError
from query.ask.blend import checked_weight
from query.search.part_score import METRICS, Metric
from query.search.parts import PartWeights
from query.search.second_moment import checked_damping

Combine = Literal["mean", "max", "rank-fusion"]
Precondition = Literal["none", "second-moment"]
Grouping = Literal["mean", "each", "domain"]
PRECONDITIONS = ("none", "second-moment")
COMBINES = ("mean", "max", "rank-fusion")
COMBINED = "combined"
"""Name of the ranking over all groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked; fields have the names of the options of ``ghoststore query``. UsageError where they clash."""

    store: str | Path
    val_set: str | Path
    part: str | Sequence[str] | None = None
    """Several are successive checkpoints: their scores are summed by ``part_weights``."""
    part_weights: PartWeights | None = None
    each: bool = False
    group_field: str | None = None
    combine: Combine = "mean"
    metric: Metric = "cosine"
    layers: Sequence[str] = ()
    exclude_layers: Sequence[str] = ()
    fields: Fields | None = None
    max_samples: int | None = None
    checkpoint: str | Path | None = None
    device: str = "auto"
    with_scores: str | None = None
    score_weight: float | None = None
    precondition: Precondition = "none"
    damping: float | None = None

    def __post_init__(self) -> None:
        if self.max_samples is not None and self.max_samples < 1:
            raise UsageError(f"--max-samples must be at least 1, not {self.max_samples}")
        if self.metric not in METRICS:
            raise UsageError(f"--metric {self.metric!r} is unknown; known: {', '.join(METRICS)}")
        if self.combine not in COMBINES:
            raise UsageError(f"--combine {self.combine!r} is unknown; known: {', '.join(COMBINES)}")
        if self.each and self.group_field is not None:
            raise UsageError("--each asks for a ranking a val sample, --group-field for one a group: give one of them")
        if self.group_field is None and self.combine != "mean":
            raise UsageError(f"--combine {self.combine} belongs to --group-field, which cuts the val set into groups")
        if self.group_field is not None and self.fields is not None and self.fields.domain is not None:
            raise UsageError(
                "--domain-field and --group-field both name the groups of the val set: give the latter alone"
            )
        if self.precondition not in PRECONDITIONS:
            raise UsageError(f"--precondition {self.precondition!r} is unknown; known: {', '.join(PRECONDITIONS)}")
        if self.damping is not None and self.precondition == "none":
            raise UsageError("--damping belongs to --precondition second-moment")
        checked_damping(self.damping)
        checked_weight(self.score_weight)
        if self.score_weight is not None and self.with_scores is None:
            raise UsageError("--score-weight belongs to --with-scores, which names a training run")

    @property
    def grouping(self) -> Grouping:
        """What val samples become one query."""
        return "each" if self.each else "mean" if self.group_field is None else "domain"

    def val_fields(self) -> Fields:
        """How rows of the val set are read: ``group_field`` takes the place of the domain."""
        fields = self.fields or Fields()
        if self.group_field is None:
            return fields
        return replace(fields, domain=self.group_field, domain_option="--group-field")
