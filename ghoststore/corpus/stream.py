"""Corpora that are read once, in order: streams in memory and of the hub, and files read as streams are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from ghoststore.corpus.corpus import Corpus, Position
from ghoststore.corpus.fields import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive samples of a corpus, and what follows them."""

    samples: list[Sample]
    next: Position | None
    """Place of the sample that follows; None if nothing does."""
    state: str | None
    """The state with which a stream goes on behind these samples; None if it has none, and for files."""


def joined(blocks: Sequence[Block]) -> Block:
    """Blocks that follow one another, as one."""
    samples = [sample for block in blocks for sample in block.samples]
    return Block(samples=samples, next=blocks[-1].next, state=blocks[-1].state)


class Once:
    """The samples of ``corpus``, each read once and one of them ahead: after the first ``skip``, at most ``most``; or
    those from ``start`` on, of which ``most`` are left.
    """

    def __init__(
        self, corpus: Corpus, *, skip: int = 0, most: int | None = None, start: Position | None = None
    ) -> None:
        self._form = corpus.stream_form
        self._samples = islice(corpus.samples(start), skip if start is None else 0, None)
        self._left = most
        self._following = next(self._samples, None)

    @property
    def ended(self) -> bool:
        """Whether all were taken."""
        return self._following is None

    def take(self, count: int) -> Block:
        """The next ``count`` samples, or all that are left. Do not call it when all were taken."""
        assert self._following is not None
        wanted = count if self._left is None else min(count, self._left)
        samples = [self._following, *islice(self._samples, wanted - 1)]
        state = None if self._form is None else self._form.state()  # before another row is read
        if self._left is not None:
            self._left -= len(samples)
        goes_on = self._left != 0 and len(samples) == wanted
        self._following = next(self._samples, None) if goes_on else None
        return Block(samples=samples, next=None if self._following is None else place_of(self._following), state=state)


def place_of(sample: Sample) -> Position:
    """Where a sample lies."""
    return Position(source_row=sample.source_row, file=sample.file, offset=sample.offset)


def go_on(corpus: Corpus, row: int, state: str | None) -> bool:
    """Have a stream go on with ``row`` by ``state``, or read what comes before if that is None. Returns whether it need
    not read that; of files it need not.
    """
    form = corpus.stream_form
    if form is None:
        return True
    form.reading.resume = None if state is None else (row, state)
    return state is not None or row == 0
