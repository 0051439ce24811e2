"""What is chosen from: the rows of a part, or the samples of a training run; each with its score for the val set."""

from __future__ import annotations

from itertools import islice
from typing import Any

from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.settings.keywords import part_of
from ghoststore.settings.question import SelectOptions
from ghoststore.store import Store
from query.ask.question import Question
from query.ask.run_question import RunQuestion, refuse_options_of_runs
from query.ask.run_scorer import RunScorer, opened_val_set
from query.ask.scorer import Scorer, open_scorer
from query.ask.unit import unit_of
from query.search.parts import note_repeated, open_parts
from query.search.unions import refuse_united
from query.select.leaks import LeakCheck
from query.select.samples import Samples
from query.select.strategy import Strategy


class OfParts:
    """The rows of a part, or of several that are summed."""

    def __init__(self, options: SelectOptions, progress: Progress) -> None:
        refuse_options_of_runs(options, all_candidates=options.all_candidates)
        self.question = part_of(Question, options)
        wanted = self.question
        self._parts, self._weights = open_parts(wanted.store, wanted.part, wanted.part_weights, progress)
        self.source = self._parts[0]
        if wanted.data is not None:
            refuse_united(self._parts, "`data`")
        mixed = wanted.with_scores is not None or wanted.lexical is not None
        self.unit = None if mixed else unit_of(wanted, self._parts)
        self.scorer: Scorer | None = None
        """Once the val set is read."""

    def read_val_set(self, progress: Progress) -> LeakCheck:
        """Read the val set, once; what finds its near-duplicates."""
        wanted = self.question
        with (
            wanted.opened_val_set(progress) as val_set,
            wanted.opened_minus(progress) as minus,
        ):
            val_set.cut_stream(int(self.source.manifest["tokens"]["max_length"]))
            leak_check = LeakCheck(islice(val_set.samples(), wanted.max_samples))
            self.scorer = open_scorer(
                wanted, self._parts, self._weights, val_set, progress, minus=minus, keep_vectors=True
            )
        note_repeated(self.source, progress)
        return leak_check

    def samples(self, progress: Progress) -> Samples:
        """Each with its score in the first ranking."""
        assert self.scorer is not None, "read_val_set() comes first"
        return Samples.of(self.source, self.scorer.scores(progress, 1)[0])

    def sources(self) -> list[tuple[str, dict[str, Any]]]:
        """(name, manifest) of every part."""
        return [(member.name, dict(member.manifest)) for part in self._parts for member in part.members]

    def settings(self) -> dict[str, Any]:
        """What the report says of the scores."""
        assert self.scorer is not None
        unit = None if self.unit is None else self.unit.to_json()
        return {**self.scorer.settings(), "unit": unit, "ranking": self.scorer.names[0]}


class OfRun:
    """The samples of a training run that keeps their gradients."""

    scorer = None
    unit = None

    def __init__(self, options: SelectOptions, strategy: Strategy) -> None:
        if strategy.diversity != "none":
            raise UsageError(
                f"`diversity={strategy.diversity}` compares samples at one checkpoint, `run={options.run}` has them at "
                "many: choose without, or from a part (`ghoststore build`)"
            )
        self.question = part_of(RunQuestion, options)
        if self.question.val_set is None and options.leaks == "error":
            raise UsageError("`leaks=error` looks for near-duplicates of the val set: give `val_set`")
        self.source = Store.open(self.question.store).run(options.run)
        self._scorer: RunScorer | None = None
        self._not_chosen = 0

    def read_val_set(self, progress: Progress) -> LeakCheck:
        """As of parts; without a val set nothing is a near-duplicate."""
        with opened_val_set(self.question, progress) as val_set, self.question.opened_minus(progress) as minus:
            leak_check = LeakCheck(() if val_set is None else islice(val_set.samples(), self.question.max_samples))
            self._scorer = RunScorer(self.question, val_set, progress, minus)
        if val_set is None:
            progress.note("without `val_set` no near-duplicates of val samples are looked for")
        return leak_check

    def samples(self, progress: Progress) -> Samples:
        """Each with its score in the first ranking; without one where none of the steps trained on it."""
        assert self._scorer is not None, "read_val_set() comes first"
        sums = self._scorer.sums(progress)
        self._not_chosen = sums.not_chosen
        return Samples.of_run(self._scorer.run, self._scorer.units, sums.score[0])

    def sources(self) -> list[tuple[str, dict[str, Any]]]:
        """(name, manifest) of the run."""
        return [(self.source.name, dict(self.source.manifest))]

    def settings(self) -> dict[str, Any]:
        """What the report says of the scores."""
        assert self._scorer is not None
        ranking = {"ranking": self._scorer.names[0], "candidates_left_out": self._not_chosen}
        return {**self._scorer.settings(), **ranking}
