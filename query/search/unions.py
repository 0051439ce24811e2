"""Which of several parts are ranked as one: those of one checkpoint and projection, and of other corpora."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

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

    Compared are the rows of the first committed span of each with places that both may have.
    """
    for span, other_span in _meeting(one, other):
        codes, other_codes = _digests(one, span), _digests(other, other_span)
        shared = sorted(codes.keys() & other_codes.keys())
        if not shared:
            continue
        if all(codes[row] == other_codes[row] for row in shared):
            raise MismatchError(
                f"parts {one.name!r} and {other.name!r} both have samples {shared[0]} to {shared[-1]} of their "
                "corpora, and these are the same: they would rank twice. Name one of the parts, or build the second of "
                "the rows that the first lacks (`ghoststore build --skip-samples`)"
            )
        return


def _meeting(one: Part, other: Part) -> Iterator[tuple[int, int]]:
    """Committed (spans of ``one``, spans of ``other``) that may have rows of the same places, in order."""
    first, other_first = (span_table(part)[:, 0] for part in (one, other))
    at = 0
    for span in one.spans:
        while at < len(other.spans) and _last(other_first, other.spans[at]) < first[span]:
            at += 1
        for other_span in other.spans[at:]:
            if other_first[other_span] > _last(first, span):
                break
            yield span, other_span


def _last(first: NDArray[np.int64], span: int) -> float:
    """The last place that ``span`` may have, where spans begin at the places ``first``."""
    return float(first[span + 1]) if span + 1 < len(first) else np.inf


def _digests(part: Part, span: int) -> dict[int, int]:
    """The digest of each sample of ``span`` by its place in the corpus."""
    source_row, digest = (read_span(part, name, span).tolist() for name in ("source_row", "source_digest"))
    return dict(zip(source_row, digest, strict=True))
