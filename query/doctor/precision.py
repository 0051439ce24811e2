"""Does a 16-bit model give the ranking that a float32 one gives, and does it stay within the range of its numbers?"""

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
"""Mean Spearman above which a ranking is called the same."""
UNFAITHFUL = 0.8
"""Mean Spearman below which a store in this dtype would be wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """One dtype against float32."""

    not_finite: int
    """Samples whose vector or loss is NaN or infinite."""
    spearman: float = float("nan")
    """Mean over samples as queries of the correlation of the rankings of all others by cosine."""
    least_spearman: float = float("nan")
    vectors: float = float("nan")
    """Mean relative error of the vectors."""
    batch: float = float("nan")
    """Largest relative difference of a few vectors, in a padded batch against alone."""


def measure(subject: Subject, model: Any) -> Precision:
    """``model`` in its dtype against the reference."""
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
    """Largest relative difference of a few vectors in one padded batch from those alone."""
    few = subject.few
    together = subject.encode(model, few, [list(range(len(few)))])
    return worst(together.vectors, subject.alone(model, few).vectors)


def examine(subject: Subject) -> Finding:
    """bfloat16, and the dtype of the builds. What is wrong in another dtype is advice."""
    reason = subject.lacks_memory(2, "a second copy in 16 bits")
    if reason is not None:
        return skipped(reason)
    wanted = subject.models.dtype
    status, sentences, advised, details = Verdict.OK, list[str](), list[str](), dict[str, Any]()
    rows, tolerance = len(subject.rows), ROUGH + drift(subject, subject.model)
    for dtype in dict.fromkeys(["bfloat16", *([wanted] if wanted != "float32" else [])]):
        try:
            precision = measure(subject, subject.models.in_dtype(dtype))
        except UsageError as error:
            verdict, sentence, advice = Verdict.WRONG, f"{dtype}: {error}", f"Do not build with `model_dtype={dtype}`."
        else:
            details[dtype] = asdict(precision)
            verdict, sentence, advice = _judge(dtype, precision, rows, tolerance)
        if verdict is Verdict.WRONG and dtype != wanted:
            verdict = Verdict.ADVICE
        status = max(status, verdict, key=[Verdict.OK, Verdict.ADVICE, Verdict.WRONG].index)
        sentences.append(sentence)
        advised += [advice] if advice else []
    return Finding(status=status, summary="; ".join(sentences), advice=tuple(advised), details=details)


def _judge(dtype: str, precision: Precision, rows: int, tolerance: float) -> tuple[Verdict, str, str]:
    """(verdict, sentence, advice) on one dtype, as if builds used it. ``tolerance``: of ``batch``."""
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
