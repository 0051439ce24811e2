"""Training rows out of token shards, and which of them each step takes: a function of seed and step alone.

Legend: N rows (samples, or windows of long ones), B rows of a micro-batch, T tokens of its longest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.corpus.repeated import Repeated, RepeatedIds
from ghoststore.errors import CorpusError, UsageError
from ghoststore.store.run.rows import RowTable
from ghoststore.tokens.shards import TokenShards
from indexer.encode.losses import IGNORED
from indexer.encode.tokens import Overlong, Tokenizer
from indexer.projection import draws


class Batch(NamedTuple):
    """One micro-batch, padded on the right."""

    rows: NDArray[np.int64]
    """(B,): places in the row table."""
    input_ids: Tensor
    """(B, T) int64; 0 at padding."""
    labels: Tensor
    """(B, T): the ids, -100 at padding and before a row's first target. The loss shifts them."""
    attention_mask: Tensor
    """(B, T): 1 where there is a token."""

    def to(self, device: str) -> Batch:
        """The same on ``device``."""
        moved = (x.to(device, non_blocking=True) for x in (self.input_ids, self.labels, self.attention_mask))
        return Batch(self.rows, *moved)


@dataclass(slots=True)
class TrainingRows:
    """The rows of a corpus as training sees them. Made by :meth:`cut`."""

    shards: TokenShards
    sample: NDArray[np.int64]
    """(N,): the sample of each row."""
    window_start: NDArray[np.int64]
    length: NDArray[np.int64]
    first_target: NDArray[np.int64]
    """Of the row: tokens before it are no targets; at least 1."""
    usable: NDArray[np.int64] = field(init=False)
    """Places of the rows with at least one target."""

    def __post_init__(self) -> None:
        self.usable = (self.first_target < self.length).nonzero()[0]
        if not len(self.usable):
            raise CorpusError(f"{self.shards.folder} has no row to train on: all are empty, too short or masked")

    @classmethod
    def cut(
        cls, shards: TokenShards, max_length: int, overlong: Overlong, domains: tuple[str, ...] = ()
    ) -> TrainingRows:
        """Rows of at most ``max_length`` tokens; windows of one sample share a token, as in a build.

        ``domains`` keeps rows of these alone. CorpusError under ``overlong="error"``, UsageError for a domain that
        is not there.
        """
        length = shards.length.astype(np.int64)
        sample = np.arange(len(length))
        unknown = sorted(set(domains) - set(shards.domains))
        if unknown:
            raise UsageError(
                f"{shards.folder} has no domain {unknown[0]!r}; it has: {', '.join(shards.domains) or 'none'}"
            )
        if domains:
            wanted = [shards.domains.index(name) for name in domains]
            sample = sample[np.isin(shards.domain, wanted)]
        too_long = length[sample] > max_length
        if overlong == "error" and too_long.any():
            first = int(sample[too_long][0])
            raise CorpusError(
                f"sample {shards.sample_id[first]!r} has {length[first]} tokens; `max_length` is {max_length} and "
                "`overlong` is error"
            )
        if overlong == "skip":
            sample = sample[~too_long]
        windows = np.ones(len(sample), dtype=np.int64)
        if overlong == "window":
            windows = np.where(too_long, -(-(length[sample] - 1) // (max_length - 1)), 1)
        of_row = np.repeat(sample, windows)
        place = np.arange(len(of_row)) - np.repeat(np.cumsum(windows) - windows, windows)
        start = place * (max_length - 1)
        return cls(
            shards,
            of_row,
            start,
            np.minimum(length[of_row] - start, max_length),
            np.maximum(shards.first_target[of_row].astype(np.int64) - start, 1),
        )

    def only(self, samples: NDArray[np.bool_]) -> TrainingRows:
        """The rows of the samples that are True, one for each of the shards. CorpusError if none has a target."""
        chosen = samples[self.sample]
        columns = (self.sample, self.window_start, self.length, self.first_target)
        return TrainingRows(self.shards, *(column[chosen] for column in columns))

    def __len__(self) -> int:
        return len(self.sample)

    def target_counts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The targets of each of these rows."""
        counts: NDArray[np.int64] = np.maximum(self.length[rows] - self.first_target[rows], 0)
        return counts

    def targets_of(self, rows: NDArray[np.int64]) -> int:
        """Targets of these rows together."""
        return int(self.target_counts(rows).sum())

    def repeated_ids(self) -> Repeated | None:
        """Ids that several samples of these rows have; None where every id is unique."""
        if self.shards.repeated_ids is None:
            return None
        return RepeatedIds.of(self.shards.sample_id[np.unique(self.sample)])

    def check(self, tokenizer: Tokenizer) -> None:
        """UsageError for a usable row with a token that the model's embedding lacks. Reads the rows only where the
        tokenizer has such tokens.
        """
        if not tokenizer.exceeds:
            return
        for row in self.usable.tolist():
            sample, start = int(self.sample[row]), int(self.window_start[row])
            tokens = self.shards.tokens_of(sample, start, start + int(self.length[row]))
            tokenizer.refuse_beyond(tokens, self.shards.sample_id[sample], int(self.shards.source_row[sample]))

    def table(self) -> RowTable:
        """The row table of a run."""
        shards, of_row = self.shards, self.sample
        return RowTable(
            sample_id=np.asarray(shards.sample_id, dtype=object)[of_row],
            domain=shards.domain[of_row],
            source_row=shards.source_row[of_row],
            source_file=shards.source_file[of_row],
            source_offset=shards.source_offset[of_row],
            source_digest=shards.source_digest[of_row],
            window_start=self.window_start,
            n_tokens=self.length,
        )

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """The micro-batch of these rows."""
        length_B1, first_B1 = self.length[rows][:, None], self.first_target[rows][:, None]
        place_T = np.arange(int(length_B1.max()))
        ids_BT = np.zeros((len(rows), len(place_T)), dtype=np.int64)
        for place, row in enumerate(rows.tolist()):
            start, length = int(self.window_start[row]), int(self.length[row])
            ids_BT[place, :length] = self.shards.tokens_of(int(self.sample[row]), start, start + length)
        mask_BT = place_T < length_B1
        labels_BT = np.where(mask_BT & (place_T >= first_B1), ids_BT, IGNORED)
        ids, labels, mask = map(torch.from_numpy, (ids_BT, labels_BT, mask_BT.astype(np.int64)))
        return Batch(rows, ids, labels, mask)


class Order:
    """Which rows step s takes: epoch after epoch, each a permutation drawn from the seed and its number.

    ``apart``: no step takes a row twice. Where a step reaches over the end of an epoch, rows that it took before that
    end come later in the next epoch: right behind those that the step takes of it. Then ``step_rows`` must be at most
    the number of usable rows.
    """

    def __init__(self, rows: TrainingRows, *, seed: int, step_rows: int, apart: bool = False) -> None:
        self._rows = rows
        self._seed = seed
        self.step_rows = step_rows
        """Rows of one step, over all ranks and micro-batches."""
        self._apart = apart
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every row once; the last may reach into the next epoch."""
        return -(-len(self._rows.usable) // self.step_rows)

    def rows_of(self, step: int) -> NDArray[np.int64]:
        """(step_rows,): places in the row table of step ``step`` (from 0). Ranks and micro-batches take slices."""
        count = len(self._rows.usable)
        places = np.arange(step * self.step_rows, (step + 1) * self.step_rows)
        usable = np.empty(len(places), dtype=np.int64)
        for epoch in np.unique(places // count):
            inside = places // count == epoch
            usable[inside] = self._of_epoch(int(epoch))[places[inside] % count]
        return self._rows.usable[usable]

    def _of_epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._permutation = self._apart_from_before(epoch) if self._apart else self._drawn(epoch)
            self._epoch = epoch
        return self._permutation

    def _drawn(self, epoch: int) -> NDArray[np.int64]:
        key = f"ghoststore/1|training order|seed={self._seed}|epoch={epoch}"
        return np.asarray(draws.permutation(key, len(self._rows.usable)), dtype=np.int64)

    def _apart_from_before(self, epoch: int) -> NDArray[np.int64]:
        """The order of ``epoch``, whose first rows are not those that its first step has of the epoch before."""
        first, permutation = 0, self._permutation
        if 0 <= self._epoch < epoch:
            first = self._epoch
        elif epoch and len(self._rows.usable) >= 2 * self.step_rows:
            # Rows change places within an epoch's first step_rows, so the end of the one before is as it was drawn.
            first, permutation = epoch - 1, self._drawn(epoch - 1)
        else:
            permutation = self._drawn(0)
        for later in range(first + 1, epoch + 1):
            permutation = self._after(permutation, later)
        return permutation

    def _after(self, before: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The order of ``epoch``, ``before`` that of the epoch before it."""
        drawn = self._drawn(epoch)
        shared = epoch * len(before) % self.step_rows
        if not shared:  # a step ends with the epoch
            return drawn
        taken = np.isin(drawn, before[len(before) - shared :])
        ahead = drawn[~taken][: self.step_rows - shared]
        return np.concatenate([ahead, drawn[~np.isin(drawn, ahead)]])
