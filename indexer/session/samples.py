"""What a loop of the user's own says of its data: which samples it trains on, where a batch's are, which val set.

Legend: N training samples.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.store.base.records import json_digest
from ghoststore.store.run.rows import RowTable


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
        zeros_N = np.zeros(count, dtype=np.int64)
        return RowTable(
            sample_id=np.array(self.ids, dtype=object),
            domain=np.array(domain),
            source_row=np.arange(count),
            source_file=zeros_N - 1,
            source_offset=zeros_N - 1,
            source_digest=zeros_N.astype(np.uint64),
            window_start=zeros_N,
            n_tokens=zeros_N,
        )

    def fingerprint(self) -> str:
        """A digest of ids and domains."""
        return f"sha256:{json_digest([list(self.ids), None if self.domains is None else list(self.domains)])}"


def places_of(batch_idx: Any, count: int, samples: Samples) -> NDArray[np.int64]:
    """(count,): places of a batch's samples; UsageError unless there is one valid place for each."""
    places = np.asarray(batch_idx.detach().cpu() if isinstance(batch_idx, torch.Tensor) else batch_idx)
    if places.shape != (count,) or places.dtype.kind not in "iu":
        raise UsageError(
            f"batch_idx must be the place of each of the {count} samples in the training set, so that a score leads "
            f"back to its sample; found {places.dtype} of shape {places.shape}"
        )
    if len(places) and (places.min() < 0 or places.max() >= len(samples.ids)):
        raise UsageError(f"batch_idx has places {places.min()} to {places.max()}; there are {len(samples.ids)} samples")
    return places.astype(np.int64)


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
