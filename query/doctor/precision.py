"""Check: does the model in 16 bits give the ranking that it gives in float32, without overflow?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ghoststore.errors import UsageError
from query.doctor.compare import relative_errors, same_ranking, worst
from query.doctor.finding import GRADIENTS, Check, Finding, Verdict, skipped
from query.doctor.invariance import ROUGH
from query.doctor.subject import Subject

FAITHFUL = 0.95
"""Mean Spearman correlation from which rankings count as the same."""
UNFAITHFUL = 0.8
"""Mean Spearman correlation below which a store in this dtype would be wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """One dtype compared with float32."""

    not_finite: int
    """Number of samples whose vector or loss is NaN or infinite."""
    spearman: float = float("nan")
    """Spearman's correlation of the rankings of all other samples by cosine, averaged over samples as queries."""
    least_spearman: float = float("nan")
    """The lowest of these correlations."""
    vectors: float = float("nan")
    """Mean relative error of the vectors."""
    batch: float = float("nan")
    """Largest relative difference of a few vectors between a padded batch and each sample alone."""


def measure(subject: Subject, model: Any) -> Precision:
    """Compare ``model``, in its dtype, with the reference."""
    vectors = subject.alone(model, subject.rows)
    if vectors.not_finite:
        return Precision(not_finite=vectors.not_finite)
    ranking = same_ranking(vectors.vectors, subject.exact.vectors)
    return Precision(
        not_finite=0,
        spearman=float(np.mean(ranking)),
        least_spearman=min(ranking),
        vectors=float(relative_errors(vectors.vectors, subject.exact.vectors).mean()),
        batch=drift(subject, model),
    )


def drift(subject: Subject, model: Any) -> float:
    """Largest relative difference of a few vectors between one padded batch and each sample alone."""
    few = subject.few
    together = subject.encode(model, few, [list(range(len(few)))])
    return worst(together.vectors, subject.alone(model, few).vectors)


def examine(subject: Subject) -> Finding:
    """Measure bfloat16 and ``model_dtype``. A problem in a dtype other than ``model_dtype`` is only advice."""
    reason = subject.lacks_memory(2, "a second copy in 16 bits")
    if reason is not None:
        return skipped(reason)
    build_dtype = subject.models.dtype
    status, sentences, advised, details = Verdict.OK, list[str](), list[str](), dict[str, Any]()
    rows, tolerance = len(subject.rows), ROUGH + drift(subject, subject.model)
    for dtype in dict.fromkeys(["bfloat16", *([build_dtype] if build_dtype != "float32" else [])]):
        try:
            precision = measure(subject, subject.models.in_dtype(dtype))
        except UsageError as error:
            verdict, sentence, advice = Verdict.WRONG, f"{dtype}: {error}", f"Do not build with `model_dtype={dtype}`."
        else:
            details[dtype] = asdict(precision)
            verdict, sentence, advice = _judge(dtype, precision, rows, tolerance)
        if verdict is Verdict.WRONG and dtype != build_dtype:
            verdict = Verdict.ADVICE
        status = max(status, verdict, key=[Verdict.OK, Verdict.ADVICE, Verdict.WRONG].index)
        sentences.append(sentence)
        advised += [advice] if advice else []
    return Finding(status=status, summary="; ".join(sentences), advice=tuple(advised), details=details)


def _judge(dtype: str, precision: Precision, rows: int, tolerance: float) -> tuple[Verdict, str, str]:
    """(verdict, sentence, advice) for a build in ``dtype``. ``tolerance`` is the largest
    ``precision.batch`` to accept.
    """
    if precision.not_finite:
        return (
            Verdict.WRONG,
            f"{dtype} overflows: the gradients of {precision.not_finite} of {rows} samples are NaN or infinite",
            f"Do not build with `model_dtype={dtype}`: those rows would have no vector. Use float32.",
        )
    agreement = f"Spearman {precision.spearman:.3f}, vectors differ by {precision.vectors:.1%}"
    sentence = f"{dtype} ranks as float32 does with {agreement}"
    if not precision.batch <= tolerance:
        return (
            Verdict.WRONG,
            f"{sentence}; in a padded batch they differ by {precision.batch:.0%} from those alone",
            f"Do not build with `model_dtype={dtype}`: a vector depends on what it is batched with. Use float32.",
        )
    if not precision.spearman >= FAITHFUL:
        verdict = Verdict.ADVICE if precision.spearman >= UNFAITHFUL else Verdict.WRONG
        return verdict, sentence, f"{dtype} changes the ranking of this model: build with `model_dtype=float32`."
    return Verdict.OK, sentence, ""


CHECK = Check(name="precision", asks="Does bfloat16 keep the ranking, within its range?", run=examine, needs=GRADIENTS)
