"""``ghoststore.fidelity``: how far a part's rankings are from those of the exact gradients.

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

from ghoststore.errors import GhostStoreError, UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.measure import FidelityOptions
from ghoststore.store import Part
from ghoststore.store.part.fidelity import keep_fidelity
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
    """What was measured."""

    store: str
    part: str
    metric: str
    rows: int
    """Rows ranked, and val samples they were ranked for."""
    val_samples: int
    val_set: str | None
    """None: rows of the part, not among those ranked."""
    seed: int
    layers: Agreement
    """Of scores by stored vectors with those by exact gradients of the layers: what the projection costs."""
    all: Agreement | None
    """With those by exact gradients of all parameters: what the choice of layers costs, too. None for a part with an
    ``own_metric``."""
    own_metric: str | None
    """Words for the metric of the part's vectors (an optimizer state's, or a preconditioner's), which is known of its
    layers alone; None for plain gradients."""
    coverage: float
    """Share of the model's parameters that the layers hold."""
    only_layers: list[str]
    without_layers: list[str]
    kept: bool
    """Whether the part keeps it."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore fidelity --json`` prints."""
        return asdict(self)


@takes(FidelityOptions)
def fidelity(options: FidelityOptions) -> FidelityReport:
    """Compare the scores of ``rows`` rows of a part, for ``val_samples`` val samples, with those of exact gradients.

    Rows are drawn by ``seed`` among the usable ones; val samples from ``val_set``, or from the part's own rows, which
    then are not ranked. Exact gradients come from the model by plain autograd, each sample alone; val samples are
    projected as a query projects them, rows are taken as they are stored. ``layers`` and ``exclude_layers`` restrict
    both to some layers of a part of plain blocks.

    The result is kept in the part (unless layers were given), one a metric; ``info`` and ``query`` show it.

    Memory: one gradient of the model, and up to 2 GiB of val gradients (one, where that is more).

    Raises CheckpointError where the checkpoint is gone, CorpusError or UsageError where the corpus is, MismatchError if
    they are not those of the part, UsageError for a part with too few rows, CorruptError for damaged rows.
    """
    progress, begun = options.progress or Silent(), time.perf_counter()
    spec = SampleSpec(
        rows=options.rows,
        val_samples=options.val_samples,
        seed=options.seed,
        val_set=options.val_set,
        fields=options.fields,
    )
    (opened,), _ = open_parts(options.store, options.part, None, progress)
    groups = choose_groups(opened, options.layers, options.exclude_layers)
    encoder = open_encoder(opened, "the fidelity", options, progress)
    sample = take_sample(encoder, spec, progress)
    approximate = vector_products(opened, sample, groups)
    pieces = pieces_of(encoder, groups)
    exact = measure_exactly(exactly(encoder, pieces), pieces, sample, progress)
    queries, rows_in = finite_pairs(exact.values(), progress)
    score_QR = approximate.only(queries, rows_in).scores(options.metric)
    references = {share: products.only(queries, rows_in) for share, products in exact.items()}
    whole = None if scaled(opened) else references["layers"] + references["rest"]
    report = FidelityReport(
        store=str(options.store),
        part=opened.name,
        metric=options.metric,
        rows=score_QR.shape[1],
        val_samples=len(score_QR),
        val_set=None if options.val_set is None else str(options.val_set),
        seed=options.seed,
        layers=agreement(score_QR, references["layers"].scores(options.metric), seed=options.seed),
        all=None if whole is None else agreement(score_QR, whole.scores(options.metric), seed=options.seed),
        own_metric=metric_words(opened),
        coverage=float(opened.manifest["coverage"]["share"]),
        only_layers=list(options.layers),
        without_layers=list(options.exclude_layers),
        kept=False,
        seconds=time.perf_counter() - begun,
    )
    return report if groups is not None else _keep(opened, report, progress)


def scaled(part: Part) -> bool:
    """Whether the vectors of ``part`` are gradients in a metric of its layers: an optimizer state's, or a
    preconditioner's.
    """
    return metric_words(part) is not None


def metric_words(part: Part) -> str | None:
    """The metric of the vectors of ``part``; None for plain gradients."""
    projection = part.manifest["projection"]
    if projection["optimizer_state"] is not None:
        return "scaled by an optimizer state"
    return None if projection["precondition"] == "none" else "preconditioned when it was built"


def vector_products(part: Part, sample: RowSample, groups: Sequence[int] | None = None) -> Products:
    """What a query gives the sampled rows, by the vectors of the blocks ``groups`` (default: all)."""
    rows_RD = PartVectors(part).gather(sample.places).double() * mask_of(part, groups)
    queries_QD = sample.queries_QD.double() * mask_of(part, groups)
    return Products.of(queries_QD, rows_RD)


def pieces_of(encoder: PartEncoder, groups: Sequence[int] | None = None) -> Pieces:
    """How gradients are cut for the part of ``encoder``: the layers of ``groups`` (default: all), and the rest."""
    plan = encoder.plan
    blocks = [layer.block for layer in plan.layers]
    chosen = None if groups is None else {blocks[group].name for group in groups}
    return Pieces(blocks, metric_of(encoder.part, plan), chosen)


def exactly(encoder: PartEncoder, pieces: Pieces, *, layers_alone: bool = False) -> ExactGradients:
    """Exact gradients by the model of ``encoder``, which is taken over; with ``layers_alone`` without the rest."""
    reduction = encoder.part.manifest["loss"]["reduction"]
    names = pieces.covered if layers_alone else pieces.parameters
    return ExactGradients(encoder.model, names, reduction=reduction)


def measure_exactly(
    exact: ExactGradients, pieces: Pieces, sample: RowSample, progress: Progress
) -> dict[Share, Products]:
    """Exact products of the sampled rows, over the layers and the rest."""
    vals, rows = len(sample.vals), len(sample.rows)
    passes = passes_over_rows(exact.numbers, vals, progress)
    with closing(progress.task("exact gradients", vals + passes * rows)) as task:
        return exact_products(exact, pieces, sample.vals, sample.rows, task)


def passes_over_rows(numbers: int, vals: int, progress: Progress) -> int:
    """How often the gradients of the rows, of so many ``numbers``, are computed; a note where it is not once."""
    at_once = vals_at_once(numbers)
    passes = -(-vals // at_once)
    if passes > 1:
        progress.note(
            f"a gradient has {numbers:,} numbers: {at_once} val gradients are held at a time, and those of the rows "
            f"are computed {passes} times"
        )
    return passes


def finite_pairs(exact: Collection[Products], progress: Progress) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(val samples, rows) whose exact gradients are finite; UsageError if too few are."""
    queries = np.logical_and.reduce([np.isfinite(products.val_Q) for products in exact])
    rows = np.logical_and.reduce([np.isfinite(products.row_R) for products in exact])
    lost = int((~queries).sum() + (~rows).sum())
    if lost:
        progress.note(f"{lost} samples whose exact gradient is not finite are left out")
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
