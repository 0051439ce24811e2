"""Gradients of stored rows, computed again from the model: exact where a part keeps lossy codes.

Legend: D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.checkpoint.load import resolve_device
from ghoststore.corpus import Position, Sample
from ghoststore.errors import MismatchError
from ghoststore.progress import Progress, Silent
from ghoststore.store import Part
from ghoststore.store.part.status import FIRST_UNUSABLE
from indexer.encode.tokens import Row
from query.ask.encoder import PartEncoder
from query.common.texts import corpus_behind

ROWS_AT_ONCE = 1024
BYTES_AT_ONCE = 128 << 20
"""Vectors in memory beside those that are returned."""

Rows = Sequence[int] | NDArray[np.int64]


class RowsAgain:
    """``with RowsAgain(part) as again: vectors = again(rows)``; the model is loaded once.

    With ``blocks`` a vector is the Kronecker blocks of the layers before the sketch; :attr:`groups` says which columns
    are whose. Samples come from the corpus that the part was built from, each checked by its digest.

    Raises MismatchError if checkpoint, tokenizer or projection are not the part's, UsageError if its corpus is gone.
    """

    def __init__(
        self,
        part: Part,
        *,
        checkpoint: str | Path | None = None,
        device: str = "auto",
        blocks: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.part = part
        self._corpus = corpus_behind(part)
        self._encoder = PartEncoder(part, checkpoint=checkpoint, device=resolve_device(device), blocks=blocks)
        self._progress = progress or Silent()

    @property
    def groups(self) -> list[tuple[str, int, int]]:
        """(name, first column, one past the last) of each block."""
        return self._encoder.groups

    @property
    def dimension(self) -> int:
        """D."""
        return self._encoder.dimension

    @property
    def encoder(self) -> PartEncoder:
        """The model and the projection."""
        return self._encoder

    def __enter__(self) -> RowsAgain:
        self._encoder.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._encoder.__exit__(kind, error, trace)

    def __call__(self, rows: Rows) -> Tensor:
        """(rows, D) float32 on the CPU, in the order of ``rows``, which may repeat; zeros where the part has no vector.

        Beside the result, some hundred samples and their vectors are in memory. Reads a compressed corpus from its
        beginning for every 1,024 rows. MismatchError for a sample that is no longer the one that was built from.
        """
        wanted, place = np.unique(np.asarray(rows, dtype=np.int64), return_inverse=True)
        found = torch.zeros(len(wanted), self.dimension)
        at_once = max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // (4 * self.dimension)))
        with closing(self._progress.task("gradients again", len(wanted))) as task:
            for start in range(0, len(wanted), at_once):
                some = wanted[start : start + at_once]
                (usable,) = np.nonzero(np.asarray(self.part.read_rows("status", some)) < FIRST_UNUSABLE)
                task.advance(len(some) - len(usable))
                found[start + usable] = self._encoder.vectors(self.tokens(some[usable]), task)
        return found[place]

    def rows(self, samples: Iterable[Sample]) -> Iterator[Row]:
        """Rows of other ``samples``, tokenized as the part's are."""
        return self._encoder.rows(samples, self._progress.note)

    def vectors(self, rows: Sequence[Row]) -> Tensor:
        """(rows, D) float32 on the CPU: what the model makes of ``rows``, wherever they come from."""
        with closing(self._progress.task("gradients", len(rows))) as task:
            return self._encoder.vectors(rows, task)

    def tokens(self, rows: NDArray[np.int64]) -> list[Row]:
        """``rows`` as they were built, read from the corpus. MismatchError for a sample that has changed."""
        columns = ("source_row", "source_file", "source_offset", "window_start", "source_digest")
        facts = zip(*(map(int, self.part.read_rows(name, rows)) for name in columns), strict=True)
        digests: dict[int, int] = {}
        places: list[Position] = []
        keys: list[tuple[int, int]] = []
        for source_row, file, offset, window_start, digest in facts:
            if source_row not in digests:
                places.append(Position(source_row=source_row, file=file, offset=offset))
            digests[source_row] = digest
            keys.append((source_row, window_start))
        samples = self._corpus.fetch(places)
        changed = [row for row, digest in digests.items() if row not in samples or samples[row].digest() != digest]
        if changed:
            raise MismatchError(
                f"{self._corpus.source} has changed since part {self.part.name!r} was built: {len(changed)} of "
                f"{len(digests)} samples are not those that were built from, the first at row {min(changed)}. Restore "
                "the corpus, or build the part anew"
            )
        made = self._encoder.rows(samples[place.source_row] for place in places)
        by_key = {(row.sample.source_row, row.window_start): row for row in made}
        return [by_key[key] for key in keys]


def vectors_again(
    part: Part,
    rows: Rows,
    *,
    checkpoint: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Tensor:
    """(rows, D) float32: the vectors of ``rows`` before they were encoded. Raises as :class:`RowsAgain`."""
    with RowsAgain(part, checkpoint=checkpoint, device=device, progress=progress) as again:
        return again(rows)
