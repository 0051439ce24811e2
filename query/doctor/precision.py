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
    found = subject.alone(model, subject.rows)
    if found.not_finite:
        return Precision(not_finite=found.not_finite)
    ranking = same_ranking(found.vectors, subject.exact.vectors)
    return Precision(
        not_finite=0,
        spearman=float(np.mean(ranking)),
        least_spearman=min(ranking),
        vectors=float(relative_errors(found.vectors, subject.exact.vectors).mean()),
        batch=drift(subject, model),
    )


def drift(subject: Subject, model: Any) -> float:
    """Largest relative difference of a few vectors in one padded batch from those alone."""
    few = subject.few
    together = subject.encode(model, few, [list(range(len(few)))])
    return worst(together.vectors, subject.alone(model, few).vectors)


def examine(subject: Subject) -> Finding:
    """bfloat16, and the dtype that was asked for. What is wrong in a dtype that was not asked for is advice."""
    reason = subject.lacks_memory(2, "a second copy in 16 bits")
    if reason is not None:
        return skipped(reason)
    asked = subject.models.dtype
    status, told, advised, details = Verdict.OK, list[str](), list[str](), dict[str, Any]()
    rows, tolerance = len(subject.rows), ROUGH + drift(subject, subject.model)
    for dtype in dict.fromkeys(["bfloat16", *([asked] if asked != "float32" else [])]):
        try:
            found = measure(subject, subject.models.in_dtype(dtype))
        except UsageError as error:
            verdict, sentence, advice = Verdict.WRONG, f"{dtype}: {error}", f"Do not build with --model-dtype {dtype}."
        else:
            details[dtype] = asdict(found)
            verdict, sentence, advice = _judge(dtype, found, rows, tolerance)
        if verdict is Verdict.WRONG and dtype != asked:
            verdict = Verdict.ADVICE
        status = max(status, verdict, key=[Verdict.OK, Verdict.ADVICE, Verdict.WRONG].index)
        told.append(sentence)
        advised += [advice] if advice else []
    return Finding(status=status, summary="; ".join(told), advice=tuple(advised), details=details)


def _judge(dtype: str, found: Precision, rows: int, tolerance: float) -> tuple[Verdict, str, str]:
    """(verdict, sentence, advice) on one dtype, as if it had been asked for. ``tolerance``: of ``batch``."""
    if found.not_finite:
        return (
            Verdict.WRONG,
            f"{dtype} overflows: the gradients of {found.not_finite} of {rows} samples are NaN or infinite",
            f"Do not build with --model-dtype {dtype}: those rows would have no vector. Use float32.",
        )
    sentence = (
        f"{dtype} ranks as float32 does with Spearman {found.spearman:.3f}, vectors differ by {found.vectors:.1%}"
    )
    if not found.batch <= tolerance:
        return (
            Verdict.WRONG,
            f"{sentence}; in a padded batch they differ by {found.batch:.0%} from those alone",
            f"Do not build with --model-dtype {dtype}: a vector depends on what it is batched with. Use float32.",
        )
    if not found.spearman >= FAITHFUL:
        verdict = Verdict.ADVICE if found.spearman >= UNFAITHFUL else Verdict.WRONG
        return verdict, sentence, f"{dtype} changes the ranking of this model: build with --model-dtype float32."
    return Verdict.OK, sentence, ""


CHECK = Check(
    name="precision",
    asks="Does bfloat16 keep the ranking, within its range?",
    run=examine,
    needs=GRADIENTS,
)
