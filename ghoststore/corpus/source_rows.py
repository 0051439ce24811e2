"""The original rows of a corpus, with all fields, each checked against a recorded digest."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ghoststore.corpus.corpus import Corpus, Position
from ghoststore.corpus.formats.arrow import wanted
from ghoststore.corpus.formats.arrow_file import ArrowForm
from ghoststore.corpus.formats.dataset import DatasetForm
from ghoststore.corpus.formats.json_document import JsonForm
from ghoststore.corpus.formats.parquet import ParquetForm
from ghoststore.corpus.formats.text import TextForm
from ghoststore.corpus.joined import JoinedCorpora
from ghoststore.corpus.values import RowError
from ghoststore.errors import CorpusError, MismatchError

ONE_FILE = "one file cannot hold both: give `out` a .jsonl file"


class SourceRows:
    """The rows at ``places`` of ``corpus``, which are distinct, in the order of the corpus. Each method reads them
    anew.

    Every method raises MismatchError for a row that is gone, or whose digest differs from that in ``digests``.
    """

    def __init__(self, corpus: Corpus | JoinedCorpora, places: Sequence[Position], digests: Sequence[int]) -> None:
        self.corpus = corpus
        self.places = sorted(places, key=lambda place: place.source_row)
        self._digest = {place.source_row: int(digest) for place, digest in zip(places, digests, strict=True)}

    @property
    def form(self) -> str:
        """The form of the corpus, without the compression: jsonl, json, csv, tsv, txt, parquet, dataset, …"""
        return self.corpus.form.partition(".")[0]

    def header(self) -> bytes:
        """For text forms: the bytes before the first row. CorpusError if they differ between files of the corpus."""
        first: bytes | None = None
        for form, path, _ in self.corpus.at(self.places):
            assert isinstance(form, TextForm | JsonForm)
            header = form.header(path)
            if first is not None and header.strip() != first.strip():
                raise CorpusError(f"{path}: expected the header {first!r:.200} of the files before it; {ONE_FILE}")
            first = header if first is None else first
        return first or b""

    def lines(self) -> Iterator[bytes]:
        """For text forms: the bytes of every row. A missing line ending is added to lines."""
        for form, path, keyed in self.corpus.at(self.places):
            assert isinstance(form, TextForm | JsonForm)
            for key, row, record in form.records(path, list(keyed)):
                self._check(path, keyed.pop(key), row)
                yield record if isinstance(form, JsonForm) or record.endswith(b"\n") else record + b"\n"
            self._refuse_missing(path, keyed)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row as a dictionary of all its fields."""
        if self.form in ("jsonl", "json"):
            return map(_exact, self.lines())
        return self._picked(None)

    def schema(self) -> Any:
        """For parquet and Arrow files and datasets: the Arrow schema. CorpusError if it differs between files of the
        corpus.
        """
        first: Any = None
        for form, path, _ in self.corpus.at(self.places):
            assert isinstance(form, ParquetForm | ArrowForm | DatasetForm)
            schema = form.schema(path)
            if first is not None and not schema.equals(first):
                raise CorpusError(f"{path}: expected the columns and types of the files before it; {ONE_FILE}")
            first = schema if first is None else first
        return first

    def tables(self) -> Iterator[Any]:
        """For parquet and Arrow files and datasets: the rows as Arrow tables with all columns."""
        for form, path, keyed in self.corpus.at(self.places):
            if isinstance(form, DatasetForm):
                self.check()
                yield form.dataset.select(list(keyed)).with_format("arrow")[:]
                continue
            assert isinstance(form, ParquetForm | ArrowForm)
            for first, inside, table in form.groups(path, None, list(keyed)):
                chosen = table.take([key - first for key in inside])
                columns = wanted(self.corpus.resolved.columns(), chosen.column_names)
                for key, row in zip(inside, chosen.select(columns).to_pylist(), strict=True):
                    self._check(path, keyed.pop(key), row)
                yield chosen
            self._refuse_missing(path, keyed)

    def dataset(self) -> Any:
        """For datasets: the rows as a dataset, with the features and the format of the source."""
        self.check()
        chosen = []
        for form, _, keyed in self.corpus.at(self.places):
            assert isinstance(form, DatasetForm)
            chosen.append(form.dataset.select(list(keyed)))
        if len(chosen) == 1:
            return chosen[0]
        import datasets

        for other in chosen[1:]:
            if other.features != chosen[0].features:
                raise CorpusError(f"{self.corpus.source}: their features differ; {ONE_FILE}")
        return datasets.concatenate_datasets(chosen)

    def check(self) -> None:
        """Read every row to compare its digest."""
        deque(self._picked(self.corpus.resolved.columns()), maxlen=0)

    def _picked(self, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        """Every row as a dictionary of ``columns`` (None: all fields), after its digest is compared."""
        for form, path, keyed in self.corpus.at(self.places):
            for key, row in form.pick(path, columns, list(keyed)):
                yield self._check(path, keyed.pop(key), row)
            self._refuse_missing(path, keyed)

    def _check(self, path: Path, place: Position, row: object) -> dict[str, Any]:
        """``row``, after its digest is compared with that recorded for ``place``."""
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
    """The row in a line of jsonl, with exact numbers: orjson would make floats of integers beyond 64 bits."""
    try:
        row: dict[str, Any] = json.loads(line)
    except RecursionError:
        raise CorpusError("a row is nested hundreds deep: give `out` a .jsonl file, which takes it as it is") from None
    return row
