"""GhostEngineManager: the engines in a training loop of one's own, behind one set of calls whatever the method.

Legend: B samples of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import UsageError
from indexer.dotprod import GradDotProdEngine, Scores
from indexer.dotprod.engine import ValLosses
from indexer.projection import ProjectionConfig
from indexer.recording import Recorder, RunShape, Samples, open_run, places_of, ranks_here
from indexer.training.config import OnStoreError
from indexer.training.ranks import Ranks

Method = Literal["GradDotProd", "GradProjLora", "Regular"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GhostConfig:
    """What :class:`GhostEngineManager` is asked to do. Any object or mapping with fields of these names will do."""

    method: Method = "GradDotProd"
    """GradDotProd: exact scores against the val data. GradProjLora: each sample's projected gradient (and, with val
    data, its sketched score). Regular: nothing."""
    store: str | Path | None = None
    """None: scores are in ``last_scores`` alone."""
    name: str = "run"
    max_steps: int | None = None
    batch_size: int | None = None
    """Samples of one rank's micro-batch; this, max_steps and samples are needed with a store."""
    gradient_accumulation_steps: int = 1
    samples: int | Sequence[str] | None = None
    """Ids of the training samples, or how many there are; ``batch_idx`` are places among them."""
    domains: Sequence[str | None] | None = None
    dot_prod_save_interval: int = 10
    """Steps that are committed to the store together."""
    val_refresh_interval: int = 1
    per_layer: bool = False
    exclude_layers: tuple[str, ...] = ()
    proj_layers: tuple[str, ...] | str = ("mlp", "attn")
    proj_rank_total: int | Literal["full"] | None = None
    proj_rank_min: int = 1
    proj_compress: int | Literal["auto", "none"] = "auto"
    proj_kind: str = "gaussian"
    proj_row_orthonormal: bool = False
    proj_seed: int = 0
    include_embeddings: bool = False
    on_store_error: OnStoreError = "stop"

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise UsageError(f"method {self.method!r} is unknown; known: {', '.join(get_args(Method))}")
        if self.dot_prod_save_interval < 1:
            raise UsageError(f"dot_prod_save_interval must be at least 1, not {self.dot_prod_save_interval}")
        if self.store is not None and self.method != "Regular":
            lacking = [name for name in ("max_steps", "batch_size", "samples") if getattr(self, name) is None]
            if lacking:
                raise UsageError(f"with a store the configuration needs {', '.join(lacking)}")

    @classmethod
    def of(cls, config: Any) -> GhostConfig:
        """From ``config``, an object or a mapping: the fields it has, the defaults for others."""
        if isinstance(config, cls):
            return config
        values = config if isinstance(config, Mapping) else vars(config)
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def projection(self) -> ProjectionConfig:
        """The projection of GradProjLora."""
        layers = self.proj_layers
        return ProjectionConfig(
            layers=tuple(piece.strip() for piece in layers.split(",")) if isinstance(layers, str) else tuple(layers),
            exclude_layers=self.exclude_layers, include_embeddings=self.include_embeddings,
            rank_total=self.proj_rank_total, rank_min=self.proj_rank_min, seed=self.proj_seed,
            kind="orthonormal" if self.proj_row_orthonormal else self.proj_kind, compress=self.proj_compress,
        )  # fmt: skip


class GhostEngineManager:
    """The reference loop::

        manager = GhostEngineManager(config, model, optimizer, val_data=(X_val, Y_val))
        for iteration in range(max_steps):
            X, Y, batch_idx = get_batch()  # batch_idx: the place of each sample in the training set
            manager.attach_train_batch(X, Y, iteration, batch_idx)
            X_forward, Y_forward = manager.prepare_forward_input(X, Y)
            loss = model(input_ids=X_forward, labels=Y_forward).loss
            loss.backward()
            manager.prepare_gradients()
            optimizer.step()
            manager.aggregate_and_log()
            manager.clear_gradients()
            optimizer.zero_grad(set_to_none=True)
            if manager.should_save_metrics(iteration):
                manager.save_metrics(iteration)
        manager.cleanup()

    Val data are never joined to the batch: ``prepare_forward_input`` gives back what it got, after the val pass.
    The loss of a model that returns one (``.loss``, the mean over targets) is found by itself; any other loop says
    what its loss is with :meth:`watch`. With accumulation, the calls up to ``prepare_gradients`` come once a
    micro-batch, those from ``optimizer.step`` on once a step. With ``method="Regular"`` every call does nothing.

    ``ddp_info`` is a mapping with ``rank`` and ``world_size``; by default that of torch.distributed. ``val_losses``
    is as in :class:`GradDotProdEngine`. Raises what the engine raises; UsageError for calls out of order.
    """

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        val_data: Any = None,
        ddp_info: Mapping[str, Any] | None = None,
        *,
        val_losses: ValLosses | None = None,
    ) -> None:
        self.config = GhostConfig.of(config)
        self.model = model
        self.optimizer = optimizer
        self.ranks = ranks_here() if ddp_info is None else _ranks_of(ddp_info)
        self.last_scores: list[Scores] = []
        """Of the micro-batches of the newest finished step."""
        self.engine: GradDotProdEngine | None = None
        self._stack = ExitStack()
        self._hook: RemovableHandle | None = None
        self._recorder: Recorder | None = None
        self._open: tuple[int, NDArray[np.int64] | None, Tensor | None] | None = None
        self._watched = self._collected = False
        self._scores: list[Scores] = []
        self._losses: list[float] = []
        self._eta = float("nan")
        if self.config.method == "Regular":
            return
        if self.config.method == "GradDotProd" and val_data is None:
            raise UsageError("method GradDotProd scores against a val set: give val_data")
        sketched = self.config.method == "GradProjLora"
        self.engine = GradDotProdEngine(
            model, val_data, val_losses=val_losses, optimizer=optimizer,
            val_refresh_interval=self.config.val_refresh_interval,
            exclude_layers=() if sketched else self.config.exclude_layers,
            projection=self.config.projection() if sketched else None,
        )  # fmt: skip
        self._samples = None if self.config.samples is None else Samples.of(self.config.samples, self.config.domains)
        self._recorder = self._make_recorder()
        self._attach()

    def _make_recorder(self) -> Recorder:
        config, engine = self.config, self.engine
        assert engine is not None
        batch = (config.batch_size or 1) * config.gradient_accumulation_steps
        shape = RunShape(
            steps=config.max_steps or 1, batch=batch, save_interval=config.dot_prod_save_interval,
            per_layer=config.per_layer,
        )  # fmt: skip
        run = None
        if config.store is not None and self.ranks.leads:
            assert self._samples is not None
            settings = {"val_refresh_interval": config.val_refresh_interval, "method": config.method}
            run = open_run(config.store, config.name, shape, self._samples, engine, self.ranks, settings)
        self.ranks.wait()
        stored = config.store is not None
        if not stored:
            shape = replace(shape, batch=1 << 31)
        recorder = Recorder(run, self.ranks, shape, stored=stored, on_store_error=config.on_store_error)
        self._stack.enter_context(recorder.log)
        return recorder

    def is_active(self) -> bool:
        """Whether there is an engine."""
        return self.engine is not None

    def get_method(self) -> str:
        """The method of the configuration."""
        return self.config.method

    # Once a micro-batch.

    def attach_train_batch(self, X_train: Any, Y_train: Any, iteration: int, batch_idx: Any = None) -> None:
        """The batch that comes next: ``iteration`` is its optimizer step (from 0), ``batch_idx`` (B,) the place of
        each sample in the training set (needed with a store).
        """
        if self.engine is None:
            return
        if self._open is not None and not self._collected:
            raise UsageError("the last batch is still open; call prepare_gradients() after its backward pass")
        if self._open is not None and self._open[0] != iteration:
            raise UsageError(
                f"a batch of step {iteration} comes while step {self._open[0]} is open; call aggregate_and_log() after "
                "optimizer.step()"
            )
        rows = None
        if batch_idx is not None and self._samples is not None:
            rows = places_of(batch_idx, len(X_train), self._samples)
        elif self.config.store is not None:
            raise UsageError("attach_train_batch needs batch_idx: the place of each sample in the training set")
        self._open = (iteration, rows, Y_train if isinstance(Y_train, Tensor) else None)
        self._watched = self._collected = False

    def prepare_forward_input(self, X_train: Any, Y_train: Any) -> tuple[Any, Any]:
        """Open the engine for the batch (the val gradient is refreshed if it is due); gives back what it got."""
        if self.engine is not None:
            if self._open is None:
                raise UsageError("call attach_train_batch() before prepare_forward_input()")
            first = next(iter(X_train.values())) if isinstance(X_train, Mapping) else X_train
            self.engine.prepare(len(first), tokens=first.numel())
        return X_train, Y_train

    def watch(self, loss: Tensor, *, weights: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Say what the training loss is of, see :meth:`GradDotProdEngine.watch`. For models that return no loss."""
        if self.engine is not None:
            self.engine.watch(loss, weights=weights, labels=labels)
            self._watched = True
            self._losses.append(float(loss.detach()))

    def prepare_gradients(self) -> None:
        """After the backward pass: take the batch's scores. The gradients are in ``.grad`` already."""
        if self.engine is None or self._recorder is None:
            return
        if self._open is None or self._collected:
            raise UsageError("call attach_train_batch() before the forward pass")
        if not self._watched:
            raise UsageError(
                f"{type(self.model).__name__} returned no .loss: call manager.watch(loss) between the forward and the "
                "backward pass"
            )
        scores = self.engine.collect()
        self._collected = True
        self._scores.append(scores)
        _, rows, _ = self._open
        if rows is not None:
            self._recorder.add(rows, scores)
        self._eta = float(self.optimizer.param_groups[0]["lr"])

    # Once a step.

    def aggregate_and_log(self) -> None:
        """After ``optimizer.step()``: the step's scores are complete and go to the store's next commit."""
        if self.engine is None or self._recorder is None:
            return
        if self._open is None or not self._collected:
            raise UsageError("no scored batch: call prepare_gradients() after the backward pass")
        iteration, rows, _ = self._open
        self.last_scores, self._scores = self._scores, []
        if rows is not None:
            shared = {
                "learning_rate": self._eta,
                "train_loss": float(np.mean(self._losses)),
                "score_seconds": sum(scores.seconds for scores in self.last_scores),
            }
            self._recorder.finish(iteration, shared)
        self._losses = []
        self._open = None

    def clear_gradients(self) -> None:
        """Forget what is open: after a finished step nothing, after an error its batch."""
        if self.engine is not None and self._recorder is not None:
            self.engine.discard()
            self._recorder.drop()
            self._open, self._scores, self._losses = None, [], []

    def should_save_metrics(self, iteration: int) -> bool:
        """Whether a save interval ends with step ``iteration`` (from 0)."""
        return self.engine is not None and (iteration + 1) % self.config.dot_prod_save_interval == 0

    def save_metrics(self, iteration: int) -> None:
        """Hand what was logged up to step ``iteration`` to the store. Nothing between two calls is dropped."""
        if self._recorder is not None:
            self._recorder.log.save()

    # Around evaluation, and at the end.

    def detach_for_evaluation(self) -> None:
        """Take the engine off the model."""
        if self.engine is not None and self.engine.attached:
            self.engine.detach()
            if self._hook is not None:
                self._hook.remove()

    def reattach_after_evaluation(self) -> None:
        """Put it back; the val gradient is kept."""
        if self.engine is not None and not self.engine.attached:
            self._attach()

    def cleanup(self) -> None:
        """Commit what is complete and take the engine off. The manager cannot be used after it."""
        self.detach_for_evaluation()
        self._stack.close()

    def __enter__(self) -> GhostEngineManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach_for_evaluation()
        self._stack.__exit__(kind, error, trace)

    def _attach(self) -> None:
        assert self.engine is not None
        self.engine.attach()
        self._hook = self.engine.model.register_forward_hook(self._found_loss)

    def _found_loss(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A model of transformers returns the mean over targets: no call of watch() is needed."""
        loss = getattr(output, "loss", None)
        if self.engine is None or not self.engine.training_batch_open or not isinstance(loss, Tensor):
            return
        if not loss.requires_grad or self._open is None or self._watched:
            return
        labels = self._open[2]
        self.watch(loss, labels=labels)


def _ranks_of(info: Mapping[str, Any]) -> Ranks:
    for rank, count in (("rank", "world_size"), ("ddp_rank", "ddp_world_size")):
        if rank in info and count in info:
            return Ranks(int(info[rank]), int(info[count]))
    if not info.get("ddp", True):
        return Ranks()
    raise UsageError(f"ddp_info needs rank and world_size; it has {sorted(info)}")
