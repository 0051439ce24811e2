"""Check: is the forward pass the same each time? With dropout left on, every gradient would be random."""

from __future__ import annotations

from functools import partial

import torch

from ghoststore.errors import UsageError
from indexer.encode.modes import refuse_randomness
from query.doctor.finding import Check, Finding, right, wrong
from query.doctor.locate import first_difference
from query.doctor.subject import Subject

TOLERANCE = 1e-5
"""Largest relative difference of the logits of two passes that can be rounding. Kernels with atomics stay far below."""


def examine(subject: Subject) -> Finding:
    """Look for modules that draw random numbers, and compare two forward passes of one batch in the model's mode."""
    devices = [subject.models.device] if subject.models.device.startswith("cuda") else []
    with torch.random.fork_rng(devices):
        first, second = (subject.logits(subject.few).double() for _ in range(2))
        difference = float((first - second).norm() / first.norm())
        details = {"difference": difference, "training": bool(subject.model.training)}
        try:
            refuse_randomness(subject.model)
        except UsageError as error:
            return wrong(str(error), "Call model.eval() before its gradients are taken.", **details)
        if difference > TOLERANCE:
            forward = partial(subject.logits, subject.few)
            where = first_difference(subject.model, forward, forward)
            summary = f"two forward passes of one batch differ by {difference:.2g}, first in the output of {where}"
            advice = "Something draws random numbers in eval mode, too, such as dropout with training=True."
            return wrong(summary, advice, **details, first=where)
    same = "are equal bit for bit" if difference == 0 else f"differ by {difference:.1g}, which is rounding"
    return right(f"two forward passes of one batch {same}", **details)


CHECK = Check(name="randomness", asks="Is a forward pass the same each time?", run=examine)
