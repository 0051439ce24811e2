"""Which samples a Trainer's batches hold, where the batches do not say: rows get numbers on their way to the collator.

The Trainer takes columns that the model does not know out of the dataset, and collators drop them. So the dataset that
its DataLoader reads hands out each row with its place, and what the collator makes of the rows gets their numbers.

Legend: N rows of the training dataset, P samples in all of them (more than N where rows are packed).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Trainer

from ghoststore.errors import UsageError
from indexer.session.samples import Samples

LENGTHS = "seq_lengths"
"""The column in which TRL keeps the lengths of the samples of a packed row."""


def read_by(trainer: Trainer, loader: Any) -> tuple[Any, str]:
    """(the dataset whose rows ``loader`` reads, why they may not be those that the user counted).

    It is the Trainer's ``train_dataset``, with all its columns, unless the DataLoader is of the user's making. None
    where it has no rows that can be counted.
    """
    dataset, moved = trainer.train_dataset, ""
    if type(trainer).get_train_dataloader.__module__.partition(".")[0] not in ("transformers", "trl"):
        dataset = getattr(loader, "base_dataloader", loader).dataset
        moved = f"{type(trainer).__name__}.get_train_dataloader reads a dataset of its own"
    countable = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return (dataset if countable else None), moved


def trainer_of_event() -> Trainer | None:
    """The Trainer whose event is being handled; None where another caller calls it.

    transformers hands a callback the model, the optimizer and the DataLoader, but not the Trainer, which alone knows
    the dataset as it was before columns were taken out.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Numbering:
    """The numbers of the samples of each row."""

    numbers: NDArray[np.int64] | None
    """(P,): places among the samples of the run; None where they are not known."""
    first: NDArray[np.int64]
    """(N + 1,): where each row's begin in ``numbers``."""
    ids: tuple[str, ...] | int
    """What the samples are called where the user gave no names."""
    unknown: str = ""
    """Why they are not known, and what to do."""

    @classmethod
    def of(cls, dataset: Any, field: str, given: Samples | None, *, moved: str = "") -> Numbering:
        """Those of the column ``field``; without one the places of the rows, and of the samples of packed rows.

        ``given`` are the samples that the user named: there must be as many. ``moved`` says why the rows of ``dataset``
        are not those that the user counted.
        """
        columns = getattr(dataset, "column_names", None) or ()
        counts = np.ones(len(dataset), dtype=np.int64)
        lengths = dataset.with_format(None)[LENGTHS] if LENGTHS in columns else None
        if lengths is not None:
            counts = np.array([len(row) for row in lengths], dtype=np.int64)
        first = np.concatenate([[0], np.cumsum(counts)])
        total = int(first[-1])
        ids: tuple[str, ...] | int = total
        if lengths is not None:
            ids = tuple(f"{row}:{place}" for row, count in enumerate(counts.tolist()) for place in range(count))
        if field in columns:
            numbers = _column(dataset.with_format(None)[field], lengths, field)
            return cls(numbers, first, ids)
        unknown = ""
        if given is not None and lengths is not None:
            unknown = (
                f"the rows of the training dataset are packed, and packing dropped the column {field!r}. Leave "
                "`samples` out: then they are called row:place of the packed dataset (trainer.train_dataset). Or pack "
                f"before: a column {field!r} with the sample's number once for each token, trl.pack_dataset(dataset, "
                "max_length), and SFTConfig(packing=False, padding_free=True, max_length=None)"
            )
        elif given is not None and (moved or total != len(given.ids)):
            unknown = (
                f"{moved or f'the training dataset has {total} rows, and `samples` names {len(given.ids)}'}: which row "
                f"is which sample is not known. Give the dataset a column {field!r} with the place of each sample, or "
                "leave `samples` out: then they are the rows of trainer.train_dataset"
            )
        return cls(None if unknown else np.arange(total), first, ids, unknown)

    def most_of(self, rows: int) -> int:
        """The most samples that ``rows`` different rows can hold."""
        return int(np.sort(np.diff(self.first))[::-1][:rows].sum()) or rows

    def of_rows(self, rows: Sequence[int]) -> NDArray[np.int64] | None:
        """The numbers of the samples of ``rows``, one after another."""
        if self.numbers is None:
            return None
        return np.concatenate([self.numbers[self.first[row] : self.first[row + 1]] for row in rows])

    def put_into(self, loader: Any, field: str) -> Any:
        """Let the batches of ``loader`` have them under ``field``; returns a function that undoes it."""
        base = getattr(loader, "base_dataloader", loader)  # accelerate's is a shell around torch's
        dataset, collate = base.dataset, base.collate_fn
        # DataLoader forbids to set another dataset, for fear of its sampler's length, which stays the same.
        object.__setattr__(base, "dataset", _Placed(dataset))
        base.collate_fn = _NumberingCollator(collate, self, field)

        def undo() -> None:
            object.__setattr__(base, "dataset", dataset)
            base.collate_fn = collate

        return undo


def _column(values: Any, lengths: Any, field: str) -> NDArray[np.int64]:
    """(P,) of a column: of packed rows the number at each sample's first token, which all of its tokens have."""
    if lengths is None:
        numbers = np.asarray(list(values))
        if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
            raise UsageError(
                f"column {field!r} of the training dataset holds the place of each sample, an integer a row; found "
                f"{numbers.dtype} of shape {numbers.shape}. Name another column with `sample_field`"
            )
        return numbers.astype(np.int64)
    found: list[int] = []
    for row, (each, own) in enumerate(zip(values, lengths, strict=True)):
        tokens = each if isinstance(each, list) else None
        if tokens is None or len(tokens) != sum(own):
            raise UsageError(
                f"column {field!r} of packed rows holds the number of the sample of each token; row {row} does not"
            )
        bounds = [0, *np.cumsum(own).tolist()]
        for start, stop in pairwise(bounds):
            if len(set(tokens[start:stop])) != 1:
                raise UsageError(f"column {field!r} of packed row {row} names several samples within one length")
            found.append(int(tokens[start]))
    return np.array(found, dtype=np.int64)


class _Placed:
    """A dataset that hands out (place, row)."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: int) -> tuple[int, Any]:
        return int(place), self._dataset[place]

    def __getitems__(self, places: list[int]) -> list[tuple[int, Any]]:
        together = getattr(self._dataset, "__getitems__", None)
        rows = [self._dataset[place] for place in places] if together is None else together(places)
        return list(zip(map(int, places), rows, strict=True))

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":
            raise AttributeError(name)  # while a worker process unpickles it
        return getattr(self._dataset, name)


class _NumberingCollator:
    """The collator of a Trainer, and the numbers of what it collates."""

    def __init__(self, collate: Any, numbering: Numbering, field: str) -> None:
        self._collate, self._numbering, self._field = collate, numbering, field

    def __call__(self, placed: list[tuple[int, Any]]) -> Any:
        places, rows = [place for place, _ in placed], [row for _, row in placed]
        named = [row.get(self._field) if isinstance(row, Mapping) else None for row in rows]
        batch = self._collate(rows)
        if not isinstance(batch, MutableMapping) or self._field in batch:
            return batch
        numbers = self._numbering.of_rows(places)
        if all(isinstance(number, int) for number in named):  # of a dataset without columns
            numbers = np.array(named, dtype=np.int64)
        if numbers is not None:
            batch[self._field] = torch.from_numpy(numbers)
        return batch
