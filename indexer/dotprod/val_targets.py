"""Leaves val rows without a target out of the val set: they have no loss, and would dilute its mean.

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
    """The batches and group names of a language model's val set, without the rows that have no target.

    A row has no target if every label but the first, which nothing predicts, is -100. With ``"each"`` the other rows
    are named by their positions among all. A RuntimeWarning says how many rows were left out.

    UsageError if no row is left, or none of a named group.
    """
    labels_of = [_labels_of(batch) for batch in batches]
    if any(labels is None for labels in labels_of):
        return batches, groups  # of another form; the first val pass refuses it
    has_target = [target_counts(labels) > 0 for labels in labels_of if labels is not None]
    flags = torch.cat([has_target_B.cpu() for has_target_B in has_target]).tolist() if has_target else []
    if all(flags):
        return batches, groups
    if not any(flags):
        raise UsageError(
            f"no row of the val set has a target (each of {len(flags)} has -100 in every label that is predicted): "
            "there is no val loss to score against. Give labels: the input ids, -100 where a token is no target"
        )
    names = group_names(groups, len(flags))
    left = None if names is None else [name for name, flag in zip(names, flags, strict=True) if flag]
    if names is not None and left is not None and groups != "each":
        for name in names:
            if name not in left:
                raise UsageError(
                    f"no row of the val group {name!r} has a target ({names.count(name)} of -100 alone): it has no val "
                    "loss to score against. Give its rows labels, or leave the group out"
                )
    warnings.warn(
        f"{flags.count(False)} of {len(flags)} val rows have no target (every label is -100) and are left out",
        RuntimeWarning,
        stacklevel=4,
    )
    pairs = zip(batches, has_target, strict=True)
    return [_select(batch, has_target_B) for batch, has_target_B in pairs if bool(has_target_B.any())], left


def _labels_of(batch: Any) -> Tensor | None:
    """The labels (B, T) of a mapping, or of a tuple (input_ids, labels, attention_mask); None of anything else."""
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
        return [str(index) for index in range(count)]
    if isinstance(groups, str):
        raise UsageError(f"`groups` is 'each' or one name for each val sample, not {groups!r}")
    if len(groups) != count:
        raise UsageError(f"`groups` names {len(groups)} val samples, but there are {count}")
    return [str(name) for name in groups]


def _select(batch: Any, keep_B: Tensor) -> Any:
    """The rows ``keep_B`` of every tensor whose first axis is the batch."""

    def select(value: Any) -> Any:
        has_rows = isinstance(value, Tensor) and value.dim() and len(value) == len(keep_B)
        return value[keep_B.to(value.device)] if has_rows else value

    if bool(keep_B.all()):
        return batch
    if isinstance(batch, Mapping):
        return {name: select(value) for name, value in batch.items()}
    return tuple(select(value) for value in batch)
