"""``ghoststore.train``: GPT-2 training with every sample scored live into a store."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ghoststore.checkpoint import (
    Checkpoint,
    find_checkpoint,
    find_tokenizer,
    fingerprint_tokenizer,
    load_model,
    load_tokenizer,
    max_positions,
    resolve_device,
)
from ghoststore.corpus import Fields, absolute, open_corpus
from ghoststore.corpus.shards import TokenShards
from ghoststore.errors import CaptureError, MismatchError, UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.software import versions_of
from ghoststore.store import Store
from ghoststore.store.layout import check_name, safe_name
from ghoststore.store.manifest import Manifest
from ghoststore.store.run import Run, RunLayout, create_run
from indexer.build import corpus_name
from indexer.dotprod import GradDotProdEngine
from indexer.projection import Projection, ProjectionConfig, ProjectionPlan
from indexer.selection import select_blocks
from indexer.tokenize import tokenize
from indexer.training.architectures import architecture, new_model
from indexer.training.config import TrainConfig
from indexer.training.data import Order, TrainingRows
from indexer.training.loop import Scorer, StepResult, Trainer, make_optimizer, run_steps
from indexer.training.ranks import Ranks, joined
from indexer.training.score_log import ScoreLog
from indexer.training.state import Resumed, checkpoints, load_state, prune, save_state
from indexer.training.trackers import Trackers
from indexer.training.validation import ValLoss, ValSet

DEFAULT_MAX_LENGTH = 1024
SHAPE = ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size", "resid_pdrop", "embd_pdrop", "attn_pdrop")
"""Entries of a GPT-2's configuration that the manifest keeps."""
IDENTITY = ("model", "tokenizer", "corpus", "val", "training", "scoring", "storage")
"""Sections of the manifest that a checkpoint must agree with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What a training run did. Losses are nats a token."""

    output_dir: str
    checkpoint: str | None
    """The last checkpoint; None after ``eval_only``."""
    store: str | None
    run: str | None
    steps: int
    resumed_from: int
    """Steps that were finished before this call."""
    rows: int
    """Training rows: samples, or windows of long ones."""
    parameters: int
    tokens: int
    """Tokens of the steps of this call, padding aside."""
    train_loss: float | None
    """Mean of the last (at most 20) steps of this call."""
    val_loss: float | None
    val_loss_by_domain: dict[str, float]
    tokens_per_second: float | None
    score_share: float | None
    """Share of the time of the steps that scoring took (host time)."""
    negative_share: float | None
    """Share of this call's scores of the first rank that are negative."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore train --json`` prints."""
        return asdict(self)


class _Start(NamedTuple):
    """Where the weights and the tokenizer come from."""

    checkpoint: Checkpoint | None
    tokenizer: Any
    tokenizer_folder: Path


@dataclass(slots=True)
class _Watch:
    """What a call has seen of its steps."""

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    score_seconds: float = 0.0
    negative: int = 0
    scored: int = 0
    val: ValLoss | None = None

    def see(self, result: StepResult) -> None:
        """Count one step."""
        self.losses = [*self.losses[-19:], result.train_loss]
        self.tokens += result.tokens
        self.seconds += result.seconds
        self.score_seconds += result.score_seconds
        if "score" in result.own:
            finite = result.own["score"][np.isfinite(result.own["score"])]
            self.negative += int((finite < 0).sum())
            self.scored += len(finite)


def train(
    *,
    data: str | Path,
    output_dir: str | Path,
    val_set: str | Path | None = None,
    store: str | Path | None = None,
    name: str | None = None,
    checkpoint: str | Path | None = None,
    tokenizer: str | Path | None = None,
    fields: Fields | None = None,
    domains: tuple[str, ...] = (),
    max_samples: int | None = None,
    max_val_samples: int | None = None,
    config: TrainConfig | None = None,
    projection: ProjectionConfig | None = None,
    device: str = "auto",
    eval_only: bool = False,
    tensorboard: str | Path | None = None,
    wandb: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> TrainReport:
    """Train a GPT-2 on ``data`` and score each sample of each step against ``val_set``, live, into ``store``.

    Parameters have the names of the command's options; ``options`` are fields of :class:`TrainConfig` and its parts
    (``batch_size=4``), or give ``config``. ``data`` and ``val_set`` are token shards or any form of corpus; a corpus
    is tokenized into ``output_dir/tokens`` first. The model is a new one of ``architecture``, or goes on from
    ``checkpoint``. Checkpoints in transformers' format go to ``output_dir``, steps and scores to the run ``name``.
    Under ``torchrun`` every process is a rank: they see different samples, and the first writes.

    Run again, it goes on from the newest checkpoint: data order, random state, weights and scores are those of a run
    that was never interrupted (on the same machine and software).

    Raises UsageError, CorpusError, CheckpointError or LayerError for inputs that cannot be used, MismatchError if
    what is there is of another run, BusyError if another process writes it, StorageError if a disk refuses.
    """
    if config is not None and options:
        raise UsageError(f"give config or single options, not both: {sorted(options)}")
    config = TrainConfig.of(**options) if config is None else config
    with joined(resolve_device(device)) as (ranks, own_device):
        job = _Job(
            data=str(data), val_set=None if val_set is None else str(val_set), store=store, name=name,
            output_dir=Path(output_dir), checkpoint=checkpoint, tokenizer=tokenizer, fields=fields or Fields(),
            domains=domains, max_samples=max_samples, max_val_samples=max_val_samples, config=config,
            projection=projection, device=own_device, eval_only=eval_only, ranks=ranks,
            progress=(progress or Silent()) if ranks.leads else Silent(),
        )  # fmt: skip
        with Trackers.open(tensorboard, wandb, config, ranks.leads) as trackers:
            return job.run(trackers)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """The parameters of :func:`train` on one rank."""

    data: str
    val_set: str | None
    store: str | Path | None
    name: str | None
    output_dir: Path
    checkpoint: str | Path | None
    tokenizer: str | Path | None
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

    def run(self, trackers: Trackers) -> TrainReport:
        """All of it."""
        begun = time.perf_counter()
        self._refuse_usage()
        start = self._start()
        resume_from = None if self.eval_only else next(reversed(checkpoints(self.output_dir)), None)
        model = self._model(start, resume_from)
        max_length = self._max_length(model)
        val = self._read_val(start.tokenizer, max_length)
        if self.eval_only:
            assert val is not None
            return self._evaluate_only(model, val, begun)
        shards = self._tokenized(start)
        rows = TrainingRows.cut(shards, max_length, self.config.overlong, self.domains)
        asked = self.config.optimization
        order = Order(
            rows, seed=self.config.seed,
            step_rows=asked.batch_size * asked.gradient_accumulation_steps * self.ranks.count,
        )  # fmt: skip
        steps = order.steps_per_epoch if asked.max_steps is None else asked.max_steps
        optimizer = make_optimizer(model, asked)
        scorer = self._scorer(model, optimizer, val)
        manifest = self._manifest(start, model, shards, rows, val, scorer, steps)
        resumed = Resumed(step=0, pending={}, scaler={})
        identity = {section: manifest[section] for section in IDENTITY}
        if resume_from is not None:
            resumed = load_state(resume_from, model, optimizer, identity)
        scaler = self._scaler(resumed)
        trainer = Trainer(
            model=self._wrapped(model), optimizer=optimizer, rows=rows, order=order, config=self.config,
            ranks=self.ranks, device=self.device, steps=steps, scorer=scorer, scaler=scaler,
        )  # fmt: skip
        run = self._open_run(manifest, rows)
        log = ScoreLog(
            run, self.ranks, interval=self.config.dot_prod_save_interval, stored=self.store is not None,
            on_error=self.config.on_store_error, note=self.progress.note,
        )  # fmt: skip
        seen = _Watch()
        with ExitStack() as stack:
            stack.enter_context(log)
            log.restore(resumed.step, resumed.pending)
            task = stack.enter_context(closing(self.progress.task("training", steps, resumed.step, "steps")))

            def on_step(result: StepResult) -> None:
                done = result.step + 1
                val_loss = None
                if val is not None and (done % self.config.eval_interval == 0 or done == steps):
                    with trainer.autocast():
                        val_loss = seen.val = val.loss(model, self.ranks)
                seen.see(result)
                log.add(result.step, result.own, _shared(result, val_loss))
                trackers.step(result, val_loss)
                task.advance(1, result.tokens)
                task.say(_words(result, seen))
                if done % self._checkpoint_interval == 0 or done == steps:
                    self._save(done, trainer, start.tokenizer, identity, log)

            run_steps(trainer, resumed.step, on_step=on_step)
        if seen.val is None and val is not None:
            with trainer.autocast():
                seen.val = val.loss(model, self.ranks)
        return TrainReport(
            output_dir=str(self.output_dir), checkpoint=str(self.output_dir / f"checkpoint-{steps}"),
            store=None if self.store is None else str(self.store), run=None if run is None else run.name, steps=steps,
            resumed_from=resumed.step, rows=len(rows), parameters=_count(model), tokens=seen.tokens,
            train_loss=float(np.mean(seen.losses)) if seen.losses else None,
            val_loss=None if seen.val is None else seen.val.loss,
            val_loss_by_domain={} if seen.val is None else seen.val.by_domain,
            tokens_per_second=seen.tokens / seen.seconds if seen.seconds else None,
            score_share=seen.score_seconds / seen.seconds if seen.seconds else None,
            negative_share=seen.negative / seen.scored if seen.scored else None,
            seconds=time.perf_counter() - begun,
        )  # fmt: skip

    @property
    def _checkpoint_interval(self) -> int:
        return self.config.checkpoint_interval or self.config.eval_interval

    @property
    def _scores(self) -> bool:
        return self.config.scoring.method == "GradDotProd"

    def _refuse_usage(self) -> None:
        """UsageError for options that do not go together."""
        if (self.config.architecture is None) == (self.checkpoint is None):
            raise UsageError("give --architecture to train from scratch, or --checkpoint to go on from one")
        if self.eval_only and (self.val_set is None or self.checkpoint is None):
            raise UsageError("--eval-only needs --checkpoint and --val-set")
        if self.eval_only:
            return
        if self._scores and (self.store is None or self.val_set is None):
            raise UsageError("--method GradDotProd needs --val-set and --store; --method Regular trains without scores")
        if self.projection is not None and self.config.scoring.score != "sketched":
            raise UsageError("projection options belong to --score sketched")
        if self.checkpoint is not None and self.config.dropout:
            raise UsageError("--dropout belongs to --architecture: a checkpoint has its own")
        if self.store is not None:
            Store.refuse_others(Path(self.store))
        if self.data == "-" and self.ranks.count > 1:
            raise UsageError("--data - cannot be read by several ranks; tokenize it first")

    def _start(self) -> _Start:
        """Checkpoint and tokenizer: those of the checkpoint, the folder given, or the token shards' own."""
        found = None if self.checkpoint is None else find_checkpoint(self.checkpoint)
        if self.tokenizer is not None:
            folder = find_tokenizer(self.tokenizer)
        elif found is not None:
            folder = found.folder
        elif (Path(self.data) / "shards.json").is_file():
            folder = Path(self.data) / "tokenizer"
        else:
            raise UsageError("give --tokenizer: a new model has none, and the data are not tokenized yet")
        return _Start(found, load_tokenizer(folder), folder)

    def _model(self, start: _Start, resume_from: Path | None) -> Any:
        """The model, in its parameters' dtype, on this rank's device; of the newest checkpoint if there is one."""
        source = find_checkpoint(resume_from) if resume_from is not None else start.checkpoint
        if source is not None:
            model = load_model(source, dtype=self.config.model_dtype, device=self.device)
        else:
            assert self.config.architecture is not None
            config = architecture(self.config.architecture, start.tokenizer, dropout=self.config.dropout)
            model = new_model(config, seed=self.config.seed)
            model = model.to(device=self.device, dtype=getattr(torch, self.config.model_dtype))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model.loss_type = "ForCausalLM"
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def _max_length(self, model: Any) -> int:
        limit = max_positions(model)
        asked = self.config.max_length
        if asked is None:
            return min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
        if limit is not None and asked > limit:
            raise UsageError(f"--max-length {asked} is more than the {limit} positions of this model")
        return asked

    def _read_val(self, tokenizer: Any, max_length: int) -> ValSet | None:
        if self.val_set is None:
            return None
        with open_corpus(self.val_set, self.fields) as corpus:
            val = ValSet.read(corpus, tokenizer, max_length, max_samples=self.max_val_samples, seed=self.config.seed)
        if val.left_out:
            shown = ", ".join(f"{count} {status}" for status, count in sorted(val.left_out.items()))
            self.progress.note(f"val rows left out: {shown}; {len(val.rows)} are used")
        return val

    def _tokenized(self, start: _Start) -> TokenShards:
        """The token shards of the corpus, made if it is no such folder. Ranks wait for the first."""
        folder = Path(self.data)
        if not (folder / "shards.json").is_file():
            folder = self.output_dir / "tokens"
            if self.ranks.leads:
                tokenize(
                    data=self.data, tokenizer=start.tokenizer_folder, out=folder, fields=self.fields,
                    max_samples=self.max_samples, progress=self.progress,
                )  # fmt: skip
            self.ranks.wait()
        elif self.max_samples is not None:
            raise UsageError("--max-samples belongs to a corpus; token shards are taken whole")
        shards = TokenShards.open(folder)
        found = fingerprint_tokenizer(start.tokenizer)
        if shards.tokenizer_fingerprint != found:
            raise MismatchError(
                f"the tokens in {folder} are of another tokenizer than that in {start.tokenizer_folder}: stored "
                f"{shards.tokenizer_fingerprint}, found {found}"
            )
        return shards

    def _scorer(self, model: nn.Module, optimizer: torch.optim.Optimizer, val: ValSet | None) -> Scorer | None:
        if not self._scores:
            return None
        assert val is not None
        scoring = self.config.scoring
        drawn = None
        if scoring.score == "sketched":
            asked = self.projection or ProjectionConfig()
            selection = select_blocks(
                model, asked.layers, asked.exclude_layers, include_embeddings=asked.include_embeddings
            )
            drawn = Projection(ProjectionPlan.of(selection, asked))
        engine = GradDotProdEngine(
            model, None, optimizer=optimizer, val_refresh_interval=scoring.val_refresh_interval,
            exclude_layers=scoring.exclude_layers, route=scoring.route, projection=drawn,
        )  # fmt: skip
        if scoring.per_layer and not engine.method.blocks:
            raise UsageError("--per-layer: a global sketch has no scores by layer; add --proj-compress none")
        return Scorer(
            engine, val, scoring, checkpoint_interval=self._checkpoint_interval,
            groups=val.domains if scoring.val_groups else [],
            blocks=list(engine.method.blocks) if scoring.per_layer else [],
        )  # fmt: skip

    def _manifest(
        self,
        start: _Start,
        model: Any,
        shards: TokenShards,
        rows: TrainingRows,
        val: ValSet | None,
        scorer: Scorer | None,
        steps: int,
    ) -> Manifest:
        asked, scoring = self.config.optimization, self.config.scoring
        layout = RunLayout(
            steps=steps, ranks=self.ranks.count, batch=asked.batch_size * asked.gradient_accumulation_steps,
            span_steps=self.config.dot_prod_save_interval, rows=len(rows),
            groups=tuple(scorer.groups) if scorer else (), blocks=tuple(scorer.blocks) if scorer else (),
        )  # fmt: skip
        method = scorer.engine.method if scorer else None
        return {
            "model": {
                "architecture": type(model).__name__,
                "name": self.config.architecture,
                "config": {key: getattr(model.config, key) for key in SHAPE if hasattr(model.config, key)},
                "checkpoint": None if start.checkpoint is None else start.checkpoint.fingerprint(),
                "parameters": _count(model),
            },
            "tokenizer": {"fingerprint": shards.tokenizer_fingerprint},
            "corpus": {
                "fingerprint": shards.corpus_fingerprint,
                "samples": shards.samples,
                "domains": shards.domains or None,
                "only_domains": sorted(self.domains) or None,
                "fields": shards.source["fields"],
            },
            "val": {
                "fingerprint": None if val is None else val.fingerprint,
                "rows": 0 if val is None else len(val.rows),
                "domains": [] if val is None else val.domains,
            },
            "training": {
                **asdict(asked),
                "max_steps": steps,
                "seed": self.config.seed,
                "dropout": self.config.dropout,
                "max_length": self._max_length(model),
                "overlong": self.config.overlong,
                "model_dtype": self.config.model_dtype,
                "train_dtype": self.config.arithmetic,
                "eval_interval": self.config.eval_interval,
                "loss": "next-token cross-entropy, mean over all targets of a step",
            },
            "scoring": {
                **asdict(scoring),
                "exclude_layers": list(scoring.exclude_layers),
                "checkpoint_interval": self._checkpoint_interval,
                "projection": method.projection.hash if method is not None and hasattr(method, "projection") else None,
            },
            "storage": layout.to_json(),
            "source": {
                "data": absolute(self.data),
                "val_set": None if self.val_set is None else absolute(self.val_set),
                "corpus": shards.source["data"],
                "form": shards.source["form"],
                "checkpoint": None if start.checkpoint is None else str(start.checkpoint.folder.resolve()),
                "output_dir": str(self.output_dir.resolve()),
            },
            "software": versions_of("ghoststore", "torch", "transformers", "tokenizers", "numpy", "zarr"),
            "compute": {
                "device": torch.device(self.device).type,
                "attn_implementation": getattr(model.config, "_attn_implementation", None),
                "threads": torch.get_num_threads(),
                "gradient_checkpointing": self.config.gradient_checkpointing,
            },
        }  # fmt: skip

    def _open_run(self, manifest: Manifest, rows: TrainingRows) -> Run | None:
        """The run, new or there already, on the rank that leads; the others wait until it is there."""
        run = None
        if self.store is not None and self.ranks.leads:
            name = self.name or safe_name(
                self.config.architecture or Path(str(self.checkpoint)).resolve().name, corpus_name(self.data)
            )
            opened = Store.create(self.store)
            run = create_run(opened.run_path(check_name(name)), manifest, rows.table())
        self.ranks.wait()
        return run

    def _scaler(self, resumed: Resumed) -> torch.amp.GradScaler | None:
        if self.config.arithmetic != "float16":
            return None
        scaler = torch.amp.GradScaler(torch.device(self.device).type)
        if resumed.scaler:
            counts = {name: int(resumed.scaler[name]) for name in ("growth_interval", "_growth_tracker")}
            scaler.load_state_dict({**scaler.state_dict(), **resumed.scaler, **counts})
        return scaler

    def _wrapped(self, model: nn.Module) -> nn.Module:
        if self.ranks.count == 1:
            return model
        on = [torch.device(self.device)] if torch.device(self.device).type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=on)

    def _save(self, step: int, trainer: Trainer, tokenizer: Any, identity: Mapping[str, Any], log: ScoreLog) -> None:
        """A checkpoint after ``step`` steps, by the rank that leads; the replicas must be the same."""
        model = trainer.scorer.engine.model if trainer.scorer else _inner(trainer.model)
        self._refuse_drift(model)
        pending = log.pending()
        if self.ranks.leads:
            save_state(
                self.output_dir, step=step, model=model, tokenizer=tokenizer, optimizer=trainer.optimizer,
                identity=identity, pending=pending,
                scaler={} if trainer.scaler is None else {k: float(v) for k, v in trainer.scaler.state_dict().items()},
            )  # fmt: skip
            prune(self.output_dir, self.config.keep_checkpoints)
        self.ranks.wait()

    def _refuse_drift(self, model: nn.Module) -> None:
        """CaptureError unless every rank has the same weights, bit for bit."""
        if self.ranks.count == 1:
            return
        sums = torch.stack([p.detach().contiguous().view(torch.uint8).long().sum() for p in model.parameters()])
        every = self.ranks.stacked(sums)
        if not bool((every == every[0]).all()):
            place = int((every != every[0]).any(0).nonzero()[0])
            name = list(dict(model.named_parameters()))[place]
            raise CaptureError(f"the ranks' weights have drifted apart, first in {name!r}: nothing was saved")

    def _evaluate_only(self, model: Any, val: ValSet, begun: float) -> TrainReport:
        found = val.loss(model, self.ranks)
        return TrainReport(
            output_dir=str(self.output_dir), checkpoint=None, store=None, run=None, steps=0, resumed_from=0, rows=0,
            parameters=_count(model), tokens=0, train_loss=None, val_loss=found.loss,
            val_loss_by_domain=found.by_domain, tokens_per_second=None, score_share=None, negative_share=None,
            seconds=time.perf_counter() - begun,
        )  # fmt: skip


def _inner(model: nn.Module) -> nn.Module:
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    assert isinstance(inner, nn.Module)
    return inner


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _shared(result: StepResult, val_loss: ValLoss | None) -> dict[str, float]:
    """Numbers of a step that are the same for every rank."""
    found = {
        "learning_rate": result.learning_rate,
        "train_loss": result.train_loss,
        "grad_norm": result.grad_norm,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "score_seconds": result.score_seconds,
    }
    return found if val_loss is None else {**found, "val_loss": val_loss.loss}


def _words(result: StepResult, seen: _Watch) -> str:
    """What stands beside the progress bar."""
    words = f"loss {np.mean(seen.losses):.3f}"
    if seen.val is not None:
        words += f", val {seen.val.loss:.3f}"
    if seen.scored:
        words += f", scoring {seen.score_seconds / seen.seconds:.0%}"
    return words
