"""A corpus: the samples of a source, streamed in order or read at random, and never all in memory."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ghoststore.corpus.fields import READING, ROLES_OF, WELL_KNOWN, ResolvedFields, Sample, resolve
from ghoststore.corpus.formats.base import Form
from ghoststore.corpus.formats.delimited import other_delimiter
from ghoststore.corpus.formats.json_document import JsonForm
from ghoststore.corpus.formats.stream import StreamForm
from ghoststore.corpus.formats.token_stream import TokenStreamForm
from ghoststore.corpus.kept import kept_value
from ghoststore.corpus.locate import locate
from ghoststore.corpus.memory import MemoryData, Source, recorded, source_of
from ghoststore.corpus.values import RowError, check_object, column_of
from ghoststore.errors import CorpusError, GhostStoreError, StorageError, UsageError
from ghoststore.progress import Progress
from ghoststore.settings.fields import Fields
from ghoststore.settings.shared import Data, is_stdin
from ghoststore.store.base.object_ranges import beginnings

STDIN = "standard input"
_OF = {"encoding": "text files (jsonl, json, csv, tsv, txt)", "delimiter": "csv and tsv files"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """The place of a sample in its corpus. The three fields are those of the `Sample`.

    An offset of -1 is always allowed. The row is then found by its number; text forms must stream the file for that.
    """

    source_row: int
    file: int
    offset: int = -1


class Place(NamedTuple):  # made for every sample, in half of the time of a dataclass
    """Where a row stands: as text it is the file, and the line or the row. Only then the line is looked for."""

    form: Form
    path: Path
    key: int

    def __str__(self) -> str:
        return self.form.where(self.path, self.key)


class Corpus:
    """The samples of one source. ``files`` are sorted by name. A dataset counts as one file, which is its folder."""

    def __init__(
        self, source: Source, form: Form, files: Sequence[Path], fields: Fields | ResolvedFields, recorded: str
    ) -> None:
        self.source = str(source)
        """The path, or what messages call data in memory."""
        self.origin = source
        """What :meth:`open` takes to open the same samples."""
        self.recorded = recorded
        """What a manifest records: the absolute path, or "-" for what cannot be read again."""
        self.form = form.name
        self.files = list(files)
        self._form = form
        self._fields = fields
        self._counts: list[int] = []
        self.domains: frozenset[str] | None = None
        """The domains of the samples that `samples` gives; None for all. See `only`."""
        self.keep: tuple[str, ...] = ()
        """Names of further fields whose values `samples` gives with each sample, in ``Sample.kept``. See `keeping`."""
        self.field_names: tuple[str, ...] = ()
        """Names of all fields of the first row, once `resolved` is decided on it."""
        self.note: Callable[[str], None] | None = None
        """Gets a message when a row first has a field that is not read and may belong to the text, once a field."""
        self.unread: list[str] = []
        """Names of these fields so far: of the first row once `resolved` is decided, of others as `samples`
        reads them.
        """
        self._left_out: set[str] = set()
        """Names of fields that would be among them, and that no row has had so far."""

    @classmethod
    def open(cls, data: Data, fields: Fields | ResolvedFields | None = None, *, stream: bool = False) -> Corpus:
        """Find the files of ``data``: a path, ``folder:split`` of a saved DatasetDict, or ``org/name:split`` of the
        Hugging Face hub; or data in memory, see `ghoststore.corpus.memory`. Rows are read later; with ``stream`` once,
        in order.

        Raises CorpusError for a source that is missing, has an unknown or mixed form, or lacks a split; UsageError for
        "-", which the caller must copy to a file with `spool_stdin`, and for an object that is no data.
        """
        source = source_of(data, stream=stream)
        fields = Fields() if fields is None else fields
        if isinstance(source, MemoryData):
            return cls(source, _reading(source.form, fields, source), [Path(source.name)], fields, recorded(source))
        form, files = locate(source)
        # Resolved fields come from an earlier reading of the corpus, which had a limit for records.
        largest = fields.max_record_bytes if isinstance(fields, Fields) else None
        form = replace(_reading(form, fields, source), largest=largest)  # type: ignore[type-var]
        return cls(source, form, files, fields, recorded(source))

    def only(self, domains: Iterable[str]) -> Corpus:
        """A copy of this corpus with only the samples of these ``domains``. They keep their ``source_row``."""
        narrowed = copy(self)  # shares _left_out, so that no field is noted twice
        narrowed.domains = frozenset(domains)
        return narrowed

    def keeping(self, fields: Iterable[str]) -> Corpus:
        """A copy of this corpus whose samples have the values of these ``fields``, too."""
        with_fields = copy(self)
        with_fields.keep = tuple(fields)
        return with_fields

    @property
    def resolved(self) -> ResolvedFields:
        """The fields to read, decided on the first row. CorpusError for a corpus without rows."""
        if isinstance(self._fields, Fields):
            self._fields = self._resolve(self._fields)
        return self._fields

    def cut_stream(self, length: int) -> None:
        """Say how long the rows of a stream of token ids are, unless that is said, and note it; for other forms
        nothing.
        """
        form = self._form
        if not isinstance(form, TokenStreamForm):
            return
        if form.ids_window is None and form.ids_document_end is None:
            self._form = replace(form, ids_window=length)
            self._fields = replace(self.resolved, ids_window=length)
            if self.note is not None:
                self.note(
                    f"{self.source}: one stream of token ids, whose rows are windows of {length} tokens, each from the "
                    "last token of the one before. Documents are rows with `fields.ids_document_end`"
                )

    @property
    def stream_form(self) -> StreamForm | None:
        """How a stream in memory is read; None for other corpora."""
        return self._form if isinstance(self._form, StreamForm) else None

    @property
    def nameless(self) -> bool:
        """Whether the samples are token ids, and nothing says which tokenizer made them."""
        return self.form in ("megatron", "token-stream")

    @property
    def template_date(self) -> str | None:
        """For token shards: the date that the chat template has written into them. None without a date, and for other
        forms.
        """
        date: str | None = getattr(getattr(self._form, "shards", None), "template_date", None)
        return date

    def samples(self, start: Position | None = None) -> Iterator[Sample]:
        """All samples in order, or those from ``start`` on. CorpusError for a row that is no sample."""
        start = Position(source_row=0, file=0, offset=-1) if start is None else start
        resolved = self.resolved
        has_offsets = self._form.has_offsets
        domains = self.domains
        left_out = self._left_out
        source_row, first = self._entry(start)
        files = self.files[start.file :]
        # Of other forms than those that are read from their beginning, the beginning is of no use.
        for file, path in enumerate(beginnings(files) if has_offsets else files, start.file):
            fields = self._form.fields(path) if left_out or self.keep else None
            # A file may lack fields that are kept. Asked for one that it lacks, a form reads all that it has.
            columns = [
                *resolved.columns(),
                *(name for name in self.keep if fields is None or column_of(name, fields) is not None),
            ]
            for key, row in self._form.rows(path, columns, first):
                if source_row >= start.source_row:
                    try:
                        place = Place(self._form, self.files[file], key)
                        sample = self.sample_of(row, source_row, file, key if has_offsets else -1, place)
                    except RowError as error:
                        raise CorpusError(f"{self._form.where(path, key)}: {error}") from None
                    if domains is None or sample.domain in domains:
                        names = fields or check_object(row)
                        if not left_out.isdisjoint(names):
                            self._see_unread(names, self._form.where(path, key))
                        yield sample
                source_row += 1
            first = 0

    def fetch(self, places: Sequence[Position]) -> dict[int, Sample]:
        """The samples at ``places`` by their source_row. Places may be in any order and may repeat.

        Plain text forms seek to the offset; compressed ones are streamed once, up to the last place; parquet reads the
        row groups that hold places; a dataset is indexed. A place without a sample is left out. Compare digests to see
        whether a sample has changed.
        """
        fetched: dict[int, Sample] = {}
        keyed, others = ([place for place in places if self._has_key(place) == has_key] for has_key in (True, False))
        for form, path, inside in self.at(keyed):
            for key, row in form.pick(path, self.resolved.columns(), list(inside)):
                place = inside[key]
                with suppress(RowError):
                    offset = key if form.has_offsets else -1
                    fetched[place.source_row] = self.sample_of(row, place.source_row, place.file, offset)
        for file in sorted({place.file for place in others}):
            fetched |= self._streamed(file, {place.source_row for place in others if place.file == file})
        return fetched

    def at(self, places: Sequence[Position]) -> Iterator[tuple[Form, Path, dict[int, Position]]]:
        """For each file with ``places``: its form, its path, and the places by their key in the file, ascending.

        In text forms, the offset of each place must be known.
        """
        for file in sorted({place.file for place in places}):
            keyed = {self._key(place): place for place in places if place.file == file}
            yield self._form, self.files[self._checked(file)], {key: keyed[key] for key in sorted(keyed)}

    def sample_of(self, row: object, source_row: int, file: int, offset: int, place: Place | None = None) -> Sample:
        """The sample of a row of this corpus. RowError for a missing field or a value of a wrong type."""
        sample = self.resolved.sample(
            row, source_row=source_row, file=file, offset=offset, adds_nulls=self._form.adds_nulls, place=place
        )
        return replace(sample, kept=tuple(kept_value(row, name) for name in self.keep)) if self.keep else sample

    def _resolve(self, fields: Fields) -> ResolvedFields:
        for path in self.files:
            form = self._form
            first_row = getattr(form, "first_row", None)
            rows = form.rows(path, None, 0) if first_row is None else first_row(path)
            for key, row in rows:
                where = self._form.where(path, key)
                try:
                    first = check_object(row)
                except RowError as error:
                    raise CorpusError(f"{where}: {error}") from None
                try:
                    self._fields = resolve(fields, first, where)
                except CorpusError as error:
                    raise CorpusError(f"{error}{self._hint(first)}") from None
                self.field_names = tuple(first)
                self._left_out |= self._fields.left_out()
                self._see_unread(first, None)
                return self._fields
        raise CorpusError(f"{self.source}: has no rows")

    def _hint(self, row: dict[str, object]) -> str:
        """What may be wrong if the first row has none of the fields."""
        delimiter = getattr(self._form, "delimiter", None)
        if delimiter is not None:
            return other_delimiter(list(row), delimiter)
        if isinstance(self._form, JsonForm):
            for name, value in row.items():
                if isinstance(value, list) and value and isinstance(value[0], dict):
                    return f". If the rows are those under {name!r}, give `{self.source}:{name}`"
        return ""

    def _see_unread(self, fields: Iterable[str], where: str | None) -> None:
        """Note which of ``fields`` are not read and may belong to the text. They are those of the first row (``where``
        is None), or of the row ``where``, the first to have some of them.
        """
        names = [name for name in WELL_KNOWN if name in self._left_out and name in fields]
        self._left_out.difference_update(names)
        self.unread += names
        if not names or self.note is None:
            return
        resolved = self.resolved
        of_content = [getattr(resolved, role) for role in ROLES_OF.get(resolved.kind, ())]
        belongs = {
            "messages": "put it among the messages",
            "chat-completion": "put it among the messages of the prompt",
            "prompt-completion": "join it to the prompt",
        }
        of_rows = "of its rows" if where is None else "of this row, and of none before it,"
        self.note(
            f"{where or self.source}: {_listed(names)} {of_rows} {'is' if len(names) == 1 else 'are'} not read "
            f"(read: {_listed(of_content)}). What belongs to the text there: "
            f"{belongs.get(resolved.kind, 'join it to the text')}, in the file"
        )

    def _streamed(self, file: int, source_rows: set[int]) -> dict[int, Sample]:
        """Rows of one file without known offsets, by the slow way: streaming the file up to the last of them."""
        fetched: dict[int, Sample] = {}
        if source_rows:
            for sample in self.samples(Position(source_row=min(source_rows), file=file)):
                if sample.file != file:
                    break
                if sample.source_row in source_rows:
                    fetched[sample.source_row] = sample
                if len(fetched) == len(source_rows):
                    return fetched
            raise CorpusError(f"{self.files[file]}: has no sample {max(source_rows)} of the corpus")
        return fetched

    def _has_key(self, place: Position) -> bool:
        return place.offset >= 0 or not self._form.has_offsets

    def _key(self, place: Position) -> int:
        return place.offset if self._form.has_offsets else place.source_row - self._first_row(place.file)

    def _entry(self, start: Position) -> tuple[int, int]:
        """(source_row, key) of the row at which to begin reading in order to reach ``start``."""
        self._checked(start.file)
        if self._has_key(start):
            key = self._key(start)
            if key < 0:
                raise CorpusError(f"{self.files[start.file]}: has no sample {start.source_row} of the corpus")
            return start.source_row, key
        return self._first_row(start.file), 0

    def _first_row(self, file: int) -> int:
        for path in self.files[len(self._counts) : self._checked(file)]:
            self._counts.append(self._form.count(path))
        return sum(self._counts[:file])

    def _checked(self, file: int) -> int:
        if not 0 <= file < len(self.files):
            raise CorpusError(f"{self.source}: expected a file from 0 to {len(self.files) - 1}, found {file}")
        return file


@contextmanager
def open_corpus(
    data: Data, fields: Fields | ResolvedFields, progress: Progress | None = None, *, stream: bool = False
) -> Iterator[Corpus]:
    """`Corpus.open`, and also for standard input (``-``, jsonl), which is copied to a temporary file (in TMPDIR) until
    the block ends.

    With ``progress`` the first row is read at once. Notes then name fields that are not read and may belong to the
    text: those of the first row, and others at the first row that has them.
    """
    with ExitStack() as stack:
        spooled: str | None = None
        if is_stdin(data):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ghoststore-"))
            data = spooled = str(spool_stdin(sys.stdin.buffer, Path(folder) / "stdin.jsonl"))
            stack.enter_context(_naming_stdin(spooled))
        corpus = Corpus.open(data, fields, stream=stream)
        if spooled is not None:
            corpus.recorded = "-"
        if progress is not None:
            note = progress.note
            corpus.note = note if spooled is None else lambda words: note(words.replace(spooled, STDIN))
            _ = corpus.resolved
        yield corpus


@contextmanager
def _naming_stdin(spooled: str) -> Iterator[None]:
    """Have errors name standard input, and not the temporary file that it lies in, which nobody has seen."""
    try:
        yield
    except GhostStoreError as error:
        error.args = (str(error).replace(spooled, STDIN), *error.args[1:])
        raise


def _reading(form: Form, fields: Fields | ResolvedFields, source: Source) -> Form:
    """``form``, which reads files in the way that ``fields`` give (see READING). UsageError where it has none."""
    given = {name: value for name in READING if (value := getattr(fields, name)) is not None}
    for name, value in given.items():
        if not hasattr(form, name) or (name == "delimiter" and getattr(form, name) is None):
            of = _OF.get(name, "files of token ids alone (nanoGPT's .bin)")
            raise UsageError(f"`fields.{name}={value!r}` is for {of}, and {source} is {form.name}: leave it out")
    return replace(form, **given) if given else form  # type: ignore[type-var]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def spool_stdin(stream: BinaryIO, to: Path) -> Path:
    """Copy a stream of jsonl to the file ``to`` (named \\*.jsonl), which appears whole or not at all.

    Returns ``to``. Raises StorageError if it cannot be written.
    """
    try:
        handle, partial = tempfile.mkstemp(prefix=f".{to.name}.", dir=to.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, to)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise StorageError(f"{to}: standard input could not be spooled: {error}") from error
    return to
