"""A run of the store for training loops of one's own: the manager and the Trainer callback write through it.

Legend: N training samples, B samples of one rank's step.
"""

from __future__ import annotations

import hashlib
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ghoststore.checkpoint.config_identity import config_identity
from ghoststore.corpus.repeated import RepeatedIds
from ghoststore.errors import MismatchError, UsageError
from ghoststore.settings.train import OnStoreError
from ghoststore.software import versions_of
from ghoststore.store import Store
from ghoststore.store.base.names import check_name
from ghoststore.store.base.records import json_digest
from ghoststore.store.run.run import RowTable, Run, RunLayout, create_run
from indexer.dotprod import GradDotProdEngine, Scores
from indexer.dotprod.sketched import SketchedMethod
from indexer.training.ranks import Ranks
from indexer.training.score_log import ScoreLog

SAME = 0.1
"""Relative difference up to which scores of a repeated step are the same: devices may add in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The samples that a loop trains on, so that a score leads back to them."""

    ids: tuple[str, ...]
    domains: tuple[str | None, ...] | None = None

    def __post_init__(self) -> None:
        if not self.ids:
            raise UsageError("there are no training samples to score")
        if self.domains is not None and len(self.domains) != len(self.ids):
            raise UsageError(f"{len(self.domains)} domains for {len(self.ids)} samples")

    @classmethod
    def of(cls, ids: Sequence[str] | int, domains: Sequence[str | None] | None = None) -> Samples:
        """``ids`` of the samples, or how many there are (their ids are their places)."""
        if isinstance(ids, str):
            raise UsageError(f"samples are a number or a sequence of ids, not the string {ids!r:.60}")
        if isinstance(domains, str):
            raise UsageError(f"domains are one name a sample, not the string {domains!r:.60}")
        names = tuple(map(str, ids)) if isinstance(ids, Iterable) else tuple(map(str, range(operator.index(ids))))
        return cls(ids=names, domains=None if domains is None else tuple(domains))

    @property
    def domain_names(self) -> list[str]:
        """The domains, sorted."""
        return sorted({name for name in self.domains or () if name is not None})

    def table(self) -> RowTable:
        """The row table: a sample's source row is its place."""
        count, names = len(self.ids), self.domain_names
        place = {name: index for index, name in enumerate(names)}
        domain = [-1 if name is None else place[name] for name in self.domains or [None] * count]
        nothing = np.zeros(count, dtype=np.int64)
        return RowTable(
            sample_id=np.array(self.ids, dtype=object),
            domain=np.array(domain),
            source_row=np.arange(count),
            source_file=nothing - 1,
            source_offset=nothing - 1,
            source_digest=nothing.astype(np.uint64),
            window_start=nothing,
            n_tokens=nothing,
        )

    def fingerprint(self) -> str:
        """Of ids and domains."""
        return f"sha256:{json_digest([list(self.ids), None if self.domains is None else list(self.domains)])}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunShape:
    """What a run needs to know before its first step."""

    steps: int
    batch: int
    """Samples of one rank's step, over all its micro-batches."""
    save_interval: int = 10
    per_layer: bool = False


def _config_of(model: Any) -> dict[str, Any] | None:
    """The identity of a transformers model's configuration; None for another model."""
    config = getattr(model, "config", None)
    return config_identity(config, training=True) if hasattr(config, "to_diff_dict") else None


def open_run(
    store: str | Path,
    name: str,
    shape: RunShape,
    samples: Samples,
    engine: GradDotProdEngine,
    ranks: Ranks,
    settings: Mapping[str, Any],
) -> tuple[Run, bool]:
    """The run ``name`` of ``store``, and whether it is new; MismatchError if it is there with other settings.

    UsageError for scores by layer where layers have none.
    """
    method = engine.method
    sketched = isinstance(method, SketchedMethod)
    if shape.per_layer and not (method.blocks and engine.val_batches):
        raise UsageError(
            "per_layer: layers have no scores of their own under a global sketch, nor without val data; give "
            "proj_rank_total for plain blocks, and val_data"
        )
    layout = RunLayout(
        steps=shape.steps,
        ranks=ranks.count,
        batch=shape.batch,
        span_steps=shape.save_interval,
        rows=len(samples.ids),
        blocks=tuple(method.blocks) if shape.per_layer else (),
        dimension=method.projection.plan.dimension if isinstance(method, SketchedMethod) else None,
    )
    parameters = list(engine.model.parameters())
    manifest = {
        "model": {
            "architecture": type(engine.model).__name__,
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "config": _config_of(engine.model),
        },
        "tokenizer": {"fingerprint": None},
        "corpus": {
            "fingerprint": samples.fingerprint(),
            "samples": len(samples.ids),
            "domains": samples.domain_names or None,
            "repeated_ids": RepeatedIds.of(samples.ids),
        },
        "val": {"fingerprint": val_fingerprint(engine.val_batches), "rows": engine.val_samples},
        "training": {"batch": shape.batch, "max_steps": shape.steps},
        "scoring": {
            "method": "GradProjLora" if sketched else "GradDotProd",
            "score": "sketched" if sketched else "exact",
            "projection": method.projection.hash if isinstance(method, SketchedMethod) else None,
            **settings,
        },
        "storage": layout.to_json(),
        "source": {"data": None},
        "software": versions_of("ghoststore", "torch", "numpy", "zarr"),
        "compute": {"device": parameters[0].device.type},
    }
    path = Store.create(store).run_path(check_name(name))
    new = not path.exists()
    return create_run(path, manifest, samples.table()), new


class Recorder:
    """Micro-batches to steps to the store: ``add`` each micro-batch's scores, ``finish`` each optimizer step.

    A context manager. Left without an exception, it commits every finished step; where that is in the middle of a save
    interval whose steps :meth:`pending` has not given out, the rest of the interval is committed without samples, and
    the run ends there. Every rank makes the same calls.

    ``run`` and ``new`` are those of :func:`open_run` on the rank that leads; ``stored`` says whether there is a store.
    """

    def __init__(
        self,
        run: Run | None,
        engine: GradDotProdEngine,
        ranks: Ranks,
        shape: RunShape,
        *,
        stored: bool,
        new: bool = True,
        on_store_error: OnStoreError = "stop",
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.next_step = 0
        """The step that finishes next."""
        self._run, self._new = run, new
        self._ranks, self._shape, self._stored = ranks, shape, stored
        self._on_store_error = on_store_error
        self._note = note or warn
        self._blocks = list(engine.method.blocks) if shape.per_layer and stored else []
        method = engine.method
        self._dimension = method.projection.plan.dimension if isinstance(method, SketchedMethod) else None
        self._log = ScoreLog(
            run, ranks, interval=shape.save_interval, stored=stored, on_error=on_store_error, note=self._note
        )
        self._given_out = 0
        """The step before which everything is committed or in what ``pending`` gave."""
        self._repeated = 0
        """Steps before this one may have been committed by an earlier process."""
        self._compared = False
        self._read: dict[str, tuple[int, NDArray[Any]]] = {}
        """The span that was read last, by array."""
        self._drop()

    @classmethod
    def open(
        cls,
        store: str | Path | None,
        name: str,
        shape: RunShape,
        samples: Samples | None,
        engine: GradDotProdEngine,
        ranks: Ranks,
        settings: Mapping[str, Any],
        *,
        on_store_error: OnStoreError,
        note: Callable[[str], None] | None = None,
    ) -> Recorder:
        """The recorder of run ``name``, on every rank; what the first rank cannot do is an error on all."""
        if store is None:
            return cls(None, engine, ranks, shape, stored=False)
        assert samples is not None
        opened = ranks.led(lambda: open_run(store, name, shape, samples, engine, ranks, settings))
        run, new = opened or (None, True)
        return cls(run, engine, ranks, shape, stored=True, new=new, on_store_error=on_store_error, note=note)

    def __enter__(self) -> Recorder:
        self._log.__enter__()
        last = 0
        if self._run is not None and len(self._run.spans):
            last = int(self._run.committed_steps()[-1]) + 1
        if self._stored:
            self._repeated = int(self._ranks.stacked(torch.tensor([last]))[0])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._stored and not self._parts:
            self._end()
        self._log.__exit__(kind, error, trace)

    def keep_open(self) -> None:
        """The run does not end with this recorder: what is not in a full save interval is left to a loop that resumes
        and repeats it.
        """
        self._given_out = self.next_step
        self._drop()

    # Once a micro-batch.

    def add(
        self, rows: NDArray[np.int64], scores: Scores, *, loss: float, weight: float = 1.0, tokens: int = 0
    ) -> None:
        """The scores of one micro-batch of samples at the places ``rows``. The step's mean loss is Σ ``loss`` ÷ Σ
        ``weight`` over its micro-batches and ranks.
        """
        part: dict[str, NDArray[Any]] = {"sample": rows, "score": _numbers(scores.total)}
        if self._blocks:
            part["block_score"] = np.stack([_numbers(scores.blocks[name]) for name in self._blocks], axis=1)
        if scores.vectors is not None:
            part["vector"] = scores.vectors.cpu().numpy()
        self._parts.append(part)
        self._sums += (loss, weight, tokens)
        self._score_seconds += scores.seconds

    def drop(self) -> None:
        """Forget the micro-batches of a step that does not come."""
        self._drop()

    def _drop(self) -> None:
        self._parts: list[dict[str, NDArray[Any]]] = []
        self._sums = np.zeros(3)
        self._score_seconds = 0.0

    # Once a step.

    def finish(self, *, learning_rate: float, seconds: float) -> None:
        """Optimizer step ``next_step`` is done; what was added is handed to the store.

        UsageError if it has more samples than the run has places; MismatchError if the store has this step already,
        with other samples.
        """
        step, parts, sums, score_seconds = self.next_step, self._parts, self._sums, self._score_seconds
        assert parts, "a step has at least one micro-batch"
        self._drop()
        if self._stored:
            whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            count = len(whole["sample"])
            if count > self._shape.batch:
                raise UsageError(
                    f"step {step} has {count} samples; the run was made for {self._shape.batch} a step and rank"
                )
            own = {name: _filled(values, self._shape.batch) for name, values in whole.items()}
            self._refuse_others(step, own["sample"], own["score"])
            loss, weight, tokens = self._ranks.stacked(torch.from_numpy(sums)).sum(0).tolist()
            shared = {
                "learning_rate": learning_rate,
                "train_loss": loss / weight if weight else float("nan"),
                "tokens": int(tokens),
                "seconds": seconds,
                "score_seconds": score_seconds,
            }
            self._log.add(step, own, shared)
            if step + 1 == self._shape.steps:
                self._log.save()
        self.next_step = step + 1

    def skip(self) -> None:
        """Step ``next_step`` was not scored (an error in it): it is stored without samples."""
        step = self.next_step
        if self._stored:
            nothing = self._nothing()
            self._refuse_others(step, nothing["sample"], nothing["score"])
            self._log.add(step, nothing, {})
        self.next_step = step + 1

    def save(self) -> None:
        """Hand what was finished to the store's writer now."""
        self._log.save()

    # Resuming.

    def pending(self) -> dict[str, NDArray[Any]]:
        """Finished steps that the store does not have yet, for a checkpoint; empty on ranks that do not write."""
        found = self._log.pending()
        self._given_out = self.next_step
        return found

    def restore(self, step: int, pending: Mapping[str, NDArray[Any]], source: str) -> None:
        """Go on after ``step`` finished steps with what :meth:`pending` gave; ``source`` is where it comes from.

        UsageError if the run began earlier and steps before ``step`` are neither in it nor in ``pending``.
        """
        self._ranks.led(lambda: self._restore(step, pending, source))
        self.next_step = self._given_out = step

    def _restore(self, step: int, pending: Mapping[str, NDArray[Any]], source: str) -> None:
        if self._run is None:
            return
        if not 0 <= step <= self._shape.steps:
            raise UsageError(f"{source} is of step {step}; the run was made for {self._shape.steps} steps")
        present = set(self._run.committed_steps().tolist()) | set(np.asarray(pending.get("step", [])).tolist())
        lacking = sorted(set(range(step)) - present)
        if lacking and not self._new and self._on_store_error == "stop":
            raise UsageError(
                f"run {self._run.name!r} lacks steps {lacking[0]} to {lacking[-1]}, and they are not in {source} of "
                f"step {step}: give what was saved of this run, or a run with another name"
            )
        self._log.restore(step, pending)

    def _refuse_others(self, step: int, sample_B: NDArray[np.int64], score_B: NDArray[np.float32]) -> None:
        """What is committed never changes: a step that is repeated must be of the same samples. That its scores are
        others (another random state) is said once.
        """
        if step >= self._repeated:
            return
        found = self._committed(step, "sample")
        if self._ranks.any(found is not None and not np.array_equal(found, sample_B)):
            name = "" if self._run is None else f"{self._run.name!r} "
            raise MismatchError(
                f"the run {name}has step {step} already, with other samples (or none): this is another training, or "
                "its data come in another order. Nothing was changed; give it a name of its own, or resume from its "
                "state"
            )
        if found is not None and not self._compared:
            self._compared = True
            stored = np.nan_to_num(self._committed(step, "score"))
            if np.linalg.norm(stored - np.nan_to_num(score_B)) > SAME * np.linalg.norm(stored):
                self._note(
                    f"step {step} is in the run already, with other scores: this training has other weights or another "
                    "random state. The store keeps what it has; give another training a name of its own"
                )

    def _committed(self, step: int, array: str) -> Any:
        """(B,): the first rank's values of a step; None where it is not committed, and on other ranks."""
        if self._run is None:
            return None
        span = step // self._run.layout.span_steps
        if span not in self._run.spans:
            return None
        start, stop = self._run.layout.span_of(span)
        if self._read.get(array, (None,))[0] != span:
            self._read[array] = (span, self._run.read(array, start, stop))
        return self._read[array][1][step - start, 0]

    def _end(self) -> None:
        """Commit the steps of a save interval that does not become full."""
        interval = self._shape.save_interval
        if self.next_step == self._given_out or not self.next_step % interval:
            return
        last = min(self.next_step - self.next_step % interval + interval, self._shape.steps)
        for step in range(self.next_step, last):
            self._log.add(step, self._nothing(), {})

    def _nothing(self) -> dict[str, NDArray[Any]]:
        """The arrays of a step without samples."""
        batch = self._shape.batch
        found: dict[str, NDArray[Any]] = {
            "sample": np.full(batch, -1, dtype=np.int64),
            "score": np.full(batch, np.nan, dtype=np.float32),
        }
        if self._blocks:
            found["block_score"] = np.full((batch, len(self._blocks)), np.nan, dtype=np.float32)
        if self._dimension is not None:
            found["vector"] = np.full((batch, self._dimension), np.nan, dtype=np.float32)
        return found


def warn(message: str) -> None:
    """What a library has to say where nobody asked to hear it in another way."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def places_of(batch_idx: Any, count: int, samples: Samples) -> NDArray[np.int64]:
    """(count,): places of a batch's samples; UsageError unless there is one valid place for each."""
    found = np.asarray(batch_idx.detach().cpu() if isinstance(batch_idx, torch.Tensor) else batch_idx)
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise UsageError(
            f"batch_idx must be the place of each of the {count} samples in the training set, so that a score leads "
            f"back to its sample; found {found.dtype} of shape {found.shape}"
        )
    if len(found) and (found.min() < 0 or found.max() >= len(samples.ids)):
        raise UsageError(f"batch_idx has places {found.min()} to {found.max()}; there are {len(samples.ids)} samples")
    return found.astype(np.int64)


def ranks_here() -> Ranks:
    """The ranks of the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


def _numbers(values: torch.Tensor) -> NDArray[np.float32]:
    return values.float().cpu().numpy()


def _filled(values: NDArray[Any], size: int) -> NDArray[Any]:
    """``values`` filled up to ``size`` samples: the last batch of an epoch may be smaller."""
    if len(values) == size:
        return values
    nothing = -1 if values.dtype.kind == "i" else np.nan
    rest = np.full((size - len(values), *values.shape[1:]), nothing, dtype=values.dtype)
    return np.concatenate([values, rest])


def val_fingerprint(val_data: Any) -> str:
    """SHA-256 of val data: of every number, shape, dtype, key and string in it. One tensor at a time is on the CPU.

    UsageError for what has no numbers of its own to hash.
    """
    digest = hashlib.sha256()

    def mark(*words: Any) -> None:
        digest.update(repr(words).encode())

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            mark("tensor", tuple(value.shape), str(value.dtype))
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().data)
        elif isinstance(value, np.ndarray):
            add(torch.from_numpy(value))
        elif isinstance(value, Mapping):
            mark("mapping", sorted(map(str, value)))
            for key in sorted(value, key=str):
                add(value[key])
        elif isinstance(value, (list, tuple)):
            mark("sequence", len(value))
            for inner in value:
                add(inner)
        elif value is None or isinstance(value, (str, bytes, bool, int, float)):
            mark(value)
        else:
            raise UsageError(
                f"val data with a {type(value).__name__} cannot be told from others, as a run must; "
                "give tensors, numbers and strings in mappings, tuples and lists"
            )

    add(val_data)
    return f"sha256:{digest.hexdigest()}"
