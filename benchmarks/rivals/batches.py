"""Rows of tokens as padded batches, for rivals that take batches of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ByLength:
    """Rows from the longest to the shortest, each as long as the longest of its batch of ``size``.

    So a loader that takes ``size`` rows in turn gets tensors of one length, with little padding, whatever its own
    collation. ``order`` are the places of the rows in ``rows``.
    """

    def __init__(self, rows: list[dict[str, Any]], size: int) -> None:
        lengths = [len(row["input_ids"]) for row in rows]
        self.order = sorted(range(len(rows)), key=lambda place: -lengths[place])
        self.items = [
            padded(rows[place], lengths[self.order[number - number % size]]) for number, place in enumerate(self.order)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.items[number]

    def in_place(self, scores: Tensor, axis: int) -> Tensor:
        """``scores`` in the order of the rows."""
        return torch.empty_like(scores).index_copy_(axis, torch.tensor(self.order), scores)


def padded(row: dict[str, Any], length: int) -> dict[str, Tensor]:
    tokens, missing = len(row["input_ids"]), length - len(row["input_ids"])
    return {
        "input_ids": torch.tensor(row["input_ids"] + [0] * missing),
        "attention_mask": torch.tensor([1] * tokens + [0] * missing),
        "labels": torch.tensor(row["labels"] + [-100] * missing),
    }
