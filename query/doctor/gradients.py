"""Check: does every sample get a finite vector? In float32, because what fails there fails in every dtype."""

from __future__ import annotations

from query.doctor.finding import Check, Finding, right, wrong
from query.doctor.subject import Subject


def examine(subject: Subject) -> Finding:
    """Encode all samples, each in a batch of its own. CaptureError if the engine misses a call of a layer."""
    rows, bad = len(subject.rows), subject.exact.not_finite
    if bad:
        return wrong(
            f"the gradients of {bad} of {rows} samples are NaN or infinite in float32 itself",
            "The checkpoint is damaged or has diverged: look at its weights and at its loss.",
            not_finite=bad,
        )
    losses = subject.exact.losses
    summary = f"{rows} samples have finite gradients, and losses from {losses.min():.3g} to {losses.max():.3g}"
    return right(summary, not_finite=0, losses=losses.tolist())


CHECK = Check(name="gradients", asks="Does every sample have a finite gradient?", run=examine, needs=("randomness",))
