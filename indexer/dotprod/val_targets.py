"""Val rows without a target have no loss: they are left out of the val set, so that they do not dilute its mean.

Legend: B samples of a batch, T tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ghoststore.errors import UsageError
from indexer.dotprod.val_data import target_counts

Groups = Sequence[str] | Literal["each"] | None


def rows_with_targets(batches: list[Any], groups: Groups) -> tuple[list[Any], Groups]:
    """The batches of a language model's val set, and the group names, without the rows that have no target.

    A row has none if every label is -100, the first aside, which nothing predicts. With ``"each"`` the rows that are
    left are named by their places among all. A RuntimeWarning says how many were left out.

    UsageError if none is left, or none of a named group.
    """
    labels_of = [_labels_of(batch) for batch in batches]
    if any(labels is None for labels in labels_of):
        return batches, groups  # not of this form; the first val pass says so
    has = [target_counts(labels) > 0 for labels in labels_of if labels is not None]
    there = torch.cat([has_B.cpu() for has_B in has]).tolist() if has else []
    if all(there):
        return batches, groups
    if not any(there):
        raise UsageError(
            f"no row of the val set has a target (each of {len(there)} has -100 in every label that is predicted): "
            "there is no val loss to score against. Give labels: the input ids, -100 where a token is no target"
        )
    names = group_names(groups, len(there))
    named = None if names is None else [name for name, has_one in zip(names, there, strict=True) if has_one]
    if names is not None and named is not None and groups != "each":
        for name in names:
            if name not in named:
                raise UsageError(
                    f"no row of the val group {name!r} has a target ({names.count(name)} of -100 alone): it has no val "
                    "loss to score against. Give its rows labels, or leave the group out"
                )
    warnings.warn(
        f"{there.count(False)} of {len(there)} val rows have no target (every label is -100) and are left out",
        RuntimeWarning,
        stacklevel=4,
    )
    return [_cut(batch, has_B) for batch, has_B in zip(batches, has, strict=True) if bool(has_B.any())], named


def _labels_of(batch: Any) -> Tensor | None:
    """(B, T), of a mapping or of a tuple (input_ids, labels, attention_mask)."""
    labels: Any = None
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        labels = batch[1]
    return labels if isinstance(labels, Tensor) and labels.dim() == 2 else None


def group_names(groups: Groups, count: int) -> list[str] | None:
    """The group of each of ``count`` val samples; None without groups. UsageError for another number of names."""
    if groups is None:
        return None
    if groups == "each":
        return [str(place) for place in range(count)]
    if isinstance(groups, str):
        raise UsageError(f"groups is 'each' or one name for each val sample, not {groups!r}")
    if len(groups) != count:
        raise UsageError(f"groups names {len(groups)} val samples, but there are {count}")
    return [str(name) for name in groups]


def _cut(batch: Any, keep_B: Tensor) -> Any:
    """The rows that are kept, of every tensor whose first axis is the batch."""

    def cut(value: Any) -> Any:
        rows = isinstance(value, Tensor) and value.dim() and len(value) == len(keep_B)
        return value[keep_B.to(value.device)] if rows else value

    if bool(keep_B.all()):
        return batch
    if isinstance(batch, Mapping):
        return {name: cut(value) for name, value in batch.items()}
    return tuple(cut(value) for value in batch)
