"""The random sample of rows and val samples that ``fidelity`` and ``plot_error`` measure, tokenized as in the build.

Legend: Q val samples, R rows, D numbers of a stored vector.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.corpus import Fields, Sample, open_corpus
from ghoststore.errors import CheckpointError, CorpusError, UsageError
from ghoststore.progress import Progress
from ghoststore.settings.question import RebuiltOptions
from ghoststore.settings.shared import Data
from ghoststore.store import Part
from indexer.encode.tokens import Row
from query.ask.encoder import PartEncoder
from query.common.texts import corpus_behind

LEAST_ROWS = 11
"""Least number of rows: with fewer, recall@10 would say nothing."""
VAL_SHARE = 5
"""If the part has too few rows, one row in five serves as a val sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSpec:
    """How many rows and val samples to draw, and from where. The fields are options of ``ghoststore.fidelity``.

    UsageError for numbers out of range.
    """

    rows: int
    val_samples: int
    seed: int = 0
    val_set: Data | None = None
    """Where to draw val samples from. Default: rows of the part, which then are not ranked."""
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
        """(rows to rank, rows that serve as val samples), ascending and without overlap. All are usable in ``part`` and
        in ``others``. UsageError if the part has too few.
        """
        usable = reduce(np.intersect1d, (source.row_numbers[source.usable()] for source in (part, *others)))
        vals = 0 if self.val_set is not None else self.val_samples
        if len(usable) < self.rows + vals:
            vals = min(vals, len(usable) // VAL_SHARE)
        rows = min(self.rows, len(usable) - vals)
        if rows < LEAST_ROWS or (self.val_set is None and not vals):
            raise UsageError(
                f"part {part.name!r} has {len(usable)} usable rows: too few to measure a ranking of {LEAST_ROWS} or "
                "more"
                + ("" if self.val_set is not None else " with val samples that are not among them; give `val_set`")
            )
        if rows < self.rows:
            progress.note(f"part {part.name!r} has {len(usable):,} usable rows: {rows:,} are ranked")
        sample = np.random.default_rng(self.seed).choice(usable, rows + vals, replace=False)
        return np.sort(sample[vals:]), np.sort(sample[:vals])

    def read_vals(self, encoder: PartEncoder, places: NDArray[np.int64], progress: Progress) -> list[Row]:
        """The usable val samples: the rows ``places`` of the part or, with ``val_set``, ``val_samples`` samples of
        that.
        """
        if self.val_set is None:
            return encoder.source_rows(places)
        with open_corpus(self.val_set, self.fields or Fields(), progress) as corpus:
            corpus.cut_stream(encoder.max_length)
            encoder.refuse_beyond(corpus.samples())  # checks all samples, so that the draw does not matter
            samples = reservoir(corpus.samples(), self.val_samples, self.seed)
        usable = [row for row in encoder.rows(samples) if row.status.usable]
        if not usable:
            raise UsageError(f"none of the {len(samples)} samples drawn from {corpus.source} can be used")
        return usable


@dataclass(frozen=True, slots=True)
class RowSample:
    """The rows and val samples that were drawn, with their tokens."""

    places: NDArray[np.int64]
    """(R,): the numbers of the rows in the part."""
    rows: list[Row]
    vals: list[Row]
    queries_QD: Tensor
    """(Q, D) float32: the val samples as a query encodes them."""


def take_sample(encoder: PartEncoder, spec: SampleSpec, progress: Progress, *others: Part) -> RowSample:
    """Draw and read rows and val samples of the part of ``encoder``. The rows are usable in ``others``, too."""
    places, held_out = spec.choose(encoder.part, progress, *others)
    vals = spec.read_vals(encoder, held_out, progress)
    return RowSample(places, encoder.source_rows(places), vals, encoder.vectors(vals))


def open_encoder(part: Part, what: str, options: RebuiltOptions, progress: Progress) -> PartEncoder:
    """The encoder of ``part`` with its corpus open. If checkpoint or corpus are gone, the error says that ``what``
    cannot be measured without them.
    """
    try:
        corpus = corpus_behind(part, options.data)  # opened before the model is loaded, which takes longer
        return PartEncoder(
            part,
            checkpoint=options.checkpoint,
            base=options.base,
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
    """``count`` random ``samples`` in their order, each with the same probability (Vitter 1985, algorithm R)."""
    rng = np.random.default_rng(seed)
    drawn: list[Sample] = []
    for place, sample in enumerate(samples):
        if place < count:
            drawn.append(sample)
        elif (slot := int(rng.integers(0, place + 1))) < count:
            drawn[slot] = sample
    return sorted(drawn, key=lambda sample: sample.source_row)
