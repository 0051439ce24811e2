"""The rows of a part, or of a training run, as samples of its corpus, with the score of each: what is chosen from.

Legend: N rows of the part or run, M samples, C candidates, D numbers of a vector.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.store import Part, Run
from query.ask.scorer import Scorer
from query.search.vectors import PartVectors
from query.training_scores.sums import Units

ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Samples:
    """One entry for each sample with a committed row, in the order of the corpus.

    A long sample that was split into windows has the largest score of its windows, and the vector of that window (of
    equal ones the first).
    """

    source: Part | Run
    source_row: NDArray[np.int64]
    """(M,): place in the corpus."""
    score: NDArray[np.float64]
    """(M,): NaN if no row of the sample is usable."""
    best_row: NDArray[np.int64]
    """(M,): row of the part with that score; of a run the first of the sample's."""
    tokens: NDArray[np.int64]
    """(M,): tokens of all rows of the sample. The token that two neighbouring windows share counts once."""
    domain: NDArray[np.int16]
    """(M,): place in the ``domains`` of the source, -1 for none."""
    digest: NDArray[np.uint64]
    """(M,): see `ghoststore.corpus.Sample.digest`."""

    def __len__(self) -> int:
        return len(self.source_row)

    @classmethod
    def of(cls, part: Part, score_N: NDArray[np.float64]) -> Samples:
        """The samples of ``part``, whose rows have the scores ``score_N`` (NaN: unusable)."""
        source, row = part.column("source_row"), part.row_numbers
        first = np.flatnonzero(np.diff(source, prepend=-1))
        rows_of = np.diff(first, append=len(source))
        score = np.nan_to_num(score_N[row], nan=-np.inf)
        highest = np.maximum.reduceat(score, first)
        at_best = np.flatnonzero(score == np.repeat(highest, rows_of))
        best_row = row[at_best[np.searchsorted(at_best, first)]]
        return cls(
            source=part,
            source_row=source[first],
            score=np.where(np.isfinite(highest), highest, np.nan),
            best_row=best_row,
            tokens=np.add.reduceat(part.column("n_tokens").astype(np.int64), first) - (rows_of - 1),
            domain=part.column("domain")[first],
            digest=part.column("source_digest")[first],
        )

    @classmethod
    def of_run(cls, run: Run, units: Units, score_M: NDArray[np.float64]) -> Samples:
        """The samples of ``units``, each with its score: NaN for one that has none."""
        count, first = len(run.rows), units.first_row
        unit, n_tokens = units.of(np.arange(count)), run.rows.read("n_tokens", 0, count).astype(np.float64)
        windows = np.bincount(unit, minlength=len(first))
        return cls(
            source=run,
            source_row=run.rows.read("source_row", 0, count)[first],
            score=score_M,
            best_row=first,
            tokens=np.bincount(unit, n_tokens, minlength=len(first)).astype(np.int64) - (windows - 1),
            domain=units.domain,
            digest=run.rows.read("source_digest", 0, count)[first],
        )

    @property
    def name(self) -> str:
        """The source, for messages."""
        return f"{self.source.kind.name} {self.source.name!r}"

    def place_of(self, source_row: int) -> tuple[str | None, int]:
        """(the part, the place in its own corpus) of a sample of several parts; of one part (None, its place)."""
        if not isinstance(self.source, Part) or len(self.source.members) == 1:
            return None, source_row
        before = [self.source.first_source_row(part) for part in self.source.members]
        place = bisect_right(before, source_row) - 1
        return self.source.members[place].name, source_row - before[place]

    def ids(self, places: NDArray[np.int64]) -> list[str]:
        """Of some of them."""
        table = self.source if isinstance(self.source, Part) else self.source.rows
        return [str(name) for name in table.read_rows("sample_id", self.best_row[places].tolist())]

    @property
    def usable(self) -> NDArray[np.bool_]:
        """(M,): whether the sample has a score."""
        return np.isfinite(self.score)


def vectors_of(scorer: Scorer, rows: NDArray[np.int64], *, unit: bool) -> Tensor:
    """(C, D) float32 on the device of ``scorer``: vectors whose inner products are the similarities of ``rows``.

    The similarity of two rows is Σ over parts of weight · ⟨g, g'⟩ ÷ Σ weights, over the chosen layers, and
    preconditioned if the scores are. With ``unit`` it is the cosine instead of ⟨g, g'⟩; a row of zeros stays zero.
    CorruptError for damaged rows.
    """
    weight_sum = sum(abs(term.weight) for term in scorer.terms)
    pieces = []
    for term in scorer.terms:
        vectors_CD = PartVectors(term.part, scorer.device).gather(rows)
        if term.preconditioner is not None:
            for first in range(0, len(rows), ROWS_AT_ONCE):
                batch_RD = vectors_CD[first : first + ROWS_AT_ONCE]
                batch_RD.copy_(term.preconditioner.whitened(batch_RD))
        if term.groups is not None:
            spans = [term.part.groups[group][1:] for group in term.groups]
            vectors_CD = torch.cat([vectors_CD[:, start:stop] for start, stop in spans], dim=1)
        if unit:
            vectors_CD /= vectors_CD.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        pieces.append(vectors_CD.mul_((abs(term.weight) / weight_sum) ** 0.5))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
