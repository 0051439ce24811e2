"""Check: are the logits at a position independent of later tokens? If not, they contain what they must predict."""

from __future__ import annotations

import torch

from ghoststore.checkpoint.load import sees_ahead
from query.doctor.finding import Check, Finding, right, skipped, wrong
from query.doctor.subject import Subject


def examine(subject: Subject) -> Finding:
    """Replace the last token of the longest row, and compare the logits before it."""
    tokens = max((row.tokens for row in subject.rows), key=len)
    ids = torch.from_numpy(tokens).long().unsqueeze(0).to(subject.models.device)
    others = [int(token) for row in subject.rows for token in row.tokens if token != tokens[-1]]
    if not others:
        return skipped("all samples are one token over and over: no later token can be changed")
    changed = ids.clone()
    changed[0, -1] = others[0]
    if sees_ahead(subject.model, ids, changed):
        return wrong(
            "changing the last token changes the logits before it",
            "Next-token gradients need a causal model (for BERT-style configs, is_decoder=true).",
        )
    return right("changing the last token changes no logits before it")


CHECK = Check(name="causality", asks="Are logits independent of later tokens?", run=examine, needs=("randomness",))
