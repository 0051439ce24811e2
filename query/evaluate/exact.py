"""Scores by the exact, unprojected gradients of a part's rows, which the scores of the part approximate.

Each val sample and each row goes through the model of the part's checkpoint alone, and plain autograd gives its
gradient. That is slow, so the inner products are computed once for all methods and kept: over the layers of the part,
and over the rest of the parameters.

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
from query.fidelity.fidelity import exact_gradients, has_own_metric, own_metric, passes_over_rows, pieces_of
from query.fidelity.reference import exact_identity

ROWS_AT_ONCE = 512
"""Rows of a block. A killed command loses at most one block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactScores:
    """Scores by exact gradients for the val samples ``vals``. Inner products are kept in ``folder``.

    A folder is for one val set. Parts of the same checkpoint, rows, tokens, loss and layers share the products in it,
    whatever their projections.
    """

    encoder: PartEncoder
    """The encoder of the part. Its model cannot be used otherwise once a missing product is computed."""
    vals: list[Row]
    """The val samples, tokenized as the part's rows are."""
    val_fingerprint: str
    samples: int
    """N, the number of samples of the corpus."""
    folder: Path
    progress: Progress

    @property
    def part(self) -> Part:
        """The part whose rows are scored."""
        return self.encoder.part

    @property
    def ids(self) -> list[str]:
        """The ids of the val samples; they may repeat."""
        return [row.sample.id for row in self.vals]

    def refuse(self, method: str) -> None:
        """UsageError if ``method`` is impossible for the part."""
        if has_own_metric(self.part) and "rest" in EXACT[method][0]:
            raise UsageError(
                f"`methods={method}`: the vectors of part {self.part.name!r} are in the metric of its layers "
                f"({own_metric(self.part)}), which is not known of all parameters; give exact-layers-dot or "
                "exact-layers-cosine, or `part` one of plain gradients"
            )

    def of(self, method: str) -> NDArray[np.float64]:
        """(V, N) float64: the scores of ``method``, one of `EXACT`, summed over the windows of a sample.

        As with stored scores, the score is 0 for a row that is not committed, not usable, or has an exact gradient that
        is not finite. UsageError for a val sample whose exact gradient, over the parameters of the method, is not
        finite or is zero.

        MismatchError if ``folder`` is of another val set, CorruptError if it is damaged. If products are missing, also
        BusyError while another process computes them, and what `PartEncoder.source_rows` raises. Memory: a few numbers
        for each val sample and row, and as many val gradients as :func:`vals_at_once` says.
        """
        self.refuse(method)
        shares, metric = EXACT[method]
        places_R = self.part.row_numbers[self.part.usable()]
        products = self._products(places_R, shares)
        _refuse_useless(self.ids, products.val_Q)
        self.part.refuse_hollow()
        scores_VR = np.full((len(self.vals), self.part.layout.rows), np.nan)
        scores_VR[:, places_R] = _finite_products(products).scores(metric)
        return by_sample(scores_VR, self.part, self.samples)

    def _products(self, places_R: NDArray[np.int64], shares: Sequence[Share]) -> Products:
        """The products of the rows ``places_R`` over ``shares``, read from the folder or computed now."""
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
                products.put(block.vals, block.rows, _summed(shares, done))
        if missing:
            with files.writing():
                for block, computed in self._compute(blocks, missing, places_R, shares):
                    files.write(block, computed)
                    products.put(block.vals, block.rows, _summed(shares, computed))
        return products

    @property
    def _numbers(self) -> int:
        """Numbers of a gradient: over all parameters, or over the layers if the part has a metric of its layers."""
        return int(self.part.manifest["coverage"]["covered" if has_own_metric(self.part) else "total"])

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
        """Compute the ``missing`` ones of all ``blocks``. UsageError for val samples without a score over
        ``shares``.
        """
        pieces = pieces_of(self.encoder)
        exact = exact_gradients(self.encoder, pieces)
        passes_over_rows(self._numbers, len(self.vals), self.progress)
        total, todo = _gradients(blocks), _gradients(missing)
        with closing(self.progress.task("exact gradients", total, total - todo)) as task:
            for (start, stop), same_vals in groupby(missing, key=lambda block: (block.vals.start, block.vals.stop)):
                held_vals = HeldVals(exact, pieces, self.vals[start:stop], task)
                _refuse_useless(self.ids[start:stop], sum((held_vals.squares[share] for share in shares), np.zeros(1)))
                for block in same_vals:
                    yield block, held_vals.products(self.encoder.source_rows(places_R[block.rows]), task)
                del held_vals  # frees the memory for the next val gradients


def _summed(shares: Sequence[Share], products: Mapping[Share, Products]) -> Products:
    """The products over the parameters of all ``shares`` together."""
    first, *others = (products[share] for share in shares)
    return sum(others, first)


def _finite_products(products: Products) -> Products:
    """The products with NaN for rows and pairs that are not finite."""
    row_R = np.where(np.isfinite(products.row_R), products.row_R, np.nan)
    finite = np.isfinite(products.dots_QR) & np.isfinite(row_R)
    return Products(np.where(finite, products.dots_QR, np.nan), products.val_Q, row_R)


def _refuse_useless(ids: Sequence[str], squares_V: NDArray[np.float64]) -> None:
    """UsageError for a val sample whose squared length is not finite or is zero: it cannot rank rows."""
    for useless_V, problem in ((~np.isfinite(squares_V), "not finite"), (squares_V == 0, "zero")):
        if useless_V.any():
            name = ids[int(useless_V.argmax())]
            raise UsageError(f"the exact gradient of val sample {name!r} is {problem}: leave it out of the val set")


def _gradients(blocks: Sequence[Block]) -> int:
    """How many gradients must be computed for ``blocks``."""
    of_vals = {block.vals.start: block.vals.stop for block in blocks}
    of_rows = [(block.rows.start, block.rows.stop) for block in blocks]
    return sum(int(stop - start) for start, stop in [*of_vals.items(), *of_rows])
