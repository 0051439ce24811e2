"""Mends what needs no model: restores groups, metadata of arrays and records, and drops damaged caches."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import zarr

from ghoststore.errors import CorruptError, GhostStoreError
from ghoststore.store.base.disk import flush, publish, replace, storage_errors
from ghoststore.store.base.manifest import manifest_of
from ghoststore.store.base.names import MOVED_ASIDE
from ghoststore.store.base.opening import is_other
from ghoststore.store.base.records import FileRecord, seal
from ghoststore.store.base.writers import FOLDER as WRITERS
from ghoststore.store.part.caches import FOLDERS, caches, drop
from ghoststore.store.part.part import Part, create_fixed
from ghoststore.store.run.journal import FOLDER as JOURNAL
from ghoststore.store.run.journal import journal_path, journal_spans
from ghoststore.store.run.run import Run
from ghoststore.store.spans.checksum import check_crc
from ghoststore.store.spans.commits import Commit, commit_path, committed
from ghoststore.store.spans.group import Spanned, create_array, group_problem, read_attributes
from ghoststore.store.spans.layout import CRC_BYTES, first_row
from ghoststore.store.spans.withdrawn import FOLDER as WITHDRAWN
from ghoststore.store.spans.withdrawn import FOREIGN, withdraw_record
from ghoststore.store.store import ROOT, ROOT_ATTRIBUTES, Store

_RECORD = re.compile(r"commits/([0-9]{8})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """A file that was mended."""

    file: str
    """Its path in the part or run, or in the store."""
    how: str
    """What was done, in words: restored, rebuilt, dropped, withdrawn."""
    part: str | None = None
    run: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def restore_groups(store: Store) -> list[Mended]:
    """Restore the store's own groups, whose metadata are the same in every store."""
    mended: list[Mended] = []
    for name, attributes in ((f"parts/{ROOT}", {}), (f"runs/{ROOT}", {}), (ROOT, ROOT_ATTRIBUTES)):
        path = store.path / name
        if group_problem(path.parent, attributes) is not None:
            mended += make_way(store.path, name, {})
            with storage_errors(str(path)):
                path.parent.mkdir(exist_ok=True)
                replace(path, _group(attributes))
            mended.append(Mended(file=name, how="restored"))
    return mended


def restore_opening(kind: type[Spanned[Any]], folder: Path, owner: dict[str, str]) -> list[Mended]:
    """Restore what a part or run needs to be opened and written, apart from its own ``zarr.json``.

    These are the folders of records and journals. Records and journals of spans that it does not have are moved away,
    and so is anything else in the place of a folder.
    """
    try:
        manifest, _ = manifest_of(read_attributes(folder, kind.kind.name), str(folder), kind.kind)
        spans = kind.layout_of(manifest["storage"]).spans
    except (GhostStoreError, KeyError, TypeError, ValueError, OverflowError):
        return []  # opening it will say why
    journaled = kind is Run and "save_steps" in manifest["storage"]
    folders = ["commits", *([JOURNAL] if journaled else [])]
    mended = [made for name in (*folders, WRITERS, WITHDRAWN) for made in make_way(folder, f"{name}/", owner)]
    with storage_errors(str(folder)):
        for name in folders:
            if not (folder / name).is_dir():
                (folder / name).mkdir()
                flush(folder)
                mended.append(Mended(file=name, how="restored", **owner))
        foreign = [commit_path(folder, span) for span in committed(folder) if span >= spans]
        if journaled:
            foreign += [journal_path(folder, span) for span in journal_spans(folder) if span >= spans]
        for path in foreign:
            to = folder / WITHDRAWN / FOREIGN
            to.mkdir(parents=True, exist_ok=True)
            os.replace(path, to / path.name)
            flush(path.parent)
            how = f"moved aside: there are {spans} spans"
            mended.append(Mended(file=path.relative_to(folder).as_posix(), how=how, **owner))
    return mended


def make_way(folder: Path, name: str, owner: dict[str, str]) -> list[Mended]:
    """Rename what prevents writing the file ``name``, a path in ``folder``: what is no file there, or no folder above.

    It is not ours, so it is not removed. A name that ends in a slash is that of a folder.
    """
    path, last = folder, folder / name
    for component in Path(name).parts:
        path /= component
        if is_other(path, folder=path != last or name.endswith("/")):
            with storage_errors(str(path)):
                to = next(free for n in count() if not os.path.lexists(free := _moved_name(path, n)))
                os.rename(path, to)
                flush(path.parent)
            how = f"something else stood there, and is called {to.name} now"
            return [Mended(file=path.relative_to(folder).as_posix(), how=how, **owner)]
    return []


def _moved_name(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name.lstrip('.')}.{MOVED_ASIDE}{f'-{number}' if number else ''}")


def restore_metadata(source: Spanned[Any], names: Iterable[str], owner: dict[str, str]) -> list[Mended]:
    """Restore metadata of groups and arrays: they follow from the layout, and the manifest has their SHA-256."""
    metadata = [name for name in names if name.endswith(ROOT)]
    mended: list[Mended] = []
    if not metadata:
        return mended
    with TemporaryDirectory(prefix="ghoststore-") as scratch:
        _make_metadata(source, Path(scratch))
        for name in metadata:
            path, data = source.path / name, None
            if name in source.files and (Path(scratch) / name).is_file():
                data = (Path(scratch) / name).read_bytes()
                if FileRecord.of(Path(scratch) / name).sha256 != source.files[name]:
                    continue  # another release of zarr writes other bytes
            elif name.partition("/")[0] in FOLDERS and name not in source.files:
                data = _group({})
            if data is not None:
                with storage_errors(str(path)):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    replace(path, data)
                mended.append(Mended(file=name, how="restored", **owner))
    return mended


def _make_metadata(source: Spanned[Any], folder: Path) -> None:
    """Write the metadata of every group and array of ``source`` below ``folder``, as its creation did."""
    group = zarr.create_group(folder)
    group.create_group("commits")
    if isinstance(source, Run) and source.layout.save_steps is not None:
        group.create_group(JOURNAL)
    # That of an open part is not the number of rows by now.
    length = source.layout_of(source.recorded["storage"]).length
    for spec in source.layout.arrays():
        create_array(group, spec, spec.count(length))
    if isinstance(source, Run):
        for spec in source.layout.row_arrays():
            create_array(group, spec, source.layout.rows)
    for name, like in _fixed_arrays(source):
        with suppress(ValueError):
            create_fixed(group, name, like)
            digest = FileRecord.of(folder / name / ROOT).sha256
            if digest != source.files.get(f"{name}/{ROOT}"):
                del group[name]  # it had another dtype


def _fixed_arrays(source: Spanned[Any]) -> Iterator[tuple[str, Any]]:
    """(name, an array of its shape and dtype) for each array of a part in one chunk that has no axis of rows.

    The size of the chunk gives the shape; if several dtypes fit, each is listed.
    """
    row_arrays = {spec.name for spec in source.layout.arrays()}
    for file in source.files:
        name, _, chunk = file.partition("/c/")
        if not isinstance(source, Part) or name in row_arrays or chunk not in ("0", "0/0"):
            continue
        try:
            size = (source.path / file).stat().st_size - CRC_BYTES
        except OSError:
            size = 8 * 5 * source.layout.spans  # the table of spans
        if chunk == "0/0":
            yield name, np.empty((size // 40, 5), dtype=np.int64)
        else:
            for dtype in (np.dtype(np.float32), np.dtype(np.int64)):
                yield name, np.empty(size // dtype.itemsize, dtype=dtype)


def _group(attributes: dict[str, Any]) -> bytes:
    return json.dumps({"attributes": attributes, "zarr_format": 3, "node_type": "group"}, indent=2).encode()


def drop_caches(part: Part, names: Iterable[str], owner: dict[str, str]) -> list[Mended]:
    """Remove the caches whose files are among the damaged ``names``."""
    damaged, mended = set(names), []
    for cache in caches(part):
        if damaged & {cache.record, *cache.files}:
            with storage_errors(str(part.path / cache.record)):
                drop(part, cache)
            mended.append(
                Mended(file=cache.record, how=f"dropped ({cache.what}: a cache, made again when asked for)", **owner)
            )
    return mended


def damaged_spans(source: Spanned[Any], names: Iterable[str]) -> set[int]:
    """Spans that have a record or a chunk among ``names``."""
    spans = {int(match[1]) for name in names if (match := _RECORD.fullmatch(name))}
    for spec in source.layout.arrays():
        chunk = re.compile(rf"{re.escape(spec.name)}/c/([0-9]{{1,12}})(?:/0)*")
        numbers = (int(match[1]) for name in names if (match := chunk.fullmatch(name)))
        spans |= {first_row(spec, number) // source.layout.span_length for number in numbers}
    return {span for span in spans if span < source.layout.spans}


def restore_record(source: Spanned[Any], span: int) -> None:
    """Write the record of ``span`` again, from the bytes of its chunks, if the crc32c of each holds.

    A chunk in place was decided by an intent of its span, so it is whole. CorruptError, without a change, if a chunk is
    missing or damaged.
    """
    layout = source.layout
    start, stop = layout.span_of(span)
    keys = layout.span_keys(span)
    for key in keys:
        check_crc(source.path / key, source.path)
    for spec in layout.arrays():
        for key in [] if spec.dtype is str else layout.chunk_keys(spec, span):
            size = (source.path / key).stat().st_size
            if size != spec.chunk_bytes + CRC_BYTES:
                raise CorruptError(f"{source.path / key} has {size} bytes; a chunk has {spec.chunk_bytes + CRC_BYTES}")
    arrays = {
        spec.name: source.slice(spec, spec.count(layout.length), *spec.entries(start, stop)) for spec in layout.arrays()
    }
    statuses, tokens = source.summarize(arrays)
    files = {key: FileRecord.of(source.path / key) for key in keys}
    commit = Commit(span=span, start=start, stop=stop, statuses=statuses, tokens=tokens, files=files)
    with storage_errors(str(commit_path(source.path, span))):
        withdraw_record(source, span)
        publish(commit_path(source.path, span), seal(commit.to_json()))


def restore_records(
    source: Spanned[Any], spans: Iterable[int], owner: dict[str, str]
) -> Iterator[tuple[int, Mended | str]]:
    """Restore the record of each of ``spans``. Yields (span, the mended record or why it cannot be restored)."""
    for span in spans:
        try:
            restore_record(source, span)
        except GhostStoreError as error:
            if error.exit_code != CorruptError.exit_code:
                raise
            yield span, str(error)
        else:
            yield span, Mended(file=commit_path(Path(), span).as_posix(), how="restored from its chunks", **owner)
