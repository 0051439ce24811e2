"""``ghoststore.plot_error``: the error of inner products over the numbers of a vector, for several parts of one corpus.

Legend: Q val samples, R rows, N numbers of the naive projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghoststore.corpus import source_name
from ghoststore.errors import UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import part_of, takes
from ghoststore.settings.measure import PlotErrorOptions
from ghoststore.settings.question import RebuiltOptions
from ghoststore.shown import json_text
from ghoststore.store import Part, Store
from ghoststore.store.base.new_files import check_new, new_files
from ghoststore.store.part.metric import metric_for
from indexer.encode.tokens import Row
from query.ask.encoder import PartEncoder
from query.common.output import check_picture
from query.exact.gradients import ExactGradients
from query.exact.products import MEMORY, Pieces, Products
from query.fidelity.agreement import Agreement, Estimate, Resampler, agreement
from query.fidelity.dense import DenseProjection
from query.fidelity.fidelity import (
    exact_gradients,
    finite_pairs,
    has_own_metric,
    measure_exactly,
    own_metric,
    pieces_of,
    vector_products,
)
from query.fidelity.plot import draw_errors
from query.fidelity.reference import MORE_PARTS, fitting_parts, parse_reference, part_of_rank
from query.fidelity.sample import SampleSpec, open_encoder, take_sample
from query.fidelity.theory import PairMoments, dense_error, kronecker_error
from query.search.part_score import Metric

PAIRS = 16
"""Number of pairs of gradients that the theoretical Kronecker error is averaged over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorPoint:
    """One part compared with the reference. Errors are those of inner products, divided by |g||h| of the reference."""

    part: str
    numbers: int
    """Numbers of a vector."""
    rank_total: int | str | None
    compress: int | None
    kind: str
    dtype: str
    mean_error: Estimate
    rms_error: Estimate
    agreement: Agreement
    """Agreement of the scores by ``metric``."""
    theory_dense: float
    """Theoretical mean error of a dense gaussian projection to as many numbers."""
    theory_rms: float | None
    """Theoretical root mean square error of gaussian Kronecker blocks (and a sketch) of this part's ranks, for pairs of
    these gradients. None for other kinds of matrices, and for references other than ``full_layers``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorCurve:
    """What ``ghoststore.plot_error`` returns. ``points`` are in the order of the numbers of a vector."""

    store: str
    reference: str
    metric: str
    rows: int
    val_samples: int
    val_set: str | None
    seed: int
    points: list[ErrorPoint]
    plot: str
    numbers_file: str

    def to_json(self) -> dict[str, Any]:
        """The document in the .json file beside the picture, which ``ghoststore plot-error --json`` prints, too."""
        return asdict(self)


@takes(PlotErrorOptions)
def plot_error(options: PlotErrorOptions) -> ErrorCurve:
    """Compare the inner products of several parts of one corpus, checkpoint and choice of layers with a reference.

    ``part`` names the parts (default: all of the store). ``reference`` is ``full_layers`` (exact gradients of the
    projected layers), ``full`` (of all parameters), ``rank=N`` (the part that was built with a rank total of N) or
    ``naive_proj_layers=N`` (one dense gaussian projection of the layers' exact gradients to N numbers). Rows and val
    samples are drawn as in :func:`ghoststore.fidelity`. Spearman's correlation and recall@10 are those of scores by
    ``metric``; errors are always those of inner products ÷ (|g||h|).

    ``out`` is a new .png, .pdf or .svg file; the numbers are written beside it as .json.

    Raises MismatchError for parts that do not fit together, UsageError if there is no part to compare, and what
    ``ghoststore.fidelity`` raises.
    """
    progress, path = options.progress or Silent(), Path(options.out)
    numbers = path.with_suffix(".json")
    check_picture(path, "out", beside=[numbers])
    check_new(f"the file of numbers beside `out={path}`, {numbers},", numbers, path)
    mode, number = parse_reference(options.reference)
    spec = part_of(SampleSpec, options)
    parts = fitting_parts(
        Store.open(options.store), [options.part] if isinstance(options.part, str) else list(options.part or ())
    )
    metric = metric_for(options.metric, parts)
    if mode == "full" and has_own_metric(parts[0]):
        raise UsageError(
            f"`reference=full`: the vectors of these parts are in a metric of their layers ({own_metric(parts[0])}), "
            "which is not known of all parameters; give full_layers"
        )
    target = part_of_rank(parts, number) if mode == "rank" else None
    if len(parts) - (target is not None) == 1:
        progress.note(f"one part is one point, and no curve: {MORE_PARTS}")
    measure = _Measure(parts, spec, options, progress)
    by_vectors = {part.name: measure.by_vectors(part) for part in parts}
    if target is not None:
        truth, parts = by_vectors[target.name], [part for part in parts if part is not target]
    else:
        truth = measure.reference(mode, number)
    pairs = measure.pairs() if mode == "full_layers" else []
    reference_numbers = target.layout.dimension if target else number if mode == "naive_proj_layers" else None
    finite = finite_pairs([truth], progress)
    truth = truth.only(*finite)
    points = [
        _point(part, by_vectors[part.name].only(*finite), truth, metric, options.seed, reference_numbers, pairs)
        for part in sorted(parts, key=lambda part: (part.layout.dimension, part.name))
    ]
    curve = ErrorCurve(
        store=str(options.store),
        reference=options.reference,
        metric=metric,
        rows=truth.dots_QR.shape[1],
        val_samples=truth.dots_QR.shape[0],
        val_set=None if options.val_set is None else source_name(options.val_set),
        seed=options.seed,
        points=points,
        plot=str(path),
        numbers_file=str(numbers),
    )
    _write(curve, path, reference_numbers)
    return curve


class _Measure:
    """The inner products of one sample of rows and val samples: by the vectors of each part, and by exact gradients.

    The model is loaded once for all parts with the same dtype and compute settings.
    """

    def __init__(self, parts: Sequence[Part], spec: SampleSpec, options: RebuiltOptions, progress: Progress) -> None:
        self._seed, self._options, self._progress = spec.seed, options, progress
        self._encoder = open_encoder(parts[0], "the error", options, progress)
        self._sample = take_sample(self._encoder, spec, progress, *parts[1:])
        self._pieces: Pieces = pieces_of(self._encoder)

    def _open(self, part: Part) -> PartEncoder:
        return open_encoder(part, "the error", self._options, self._progress)

    def by_vectors(self, part: Part) -> Products:
        """The products by the vectors of ``part``."""
        sample, first = self._sample, self._encoder.part
        if part is not first:
            same = all(part.manifest[name] == first.manifest[name] for name in ("dtype", "compute"))
            encoder = self._encoder.for_part(part) if same else self._open(part)
            sample = replace(sample, queries_QD=encoder.vectors(sample.vals))
        return vector_products(part, sample)

    def reference(self, mode: str, number: int) -> Products:
        """The products by exact gradients. ``number`` is N of the naive projection."""
        if mode == "naive_proj_layers":
            return self._naive(number)
        exact = exact_gradients(self._encoder, self._pieces, layers_alone=mode == "full_layers")
        products = measure_exactly(exact, self._pieces, self._sample, self._progress)
        return products["layers"] if mode == "full_layers" else products["layers"] + products["rest"]

    def pairs(self) -> list[PairMoments]:
        """The moments of random pairs of a val sample and a row, for the theory."""
        exact = exact_gradients(self._encoder, self._pieces, layers_alone=True)
        rng = np.random.default_rng(self._seed)
        moments = []
        with closing(self._progress.task("theory", PAIRS)) as task:
            for _ in range(PAIRS):
                pair = [rows[int(rng.integers(len(rows)))] for rows in (self._sample.vals, self._sample.rows)]
                first, second = (exact(row) for row in pair)
                if first.finite and second.finite:
                    moments.append(PairMoments.of(self._pieces.matrices(first), self._pieces.matrices(second)))
                task.advance(1)
        return moments

    def _naive(self, number: int) -> Products:
        exact = exact_gradients(self._encoder, self._pieces, layers_alone=True)
        project = DenseProjection(number, exact.numbers, self._seed)
        both = [self._projected(exact, project, rows) for rows in (self._sample.vals, self._sample.rows)]
        return Products.of(*both)

    def _projected(self, exact: ExactGradients, project: DenseProjection, rows: Sequence[Row]) -> Tensor:
        """(rows, N) float64. Gradients are projected in large batches, because the matrix is drawn anew for
        each batch.
        """
        at_once = max(1, MEMORY // (4 * exact.numbers))
        projected = []
        with closing(self._progress.task("naive projection", len(rows))) as task:
            for start in range(0, len(rows), at_once):
                batch = rows[start : start + at_once]
                projected.append(project([self._pieces.of(exact(row))["layers"] for row in batch]))
                task.advance(len(batch), sum(len(row.tokens) for row in batch))
        return torch.cat(projected)


def _point(
    part: Part,
    approximate: Products,
    truth: Products,
    metric: Metric,
    seed: int,
    reference_numbers: int | None,
    pairs: Sequence[PairMoments],
) -> ErrorPoint:
    """The point of one part: its products compared with those of the reference."""
    lengths = np.where(truth.lengths > 0, truth.lengths, 1.0)
    errors_QR = np.abs(approximate.dots_QR - truth.dots_QR) / lengths
    resample = Resampler(len(errors_QR), seed)
    projection = part.manifest["projection"]
    ranks = [(int(layer["ranks"][0]), int(layer["ranks"][1])) for layer in part.manifest["layers"]]
    has_theory = pairs and projection["kind"] == "gaussian" and projection["compress_by"] == "all"
    return ErrorPoint(
        part=part.name,
        numbers=part.layout.dimension,
        rank_total=projection["rank_total"],
        compress=projection["compress"],
        kind=projection["kind"],
        dtype=part.layout.dtype,
        mean_error=resample(errors_QR.mean(1), lambda of_queries: of_queries.mean(1)),
        rms_error=resample(np.square(errors_QR).mean(1), lambda of_queries: np.sqrt(of_queries.mean(1))),
        agreement=agreement(approximate.scores(metric), truth.scores(metric), seed=seed),
        theory_dense=dense_error(part.layout.dimension, reference_numbers),
        theory_rms=kronecker_error(pairs, ranks, projection["compress"]) if has_theory else None,
    )


def _write(curve: ErrorCurve, path: Path, reference_numbers: int | None) -> None:
    """Write the picture and the numbers. Both files appear, or neither."""
    with new_files(path, Path(curve.numbers_file)) as (picture, numbers):
        draw_errors(curve.to_json(), picture, reference_numbers)
        numbers.write_text(json_text(curve.to_json(), indent=1) + "\n", encoding="utf-8")
