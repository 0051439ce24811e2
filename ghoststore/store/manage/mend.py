"""What of a damaged store can be mended without a model: groups, metadata of arrays, records, and caches dropped."""

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

import google_crc32c
import numpy as np
import zarr

from ghoststore.errors import CorruptError, GhostStoreError
from ghoststore.store.base.disk import flush, publish, replace, storage_errors
from ghoststore.store.base.manifest import manifest_of
from ghoststore.store.base.opening import open_regular
from ghoststore.store.base.records import FileRecord, seal
from ghoststore.store.base.writers import FOLDER as WRITERS
from ghoststore.store.part.caches import FOLDERS, caches, drop
from ghoststore.store.part.part import Part, create_fixed
from ghoststore.store.run.journal import FOLDER as JOURNAL
from ghoststore.store.run.journal import journal_path, journal_spans
from ghoststore.store.run.run import Run
from ghoststore.store.spans.commits import Commit, commit_path, committed
from ghoststore.store.spans.group import Spanned, create_array, group_problem, read_attributes
from ghoststore.store.spans.layout import CRC_BYTES, first_row
from ghoststore.store.spans.withdrawn import FOLDER as WITHDRAWN
from ghoststore.store.spans.withdrawn import FOREIGN, withdraw_record
from ghoststore.store.store import ROOT, ROOT_ATTRIBUTES, Store

_RECORD = re.compile(r"commits/([0-9]{8})\.json")
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """One thing that was put in order."""

    file: str
    """Its path in the part or run, or in the store."""
    how: str
    """restored, rebuilt, dropped, withdrawn."""
    part: str | None = None
    run: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def restore_groups(store: Store) -> list[Mended]:
    """The store's own groups, whose metadata say the same in every store."""
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
    """What a part or run needs to be opened and written at all, beside its own ``zarr.json``: the folders of its
    records and journals, with those of its own spans alone, and nothing else in the place of a folder.
    """
    try:
        manifest, _ = manifest_of(read_attributes(folder, kind.kind.name), str(folder), kind.kind)
        spans = kind.layout_of(manifest["storage"]).spans
    except (GhostStoreError, KeyError, TypeError, ValueError, OverflowError):
        return []  # whoever opens it says so
    journaled = kind is Run and "save_steps" in manifest["storage"]
    wanted = ["commits", *([JOURNAL] if journaled else [])]
    mended = [made for name in (*wanted, WRITERS, WITHDRAWN) for made in make_way(folder, f"{name}/", owner)]
    with storage_errors(str(folder)):
        for name in wanted:
            if not (folder / name).is_dir():
                (folder / name).mkdir()
                flush(folder)
                mended.append(Mended(file=name, how="restored", **owner))
        foreign = [commit_path(folder, span) for span in committed(folder) if span >= spans]
        if journaled:
            foreign += [journal_path(folder, span) for span in journal_spans(folder) if span >= spans]
        for path in foreign:
            aside = folder / WITHDRAWN / FOREIGN
            aside.mkdir(parents=True, exist_ok=True)
            os.replace(path, aside / path.name)
            flush(path.parent)
            how = f"moved aside: there are {spans} spans"
            mended.append(Mended(file=path.relative_to(folder).as_posix(), how=how, **owner))
    return mended


def make_way(folder: Path, name: str, owner: dict[str, str]) -> list[Mended]:
    """Rename what is no folder on the way to the file ``name``, a path in ``folder``, and what is no file in its place:
    nothing could be written there. It is not ours, and not removed. A name that ends in a slash is a folder's.
    """
    place, last = folder, folder / name
    for inside in Path(name).parts:
        place /= inside
        if place == last and not name.endswith("/"):
            fits = place.is_file()
        else:
            fits = place.is_dir()
        if not fits and os.path.lexists(place):
            with storage_errors(str(place)):
                to = next(path for n in count() if not os.path.lexists(path := _aside(place, n)))
                os.rename(place, to)
                flush(place.parent)
            how = f"something else stood there, and is called {to.name} now"
            return [Mended(file=place.relative_to(folder).as_posix(), how=how, **owner)]
    return []


def _aside(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name.lstrip('.')}.moved-aside{f'-{number}' if number else ''}")


def restore_metadata(source: Spanned[Any], names: Iterable[str], owner: dict[str, str]) -> list[Mended]:
    """Metadata of groups and arrays: functions of the layout, and compared with what the manifest says of them."""
    wanted = [name for name in names if name.endswith(ROOT)]
    mended: list[Mended] = []
    if not wanted:
        return mended
    with TemporaryDirectory(prefix="ghoststore-") as made:
        _make_metadata(source, Path(made))
        for name in wanted:
            path, data = source.path / name, None
            if name in source.files and (Path(made) / name).is_file():
                data = (Path(made) / name).read_bytes()
                if FileRecord.of(Path(made) / name).sha256 != source.files[name]:
                    continue  # another release of zarr writes it in other words
            elif name.partition("/")[0] in FOLDERS and name not in source.files:
                data = _group({})
            if data is not None:
                with storage_errors(str(path)):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    replace(path, data)
                mended.append(Mended(file=name, how="restored", **owner))
    return mended


def _make_metadata(source: Spanned[Any], folder: Path) -> None:
    """The metadata of every group and array of ``source`` below ``folder``, as its maker wrote them."""
    group = zarr.create_group(folder)
    group.create_group("commits")
    if isinstance(source, Run) and source.layout.save_steps is not None:
        group.create_group(JOURNAL)
    for spec in source.layout.arrays():
        create_array(group, spec, spec.count(source.layout.length))
    if isinstance(source, Run):
        for spec in source.layout.row_arrays():
            create_array(group, spec, source.layout.rows)
    for name, like in _fixed_arrays(source):
        with suppress(ValueError):
            create_fixed(group, name, like)
            digest = FileRecord.of(folder / name / ROOT).sha256
            if digest != source.files.get(f"{name}/{ROOT}"):
                del group[name]  # of this dtype it was not


def _fixed_arrays(source: Spanned[Any]) -> Iterator[tuple[str, Any]]:
    """(name, an array of its shape and dtype) for each array in one chunk beside the rows of a part, by the size of
    that chunk; several dtypes where it does not tell.
    """
    known = {spec.name for spec in source.layout.arrays()}
    for file in source.files:
        name, _, chunk = file.partition("/c/")
        if not isinstance(source, Part) or name in known or chunk not in ("0", "0/0"):
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
    wanted = {int(match[1]) for name in names if (match := _RECORD.fullmatch(name))}
    for spec in source.layout.arrays():
        chunk = re.compile(rf"{re.escape(spec.name)}/c/([0-9]{{1,12}})(?:/0)*")
        numbers = (int(match[1]) for name in names if (match := chunk.fullmatch(name)))
        wanted |= {first_row(spec, number) // source.layout.span_length for number in numbers}
    return {span for span in wanted if span < source.layout.spans}


def restore_record(source: Spanned[Any], span: int) -> None:
    """Write the record of ``span`` again, from its chunks: a function of their bytes, if each holds by its crc32c.

    A chunk that is in place was decided on by its span's intent, and is whole. CorruptError if one is missing or does
    not hold; nothing is changed then.
    """
    layout = source.layout
    start, stop = layout.span_of(span)
    keys = layout.span_keys(span)
    for key in keys:
        _check_crc(source.path / key, source.path)
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


def _check_crc(path: Path, within: Path) -> None:
    """CorruptError unless the last four bytes of a chunk file are the crc32c of those before."""
    try:
        with open_regular(path, within) as file:
            left = os.fstat(file.fileno()).st_size - CRC_BYTES
            checksum = 0
            while left > 0 and (piece := file.read(min(left, _PIECE))):
                checksum, left = google_crc32c.extend(checksum, piece), left - len(piece)
            stated = file.read()
    except CorruptError:
        raise
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error}") from error
    if left or stated != checksum.to_bytes(CRC_BYTES, "little"):
        raise CorruptError(f"{path} is damaged: its crc32c does not hold")


def restore_records(
    source: Spanned[Any], spans: Iterable[int], owner: dict[str, str]
) -> Iterator[tuple[int, Mended | str]]:
    """(span, its record as it was restored, or why it cannot be) of each of ``spans``."""
    for span in spans:
        try:
            restore_record(source, span)
        except GhostStoreError as error:
            if error.exit_code != CorruptError.exit_code:
                raise
            yield span, str(error)
        else:
            yield span, Mended(file=commit_path(Path(), span).as_posix(), how="restored from its chunks", **owner)
