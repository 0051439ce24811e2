"""A corpus: what a source names, streamed in order or read at random, never held in memory."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ghoststore.corpus.fields import ResolvedFields, RowError, Sample, check_object, resolve
from ghoststore.corpus.formats import FORMS, DatasetForm, Form, form_of
from ghoststore.errors import CorpusError, StorageError, UsageError
from ghoststore.progress import Progress
from ghoststore.settings.fields import CONTENT_FIELDS, Fields

SUPPORTED = f"supported: {', '.join(sorted(FORMS))}, a folder of such files, a save_to_disk folder, token shards"
NOT_DATA = {"", ".md", ".yaml", ".yml"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_SOURCE = re.compile(rf"(?P<name>{HUB_NAME.pattern}):(?P<split>[\w.+%:\[\]-]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a sample stands; the three fields are those of the `Sample`.

    An offset of -1 is always allowed: the row is then found by its number, in text forms by streaming.
    """

    source_row: int
    file: int
    offset: int = -1


class Corpus:
    """The samples of one source. ``files`` are sorted by name; a dataset counts as one file, its folder."""

    def __init__(self, source: str, form: Form, files: Sequence[Path], fields: Fields | ResolvedFields):
        self.source = source
        self.form = form.name
        self.files = list(files)
        self._form = form
        self._fields = fields
        self._counts: list[int] = []
        self.domains: frozenset[str] | None = None
        """The domains whose samples `samples` gives; None for all. See `only`."""
        self.unread: list[str] = []
        """Fields of the first row that are not read and may belong to the text. Known once `resolved` was decided."""

    @classmethod
    def open(cls, source: str, fields: Fields | ResolvedFields | None = None) -> Corpus:
        """Find what ``source`` names; rows are read later.

        A path; ``folder:split`` of a saved DatasetDict; or ``org/name:split`` of the Hugging Face hub.
        Raises CorpusError for a source that is missing, of an unknown or mixed form, or without a split;
        UsageError for "-", which the caller spools with `spool_stdin`.
        """
        form, files = locate(source)
        return cls(source, form, files, Fields() if fields is None else fields)

    def only(self, domains: Iterable[str]) -> Corpus:
        """The same corpus without the samples of other domains, or of none. All keep their ``source_row``."""
        narrowed = Corpus(self.source, self._form, self.files, self._fields)
        narrowed.domains = frozenset(domains)
        return narrowed

    @property
    def resolved(self) -> ResolvedFields:
        """The fields in use, decided on the first row; CorpusError for a corpus without rows."""
        if isinstance(self._fields, Fields):
            self._fields = self._resolve(self._fields)
        return self._fields

    def samples(self, start: Position | None = None) -> Iterator[Sample]:
        """All samples in order, or those from the one at ``start`` on."""
        start = Position(source_row=0, file=0, offset=-1) if start is None else start
        resolved = self.resolved
        columns = resolved.columns()
        has_offsets = self._form.has_offsets
        domains = self.domains
        source_row, first = self._entry(start)
        for file in range(start.file, len(self.files)):
            path = self.files[file]
            for key, row in self._form.rows(path, columns, first):
                if source_row >= start.source_row:
                    try:
                        sample = resolved.sample(
                            row, source_row=source_row, file=file, offset=key if has_offsets else -1
                        )
                    except RowError as error:
                        raise CorpusError(f"{self._form.where(path, key)}: {error}") from None
                    if domains is None or sample.domain in domains:
                        yield sample
                source_row += 1
            first = 0

    def fetch(self, places: Sequence[Position]) -> dict[int, Sample]:
        """The samples at ``places`` (any order, repeated or not) by their source_row.

        Plain text forms seek to the offset; compressed ones are streamed once, up to the last place;
        parquet reads the row groups concerned; a dataset is indexed. A place where no sample stands any
        more is left out: whether it is the same sample, its digest tells.
        """
        found: dict[int, Sample] = {}
        for file in sorted({place.file for place in places}):
            inside = [place for place in places if place.file == file]
            known = {self._key(place): place for place in inside if self._has_key(place)}
            path = self.files[self._checked(file)]
            for key, row in self._form.pick(path, self.resolved.columns(), sorted(known)):
                place = known[key]
                offset = key if self._form.has_offsets else -1
                try:
                    found[place.source_row] = self.resolved.sample(
                        row, source_row=place.source_row, file=file, offset=offset
                    )
                except RowError:
                    continue
            found |= self._streamed(file, {p.source_row for p in inside if not self._has_key(p)})
        return found

    def at(self, places: Sequence[Position]) -> Iterator[tuple[Form, Path, dict[int, Position]]]:
        """Where different ``places`` with known offsets are: for each file its form, its path, and the places by their
        key in it, ascending.
        """
        for file in sorted({place.file for place in places}):
            keyed = {self._key(place): place for place in places if place.file == file}
            yield self._form, self.files[self._checked(file)], {key: keyed[key] for key in sorted(keyed)}

    def _resolve(self, fields: Fields) -> ResolvedFields:
        for path in self.files:
            for key, row in self._form.rows(path, None, 0):
                where = self._form.where(path, key)
                try:
                    first = check_object(row)
                except RowError as error:
                    raise CorpusError(f"{where}: {error}") from None
                resolved = resolve(fields, first, where)
                self.unread = resolved.unread(first)
                return resolved
        raise CorpusError(f"{self.source}: has no rows")

    def _streamed(self, file: int, source_rows: set[int]) -> dict[int, Sample]:
        """The slow way to rows of one file without a known offset: from its beginning to the last."""
        found: dict[int, Sample] = {}
        if source_rows:
            for sample in self.samples(Position(source_row=min(source_rows), file=file)):
                if sample.file != file:
                    break
                if sample.source_row in source_rows:
                    found[sample.source_row] = sample
                if len(found) == len(source_rows):
                    return found
            raise CorpusError(f"{self.files[file]}: has no sample {max(source_rows)} of the corpus")
        return found

    def _has_key(self, place: Position) -> bool:
        return place.offset >= 0 or not self._form.has_offsets

    def _key(self, place: Position) -> int:
        return place.offset if self._form.has_offsets else place.source_row - self._first_row(place.file)

    def _entry(self, start: Position) -> tuple[int, int]:
        """Where to begin reading for ``start``: the source_row and the key of the first row read."""
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


def locate(source: str) -> tuple[Form, list[Path]]:
    """The form and the files that a source names; see `Corpus.open`."""
    if source == "-":
        raise UsageError("standard input can be read only once: spool it to a file first (spool_stdin)")
    path = Path(source)
    if path.is_file():
        form = form_of(path)
        if form is None:
            raise CorpusError(f"{path}: unsupported form {path.suffix!r}; {SUPPORTED}")
        return form, [path]
    if path.is_dir():
        return _locate_folder(path, split=None)
    if path.exists():
        raise CorpusError(f"{path}: expected a file or a folder, found a device, pipe or socket")
    folder, _, split = source.rpartition(":")
    if folder and Path(folder).exists():
        if Path(folder).is_dir():
            return _locate_folder(Path(folder), split)
        raise CorpusError(f"{source}: a split is for a saved DatasetDict; {folder} is a file")
    hub = HUB_SOURCE.fullmatch(source)
    if hub and form_of(Path(hub["name"])) is None:
        return _locate_on_hub(source, hub["name"], hub["split"])
    hint = f"; for a dataset of the hub, add its split: {source}:train" if HUB_NAME.fullmatch(source) else ""
    raise CorpusError(f"{source}: does not exist{hint}")


def absolute(source: str) -> str:
    """``source`` as an absolute path where it is one (a split of a saved dataset keeps its ``:split``)."""
    path, _, split = source.rpartition(":")
    if Path(source).exists():
        return str(Path(source).resolve())
    return f"{Path(path).resolve()}:{split}" if path and Path(path).exists() else source


def _locate_folder(folder: Path, split: str | None) -> tuple[Form, list[Path]]:
    if (folder / "shards.json").is_file():
        from ghoststore.tokens.shards import ShardsForm, TokenShards

        if split is not None:
            raise CorpusError(f"{folder}:{split}: a split is for a saved DatasetDict; {folder} holds token shards")
        return ShardsForm(TokenShards.open(folder, verify_on_read=True)), [folder]
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _locate_saved(folder, split)
    if split is not None:
        raise CorpusError(f"{folder}:{split}: a split is for a saved DatasetDict; {folder} is a plain folder")
    files = [f for f in folder.iterdir() if f.is_file() and not f.name.startswith(".")]
    files = sorted((f for f in files if f.suffix.lower() not in NOT_DATA), key=lambda f: f.name)
    forms: dict[str, Form] = {}
    for file in files:
        form = form_of(file)
        if form is None:
            raise CorpusError(f"{file}: unsupported form {file.suffix!r} in a folder of data; {SUPPORTED}")
        forms[form.name] = form
    if not forms:
        raise CorpusError(f"{folder}: no data files in this folder (subfolders are not read); {SUPPORTED}")
    if len(forms) > 1:
        raise CorpusError(f"{folder}: expected files of one form, found {', '.join(sorted(forms))}")
    return forms.popitem()[1], files


def _locate_saved(folder: Path, split: str | None) -> tuple[Form, list[Path]]:
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise CorpusError(f"{folder}: cannot be read as a saved dataset: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        if split is not None:
            raise CorpusError(f"{folder}: is one Dataset and has no splits; name it without ':{split}'")
        return DatasetForm(loaded), [folder]
    if split is None or split not in loaded:
        wrong = "which split?" if split is None else f"no split {split!r};"
        choices = ", ".join(f"{folder}:{name}" for name in loaded)
        raise CorpusError(f"{folder}: {wrong} it has {choices}")
    return DatasetForm(loaded[split]), [folder / split]


def _locate_on_hub(source: str, name: str, split: str) -> tuple[Form, list[Path]]:
    import datasets

    missing = f"{source}: no such path exists"
    try:
        loaded: Any = datasets.load_dataset(name, split=split)
    except ConnectionError as error:
        raise CorpusError(f"{missing}, and the Hugging Face hub could not be reached: {error}") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CorpusError(f"{missing}, and the Hugging Face hub does not give it: {error}") from error
    cached = sorted({Path(entry["filename"]).parent for entry in loaded.cache_files})
    return DatasetForm(loaded), cached[:1] or [Path(source)]


@contextmanager
def open_corpus(source: str, fields: Fields | ResolvedFields, progress: Progress | None = None) -> Iterator[Corpus]:
    """`Corpus.open`, and standard input (``-``, jsonl) as well: it lies in a temporary file (TMPDIR) until the end.

    With ``progress`` the first row is read at once, and a note names the fields of it that are not read, where they may
    belong to the text.
    """
    with ExitStack() as stack:
        if source == "-":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ghoststore-"))
            source = str(spool_stdin(sys.stdin.buffer, Path(folder) / "stdin.jsonl"))
        corpus = Corpus.open(source, fields)
        if progress is not None:
            _note_unread(corpus, progress)
        yield corpus


def _note_unread(corpus: Corpus, progress: Progress) -> None:
    resolved = corpus.resolved
    if corpus.unread:
        of_content = [getattr(resolved, role) for role in CONTENT_FIELDS.get(resolved.kind, ())]
        where = {"messages": "put it among the messages", "prompt-completion": "join it to the prompt"}
        progress.note(
            f"{corpus.source}: {_listed(corpus.unread)} of its rows {'is' if len(corpus.unread) == 1 else 'are'} not "
            f"read (read: {_listed(of_content)}). What belongs to the text there: "
            f"{where.get(resolved.kind, 'join it to the text')}, in the file"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def spool_stdin(stream: BinaryIO, to: Path) -> Path:
    """Copy a stream of jsonl to the file ``to`` (named \\*.jsonl), which appears whole or not at all.

    Returns ``to``. Raises StorageError where it cannot be written.
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
