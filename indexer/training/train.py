"""``ghoststore.train``: training of language models with every sample scored live into a store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghoststore.checkpoint.load import resolve_device
from ghoststore.corpus import Fields, Source, part_word, source_of
from ghoststore.corpus.memory import recorded
from ghoststore.errors import UsageError
from ghoststore.interrupts import Stopping
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.settings.shared import TokenizerSource
from ghoststore.settings.train import TrainConfig, TrainOptions
from ghoststore.store.base.disk import exclusive, storage_errors
from ghoststore.store.base.manifest import Manifest
from ghoststore.store.base.names import safe_name
from ghoststore.store.base.object_path import location
from ghoststore.store.base.writable import check_writable
from ghoststore.store.run.layout import RunLayout
from ghoststore.tokens.manifest import date_in
from indexer.encode.tokens import Tokenizer, embedding_rows, longest_row
from indexer.session.chooser import Chooser
from indexer.session.ranks import Ranks, joined, refuse_drift
from indexer.session.run_plan import RunPlan, parameter_count
from indexer.session.session import ScoringSession
from indexer.training.architectures import model_name
from indexer.training.data import Order, TrainingRows
from indexer.training.dry_run import Prepared, plan_of, tokens_aside
from indexer.training.inputs import Inputs, Start, is_shards, read_val, token_shards
from indexer.training.loop import REHEARSALS, Trainer, autocast, make_optimizer, make_scaler
from indexer.training.manifest import IDENTITY, remember_corpus, training_layout, training_manifest
from indexer.training.report import StepTotals
from indexer.training.report import TrainReport as TrainReport
from indexer.training.scoring import ValSchedule, scoring_engine
from indexer.training.state import (
    Resumed,
    SavedState,
    checkpoints,
    prune,
    read_state,
    refuse_other,
    restore,
    save_state,
)
from indexer.training.stopping import saved_at, saying_what_is_left, stop_after
from indexer.training.trackers import Trackers
from indexer.training.usage import refuse_usage
from indexer.training.validation import ValSet

REHEARSED = 20
"""With so many steps left one is rehearsed first, to say how long they take. Of fewer it would be more than a tenth,
and the first two of them say it as soon."""


@takes(TrainOptions)
def train(options: TrainOptions) -> TrainReport:
    """Train a language model on ``data`` and score each sample of each step against ``val_set``, live, into ``store``.

    Parameters have the names of the command's options; those of training (``batch_size=4``) may come
    as one ``config`` instead. ``data`` and ``val_set`` are token shards or any form of corpus; a corpus
    is tokenized into ``output_dir/tokens`` first. The model is a new one of ``architecture`` or ``model_config``,
    or goes on from ``checkpoint``. Checkpoints in transformers' format go to ``output_dir``, steps and scores to the
    run ``name``. Under ``torchrun`` every process is a rank: they see different samples, and the first writes.

    Run again, it goes on from the newest checkpoint: data order, random state, weights and scores are those of a run
    that was never interrupted (on the same machine and software).

    Raises UsageError, CorpusError, CheckpointError or LayerError for inputs that cannot be used, MismatchError if
    what is there is of another run, CorruptError if it is damaged, BusyError if another process writes it, StorageError
    if a disk refuses, DivergedError if a loss, a gradient or a weight stops being a number.
    """
    config = options.configuration()
    with joined(resolve_device(options.device)) as (ranks, own_device):
        refuse_usage(options, config, ranks)
        training = _Training(
            data=source_of(options.data),
            val_set=None if options.val_set is None else source_of(options.val_set),
            store=options.store,
            name=options.name,
            output_dir=Path(options.output_dir),
            checkpoint=options.checkpoint,
            tokenizer=options.tokenizer,
            fields=options.fields or Fields(),
            domains=options.domains,
            max_samples=options.max_samples,
            max_val_samples=options.max_val_samples,
            config=config,
            projection=options.projection,
            device=own_device,
            eval_only=options.eval_only,
            ranks=ranks,
            progress=(options.progress or Silent()) if ranks.leads else Silent(),
        )
        if options.dry_run:
            return training.plan([str(options.tensorboard)] if options.tensorboard is not None else [])
        with Trackers.open(options.tensorboard, options.wandb, config, ranks) as trackers:
            return training.evaluate() if options.eval_only else training.run(trackers)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Training:
    """The parameters of :func:`train` on one rank."""

    data: Source
    val_set: Source | None
    store: str | Path | None
    name: str | None
    output_dir: Path
    checkpoint: str | Path | None
    tokenizer: TokenizerSource | None
    fields: Fields
    domains: tuple[str, ...]
    max_samples: int | None
    max_val_samples: int | None
    config: TrainConfig
    projection: ProjectionConfig | None
    device: str
    eval_only: bool
    ranks: Ranks
    progress: Progress

    def evaluate(self) -> TrainReport:
        """The val loss of the checkpoint."""
        begun = time.perf_counter()
        start = Start.find(self.checkpoint, self.tokenizer, self.data, self.progress)
        model = start.model(self.config, self.device, None, self.progress)
        val = self._val(self._tokenizer(start, model, None), longest_row(model, self.config.max_length))
        assert val is not None
        with autocast(self.config, self.device):
            totals = StepTotals(val=val.loss(model, self.ranks, self.progress))
        return totals.report(
            output_dir=str(self.output_dir),
            parameters=parameter_count(model),
            seconds=time.perf_counter() - begun,
        )

    def run(self, trackers: Trackers) -> TrainReport:
        """Train, in an output folder that no other training uses."""
        begun = time.perf_counter()
        self.ranks.led(self._refuse_unwritable)
        start = Start.find(self.checkpoint, self.tokenizer, self.data, self.progress)
        with self._output_dir(), saying_what_is_left(self.output_dir, self.ranks):
            return self._run(start, trackers, begun)

    def plan(self, log_folders: list[str]) -> TrainReport:
        """What :meth:`run` would do, which would write ``log_folders``, too. Writes nothing but tokens in a temporary
        folder.
        """
        begun = time.perf_counter()
        start = Start.find(self.checkpoint, self.tokenizer, self.data, self.progress)
        with tokens_aside() as folder:
            prepared = self._prepared(start, folder, record=False)
            plan = plan_of(prepared, str(self.data), self.output_dir, log_folders)
        return StepTotals().report(
            output_dir=str(self.output_dir),
            steps=prepared.inputs.steps,
            resumed_from=prepared.resumed.step,
            rows=len(prepared.inputs.rows),
            parameters=parameter_count(prepared.inputs.model),
            repeated_ids=prepared.manifest["corpus"]["repeated_ids"],
            seconds=time.perf_counter() - begun,
            plan=plan,
        )

    def _prepared(self, start: Start, tokens: Path, *, record: bool) -> Prepared:
        """All that comes before the first step; tokens of a corpus are in ``tokens``, or are made there."""
        newest = next(reversed(checkpoints(self.output_dir)), None)
        saved = None if newest is None else read_state(newest)
        inputs = self._inputs(start, newest, saved, tokens)
        model = inputs.model
        optimizer = make_optimizer(model, self.config.optimization)
        engine = scoring_engine(model, optimizer, self.config, self.projection) if self._scores else None
        stored = None if saved is None else saved.identity
        layout = training_layout(self.config, inputs, engine, self.ranks.count, stored)
        manifest = training_manifest(
            self.config,
            inputs,
            layout,
            engine=engine,
            checkpoint_interval=self._checkpoint_interval,
            source=self._source(start),
            stored=stored,
        )
        schedule = None
        if engine is not None and inputs.val is not None:
            schedule = ValSchedule(engine, inputs.val, self.config, self._checkpoint_interval, self.progress)
        resumed = self._resumed(saved, manifest, model, optimizer)
        plan = self._plan(manifest, layout, inputs.rows)
        trainer = Trainer(
            model=self._wrapped(model),
            optimizer=optimizer,
            rows=inputs.rows,
            order=inputs.order,
            config=self.config,
            ranks=self.ranks,
            device=self.device,
            steps=inputs.steps,
            session=ScoringSession(engine, plan if record else None, self.ranks, note=self.progress.note),
            val_schedule=schedule,
            scaler=make_scaler(self.config, self.device, resumed.scaler),
            chooser=Chooser.of(self.config, self.ranks, inputs.steps),
        )
        if schedule is not None:
            with trainer.autocast():
                schedule.examine(resumed.step)
        return Prepared(
            inputs=inputs, engine=engine, layout=layout, manifest=manifest, plan=plan, resumed=resumed, trainer=trainer
        )

    def _run(self, start: Start, trackers: Trackers, begun: float) -> TrainReport:
        prepared = self._prepared(start, self.output_dir, record=True)
        inputs, manifest, resumed, trainer = prepared.inputs, prepared.manifest, prepared.resumed, prepared.trainer
        self.ranks.led(lambda: prune(self.output_dir, self.config.keep_checkpoints))
        totals = self._train(trainer, resumed, manifest, inputs, trackers)
        run = trainer.session.run
        return totals.report(
            output_dir=str(self.output_dir),
            checkpoint=str(self.output_dir / f"checkpoint-{inputs.steps}"),
            store=None if self.store is None else str(self.store),
            run=None if run is None else run.name,
            steps=inputs.steps,
            resumed_from=resumed.step,
            rows=len(inputs.rows),
            parameters=parameter_count(inputs.model),
            repeated_ids=manifest["corpus"]["repeated_ids"],
            seconds=time.perf_counter() - begun,
        )

    def _rehearsed(self, trainer: Trainer, step: int) -> float:
        """Seconds that a step is expected to take."""
        with closing(self.progress.task("measuring a step", REHEARSALS, unit="rounds")) as task:
            return trainer.rehearse(step, task)

    def _train(
        self, trainer: Trainer, resumed: Resumed, manifest: Manifest, inputs: Inputs, trackers: Trackers
    ) -> StepTotals:
        """Every step that is left: made, scored, recorded, and saved where a checkpoint is due."""
        totals, val, steps, session = StepTotals(), inputs.val, inputs.steps, trainer.session
        with ExitStack() as stack:
            stack.enter_context(session)
            if session.run is not None and (problem := remember_corpus(session.run, inputs.rows.shards)):
                self.progress.note(problem)
            # Checkpoints are this run's own: a gap is one that the store could not take, not a sign of another run.
            session.restore(resumed.step, resumed.pending, "the checkpoint", gaps_are_known=True)
            trackers.summarize(inputs.rows, session.run)
            stack.enter_context(trainer.running())
            stopping = stack.enter_context(Stopping())
            left = steps - resumed.step
            expected = self._rehearsed(trainer, resumed.step) * left if left >= REHEARSED else None
            task = stack.enter_context(closing(self.progress.task("training", steps, resumed.step, "steps")))
            if expected is not None:
                task.expect(expected, "val losses and checkpoints")
            for step in range(resumed.step, steps):
                result, done, val_loss = trainer.step(step), step + 1, None
                if val is not None and (done % self.config.eval_interval == 0 or done == steps):
                    with trainer.autocast():
                        val_loss = val.loss(trainer.inner, self.ranks, self.progress)
                totals.add(result, val_loss)
                session.record(result.scored, result.shared(None if val_loss is None else val_loss.loss))
                trackers.step(result, val_loss)
                task.advance(1, result.tokens)
                task.say(totals.words())
                stop = stop_after(done, stopping, self.config, self.ranks, self._checkpoint_interval)
                if stop or done % self._checkpoint_interval == 0 or done == steps:
                    self._save(done, trainer, inputs.start.tokenizer, manifest)
                if done == steps:  # a signal that came while the last checkpoint was written
                    stop = self.ranks.highest(stopping.number)
                if stop:
                    raise saved_at(self.output_dir / f"checkpoint-{done}", stop, done, steps, self.ranks)
        if totals.val is None and val is not None:  # it was finished before
            with trainer.autocast():
                totals.val = val.loss(trainer.inner, self.ranks, self.progress)
        return totals

    def _inputs(self, start: Start, newest: Path | None, saved: SavedState | None, tokens: Path) -> Inputs:
        """Model, val set and rows, with notes on rows that cannot be used; the model of the checkpoint ``newest``."""
        model = start.model(self.config, self.device, newest, self.progress)
        max_length = longest_row(model, self.config.max_length)
        tokenizer = self._tokenizer(start, model, saved)
        val = self._val(tokenizer, max_length)
        shards = token_shards(
            self.data,
            start,
            tokens,
            fields=self.fields,
            max_samples=self.max_samples,
            max_length=max_length,
            tokenizer=tokenizer,
            ranks=self.ranks,
            progress=self.progress,
        )
        rows = TrainingRows.cut(shards, max_length, self.config.overlong, self.domains)
        rows.check(tokenizer)
        if len(rows.usable) < len(rows):
            self.progress.note(
                f"{len(rows) - len(rows.usable):,} of {len(rows):,} rows have no target and are left out"
            )
        config, count = self.config.optimization, self.ranks.count
        candidates = self.config.choosing.candidates
        if candidates is not None and candidates > len(rows.usable):
            raise UsageError(
                f"`candidates={candidates}` is more than the {len(rows.usable)} rows with a target; give fewer"
            )
        step_rows = self.config.drawn(count) * count
        order = Order(rows, seed=self.config.seed, step_rows=step_rows, apart=candidates is not None)
        return Inputs(
            start=start,
            model=model,
            rows=rows,
            domains=self.domains,
            val=val,
            order=order,
            steps=order.steps_per_epoch if config.max_steps is None else config.max_steps,
            max_length=max_length,
        )

    def _plan(self, manifest: Manifest, layout: RunLayout, rows: TrainingRows) -> RunPlan | None:
        if self.store is None:
            return None
        model = self.config.architecture or model_name(self.config.model_config or str(self.checkpoint))
        return RunPlan(
            store=self.store,
            name=self.name or safe_name(model, part_word(self.data)),
            layout=layout,
            manifest=manifest,
            rows=rows,
            on_store_error=self.config.on_store_error,
        )

    @property
    def _checkpoint_interval(self) -> int:
        return self.config.checkpoint_interval or self.config.eval_interval

    @property
    def _scores(self) -> bool:
        return self.config.scoring.method == "GradDotProd"

    def _refuse_unwritable(self) -> None:
        """StorageError for folders that must be written and cannot be."""
        check_writable(self.output_dir)
        if self.store is not None and self.config.on_store_error == "stop":
            check_writable(location(self.store) / "runs")

    @contextmanager
    def _output_dir(self) -> Iterator[None]:
        """Make the output folder and hold it against other trainings, on the rank that leads."""
        with ExitStack() as stack:

            def hold() -> None:
                with storage_errors(str(self.output_dir)):
                    self.output_dir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(self.output_dir, f"`output_dir={self.output_dir}`", "output_dir"))

            self.ranks.led(hold)
            yield

    def _tokenizer(self, start: Start, model: Any, saved: SavedState | None) -> Tokenizer:
        """The chat template writes the date of the tokens that are there, of the checkpoint ``saved``, or today's."""
        of_tokens = date_in(Path(str(self.data))) if is_shards(self.data) else date_in(self.output_dir / "tokens")
        of_checkpoint = None if saved is None else saved.identity["tokenizer"]["template_date"]
        # All ranks take the day of the first: midnight may come between them.
        day = torch.tensor(date.today().toordinal() if self.ranks.leads else 0, device=self.device)
        return Tokenizer(
            start.tokenizer,
            vocabulary=embedding_rows(model),
            note=self.progress.note,
            template_date=of_tokens or of_checkpoint or date.fromordinal(int(self.ranks.sum(day))).isoformat(),
            takes_ids=self.tokenizer is not None,
        )

    def _val(self, tokenizer: Tokenizer, max_length: int) -> ValSet | None:
        if self.val_set is None:
            return None
        return read_val(
            self.val_set,
            self.fields,
            tokenizer,
            max_length,
            max_samples=self.max_val_samples,
            seed=self.config.seed,
            progress=self.progress,
        )

    def _source(self, start: Start) -> dict[str, str | None]:
        return {
            "data": recorded(self.data),
            "val_set": None if self.val_set is None else recorded(self.val_set),
            "checkpoint": None if start.checkpoint is None else start.checkpoint.recorded,
            "output_dir": str(self.output_dir.resolve()),
        }

    def _resumed(
        self, saved: SavedState | None, manifest: Manifest, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Resumed:
        """Where training stands: at its beginning, or where the newest checkpoint left it."""
        if saved is None:
            return Resumed(step=0, pending={}, scaler={})
        refuse_other(saved, _identity(manifest))
        software = {name: manifest["software"][name] for name in saved.software}
        if software != saved.software:
            self.progress.note(
                f"going on with other software than wrote {saved.path.name} ({saved.software}; now {software}): the "
                "last bits of what follows may differ from an uninterrupted run"
            )
        return restore(saved, model, optimizer)

    def _wrapped(self, model: nn.Module) -> nn.Module:
        if self.ranks.count == 1:
            return model
        devices = [torch.device(self.device)] if torch.device(self.device).type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def _save(self, step: int, trainer: Trainer, tokenizer: Any, manifest: Manifest) -> None:
        """A checkpoint after ``step`` steps, by the rank that leads; the replicas must be the same."""
        model = trainer.inner
        refuse_drift(model, self.ranks)
        pending = trainer.session.pending()

        def save() -> None:
            save_state(
                self.output_dir,
                step=step,
                model=model,
                tokenizer=tokenizer,
                optimizer=trainer.optimizer,
                identity=_identity(manifest),
                pending=pending,
                scaler={} if trainer.scaler is None else {k: float(v) for k, v in trainer.scaler.state_dict().items()},
            )
            prune(self.output_dir, self.config.keep_checkpoints)

        self.ranks.led(save)


def _identity(manifest: Manifest) -> dict[str, Any]:
    """What a checkpoint and the training that goes on from it must agree on."""
    return {section: manifest[section] for section in IDENTITY}
