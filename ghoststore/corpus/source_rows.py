"""Rows of a corpus as they stand there, with every field, each checked against the digest that it had."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ghoststore.corpus.corpus import Corpus, Position
from ghoststore.corpus.fields import RowError
from ghoststore.corpus.formats.arrow import wanted
from ghoststore.corpus.formats.dataset import DatasetForm
from ghoststore.corpus.formats.parquet import ParquetForm
from ghoststore.corpus.formats.text import TextForm
from ghoststore.errors import CorpusError, MismatchError

ONE_FILE = "one file cannot hold both: give `out` a .jsonl file"


class SourceRows:
    """Different rows of ``corpus`` in the order of the corpus, each time anew.

    Every method raises MismatchError for a row whose digest is not that in ``digests``, or that is gone.
    """

    def __init__(self, corpus: Corpus, places: Sequence[Position], digests: Sequence[int]) -> None:
        self.corpus = corpus
        self.places = sorted(places, key=lambda place: place.source_row)
        self._digest = {place.source_row: int(digest) for place, digest in zip(places, digests, strict=True)}

    @property
    def form(self) -> str:
        """jsonl, csv, txt, parquet, dataset or token-shards, whatever the packing."""
        return self.corpus.form.partition(".")[0]

    def header(self) -> bytes:
        """Of a text form: what stands before the first row. CorpusError if files of the corpus differ in it."""
        first: bytes | None = None
        for form, path, _ in self.corpus.at(self.places):
            assert isinstance(form, TextForm)
            header = form.header(path)
            if first is not None and header.strip() != first.strip():
                raise CorpusError(f"{path}: expected the header {first!r:.200} of the files before it; {ONE_FILE}")
            first = header if first is None else first
        return first or b""

    def lines(self) -> Iterator[bytes]:
        """Of a text form: the bytes of every row, a line ending added where there is none."""
        for form, path, keyed in self.corpus.at(self.places):
            assert isinstance(form, TextForm)
            for key, row, record in form.records(path, list(keyed)):
                self._check(path, keyed.pop(key), row)
                yield record if record.endswith(b"\n") else record + b"\n"
            self._refuse_missing(path, keyed)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row as a dictionary of all its fields."""
        if self.form == "jsonl":
            return map(_exact, self.lines())
        return self._picked(None)

    def schema(self) -> Any:
        """The Arrow schema of a corpus of parquet files or a dataset. CorpusError if its files have different ones."""
        first: Any = None
        for form, path, _ in self.corpus.at(self.places):
            assert isinstance(form, ParquetForm | DatasetForm)
            schema = form.schema(path)
            if first is not None and not schema.equals(first):
                raise CorpusError(f"{path}: expected the columns and types of the files before it; {ONE_FILE}")
            first = schema if first is None else first
        return first

    def tables(self) -> Iterator[Any]:
        """Of parquet files or a dataset: Arrow tables of all columns."""
        for form, path, keyed in self.corpus.at(self.places):
            if isinstance(form, DatasetForm):
                self.check()
                yield form.dataset.select(list(keyed)).with_format("arrow")[:]
                continue
            assert isinstance(form, ParquetForm)
            for first, inside, table in form.groups(path, None, list(keyed)):
                chosen = table.take([key - first for key in inside])
                columns = wanted(self.corpus.resolved.columns(), chosen.column_names)
                for key, row in zip(inside, chosen.select(columns).to_pylist(), strict=True):
                    self._check(path, keyed.pop(key), row)
                yield chosen
            self._refuse_missing(path, keyed)

    def dataset(self) -> Any:
        """Of a dataset: the rows as one. They are its own, with features and format."""
        self.check()
        ((form, _, keyed),) = self.corpus.at(self.places)
        assert isinstance(form, DatasetForm)
        return form.dataset.select(list(keyed))

    def check(self) -> None:
        """Read every row, only to compare its digest."""
        deque(self._picked(self.corpus.resolved.columns()), maxlen=0)

    def _picked(self, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        """Every row, with these fields (None: all), checked."""
        for form, path, keyed in self.corpus.at(self.places):
            for key, row in form.pick(path, columns, list(keyed)):
                yield self._check(path, keyed.pop(key), row)
            self._refuse_missing(path, keyed)

    def _check(self, path: Path, place: Position, row: object) -> dict[str, Any]:
        """``row``, a dictionary, if it is the sample that belongs at ``place``."""
        expected = self._digest[place.source_row]
        try:
            sample = self.corpus.sample_of(row, place.source_row, place.file, place.offset)
            digest = f"{sample.digest():016x}"
        except RowError as error:
            digest = str(error)
        if digest != f"{expected:016x}":
            raise MismatchError(
                f"{path}: row {place.source_row} of the corpus is not the one that the part was built from: expected "
                f"the digest {expected:016x}, found {digest}. Build the part again on the corpus as it is"
            )
        assert isinstance(row, dict)
        return row

    def _refuse_missing(self, path: Path, keyed: dict[int, Position]) -> None:
        for place in keyed.values():
            raise MismatchError(
                f"{path}: row {place.source_row} of the corpus is no longer there. Build the part again on the corpus "
                "as it is"
            )


def _exact(line: bytes) -> dict[str, Any]:
    """The row of a line, its numbers exact: orjson makes floats of integers beyond 64 bits."""
    try:
        row: dict[str, Any] = json.loads(line)
    except RecursionError:
        raise CorpusError("a row is nested hundreds deep: give `out` a .jsonl file, which takes it as it is") from None
    return row
