"""A run of the store for training loops of one's own: the manager and the Trainer callback write through it.

Legend: N training samples, B samples of one rank's step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ghoststore.errors import UsageError
from ghoststore.software import versions_of
from ghoststore.store import Store
from ghoststore.store.commits import json_digest
from ghoststore.store.layout import check_name
from ghoststore.store.run import RowTable, Run, RunLayout, create_run
from indexer.dotprod import GradDotProdEngine, Scores
from indexer.dotprod.sketched import SketchedMethod
from indexer.training.config import OnStoreError
from indexer.training.ranks import Ranks
from indexer.training.score_log import ScoreLog


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
        names = tuple(map(str, range(ids))) if isinstance(ids, int) else tuple(map(str, ids))
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
            sample_id=np.array(self.ids, dtype=object), domain=np.array(domain), source_row=np.arange(count),
            source_file=nothing - 1, source_offset=nothing - 1, source_digest=nothing.astype(np.uint64),
            window_start=nothing, n_tokens=nothing,
        )  # fmt: skip

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


def open_run(
    store: str | Path,
    name: str,
    shape: RunShape,
    samples: Samples,
    engine: GradDotProdEngine,
    ranks: Ranks,
    settings: Mapping[str, Any],
) -> Run:
    """The run ``name`` of ``store``, made if it is not there; MismatchError if it is of other settings."""
    method = engine.method
    keeps_vectors = isinstance(method, SketchedMethod)
    layout = RunLayout(
        steps=shape.steps, ranks=ranks.count, batch=shape.batch, span_steps=shape.save_interval,
        rows=len(samples.ids), blocks=tuple(method.blocks) if shape.per_layer else (),
        dimension=method.projection.plan.dimension if isinstance(method, SketchedMethod) else None,
    )  # fmt: skip
    manifest = {
        "model": {"architecture": type(engine.model).__name__, "parameters": _count(engine.model)},
        "tokenizer": {"fingerprint": None},
        "corpus": {
            "fingerprint": samples.fingerprint(),
            "samples": len(samples.ids),
            "domains": samples.domain_names or None,
        },
        "val": {"fingerprint": _val_fingerprint(engine), "rows": engine.val_samples},
        "training": {"batch": shape.batch, "max_steps": shape.steps},
        "scoring": {
            "score": "sketched" if keeps_vectors else "exact",
            "projection": method.projection.hash if isinstance(method, SketchedMethod) else None,
            **settings,
        },
        "storage": layout.to_json(),
        "source": {"data": None},
        "software": versions_of("ghoststore", "torch", "numpy", "zarr"),
        "compute": {"device": next(engine.model.parameters()).device.type},
    }
    opened = Store.create(store)
    return create_run(opened.run_path(check_name(name)), manifest, samples.table())


class Recorder:
    """Micro-batches to steps to the store: ``add`` each micro-batch's scores, ``finish`` each optimizer step."""

    def __init__(
        self, run: Run | None, ranks: Ranks, shape: RunShape, *, stored: bool, on_store_error: OnStoreError,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:  # fmt: skip
        self.shape = shape
        self._arrays = {"blocks": run is not None and bool(run.layout.blocks)}
        self.log = ScoreLog(run, ranks, interval=shape.save_interval, stored=stored, on_error=on_store_error, note=note)
        self._stored = stored
        self._parts: list[dict[str, NDArray[Any]]] = []

    def add(self, rows: NDArray[np.int64], scores: Scores) -> None:
        """The scores of one micro-batch of samples at the places ``rows``."""
        part: dict[str, NDArray[Any]] = {"sample": rows, "score": _numbers(scores.total)}
        if self.shape.per_layer:
            part["block_score"] = np.stack([_numbers(values) for values in scores.blocks.values()], axis=1)
        if scores.vectors is not None:
            part["vector"] = scores.vectors.cpu().numpy()
        self._parts.append(part)

    def finish(self, step: int, shared: Mapping[str, float]) -> dict[str, NDArray[Any]]:
        """The optimizer step is done; what it was is handed to the store. Its arrays, (B, …), are returned."""
        if not self._parts:
            raise UsageError(f"step {step} has no scored batch: attach_train_batch() was not called, or not scored")
        whole = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        self._parts = []
        count = len(whole["sample"])
        if count > self.shape.batch:
            raise UsageError(
                f"step {step} has {count} samples; the run was made for {self.shape.batch} a step and rank"
            )
        if self._stored:
            self.log.add(step, {name: _filled(values, self.shape.batch) for name, values in whole.items()}, shared)
        return whole

    def drop(self) -> None:
        """Forget micro-batches whose step did not come."""
        self._parts = []


def places_of(batch_idx: Any, count: int, samples: Samples) -> NDArray[np.int64]:
    """(count,): places of a batch's samples; UsageError unless there is one valid place for each."""
    found = np.asarray(batch_idx.cpu() if isinstance(batch_idx, torch.Tensor) else batch_idx)
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


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _val_fingerprint(engine: GradDotProdEngine) -> str:
    """SHA-256 of the numbers of the val batches."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(str((tuple(value.shape), value.dtype)).encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else b"")
        elif isinstance(value, Mapping):
            for key in sorted(value):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for inner in value:
                add(inner)

    add(engine.val_batches)
    return f"sha256:{digest.hexdigest()}"
