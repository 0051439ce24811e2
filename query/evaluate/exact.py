"""Scores of the exact, unprojected gradients of a part's rows: what its own scores are an approximation of.

Each val sample and each row goes through the model of the part's checkpoint alone, and plain autograd gives its
gradient. That is slow: inner products over the layers, and over the rest, are computed once for all methods, and kept.

Legend: V val samples, N samples of the corpus, R rows of the part (samples, or windows of long ones).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.store import Part
from ghoststore.store.base.records import json_digest
from indexer.encode.tokens import Row
from query.ask.encoder import PartEncoder
from query.evaluate.exact_blocks import Block, BlockFiles, grid
from query.evaluate.predictors import EXACT, by_sample
from query.exact.products import HeldVals, Products, Share, vals_at_once
from query.fidelity.fidelity import exactly, metric_words, passes_over_rows, pieces_of, scaled
from query.fidelity.reference import exact_identity

ROWS_AT_ONCE = 512
"""Of a block: what a killed command computes again, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactScores:
    """Scores of exact gradients for the val samples ``vals``; their products are kept below ``folder``.

    A folder is of one val set. In it, parts of the same checkpoint, rows, tokens, loss and layers share their products,
    whatever their projections.
    """

    encoder: PartEncoder
    """Of the part; the first product that is missing takes its model over."""
    vals: list[Row]
    """As the part's tokens are made."""
    val_fingerprint: str
    samples: int
    """N."""
    folder: Path
    progress: Progress

    @property
    def part(self) -> Part:
        """The part whose rows are scored."""
        return self.encoder.part

    @property
    def ids(self) -> list[str]:
        """Of the val samples; they may repeat."""
        return [row.sample.id for row in self.vals]

    def refuse(self, method: str) -> None:
        """UsageError where the part cannot have ``method``."""
        if scaled(self.part) and "rest" in EXACT[method][0]:
            raise UsageError(
                f"`methods={method}`: the vectors of part {self.part.name!r} are in the metric of its layers "
                f"({metric_words(self.part)}), which is not known of all parameters; give exact-layers-dot or "
                "exact-layers-cosine, or `part` one of plain gradients"
            )

    def of(self, method: str) -> NDArray[np.float64]:
        """(V, N): the scores of ``method``, one of `EXACT`, summed over the windows of a sample.

        As with stored scores: 0 for a row that the part does not have or marks as unusable, and for one whose exact
        gradient is not finite; UsageError for a val sample that cannot be used, whose exact gradient is not finite, or
        is zero. Only the parameters count that the method is over.

        MismatchError if what ``folder`` keeps is of another val set, CorruptError if it is damaged; where products are
        missing, BusyError if another process computes them, and what `PartEncoder.source_rows` raises. Memory: some
        numbers a val sample and row, and val gradients as :func:`vals_at_once` says.
        """
        self.refuse(method)
        shares, metric = EXACT[method]
        places_R = self.part.row_numbers[self.part.usable()]
        products = self._products(places_R, shares)
        _refuse_useless(self.ids, products.val_Q)
        self.part.refuse_hollow()
        scores_VR = np.full((len(self.vals), self.part.layout.rows), np.nan)
        scores_VR[:, places_R] = _known(products).scores(metric)
        return by_sample(scores_VR, self.part, self.samples)

    def _products(self, places_R: NDArray[np.int64], shares: Sequence[Share]) -> Products:
        """Those of the rows ``places_R`` over ``shares``, from the folder or made now."""
        at_once = vals_at_once(self._numbers)
        blocks = grid(len(self.vals), at_once, len(places_R), ROWS_AT_ONCE)
        files = self._files(places_R, at_once)
        products = Products.empty(len(self.vals), len(places_R))
        missing = []
        for block in blocks:
            done = files.read(block)
            if done is None:
                missing.append(block)
            else:
                products.put(block.vals, block.rows, _over(shares, done))
        if missing:
            with files.writing():
                for block, made in self._compute(blocks, missing, places_R, shares):
                    files.write(block, made)
                    products.put(block.vals, block.rows, _over(shares, made))
        return products

    @property
    def _numbers(self) -> int:
        """Numbers of a gradient: of all parameters, or of the layers where only their scales are known."""
        return int(self.part.manifest["coverage"]["covered" if scaled(self.part) else "total"])

    def _files(self, places_R: NDArray[np.int64], at_once: int) -> BlockFiles:
        identity = json_digest(
            {
                **exact_identity(self.part),
                "dtype": self.part.manifest["dtype"]["model"],
                "rows": hashlib.sha256(places_R.astype("<i8").tobytes()).hexdigest(),
            }
        )
        sections = {
            "part": identity,
            "val": {"fingerprint": self.val_fingerprint, "samples": len(self.vals)},
            "grid": {"vals": at_once, "rows": ROWS_AT_ONCE},
        }
        return BlockFiles(self.folder / identity[:16], sections)

    def _compute(
        self, blocks: Sequence[Block], missing: Sequence[Block], places_R: NDArray[np.int64], shares: Sequence[Share]
    ) -> Iterator[tuple[Block, dict[Share, Products]]]:
        """The ``missing`` ones of ``blocks``; UsageError for val samples that have no score over ``shares``."""
        pieces = pieces_of(self.encoder)
        exact = exactly(self.encoder, pieces)
        passes_over_rows(self._numbers, len(self.vals), self.progress)
        total, todo = _gradients(blocks), _gradients(missing)
        with closing(self.progress.task("exact gradients", total, total - todo)) as task:
            for (start, stop), same_vals in groupby(missing, key=lambda block: (block.vals.start, block.vals.stop)):
                held = HeldVals(exact, pieces, self.vals[start:stop], task)
                _refuse_useless(self.ids[start:stop], sum((held.squares[share] for share in shares), np.zeros(1)))
                for block in same_vals:
                    yield block, held.products(self.encoder.source_rows(places_R[block.rows]), task)
                del held  # before the next are held


def _over(shares: Sequence[Share], products: Mapping[Share, Products]) -> Products:
    """Over the parameters of all ``shares``."""
    first, *others = (products[share] for share in shares)
    return sum(others, first)


def _known(products: Products) -> Products:
    """NaN where anything is not finite."""
    row_R = np.where(np.isfinite(products.row_R), products.row_R, np.nan)
    known = np.isfinite(products.dots_QR) & np.isfinite(row_R)
    return Products(np.where(known, products.dots_QR, np.nan), products.val_Q, row_R)


def _refuse_useless(ids: Sequence[str], squares_V: NDArray[np.float64]) -> None:
    """UsageError for val samples that score every row the same, or none."""
    for useless_V, problem in ((~np.isfinite(squares_V), "not finite"), (squares_V == 0, "zero")):
        if useless_V.any():
            name = ids[int(useless_V.argmax())]
            raise UsageError(f"the exact gradient of val sample {name!r} is {problem}: leave it out of the val set")


def _gradients(blocks: Sequence[Block]) -> int:
    """How many gradients are computed for ``blocks``."""
    of_vals = {block.vals.start: block.vals.stop for block in blocks}
    of_rows = [(block.rows.start, block.rows.stop) for block in blocks]
    return sum(int(stop - start) for start, stop in [*of_vals.items(), *of_rows])
