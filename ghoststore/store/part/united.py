"""Parts of one projection and several corpora, read as one part.

Rows of the union are numbered part after part. The first row of each has a number that is a multiple of the length of a
span, so that the span of a row is its number divided by that length, as in any part; numbers at the end of a part that
has no such row stand for nothing. Only spans are mapped to (part, span of it). ``docs/design/0022-growth.md`` says why.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.store.base.manifest import Manifest
from ghoststore.store.base.records import json_digest
from ghoststore.store.part.layout import PartLayout
from ghoststore.store.part.part import Part
from ghoststore.store.spans.group import Spanned


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitedLayout(PartLayout):
    """The layout of a union: that of its longest spans, with the spans of all ``members``, one after the other.

    ``rows`` is one past the largest number of a row.
    """

    members: tuple[PartLayout, ...]
    first: tuple[int, ...]
    """The first span of each member, and one past the last span of all."""

    @classmethod
    def over(cls, members: Sequence[PartLayout]) -> UnitedLayout:
        """The layout of the union of ``members``, which have the same numbers in a row."""
        longest = max(members, key=lambda layout: layout.span_rows)
        first = (0, *accumulate(layout.spans for layout in members))
        last_start, last_stop = members[-1].span_of(members[-1].spans - 1)
        shared = {field.name: getattr(longest, field.name) for field in fields(PartLayout)}
        shared["rows"] = (first[-1] - 1) * longest.span_rows + last_stop - last_start
        shared["stream"] = None  # it is read as one that has ended, or never was one
        shared["store_text"] = all(layout.store_text for layout in members)
        return cls(**shared, members=tuple(members), first=first)

    @property
    def spans(self) -> int:
        return self.first[-1]

    def home(self, span: int) -> tuple[int, int]:
        """(place of the member, its span) of a span of the union."""
        if not 0 <= span < self.spans:
            raise IndexError(f"span {span} of {self.spans}")
        place = bisect_right(self.first, span) - 1
        return place, span - self.first[place]

    def span_of(self, span: int) -> tuple[int, int]:
        place, own = self.home(span)
        start, stop = self.members[place].span_of(own)
        return span * self.span_rows, span * self.span_rows + stop - start


class UnitedPart(Part):
    """``members``, which have one projection and other corpora, read as one part: see the head of this file.

    What belongs to a whole part (what it learned, its caches) lies with the first member. ``source_row`` is counted
    through the corpora, one after the other; :meth:`located` leads to the rows of the members, which have their own.
    """

    def __init__(self, members: Sequence[Part]) -> None:
        first = members[0]
        self._members = tuple(members)
        self.name = "+".join(part.name for part in members)
        self.path, self.files = first.path, first.files
        self.manifest = _manifest(members)
        self.layout: UnitedLayout = UnitedLayout.over([part.layout for part in members])
        self.spans = [
            begin + span for begin, part in zip(self.layout.first, members, strict=False) for span in part.spans
        ]
        self._forget()
        names = self.domains
        self._codes = [np.array([*map(names.index, part.domains), -1], dtype=np.int16) for part in members]
        counts = (self._samples(part) for part in members)
        self._before = (0, *accumulate(counts))

    @staticmethod
    def _samples(part: Part) -> int:
        """One past the largest ``source_row``."""
        corpus = part.manifest["corpus"]
        return int(corpus.get("skip_samples", 0)) + int(corpus["samples"])

    @property
    def members(self) -> tuple[Part, ...]:
        return self._members

    @property
    def planned_rows(self) -> int:
        return sum(part.layout.rows for part in self._members)

    @property
    def tag(self) -> str:
        names = "/".join(part.name for part in self._members)
        return f"-union-{hashlib.sha256(names.encode()).hexdigest()[:8]}"

    def home(self, span: int) -> tuple[Part, int]:
        place, own = self.layout.home(span)
        return self._members[place], own

    def homes(self, spans: Sequence[int]) -> Iterator[tuple[Spanned[PartLayout], list[int], int]]:
        at = 0
        while at < len(spans):
            place, own = self.layout.home(spans[at])
            part, inside = self._members[place], [own]
            while at + len(inside) < len(spans) and spans[at + len(inside)] < self.layout.first[place + 1]:
                inside.append(spans[at + len(inside)] - self.layout.first[place])
            yield part, inside, self.layout.span_of(spans[at])[0] - part.layout.span_of(own)[0]
            at += len(inside)

    def seen(self, name: str, span: int, values: NDArray[Any]) -> NDArray[Any]:
        return self._of_member(name, self.layout.home(span)[0], values)

    def _of_member(self, name: str, place: int, values: NDArray[Any]) -> NDArray[Any]:
        """``values`` of the array ``name`` of the member at ``place``, as the union has them."""
        if name == "domain":
            return np.asarray(self._codes[place][values])
        return values + self._before[place] if name == "source_row" else values

    def located(
        self, rows: Sequence[int] | NDArray[np.int64]
    ) -> Iterator[tuple[Part, NDArray[np.int64], NDArray[np.int64]]]:
        row_R = np.asarray(rows, dtype=np.int64)
        span_R = row_R // self.layout.span_rows
        place_R = np.searchsorted(self.layout.first, span_R, side="right") - 1
        for place in np.unique(place_R).tolist():
            part, (at,) = self._members[place], np.nonzero(place_R == place)
            own_span = span_R[at] - self.layout.first[place]
            yield part, at, own_span * part.layout.span_rows + row_R[at] % self.layout.span_rows

    def read_rows(self, name: str, rows: Sequence[int] | NDArray[np.int64]) -> list[Any]:
        of_rows: dict[int, Any] = {}
        for part, at, own in self.located(rows):
            values = part.read_rows(name, own)
            if name in ("domain", "source_row"):
                values = list(self._of_member(name, self._members.index(part), np.asarray(values)))
            of_rows.update(zip(at.tolist(), values, strict=True))
        return [of_rows[place] for place in range(len(rows))]

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        size, pieces = self.layout.span_rows, []
        for span in range(start // size, -(-stop // size)):
            begin, end = self.layout.span_of(span)
            part, own = self.home(span)
            shift = part.layout.span_of(own)[0] - begin
            inside = part.read(name, max(start, begin) + shift, max(min(stop, end), begin) + shift)
            pieces.append(self.seen(name, span, inside))
        return np.concatenate(pieces)

    def first_source_row(self, member: Part) -> int:
        return self._before[self._members.index(member)]

    def bear_out(self, spans: Sequence[int] | None = None) -> None:
        for part in self._members:
            part.bear_out()

    def refuse_hollow(self) -> None:
        for part in self._members:
            part.refuse_hollow()

    @property
    def identity(self) -> str:
        return json_digest([part.identity for part in self._members])

    def fingerprint(self) -> str:
        return json_digest([part.fingerprint() for part in self._members])


def _manifest(members: Sequence[Part]) -> Manifest:
    """That of the first member, with the corpora of all."""
    manifests = [part.manifest for part in members]
    corpora = [manifest["corpus"] for manifest in manifests]
    repeated = [corpus["repeated_ids"] for corpus in corpora if corpus["repeated_ids"] is not None]
    first = manifests[0]
    corpus = {
        **corpora[0],
        "fingerprint": json_digest([corpus["fingerprint"] for corpus in corpora]),
        "samples": sum(corpus["samples"] for corpus in corpora),
        "max_samples": None,
        "domains": sorted({name for corpus in corpora for name in corpus["domains"] or []}) or None,
        "repeated_ids": {name: sum(counts[name] for counts in repeated) for name in ("ids", "samples")}
        if repeated
        else None,
    }
    padding = all(manifest["batching"]["padding"] for manifest in manifests)
    return {**first, "corpus": corpus, "batching": {**first["batching"], "padding": padding}}
