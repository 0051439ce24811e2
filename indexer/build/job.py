"""A resolved build: everything that is decided before the first gradient, and the manifest that records it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, islice
from typing import Any

from numpy.typing import NDArray

from ghoststore.errors import CaptureError, LayerError, UsageError
from ghoststore.progress import Progress
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.store import Manifest, Part, PartLayout
from ghoststore.store.base.manifest import refuse_differences
from ghoststore.store.part.encoding import numbers_per_layer
from ghoststore.store.part.kept import KeptField
from indexer.build.calibrate import calibrate
from indexer.build.corpus_plan import CorpusPlan, LearningSample, plan_corpus, planned_as
from indexer.build.inputs import BuildInputs
from indexer.build.kept_fields import refuse_other_fields
from indexer.build.like import kept_like, refuse_unlike
from indexer.build.model_check import ROWS_LOOKED_AT, ModelCheck
from indexer.encode.tokens import Row, rows_of
from indexer.projection.adam import SideScales, flat, read_scales, scales_digest
from indexer.projection.matrices import Projection
from indexer.projection.plan import ProjectionPlan
from indexer.projection.stored import calibrated_as, scales_of


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """A resolved build. :func:`plan_job` makes it."""

    inputs: BuildInputs
    projected: ProjectionPlan
    projection: Projection | None
    """None in a dry run, if the projection must be learned."""
    scales: Mapping[str, SideScales] | None
    """The scales of both sides from ``optimizer_state``; None without one."""
    plan: CorpusPlan
    layout: PartLayout
    padding: bool
    """Whether rows of different lengths share a batch."""
    learning_seconds: float = 0.0
    """Wall time that learning the projection took; 0 where nothing was learned now."""

    def fixed(self) -> dict[str, NDArray[Any]]:
        """The arrays that the part keeps beside its rows: scales, and what the projection learned."""
        scales = {} if self.scales is None else flat(self.scales)
        calibration = self.projected.calibration
        return scales if calibration is None else scales | calibration.arrays(self.projected.shapes)

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest of the part."""
        options, scan, plan = self.inputs.options, self.plan.scan, self.projected
        hashed = self.projection is not None
        return {
            "corpus": {
                "fingerprint": scan.fingerprint,
                "samples": scan.rows,
                "max_samples": options.max_samples,
                **({"skip_samples": options.skip_samples} if options.skip_samples else {}),
                "domains": scan.domains,
                "repeated_ids": self.plan.repeated_ids,
                "fields": self.inputs.corpus.resolved.to_json(),
                **({} if self.plan.head is None else {"head": self.plan.head}),
                **({} if self.plan.kept_fingerprint is None else {"kept_fingerprint": self.plan.kept_fingerprint}),
            },
            "tokens": asdict(self.inputs.tokens),
            "loss": self.inputs.loss,
            "projection": {
                **plan.to_json(),
                "hash": None if self.projection is None else self.projection.hash,
                "optimizer_state": None if self.scales is None else scales_digest(self.scales),
            },
            "layers": plan.layers_json(),
            "storage": {**self.layout.to_json(), "groups": [list(group) for group in plan.groups] if hashed else None},
            "coverage": {"covered": plan.covered, "total": plan.total, "share": plan.coverage},
            **self.inputs.identity,
            "dtype": {"model": options.model_dtype},
            "batching": {
                "batch_tokens": self.inputs.batch_tokens,
                "order": "longest first inside a span",
                "padding": self.padding,
            },
            **self.inputs.description(),
        }


def plan_job(inputs: BuildInputs, progress: Progress, *, joining: bool = False) -> BuildJob:
    """Choose the layers, check the model, scan the corpus, and draw or learn the matrices.

    A worker that is ``joining`` a part that is not complete does not scan the corpus where the part says enough: what
    it builds is compared with the plan of the part.
    """
    options, existing = inputs.options, inputs.existing
    plan, padding = chosen_layers(inputs, progress)
    learning = LearningSample(plan.config.calibration_samples) if plan.calibrated else None
    planned = joining and existing is not None and not existing.complete and inputs.tokens.overlong != "window"
    if planned and existing is not None:
        corpus_plan = planned_as(existing)
    else:
        corpus_plan = plan_corpus(
            inputs.corpus,
            inputs.tokenizer,
            inputs.tokens,
            # The size of spans does not depend on the number of rows, which only the scan will tell.
            span_rows=layout_of(inputs, plan, sys.maxsize).span_rows,
            skip_samples=options.skip_samples,
            max_samples=inputs.most_samples,
            known=0 if existing is None else int(existing.manifest["corpus"]["samples"]),
            tokenize=options.dry_run,
            learning=learning,
            progress=progress,
        )
    fields = corpus_plan.fields if inputs.like is None else kept_like(inputs.like, corpus_plan.fields)
    layout = layout_of(inputs, plan, corpus_plan.rows, fields)
    return job_of(inputs, plan, corpus_plan, layout, learning, progress, padding=padding)


def chosen_layers(inputs: BuildInputs, progress: Progress) -> tuple[ProjectionPlan, bool]:
    """(the plan of the projection, whether rows of different lengths share a batch), after the model was checked."""
    options = inputs.options
    config = (options.projection or ProjectionConfig()).for_build(optimizer_state=options.optimizer_state is not None)
    if options.optimizer_state is not None and config.preconditioned:
        raise UsageError(
            f"`optimizer_state` and `precondition={config.precondition}` each give the gradients a metric of its "
            "own: choose one (`precondition=none`)"
        )
    return _supported(inputs, config, progress)


def job_of(
    inputs: BuildInputs,
    plan: ProjectionPlan,
    corpus_plan: CorpusPlan,
    layout: PartLayout,
    learning: LearningSample | None,
    progress: Progress,
    *,
    padding: bool,
) -> BuildJob:
    """The build of a planned corpus, after the projection was learned from the samples of ``learning``, if it is."""
    options, existing, like = inputs.options, inputs.existing, inputs.like
    before = existing or like
    scales: Mapping[str, SideScales] | None = None
    if like is not None and options.optimizer_state is None:
        scales = scales_of(like, plan)
    elif inputs.repairing and existing is not None:
        scales = scales_of(existing, plan)
    elif options.optimizer_state is not None:
        scales = read_scales(options.optimizer_state, inputs.model, [layer.block for layer in plan.layers])
    learning_seconds = 0.0
    if learning is not None and before is not None:
        plan = calibrated_as(before, plan)
    elif learning is not None and not options.dry_run:
        began = time.perf_counter()
        plan = _learned(inputs, plan, learning, scales, padding, progress)
        learning_seconds = time.perf_counter() - began
    drawable = plan.calibration is not None or learning is None
    job = BuildJob(
        inputs=inputs,
        projected=plan,
        projection=Projection(plan, scales) if drawable else None,
        scales=scales,
        plan=corpus_plan,
        layout=layout,
        padding=padding,
        learning_seconds=learning_seconds,
    )
    if like is not None:
        refuse_unlike(like, job.manifest, layout, learned=True)
    return job


def _supported(inputs: BuildInputs, config: ProjectionConfig, progress: Progress) -> tuple[ProjectionPlan, bool]:
    """(the plan, whether rows of different lengths may share a batch), without unsupported layers if these may be
    left out. Says which they are, and which layers run again for each sample.
    """
    options, existing = inputs.options, inputs.existing
    left_out: list[str] = []
    if options.skip_unsupported and existing is not None:  # the choice was made when the part was begun
        stored = existing.manifest["projection"]["exclude_layers"]
        left_out = [name for name in stored if name not in config.exclude_layers]
    while True:
        chosen = replace(config, exclude_layers=(*config.exclude_layers, *left_out))
        try:
            plan = ProjectionPlan.for_model(inputs.model, chosen, numbers=numbers_per_layer(options.proj_dtype))
            if existing is not None:  # refused before the corpus is read, which takes longer
                _refuse_other(existing, plan, inputs.identity)
                refuse_other_fields(existing, inputs.corpus.keep)
            elif inputs.like is not None:
                _refuse_unlike(inputs, inputs.like, plan)
            padding = _may_pad(inputs, plan, progress)
        except (LayerError, CaptureError) as error:
            more = [name for name in error.unsupported if name not in left_out]
            if not options.skip_unsupported or not more or existing is not None:
                raise
            left_out += more
            continue
        if left_out:
            progress.note(f"{len(left_out)} layer(s) left out as unsupported: {', '.join(left_out)}")
        again = plan.replayed
        if again:
            progress.note(
                f"no formula knows {', '.join(f'{count} {kind}' for kind, count in again.items())}: they run again for "
                "each sample, exact and slower"
            )
        return plan, padding


def _refuse_other(part: Part, plan: ProjectionPlan, identity: Manifest) -> None:
    """MismatchError if ``part`` is of another model or projection. What it has learned is compared later."""
    compared_later = ("calibration", "hash", "optimizer_state")
    stored = {name: value for name, value in part.manifest["projection"].items() if name not in compared_later}
    wanted = {**part.manifest, "projection": plan.to_json(), "layers": plan.layers_json(), **identity}
    refuse_differences(
        {**part.manifest, "projection": stored}, wanted, f"part {part.name!r} of {part.path.parent.parent}"
    )


def _refuse_unlike(inputs: BuildInputs, like: Part, plan: ProjectionPlan) -> None:
    """What :func:`refuse_unlike` refuses, as far as it is known before the corpus is read."""
    kept = tuple(KeptField(name=name, type="string") for name in inputs.corpus.keep)  # their types tells the scan
    layout = layout_of(inputs, plan, sys.maxsize, kept)
    wanted = {
        **inputs.identity,
        "tokens": asdict(inputs.tokens),
        "loss": inputs.loss,
        "dtype": {"model": inputs.options.model_dtype},
        "projection": plan.to_json(),
        "layers": plan.layers_json(),
        "storage": layout.to_json(),
    }
    refuse_unlike(like, wanted, layout, learned=False)


def _may_pad(inputs: BuildInputs, plan: ProjectionPlan, progress: Progress) -> bool:
    """Whether rows of different lengths may share a batch. CaptureError for a model that no part can be built from."""
    options, tokens, existing = inputs.options, inputs.tokens, inputs.existing
    if existing is not None and existing.complete:  # nothing will be computed
        return bool(existing.manifest["batching"]["padding"])
    if inputs.head is not None:  # a stream: it is read no further than it must be
        rows: Iterator[Row] = chain.from_iterable(rows_of([sample], inputs.tokenizer, tokens) for sample in inputs.head)
    else:
        samples = islice(islice(inputs.corpus.samples(), options.skip_samples, None), inputs.most_samples)
        rows = rows_of(samples, inputs.tokenizer, tokens)
    # The first usable rows, however far they are from the beginning of the corpus.
    usable = list(islice((row for row in rows if row.status.usable), ROWS_LOOKED_AT))
    padding = ModelCheck(
        inputs.model,
        plan,
        usable,
        longest=tokens.max_length,
        batch_tokens=inputs.batch_tokens,
        reduction=options.loss_reduction,
        checkpointing=options.gradient_checkpointing,
        note=progress.note,
    ).run()
    if existing is not None and existing.layout.stream is not None:  # of other rows, which came first
        padding = bool(existing.manifest["batching"]["padding"])
    if inputs.like is not None:
        padding &= bool(inputs.like.manifest["batching"]["padding"])
    if not padding:
        progress.note(
            f"padding changes what {type(inputs.model).__name__} makes of a row: only rows of one length share a batch"
        )
    return padding


def layout_of(inputs: BuildInputs, plan: ProjectionPlan, rows: int, fields: tuple[KeptField, ...] = ()) -> PartLayout:
    """The layout of a part of ``rows`` rows."""
    options = inputs.options
    return PartLayout.choose(
        rows=rows,
        dimension=plan.dimension,
        groups=plan.group_count,
        dtype=options.proj_dtype,
        span_rows=options.span_rows,
        store_text=inputs.keeps_texts,
        fields=fields,
    )


def _learned(
    inputs: BuildInputs,
    plan: ProjectionPlan,
    learning: LearningSample,
    scales: Mapping[str, SideScales] | None,
    padding: bool,
    progress: Progress,
) -> ProjectionPlan:
    """``plan`` with what it learns from the sample of the corpus."""
    options = inputs.options
    rows = list(rows_of(learning.samples, inputs.tokenizer, inputs.tokens))
    calibration = calibrate(
        inputs.model,
        plan,
        _evenly(rows, plan.config.calibration_samples),
        reduction=options.loss_reduction,
        batch_tokens=inputs.batch_tokens,
        scales=scales,
        progress=progress,
        checkpointing=options.gradient_checkpointing,
        padding=padding,
    )
    return replace(plan, calibration=calibration)


def _evenly(rows: Sequence[Row], count: int) -> list[Row]:
    """At most ``count`` of ``rows``, evenly spaced, because long samples may have many windows."""
    return [rows[place * len(rows) // count] for place in range(count)] if len(rows) > count else list(rows)
