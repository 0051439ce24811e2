"""``ghoststore.fidelity``: how far the rankings of a part are from those of exact gradients.

Legend: Q val samples, R rows, D numbers of a stored vector.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.corpus import source_name
from ghoststore.errors import GhostStoreError, UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import part_of, takes
from ghoststore.settings.measure import FidelityOptions
from ghoststore.store import Part
from ghoststore.store.part.fidelity import keep_fidelity
from ghoststore.store.part.metric import metric_for, part_metric
from indexer.projection.stored import metric_of
from query.ask.encoder import PartEncoder
from query.exact.gradients import ExactGradients
from query.exact.products import Pieces, Products, Share, exact_products, vals_at_once
from query.fidelity.agreement import Agreement, agreement
from query.fidelity.sample import RowSample, SampleSpec, open_encoder, take_sample
from query.search.part_score import mask_of
from query.search.parts import choose_groups, open_parts
from query.search.vectors import PartVectors


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityReport:
    """What ``ghoststore.fidelity`` returns."""

    store: str
    part: str
    metric: str
    rows: int
    """Number of rows that were ranked."""
    val_samples: int
    """Number of val samples that they were ranked for."""
    val_set: str | None
    """None if the val samples are rows of the part, which then are not ranked."""
    seed: int
    layers: Agreement
    """Agreement with scores by exact gradients of the layers. It shows the loss from projection and storage."""
    all: Agreement | None
    """Agreement with scores by exact gradients of all parameters. It shows the loss from the choice of layers, too.
    None for a part with an ``own_metric``."""
    own_metric: str | None
    """A phrase for the metric of the part's vectors, from an optimizer state or a preconditioner, which is known only
    for its layers. None for plain gradients."""
    coverage: float
    """Share of the model's parameters that are in the layers, 0 to 1."""
    only_layers: list[str]
    without_layers: list[str]
    kept: bool
    """Whether the result was kept in the part."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The document that ``ghoststore fidelity --json`` prints."""
        return asdict(self)


@takes(FidelityOptions)
def fidelity(options: FidelityOptions) -> FidelityReport:
    """Compare the scores of ``rows`` rows of a part, for ``val_samples`` val samples, with those of exact gradients.

    ``seed`` draws the rows from the usable ones. It draws the val samples from ``val_set`` or, without one, from other
    rows of the part. Exact gradients are computed by plain autograd, one sample at a time. For the approximate scores,
    val samples are projected as in a query, and the vectors of rows are the stored ones. ``layers`` and
    ``exclude_layers`` restrict both to some layers of a part that keeps them apart.

    The result is kept in the part, one for each ``metric``, unless layers were given; ``info`` and ``query`` show it.
    Memory: one gradient of the model, and up to 2 GiB of val gradients (one, if that is more).

    Raises CheckpointError if the checkpoint is gone, CorpusError or UsageError if the corpus is gone, MismatchError if
    they are not those of the part, UsageError for a part with too few rows, CorruptError for damaged rows.
    """
    progress, started = options.progress or Silent(), time.perf_counter()
    spec = part_of(SampleSpec, options)
    (part,), _ = open_parts(options.store, options.part, None, progress)
    metric = metric_for(options.metric, [part])
    groups = choose_groups(part, options.layers, options.exclude_layers)
    encoder = open_encoder(part, "the fidelity", options, progress)
    sample = take_sample(encoder, spec, progress)
    approximate = vector_products(part, sample, groups)
    pieces = pieces_of(encoder, groups)
    exact = measure_exactly(exact_gradients(encoder, pieces), pieces, sample, progress)
    queries, finite_rows = finite_pairs(exact.values(), progress)
    score_QR = approximate.only(queries, finite_rows).scores(metric)
    references = {share: products.only(queries, finite_rows) for share, products in exact.items()}
    all_parameters = None if has_own_metric(part) else references["layers"] + references["rest"]
    report = FidelityReport(
        store=str(options.store),
        part=part.name,
        metric=metric,
        rows=score_QR.shape[1],
        val_samples=len(score_QR),
        val_set=None if options.val_set is None else source_name(options.val_set),
        seed=options.seed,
        layers=agreement(score_QR, references["layers"].scores(metric), seed=options.seed),
        all=None if all_parameters is None else agreement(score_QR, all_parameters.scores(metric), seed=options.seed),
        own_metric=own_metric(part),
        coverage=float(part.manifest["coverage"]["share"]),
        only_layers=list(options.layers),
        without_layers=list(options.exclude_layers),
        kept=False,
        seconds=time.perf_counter() - started,
    )
    return report if groups is not None else _keep(part, report, progress)


def has_own_metric(part: Part) -> bool:
    """Whether the vectors of ``part`` are not plain gradients, but scaled by an optimizer state or preconditioned."""
    return own_metric(part) is not None


def own_metric(part: Part) -> str | None:
    """A phrase for the metric of the vectors of ``part``; None for plain gradients."""
    return part_metric(part.manifest["projection"])


def vector_products(part: Part, sample: RowSample, groups: Sequence[int] | None = None) -> Products:
    """The products of a query with the sampled rows, by stored vectors, over the blocks ``groups`` (default: all)."""
    rows_RD = PartVectors(part).gather(sample.places).double() * mask_of(part, groups)
    queries_QD = sample.queries_QD.double() * mask_of(part, groups)
    return Products.of(queries_QD, rows_RD)


def pieces_of(encoder: PartEncoder, groups: Sequence[int] | None = None) -> Pieces:
    """How to cut gradients for the part of ``encoder``: into the layers of ``groups`` (default: all), and the rest."""
    plan = encoder.plan
    blocks = [layer.block for layer in plan.layers]
    chosen = None if groups is None else {blocks[group].name for group in groups}
    return Pieces(blocks, metric_of(encoder.part, plan), chosen)


def exact_gradients(encoder: PartEncoder, pieces: Pieces, *, layers_alone: bool = False) -> ExactGradients:
    """Exact gradients by the model of ``encoder``, whose model they change; with ``layers_alone`` only of
    the layers.
    """
    reduction = encoder.part.manifest["loss"]["reduction"]
    names = pieces.covered if layers_alone else pieces.parameters
    return ExactGradients(encoder.model, names, reduction=reduction)


def measure_exactly(
    exact: ExactGradients, pieces: Pieces, sample: RowSample, progress: Progress
) -> dict[Share, Products]:
    """The exact products of the val samples with the sampled rows, over the layers and over the rest."""
    vals, rows = len(sample.vals), len(sample.rows)
    passes = passes_over_rows(exact.numbers, vals, progress)
    with closing(progress.task("exact gradients", vals + passes * rows)) as task:
        return exact_products(exact, pieces, sample.vals, sample.rows, task)


def passes_over_rows(numbers: int, vals: int, progress: Progress) -> int:
    """How often the gradients of the rows, of ``numbers`` numbers, are computed. A note says so if it is more than
    once.
    """
    at_once = vals_at_once(numbers)
    passes = -(-vals // at_once)
    if passes > 1:
        progress.note(
            f"a gradient has {numbers:,} numbers: {at_once} val gradients are held at a time, and those of the rows "
            f"are computed {passes} times"
        )
    return passes


def finite_pairs(exact: Collection[Products], progress: Progress) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(masks of the val samples, of the rows) whose exact gradients are finite. UsageError if too few are."""
    queries = np.logical_and.reduce([np.isfinite(products.val_Q) for products in exact])
    rows = np.logical_and.reduce([np.isfinite(products.row_R) for products in exact])
    left_out = int((~queries).sum() + (~rows).sum())
    if left_out:
        progress.note(f"{left_out} samples whose exact gradient is not finite are left out")
    if not queries.any() or rows.sum() < 2:
        raise UsageError("the exact gradients of the drawn samples are not finite: there is nothing to compare with")
    return queries, rows


def _keep(part: Part, report: FidelityReport, progress: Progress) -> FidelityReport:
    value = {name: entry for name, entry in report.to_json().items() if name not in ("store", "kept")}
    try:
        keep_fidelity(part, report.metric, value)
    except GhostStoreError as error:
        progress.note(f"what was measured is not kept in the part: {error}")
        return report
    return replace(report, kept=True)
