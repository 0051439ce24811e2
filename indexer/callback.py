"""GhostStoreCallback: training-time scores for transformers' Trainer, without changing its loop.

Legend: B samples of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ghoststore.errors import CaptureError, UsageError
from ghoststore.store.disk import storage_errors
from indexer.dotprod import GradDotProdEngine, target_counts
from indexer.dotprod.exact import Route
from indexer.projection import ProjectionConfig
from indexer.recording import Recorder, RunShape, Samples, open_run, places_of, ranks_here
from indexer.training.config import OnStoreError

PENDING = "ghoststore_pending.safetensors"
"""In a Trainer's checkpoint: the steps that the store did not have yet."""


class GhostStoreCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """``Trainer(…, callbacks=[GhostStoreCallback(store="./store", val_data=batches, samples=len(dataset))])``.

    Every training batch must say which samples it holds: give the dataset an integer column ``sample`` with each
    sample's place (``dataset.add_column("sample", range(len(dataset)))``), keep it
    (``TrainingArguments(remove_unused_columns=False)``), and use a collator that passes it on, as transformers' own
    do. The callback takes it out again before the model sees it.

    ``val_data`` is a batch or a list of batches (mappings with input_ids, labels, maybe attention_mask);
    ``samples`` the ids of the training samples, or how many there are. The other parameters are those of
    :class:`GradDotProdEngine` and of ``ghoststore train``. The run is called ``name``; training that resumes from a
    checkpoint goes on with it. The training step stays what it is, bit for bit.

    Raises UsageError for batches without ``sample`` and models that return no loss; what the engine raises.
    """

    def __init__(
        self,
        *,
        store: str | Path,
        val_data: Any,
        samples: int | Sequence[str],
        domains: Sequence[str | None] | None = None,
        name: str = "trainer",
        sample_field: str = "sample",
        dot_prod_save_interval: int = 10,
        val_refresh_interval: int = 1,
        per_layer: bool = False,
        exclude_layers: Sequence[str] = (),
        route: Route = "auto",
        projection: ProjectionConfig | None = None,
        on_store_error: OnStoreError = "stop",
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._store, self._name = store, name
        self._val_data = val_data
        self._samples = Samples.of(samples, domains)
        self._field = sample_field
        self._interval = dot_prod_save_interval
        self._engine_options = {
            "val_refresh_interval": val_refresh_interval, "exclude_layers": tuple(exclude_layers), "route": route,
            "projection": projection,
        }  # fmt: skip
        self._per_layer = per_layer
        self._on_store_error: OnStoreError = on_store_error
        self._note = note
        self.engine: GradDotProdEngine | None = None
        """The engine, while training."""
        self._recorder: Recorder | None = None
        self._stack = ExitStack()
        self._handles: list[RemovableHandle] = []
        self._rows: NDArray[np.int64] | None = None
        self._labels: Tensor | None = None
        self._items: Any = None
        self._preparing = False
        self._losses: list[float] = []
        self._seconds = 0.0

    # Events of the Trainer.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model and open the run."""
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        if isinstance(model, nn.DataParallel):
            raise UsageError("nn.DataParallel splits batches behind the Trainer's back; use torchrun (DDP)")
        self.engine = GradDotProdEngine(model, self._val_data, optimizer=_inner(optimizer), **self._engine_options)  # type: ignore[arg-type]
        ranks = ranks_here()
        shape = RunShape(
            steps=state.max_steps, batch=args.per_device_train_batch_size * args.gradient_accumulation_steps,
            save_interval=self._interval, per_layer=self._per_layer,
        )  # fmt: skip
        run = None
        if ranks.leads:
            settings = {"val_refresh_interval": self.engine.val_refresh_interval, "method": "GradDotProd"}
            run = open_run(self._store, self._name, shape, self._samples, self.engine, ranks, settings)
        ranks.wait()
        self._recorder = Recorder(run, ranks, shape, stored=True, on_store_error=self._on_store_error, note=self._note)
        self._stack.enter_context(self._recorder.log)
        if state.global_step:
            pending = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / PENDING
            self._recorder.log.restore(state.global_step, load_file(pending) if pending.is_file() else {})
        self.engine.attach()
        inner = self.engine.model
        self._handles = [
            model.register_forward_pre_hook(self._take_sample, with_kwargs=True, prepend=True),
            inner.register_forward_hook(self._found_loss),
        ]

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The backward pass of a micro-batch that is not the last of its step is done."""
        self._collect()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """That of the last one is done: the step's scores are complete."""
        self._collect()
        assert self._recorder is not None
        optimizer = kwargs.get("optimizer")
        shared = {
            "learning_rate": float(optimizer.param_groups[0]["lr"]) if optimizer is not None else float("nan"),
            "train_loss": float(np.mean(self._losses)),
            "score_seconds": self._seconds,
        }
        self._recorder.finish(state.global_step, shared)
        self._losses, self._seconds = [], 0.0

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The Trainer wrote a checkpoint: the steps that the store does not have yet go beside it."""
        assert self._recorder is not None
        pending = self._recorder.log.pending()
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if pending and folder.is_dir():
            with storage_errors(str(folder)):
                save_file({key: np.ascontiguousarray(value) for key, value in pending.items()}, folder / PENDING)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit the rest and take everything off the model."""
        self.close()

    def close(self) -> None:
        """Take everything off the model and close the run; after an error in training, call it yourself."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.engine is not None and self.engine.attached:
            self.engine.detach()
        self._stack.close()

    # Hooks on the model.

    def _take_sample(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the forward pass of a training batch: take ``sample`` out and open the engine."""
        if self._preparing:
            return None
        places = kwargs.pop(self._field, None)
        if not module.training or not torch.is_grad_enabled():
            return args, kwargs
        assert self.engine is not None
        labels = kwargs.get("labels")
        if labels is None:
            raise UsageError("the Trainer's batch has no 'labels': scores need the mean loss over targets")
        if places is None:
            raise UsageError(
                f"the Trainer's batch has no {self._field!r}: add that column to the dataset (the place of each "
                "sample), set remove_unused_columns=False, and use a collator that keeps it"
            )
        self._rows = places_of(places, len(labels), self._samples)
        self._labels, self._items = labels, kwargs.get("num_items_in_batch")
        self._preparing = True
        try:
            self.engine.prepare(len(labels), tokens=labels.numel())
        finally:
            self._preparing = False
        return args, kwargs

    def _found_loss(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The model's own loss is Σ over targets, divided by the targets of this batch, or of the whole step."""
        if self._preparing or self.engine is None or not self.engine.training_batch_open or self._labels is None:
            return
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise UsageError(f"{type(module).__name__} returned no loss: the Trainer's batches need labels")
        counts_B = target_counts(self._labels).double()
        total = counts_B.sum().clamp_min(1) if self._items is None else torch.as_tensor(self._items).double()
        self.engine.watch(loss, weights=counts_B / total.to(counts_B.device))
        self._losses.append(float(loss.detach()))
        self._labels = None

    def _collect(self) -> None:
        if self.engine is None or self._recorder is None or self._rows is None:
            raise CaptureError("the Trainer finished a batch that never went through the model's forward pass")
        scores = self.engine.collect()
        self._seconds += scores.seconds
        self._recorder.add(self._rows, scores)
        self._rows = None


def _inner(optimizer: Any) -> Any:
    """The optimizer that accelerate wraps: its hooks are the ones that fire."""
    return getattr(optimizer, "optimizer", optimizer)
