"""Which of several parts are ranked as one: those of one checkpoint and projection, and of other corpora."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from ghoststore.errors import MismatchError, UsageError
from ghoststore.store import Part
from ghoststore.store.base.manifest import Difference, differences
from ghoststore.store.base.records import json_digest
from ghoststore.store.part.part import span_table
from ghoststore.store.part.united import UnitedPart
from ghoststore.store.spans.reader import read_span

SHARED = ("tokenizer", "tokens", "loss", "dtype", "projection", "layers")
"""Sections of the manifest that must be equal beside the checkpoint."""
STORED = ("dimension", "groups", "dtype", "fields")
"""Entries of the section ``storage`` that must be, too."""


def united(parts: Sequence[Part]) -> list[Part]:
    """``parts`` with those of one checkpoint and several corpora united, in the order of the first of each.

    Parts of one corpus are left as they are. Of several checkpoints, each must have the same corpora.

    MismatchError for parts of one checkpoint that differ otherwise, for samples that are in two of them, and for
    checkpoints with other corpora.
    """
    if len({_corpus(part) for part in parts}) == 1:
        return list(parts)
    by_checkpoint: dict[str, list[Part]] = {}
    for part in parts:
        by_checkpoint.setdefault(json_digest(part.manifest["checkpoint"]), []).append(part)
    groups = list(by_checkpoint.values())
    if all(len(group) == 1 for group in groups):
        return list(parts)  # of other rows at every checkpoint: refused as a sum
    for group in groups:
        for part in group[1:]:
            _refuse_unlike(group[0], part)
        for one, other in combinations(group, 2):
            _refuse_overlap(one, other)
    first = groups[0]
    for group in groups[1:]:
        if sorted(map(_corpus, group)) != sorted(map(_corpus, first)):
            raise MismatchError(
                f"parts {_names(first)} are of one checkpoint and {_names(group)} of another, and their corpora are "
                "not the same: a sum over checkpoints is of the same rows at each. Name the parts of one checkpoint "
                "alone, or as many of each, of the same corpora"
            )
        group.sort(key=lambda part: [_corpus(member) for member in first].index(_corpus(part)))
    return [UnitedPart(group) for group in groups]


def refuse_united(parts: Sequence[Part], what: str) -> None:
    """UsageError where one of ``parts`` is a union, which ``what`` does not take."""
    for part in parts:
        if len(part.members) > 1:
            raise UsageError(
                f"{what} is of one corpus, and parts {_names(part.members)} have several: name one of them"
            )


def _corpus(part: Part) -> str:
    return str(part.manifest["corpus"]["fingerprint"])


def _names(parts: Sequence[Part]) -> str:
    return ", ".join(repr(part.name) for part in parts)


def _refuse_unlike(first: Part, part: Part) -> None:
    """MismatchError unless the vectors of both can be compared, and their rows be read in one way."""
    one, other = first.manifest, part.manifest
    different: list[Difference] = [
        found for section in SHARED for found in differences(one[section], other[section], section)
    ]
    for name in STORED:
        different += differences(one["storage"].get(name), other["storage"].get(name), f"storage.{name}")
    if first.layout.spans > 1 and part.layout.spans > 1:
        different += differences(first.layout.span_rows, part.layout.span_rows, "storage.span_rows")
    if different:
        path, value, other_value = different[0]
        raise MismatchError(
            f"parts {first.name!r} and {part.name!r} are of one checkpoint and other corpora, and cannot be ranked as "
            f"one: {path} is {value!r:.90} in the first and {other_value!r:.90} in the second. Build the second like "
            f"the first: `ghoststore build --like {first.name} --data … --name …`"
        )


def _refuse_overlap(one: Part, other: Part) -> None:
    """MismatchError where both have the same samples at the same places of their corpora.

    Compared are the rows from the first place on that both have, in one span of each. Spans that are not committed are
    not looked at.
    """
    tables = [span_table(part) for part in (one, other)]
    place = max(int(table[0, 0]) for table in tables)
    found = []
    for part, table in zip((one, other), tables, strict=True):
        span = int(np.searchsorted(table[:, 0], place, side="right")) - 1
        if span < 0 or span not in part.spans:
            return
        source_row, digest = (read_span(part, name, span) for name in ("source_row", "source_digest"))
        found.append({int(row): int(code) for row, code in zip(source_row, digest, strict=True) if row >= place})
    shared = sorted(found[0].keys() & found[1].keys())
    if shared and all(found[0][row] == found[1][row] for row in shared):
        raise MismatchError(
            f"parts {one.name!r} and {other.name!r} both have samples {shared[0]} to {shared[-1]} of their corpora, "
            "and these are the same: they would rank twice. Name one of the parts, or build the second of the rows "
            "that the first lacks (`ghoststore build --skip-samples`)"
        )
