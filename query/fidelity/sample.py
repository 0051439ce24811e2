"""The few rows and val samples of a part that are measured: drawn by a seed, tokenized as the build did.

Legend: Q val samples, R rows, D numbers of a stored vector.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.corpus import Fields, Sample, open_corpus
from ghoststore.errors import CheckpointError, CorpusError, UsageError
from ghoststore.progress import Progress
from ghoststore.settings.question import RebuiltOptions
from ghoststore.store import Part
from indexer.encode.tokens import Row
from query.ask.encoder import PartEncoder
from query.common.texts import corpus_behind

LEAST_ROWS = 11
"""Of recall@10 to say anything."""
VAL_SHARE = 5
"""Where the part has fewer rows than are asked for, one in five is a val sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSpec:
    """Which rows and val samples; fields have the names of the options. UsageError where they cannot be."""

    rows: int
    val_samples: int
    seed: int = 0
    val_set: str | Path | None = None
    """Default: rows of the part, which are not ranked then."""
    fields: Fields | None = None

    def __post_init__(self) -> None:
        if self.rows < LEAST_ROWS:
            raise UsageError(f"`rows` must be at least {LEAST_ROWS}, not {self.rows}: recall@10 is measured")
        if self.val_samples < 1:
            raise UsageError(f"`val_samples` must be at least 1, not {self.val_samples}")
        if self.seed < 0:
            raise UsageError(f"`seed` must be 0 or more, not {self.seed}")
        if self.val_set is None and self.fields is not None and self.fields != Fields():
            raise UsageError("fields of a val set belong to `val_set`: without it rows of the part are val samples")

    def choose(self, part: Part, progress: Progress, *others: Part) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(rows to rank, rows that are val samples), different, usable in ``part`` and ``others``, ascending."""
        usable = reduce(np.intersect1d, (one.row_numbers[one.usable()] for one in (part, *others)))
        vals = 0 if self.val_set is not None else self.val_samples
        if len(usable) < self.rows + vals:
            vals = min(vals, len(usable) // VAL_SHARE)
        rows = min(self.rows, len(usable) - vals)
        if rows < LEAST_ROWS or (self.val_set is None and not vals):
            raise UsageError(
                f"part {part.name!r} has {len(usable)} usable rows: too few to measure a ranking of {LEAST_ROWS} or "
                "more" + ("" if self.val_set else " with val samples that are not among them; give `val_set`")
            )
        if rows < self.rows:
            progress.note(f"part {part.name!r} has {len(usable):,} usable rows: {rows:,} are ranked")
        sample = np.random.default_rng(self.seed).choice(usable, rows + vals, replace=False)
        return np.sort(sample[vals:]), np.sort(sample[:vals])

    def read_vals(self, encoder: PartEncoder, places: NDArray[np.int64], progress: Progress) -> list[Row]:
        """The val samples: the rows ``places``, or as many of ``val_set``, sampled; those that cannot be used are left
        out.
        """
        if self.val_set is None:
            return encoder.source_rows(places)
        with open_corpus(str(self.val_set), self.fields or Fields(), progress) as corpus:
            encoder.refuse_beyond(corpus.samples())  # whichever rows are drawn
            samples = reservoir(corpus.samples(), self.val_samples, self.seed)
        usable = [row for row in encoder.rows(samples) if row.status.usable]
        if not usable:
            raise UsageError(f"none of the {len(samples)} samples drawn from {self.val_set} can be used")
        return usable


@dataclass(frozen=True, slots=True)
class RowSample:
    """Rows and val samples, read; and how a part sees them."""

    places: NDArray[np.int64]
    """(R,): the rows in the part."""
    rows: list[Row]
    vals: list[Row]
    queries_QD: Tensor
    """(Q, D) float32: the val samples as a query encodes them."""


def take_sample(encoder: PartEncoder, spec: SampleSpec, progress: Progress, *others: Part) -> RowSample:
    """Of the part of ``encoder``, rows that ``others`` have, too."""
    places, held_out = spec.choose(encoder.part, progress, *others)
    vals = spec.read_vals(encoder, held_out, progress)
    return RowSample(places, encoder.source_rows(places), vals, encoder.vectors(vals))


def open_encoder(part: Part, what: str, options: RebuiltOptions, progress: Progress) -> PartEncoder:
    """The encoder of ``part``, its corpus open, too. Where the checkpoint or the corpus is gone, the error says that
    ``what`` cannot be done for that.
    """
    try:
        corpus = corpus_behind(part, options.data)  # before the model, which takes longer
        return PartEncoder(
            part,
            checkpoint=options.checkpoint,
            tokenizer=options.tokenizer,
            device=options.device,
            corpus=corpus,
            progress=progress,
        )
    except CheckpointError as error:
        raise CheckpointError(
            f"{what} of part {part.name!r} cannot be measured without its checkpoint: {error}"
        ) from error
    except CorpusError as error:
        raise CorpusError(f"{what} of part {part.name!r} cannot be measured without its corpus: {error}") from error
    except UsageError as error:
        raise UsageError(f"{what} of part {part.name!r} cannot be measured: {error}") from error


def reservoir(samples: Iterable[Sample], count: int, seed: int) -> list[Sample]:
    """``count`` of ``samples``, each as likely as any, in their order (Vitter 1985, algorithm R)."""
    rng = np.random.default_rng(seed)
    held: list[Sample] = []
    for place, sample in enumerate(samples):
        if place < count:
            held.append(sample)
        elif (slot := int(rng.integers(0, place + 1))) < count:
            held[slot] = sample
    return sorted(held, key=lambda sample: sample.source_row)
