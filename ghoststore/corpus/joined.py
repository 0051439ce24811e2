"""Several corpora read as one: rows are counted through them, and so are files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from ghoststore.corpus.corpus import Corpus, Position
from ghoststore.corpus.fields import ResolvedFields, Sample
from ghoststore.corpus.formats.base import Form
from ghoststore.errors import UsageError


class JoinedCorpora:
    """``corpora`` of one form, whose rows have the same fields. ``before`` is what is added to ``source_row`` in each.

    UsageError, with their names, if their forms or fields differ.
    """

    def __init__(self, corpora: Sequence[Corpus], before: Sequence[int]) -> None:
        self.corpora = list(corpora)
        self._before = list(before)
        self._first_file = [0, *accumulate(len(corpus.files) for corpus in corpora)]
        first = corpora[0]
        for corpus in corpora[1:]:
            one, other = ((it.form.partition(".")[0], it.resolved.columns()) for it in (first, corpus))
            if one != other:
                raise UsageError(
                    f"rows of {first.source} ({one[0]}, {', '.join(one[1])}) and {corpus.source} ({other[0]}, "
                    f"{', '.join(other[1])}) are of different forms, and no file can hold both as they are: choose "
                    "from one part at a time"
                )
        self.source = " and ".join(dict.fromkeys(corpus.source for corpus in corpora))
        self.form = first.form

    @property
    def resolved(self) -> ResolvedFields:
        """The fields of the first corpus: the others have the same."""
        return self.corpora[0].resolved

    def samples_of(self, place: int, samples: Iterable[Sample]) -> Iterator[Sample]:
        """``samples`` of the corpus at ``place``, as those of all."""
        before, first_file = self._before[place], self._first_file[place]
        for sample in samples:
            yield replace(sample, source_row=before + sample.source_row, file=first_file + sample.file)

    def at(self, places: Sequence[Position]) -> Iterator[tuple[Form, Path, dict[int, Position]]]:
        """As :meth:`Corpus.at`."""
        for place, corpus in enumerate(self.corpora):
            own = {
                replace(it, source_row=it.source_row - self._before[place], file=it.file - self._first_file[place]): it
                for it in places
                if self._place(it.file) == place
            }
            for form, path, keyed in corpus.at(list(own)):
                yield form, path, {key: own[position] for key, position in keyed.items()}

    def sample_of(self, row: object, source_row: int, file: int, offset: int) -> Sample:
        """As :meth:`Corpus.sample_of`, with the numbers that the sample has in its own corpus."""
        place = self._place(file)
        own = source_row - self._before[place], file - self._first_file[place]
        return self.corpora[place].sample_of(row, *own, offset)

    def _place(self, file: int) -> int:
        return bisect_right(self._first_file, file) - 1
