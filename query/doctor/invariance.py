"""Check: is a sample's vector independent of its batch mates and its padding, with each attention kernel?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from transformers.utils import is_flash_attn_2_available

from ghoststore.errors import UsageError
from indexer.encode.tokens import Row
from query.doctor.compare import EXACT, relative_errors, worst
from query.doctor.finding import GRADIENTS, Check, Finding, right, wrong
from query.doctor.locate import first_difference
from query.doctor.models import attending, half_only, kernel_of
from query.doctor.rows import cut
from query.doctor.subject import Subject

ROUGH = 0.2
"""Largest relative difference of vectors in a 16-bit dtype that can be rounding."""


class Invariance(NamedTuple):
    """The largest relative differences with one kernel, between samples in batches and the same samples alone."""

    vectors: dict[str, float]
    """Differences of vectors, by what was changed: ``batch_mates`` (of one length, without padding), ``padding``,
    ``order``.
    """
    losses: float
    worst_row: int
    tolerance: float

    @property
    def largest(self) -> float:
        """The largest of all differences."""
        return max(*self.vectors.values(), self.losses)

    @property
    def sound(self) -> bool:
        """Whether all differences can be rounding."""
        return self.largest <= self.tolerance


def measure(subject: Subject, model: Any, tolerance: float = EXACT) -> Invariance:
    """Encode a few samples alone, in a batch of one length, in a padded batch, and in reverse order; and compare."""
    rows = subject.few
    all_places = list(range(len(rows)))
    even = [cut(row, min(len(row.tokens) for row in rows)) for row in rows]
    even = [row for row in even if len(row.tokens) == len(even[0].tokens)]
    alone, even_alone = subject.alone(model, rows), subject.alone(model, even)
    together = subject.encode(model, rows, [all_places])
    reversed_ = subject.encode(model, rows, [all_places[::-1]])
    mates = subject.encode(model, even, [list(range(len(even)))])
    losses = max(
        worst(vectors.losses.unsqueeze(1), expected.losses.unsqueeze(1))
        for vectors, expected in ((together, alone), (reversed_, alone), (mates, even_alone))
    )
    errors = {
        "batch_mates": worst(mates.vectors, even_alone.vectors),
        "padding": worst(together.vectors, alone.vectors),
        "order": worst(reversed_.vectors, together.vectors),
    }
    return Invariance(errors, losses, int(relative_errors(together.vectors, alone.vectors).argmax()), tolerance)


def examine(subject: Subject) -> Finding:
    """Measure every available kernel in float32, and flash attention in 16 bits."""
    measured: dict[str, Invariance] = {}
    missing: dict[str, str] = {}
    problems: list[str] = []
    first_modules: dict[str, str | None] = {}
    for kernel in _kernels(subject):
        name = kernel or "its own attention"
        try:
            if half_only(kernel):
                dtype = "bfloat16" if subject.models.dtype == "float32" else subject.models.dtype
                invariance = measure(subject, subject.models.in_dtype(dtype, kernel), ROUGH)
            else:
                with attending(subject.model, kernel) as model:
                    invariance = measure(subject, model)
                    if not invariance.sound:
                        first_modules[name] = _first_module(subject, subject.few[invariance.worst_row])
        except UsageError as error:
            missing[name] = str(error)
            if subject.kernels is not None:
                problems.append(f"{name} cannot be used: {error}")
            continue
        measured[name] = invariance
        if not invariance.sound:
            problems.append(_sentence(name, invariance, first_modules.get(name)))
    details = {
        "kernels": {name: {**invariance.vectors, "losses": invariance.losses} for name, invariance in measured.items()},
        "unavailable": missing,
        "first": first_modules,
        "tolerance": EXACT,
    }
    if problems:
        return wrong("; ".join(problems), _advice(measured), **details)
    largest = max(invariance.largest for invariance in measured.values())
    kernels = ", ".join(measured)
    summary = f"alone, padded, reordered, in other company: the same vector, to {largest:.1g} ({kernels})"
    return right(summary, **details)


def _kernels(subject: Subject) -> Sequence[str | None]:
    if subject.kernels is not None:
        return subject.kernels
    own = kernel_of(subject.model)
    if own is None:
        return [None]
    flash = subject.models.device.startswith("cuda") and is_flash_attn_2_available()
    return list(dict.fromkeys([own, "eager", "sdpa", *(["flash_attention_2"] if flash else [])]))


def _first_module(subject: Subject, row: Row) -> str | None:
    """The first module whose output for ``row`` changes when the row is padded to the longest row."""
    longest = max(subject.few, key=lambda row: len(row.tokens))
    alone, padded = (partial(subject.logits, rows) for rows in ([row], [row, longest]))
    return first_difference(subject.model, alone, padded, len(row.tokens))


def _sentence(kernel: str, invariance: Invariance, module: str | None) -> str:
    changes = {name: error for name, error in invariance.vectors.items() if not error <= invariance.tolerance}
    changed = ", ".join(f"{name.replace('_', ' ')} ({error:.2g})" for name, error in changes.items())
    where = f", first in the output of {module}" if module else ""
    return f"with {kernel}, a sample's vector changes with {changed or 'its batch, or its loss does'}{where}"


def _advice(measured: dict[str, Invariance]) -> str:
    sound = [name for name, invariance in measured.items() if invariance.sound]
    if sound:
        return f"Build with `attn_implementation={sound[0]}`."
    if any(invariance.vectors["batch_mates"] > invariance.tolerance for invariance in measured.values()):
        return "Something mixes the samples of a batch, such as a statistic over it or routing with a capacity."
    if not measured:
        return "Leave `attn_implementation` out, or give one that is installed."
    return (
        "Padding leaks into real tokens: attention, a mean over positions or position ids ignore attention_mask. "
        "Padding is on the right, with mask 0."
    )


CHECK = Check(name="invariance", asks="Does a vector depend on batch mates or padding?", run=examine, needs=GRADIENTS)
