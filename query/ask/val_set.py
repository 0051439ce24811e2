"""A val set through the same model, tokens and projection as the part it is compared with."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.corpus import Corpus
from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.store import Status
from indexer.encode.tokens import Row
from query.ask.encoder import PartEncoder
from query.ask.question import Grouping

ROWS_AT_ONCE = 1024


@dataclass(slots=True, kw_only=True)
class ValVectors:
    """What a val set became: one vector a val sample, a domain, or for all."""

    vectors: Tensor
    """(M, D) float32 on the CPU."""
    ids: list[str]
    """One each for a vector: the sample's id, the domain, or ``mean``."""
    used: int
    """Val rows that have a vector."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Val rows without one, by status."""
    rows_of: dict[str, int] = field(default_factory=dict)
    """Val rows of each mean."""
    places: list[int] = field(default_factory=list)
    """With ``each``: the place in the val set, from 0, of the sample that each vector is of. Ids may repeat."""
    digest: int = 0
    """Hash of which val rows have a vector: their samples' places and first tokens."""

    def note_left_out(self, progress: Progress) -> None:
        """Say how many val rows have no vector, and why."""
        if self.left_out:
            shown = ", ".join(f"{count} {status}" for status, count in sorted(self.left_out.items()))
            progress.note(f"val rows left out: {shown}; {self.used} are used")


def encode_val_set(
    encoder: PartEncoder, corpus: Corpus, *, grouping: Grouping, max_samples: int | None, progress: Progress
) -> ValVectors:
    """Vectors of every usable row of ``corpus``, or their mean (over rows, in float64): of all, or of each domain.

    Rows that cannot be used (too short, masked, not finite) are left out and counted. UsageError if none is left, or
    one has no domain where domains are asked for.
    """
    sums: dict[str, NDArray[np.float64]] = {}
    counts: Counter[str] = Counter()
    ids: list[str] = []
    places: list[int] = []
    used_rows, which = 0, xxhash.xxh3_64()
    pieces: list[Tensor] = []
    left_out: Counter[str] = Counter()
    rows = encoder.rows(islice(corpus.samples(), max_samples))
    with closing(progress.task("val set", None)) as task:
        while some := list(islice(rows, ROWS_AT_ONCE)):
            vectors = encoder.vectors(some, task)
            finite = torch.isfinite(vectors).all(1)
            fates = [
                row.status if finite[place] or not row.status.usable else Status.NOT_FINITE
                for place, row in enumerate(some)
            ]
            used = [place for place, fate in enumerate(fates) if fate.usable]
            used_rows += len(used)
            for place in used:
                which.update(f"{some[place].sample.source_row} {some[place].window_start};".encode())
            left_out.update(fate.name.lower() for fate in fates if not fate.usable)
            if grouping == "each":
                ids += [some[place].sample.id for place in used]
                places += [some[place].sample.source_row for place in used]
                pieces.append(vectors[used])
                continue
            for label, members in _by_label([some[place] for place in used], used, grouping).items():
                sums[label] = sums.get(label, np.zeros(encoder.dimension)) + vectors[members].double().sum(0).numpy()
                counts[label] += len(members)
    if not ids and not counts:
        raise UsageError(f"no row of the val set {corpus.source} can be used: {dict(left_out)}")
    if grouping != "each":
        ids = sorted(sums)
        pieces = [torch.from_numpy((sums[label] / counts[label]).astype(np.float32)).unsqueeze(0) for label in ids]
    return ValVectors(
        vectors=torch.cat(pieces),
        ids=ids,
        used=used_rows,
        left_out=dict(left_out),
        rows_of=dict(counts),
        places=places,
        digest=which.intdigest(),
    )


def _by_label(rows: list[Row], places: list[int], grouping: Grouping) -> dict[str, list[int]]:
    """``places`` by the domain of their rows, or all under ``mean``."""
    by_label: dict[str, list[int]] = {}
    for row, place in zip(rows, places, strict=True):
        label = "mean" if grouping == "mean" else row.sample.domain
        if label is None:
            raise UsageError(
                f"val sample {row.sample.id!r} (row {row.sample.source_row}) has no group: the field of --group-field "
                "is null there"
            )
        by_label.setdefault(label, []).append(place)
    return by_label
