"""``ghoststore.doctor``: would a store that is built from this model on this machine be right?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ghoststore.checkpoint.in_memory import LoadedCheckpoint
from ghoststore.checkpoint.load import (
    choose_max_length,
    find_checkpoint,
    find_tokenizer,
    load_tokenizer,
    resolve_device,
)
from ghoststore.checkpoint.nanogpt import looks_like
from ghoststore.corpus import Fields, open_corpus, source_name
from ghoststore.errors import CaptureError, UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.measure import DoctorOptions
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.settings.shared import AdapterUse, in_memory
from ghoststore.store.base.object_path import refuse_objects
from indexer.encode.tokens import Tokenizer, embedding_rows
from indexer.projection.matrices import Projection
from query.doctor import (
    causality,
    coverage,
    disk,
    exactness,
    faiss,
    gradients,
    invariance,
    machine,
    precision,
    randomness,
)
from query.doctor.finding import Check, Finding, Verdict, skipped, wrong
from query.doctor.models import LoadedModels, Models, SavedModels, half_only
from query.doctor.rows import choose_rows
from query.doctor.subject import Subject

CHECKS = tuple(
    module.CHECK
    for module in (randomness, causality, gradients, exactness, invariance, precision, coverage, faiss, disk, machine)
)
"""In the order in which they run and are shown."""

MAX_LENGTH = 128
"""Default for the tokens of the longest sample, enough for all checks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """What ``ghoststore.doctor`` returns: the finding of each check."""

    model: str
    """The folder of the checkpoint, or the class of a model in memory."""
    settings: dict[str, Any]
    findings: Mapping[str, Finding]
    """The findings by the name of the check, in the order of CHECKS."""

    @property
    def wrong(self) -> list[str]:
        """The names of the checks with which a store would be wrong."""
        return [name for name, finding in self.findings.items() if finding.status is Verdict.WRONG]

    def to_json(self) -> dict[str, Any]:
        """The document that ``ghoststore doctor --json`` prints."""
        asks = {check.name: check.asks for check in CHECKS}
        return {
            "model": self.model,
            "settings": self.settings,
            "wrong": self.wrong,
            "findings": {name: {"asks": asks[name], **finding.to_json()} for name, finding in self.findings.items()},
        }


@takes(DoctorOptions)
def doctor(options: DoctorOptions) -> DoctorReport:
    """Examine a ``checkpoint``, or a ``model`` in memory with its ``tokenizer``, before a store is built from it.

    ``tokenizer`` is a folder, or the object itself. ``samples`` samples (at least 3) of ``data`` (default: built-in
    sentences) are cut to ``max_length`` tokens (default: 128, or the model's positions if these are fewer). Without
    ``attn_implementation`` the checks use eager, sdpa and, on CUDA, flash attention if it is installed. ``store`` is
    the folder whose disk is measured; nothing in it is changed. A model in memory is examined in its current mode, and
    left as it was, with its flags and its attention kernel.

    Needs memory for the model in float32, a second copy in 16 bits, and a gradient of every parameter. A check that
    does not fit into memory is skipped, and its finding says so.

    Raises UsageError, CheckpointError, LayerError or CorpusError for inputs from which no store could be built at all.
    """
    refuse_objects(options.store, "store", "measuring a disk", "leave `store` out: the rest needs no store")
    progress = options.progress or Silent()
    if options.samples < 3:
        raise UsageError(f"`samples` must be at least 3 (a ranking of two others), not {options.samples}")
    if half_only(options.attn_implementation) and (options.model_dtype or "float32") == "float32":
        raise UsageError(
            f"{options.attn_implementation} has no float32: give `model_dtype=bfloat16`, or another kernel"
        )
    models, text_tokenizer = _open_models(
        options.checkpoint,
        options.model,
        options.tokenizer,
        options.model_dtype,
        options.device,
        options.attn_implementation,
        base=options.base,
        adapter=options.adapter,
        progress=progress,
    )
    with ExitStack() as stack:
        corpus = (
            None
            if options.data is None
            else stack.enter_context(open_corpus(options.data, options.fields or Fields(), progress))
        )
        reference = models.reference()
        length = choose_max_length(options.max_length, reference, MAX_LENGTH)
        if corpus is not None:
            corpus.cut_stream(length)
        told = options.tokenizer is not None
        vocabulary = embedding_rows(reference)
        tokenizer = Tokenizer(text_tokenizer, vocabulary=vocabulary, note=progress.note, takes_ids=told)
        rows = choose_rows(corpus, tokenizer, max_length=length, count=options.samples)
    subject = Subject(
        models=models,
        model=reference,
        rows=rows,
        projection=Projection.for_model(reference, options.projection or ProjectionConfig()),
        kernels=None if options.attn_implementation is None else (options.attn_implementation,),
        reduction=options.loss_reduction,
        store=Path(options.store),
    )
    settings = {
        "data": "built-in sentences" if options.data is None else source_name(options.data),
        "samples": len(rows),
        "max_length": length,
        "model_dtype": models.dtype,
        "device": models.device,
        "attn_implementation": options.attn_implementation,
        "loss_reduction": options.loss_reduction,
        "projection": subject.plan.to_json(),
    }
    return DoctorReport(model=models.name, settings=settings, findings=_examine(subject, progress))


def _examine(subject: Subject, progress: Progress) -> dict[str, Finding]:
    findings: dict[str, Finding] = {}
    with closing(progress.task("examining", len(CHECKS), unit="checks")) as task:
        for check in CHECKS:
            task.say(check.name)
            findings[check.name] = _run_check(check, subject, findings)
            task.advance(1)
        task.say("")
    return findings


def _run_check(check: Check, subject: Subject, findings: Mapping[str, Finding]) -> Finding:
    """The finding of one check. The check is skipped if one that it needs has found something wrong."""
    reasons = [name for name in check.needs if findings[name].status is Verdict.WRONG]
    if reasons:
        return skipped(f"cannot be told: see {reasons[0]}")
    try:
        return check.run(subject)
    except CaptureError as error:
        return wrong(f"the engine refuses this model: {error}")
    except torch.OutOfMemoryError as error:
        return skipped(f"{subject.models.device} has not enough memory: {str(error).splitlines()[0]}")


def _open_models(
    checkpoint: Any,
    model: torch.nn.Module | None,
    tokenizer: Any,
    dtype: str | None,
    device: str,
    kernel: str | None,
    *,
    base: str | Path | None,
    adapter: AdapterUse | None,
    progress: Progress,
) -> tuple[Models, Any]:
    """(source of the model in its dtypes and kernels, its tokenizer). UsageError unless exactly one model is given."""
    if in_memory(checkpoint):
        checkpoint, model = None, checkpoint if model is None else None
    if (checkpoint is None) == (model is None):
        raise UsageError("give either a checkpoint or a model in memory")
    models: Models
    if model is not None:
        if base is not None or adapter is not None:
            raise UsageError("`base` and `adapter` belong to the folder of an adapter, and the model is in memory")
        if looks_like(model):
            loaded = LoadedCheckpoint.of(model)
            model, tokenizer = loaded.model, loaded.tokenizer_folder if tokenizer is None else tokenizer
        if tokenizer is None:
            raise UsageError("a model in memory needs its tokenizer: give `tokenizer`")
        models = LoadedModels(model, dtype, device, kernel)
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(find_tokenizer(tokenizer, progress))
        return models, tokenizer
    assert checkpoint is not None
    saved = find_checkpoint(checkpoint, base=base, adapter=adapter, progress=progress)
    models = SavedModels(saved, dtype or "float32", resolve_device(device), kernel, progress)
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(saved.tokenizer_folder if tokenizer is None else find_tokenizer(tokenizer, progress))
    return models, tokenizer
