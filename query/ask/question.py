"""The options of a query, checked before anything is opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from ghoststore.corpus import Corpus, Fields, open_corpus, same_source, source_name
from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.settings.option import check_at_least, check_choices
from ghoststore.settings.question import NO_VAL_SET, QuestionOptions
from ghoststore.settings.shared import Checkpoint
from query.ask.blend import checked_weight
from query.ask.phrase import Phrase
from query.search.second_moment import checked_damping

Grouping = Literal["mean", "each", "domain"]
COMBINED = "combined"
"""Name of the ranking over all groups."""


@dataclass(frozen=True, kw_only=True)
class Question(QuestionOptions):
    """The options that say what is scored against what. UsageError for options that exclude each other."""

    each: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        if self.val_set is None:
            self._refuse_without_val_set()
        elif self.minus is not None and same_source(self.val_set, self.minus):
            raise UsageError(
                f"`minus={source_name(self.minus)}` is the val set itself: the difference of their gradients is zero. "
                "Give another one, or leave `minus` out"
            )
        check_at_least(1, max_samples=self.max_samples)
        if self.phrase is not None:
            Phrase.of(self.phrase)  # refuses what is none
            if self.group_field is not None:
                raise UsageError("`phrase` is of one val sample, and `group_field` divides several: give one of them")
            if self.lexical is not None:
                raise UsageError("`lexical` ranks by the words of whole val samples: leave it or `phrase` out")
        if self.each and self.group_field is not None:
            raise UsageError("`each` asks for a ranking a val sample, `group_field` for one a group: give one of them")
        if self.group_field is None and self.combine != "mean":
            raise UsageError(f"`combine={self.combine}` belongs to `group_field`, which cuts the val set into groups")
        if self.group_field is not None and self.fields is not None and self.fields.domain is not None:
            raise UsageError(
                "`fields.domain` and `group_field` both name the groups of the val set: give the latter alone"
            )
        if self.damping is not None and self.precondition == "none":
            raise UsageError("`damping` belongs to `precondition=second-moment`")
        checked_damping(self.damping)
        checked_weight(self.score_weight)
        if self.lexical is not None and not 0 <= self.lexical <= 1:
            raise UsageError(f"`lexical` must be between 0 (gradients alone) and 1 (words alone), not {self.lexical}")
        if self.lexical is not None and self.with_scores is not None:
            raise UsageError("`lexical` and `with_scores` each blend the scores with something: give one of them")
        if self.score_weight is not None and self.with_scores is None:
            raise UsageError("`score_weight` belongs to `with_scores`, which names a training run")

    def _refuse_without_val_set(self) -> None:
        raise UsageError(NO_VAL_SET)

    @property
    def grouping(self) -> Grouping:
        """Which val samples make one query: ``each`` alone, ``domain`` by group, or ``mean`` over all."""
        return "each" if self.each else "mean" if self.group_field is None else "domain"

    def checkpoints(self, parts: int) -> list[Checkpoint | None]:
        """The path of each part's checkpoint; None for the path that the user's own build read.

        UsageError unless ``checkpoint`` names one for each part, or none.
        """
        if self.checkpoint is None:
            return [None] * parts
        given: Any = self.checkpoint
        paths: list[Checkpoint | None] = list(given) if isinstance(given, list | tuple) else [given]
        if len(paths) != parts:
            raise UsageError(
                f"`checkpoint` is given {len(paths)} time(s) for {parts} parts: one part's checkpoint cannot stand for "
                "another's; give one for each, in their order"
            )
        return paths

    @contextmanager
    def opened_val_set(self, progress: Progress) -> Iterator[Corpus]:
        """The val set, which there must be."""
        assert self.val_set is not None
        with open_corpus(self.val_set, self.val_fields(), progress) as corpus:
            yield corpus

    @contextmanager
    def opened_minus(self, progress: Progress) -> Iterator[Corpus | None]:
        """The val set ``minus``; None without. Its rows are read as those of the val set, groups aside."""
        if self.minus is None:
            yield None
            return
        with open_corpus(self.minus, self.fields or Fields(), progress) as corpus:
            yield corpus

    def val_fields(self) -> Fields:
        """The fields of the val set; ``group_field`` takes the place of the domain."""
        fields = self.fields or Fields()
        if self.group_field is None:
            return fields
        return replace(fields, domain=self.group_field, domain_parameter="group_field")
