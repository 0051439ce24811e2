"""What is asked of the gradients that a training run keeps, checked."""

from __future__ import annotations

from dataclasses import dataclass

from ghoststore.errors import UsageError
from ghoststore.settings.option import check_at_least, given
from ghoststore.settings.question import QueryOptions, RunGradientsOptions, SelectOptions
from ghoststore.settings.shared import WeightOption
from ghoststore.store import Run
from ghoststore.store.run.ranges import Steps
from query.ask.question import Question
from query.training_scores.steps import window_of


@dataclass(frozen=True, kw_only=True)
class RunQuestion(RunGradientsOptions, Question):
    """The options of a question to a run. UsageError where they clash, or belong to parts."""

    all_candidates: bool = False
    """Of a run that chose: whether candidates that were not trained on count, too, all alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, last=self.last)
        if self.last is not None and self.step_window is not None:
            raise UsageError("`last` is a window of steps, and so is `step_window`: give one of them")
        for option in given(self, ("part", "part_weights", "precondition", "with_scores", "lexical")):
            raise UsageError(f"{option} is for parts, and `run={self.run}` asks a training run: give one of the two")
        if self.val_set is not None and self.checkpoint is None:
            raise UsageError(
                "give `checkpoint`, a checkpoint of that training: the gradient of `val_set` is taken there. Or leave "
                "`val_set` out, for each step's own val gradient"
            )
        self.checkpoints(1)  # refuses several

    def _refuse_without_val_set(self) -> None:
        of_val_set = ("checkpoint", "tokenizer", "each", "group_field", "minus", "max_samples", "phrase", "fields")
        for option in given(self, of_val_set):
            raise UsageError(
                f"{option} is for a val set: give `val_set`, or leave it out for each step's own val gradient"
            )

    def window(self, run: Run) -> Steps:
        """The steps that count. UsageError if none of them is committed."""
        if self.last is not None:
            return window_of(run, slice(-self.last, None), "last")
        return window_of(run, self.step_window, "step_window")


def refuse_options_of_runs(options: QueryOptions | SelectOptions, **flags: bool) -> None:
    """UsageError for options that only a training run has a use for, where there is none. ``flags`` are further ones,
    by name.
    """
    of_runs = {"step_window": options.step_window is not None, "last": options.last is not None, **flags}
    for name, is_given in of_runs.items():
        if is_given:
            raise UsageError(f"`{name}` belongs to `run`, the gradients that a training run keeps")
    if options.weight != WeightOption.weight and options.with_scores is None:
        raise UsageError(
            f"`weight={options.weight}` is what a step of a training run counts with: give `run`, or `with_scores`"
        )
