"""The manifest of a folder of token shards, ``shards.json``, and the files that it describes. See
``docs/shards.md``.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.corpus.scan import MAX_DOMAINS
from ghoststore.errors import CorpusError, CorruptError, MismatchError
from ghoststore.store.base.manifest import Kind
from ghoststore.store.base.opening import open_regular, parse_json, read_bounded
from ghoststore.store.base.records import reading, seal, unseal
from ghoststore.store.spans.commits import Commit, commit_path, committed, read_commit

SHARDS_VERSION = 1
MANIFEST = "shards.json"
TOKENIZER = "tokenizer"
CHECKSUM = "sha256"
"""The key, in the manifest, of its own checksum."""
LARGEST_MANIFEST = 64 << 20
SHARDS = Kind(
    name="folder",
    made="tokenized",
    identity=("tokenizer", "corpus", "storage"),
    description=("source", "software"),
    parameter="out",
)

SAMPLE = np.dtype(
    [
        ("source_row", "<i8"),
        ("source_offset", "<i8"),
        ("source_digest", "<u8"),
        ("start", "<i8"),
        ("id_stop", "<i8"),
        ("length", "<i4"),
        ("first_target", "<i4"),
        ("source_file", "<i4"),
        ("domain", "<i2"),
    ]
)
"""The entry of one sample in ``samples-*.npy``."""

ENTRIES = {
    "tokenizer": ("fingerprint", "template_date", "vocabulary"),
    "corpus": ("fingerprint", "samples", "domains", "repeated_ids", "fields", "max_samples", "only_domains"),
    "storage": ("shard_samples", "shards", "token_dtype"),
    "source": ("data", "form"),
}
"""The entries that every manifest has, by section."""
_TOKENIZER_FILE = re.compile(rf"{TOKENIZER}(/[A-Za-z0-9_-][A-Za-z0-9._-]*){{1,3}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLayout:
    """The numbers that determine the files of a folder. Raises MismatchError for numbers out of range."""

    samples: int
    shard_samples: int
    vocabulary: int
    """One more than the largest token id."""
    domains: int

    def __post_init__(self) -> None:
        limits = {"samples": 1 << 48, "shard_samples": 1 << 31, "vocabulary": 1 << 31, "domains": MAX_DOMAINS}
        for name, limit in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not (name != "domains") <= value <= limit:
                raise MismatchError(f"token shards of {value!r} {name}: expected a number up to {limit}")

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.samples // self.shard_samples)

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """uint16 if the vocabulary fits, else uint32; little endian."""
        return np.dtype("<u2" if self.vocabulary <= 1 << 16 else "<u4")

    def span_of(self, shard: int) -> tuple[int, int]:
        """(first sample, one past the last) of ``shard``."""
        return shard * self.shard_samples, min((shard + 1) * self.shard_samples, self.samples)


def shard_files(shard: int) -> list[str]:
    """The names of the files of a shard: tokens, samples, ids."""
    return [f"{kind}-{shard:08d}.npy" for kind in ("tokens", "samples", "ids")]


def npy_bytes(array: NDArray[Any]) -> bytes:
    """The bytes of an .npy file of ``array``."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def seal_shards(manifest: Mapping[str, Any], files: Mapping[str, str]) -> bytes:
    """The bytes of ``shards.json``: format version, manifest, SHA-256 of the tokenizer's files, and a checksum."""
    value = {"ghoststore_shards": SHARDS_VERSION, "manifest": manifest, "files": dict(sorted(files.items()))}
    return seal(value, CHECKSUM, ascii_only=False)


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(manifest of a folder, SHA-256 of its tokenizer's files by name): see :func:`seal_shards`.

    Raises CorpusError if there is no manifest, MismatchError for another version, CorruptError if it is damaged.
    """
    path = folder / MANIFEST
    try:
        with reading(path):
            data = read_bounded(path, LARGEST_MANIFEST, folder)
            _check_version(path, data)
            value = unseal(data, CHECKSUM)
            _check(value["manifest"], value["files"])
            return value["manifest"], value["files"]
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusError(f"{folder} holds no token shards (it has no {MANIFEST})") from None


def date_in(folder: Path) -> str | None:
    """The date that the chat template has written into the shards in ``folder``; None if it used no date, or if there
    are no shards.
    """
    if not (folder / MANIFEST).is_file():
        return None
    date: str | None = read_manifest(folder)[0]["tokenizer"]["template_date"]
    return date


def _check_version(path: Path, data: bytes) -> None:
    """MismatchError for another version of the format. It is checked before the seal, which may have changed, too."""
    value = parse_json(data)
    if not isinstance(value, dict) or "ghoststore_shards" not in value:
        raise ValueError("it has no 'ghoststore_shards'")
    if value["ghoststore_shards"] != SHARDS_VERSION:
        raise MismatchError(
            f"{path} has format version {value['ghoststore_shards']!r:.20}; this release reads version "
            f"{SHARDS_VERSION}. Use a release that reads it"
        )


def _check(manifest: dict[str, Any], files: dict[str, str]) -> None:
    """ValueError, KeyError or TypeError for a manifest that lacks entries, or has entries of a wrong type."""
    lacking = [name for name in (*SHARDS.identity, *SHARDS.description) if not isinstance(manifest[name], dict)]
    if lacking or not isinstance(files, dict):
        raise ValueError(f"its sections {lacking or 'files'} are no objects")
    wrong = [name for name in files if not _TOKENIZER_FILE.fullmatch(name)]
    if wrong or not all(isinstance(sha256, str) for sha256 in files.values()):
        raise ValueError(f"it names other files than those of a tokenizer: {wrong[:3]!r:.200}")
    lacking = [
        f"{section}.{name}" for section, names in ENTRIES.items() for name in names if name not in manifest[section]
    ]
    if lacking:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    domains = manifest["corpus"]["domains"]
    if domains is not None and not (isinstance(domains, list) and all(isinstance(d, str) for d in domains)):
        raise ValueError("its domains are no list of names")
    for section in ("tokenizer", "corpus"):
        if not isinstance(manifest[section]["fingerprint"], str):
            raise ValueError(f"the fingerprint of its {section} is no string")


def layout_of(manifest: Mapping[str, Any], where: Path) -> ShardLayout:
    """The layout of the files that a manifest describes. CorruptError for an impossible one. ``where`` is
    the folder.
    """
    try:
        corpus, storage = manifest["corpus"], manifest["storage"]
        layout = ShardLayout(
            samples=corpus["samples"],
            shard_samples=storage["shard_samples"],
            vocabulary=manifest["tokenizer"]["vocabulary"],
            domains=len(corpus["domains"] or ()),
        )
        stated = (storage["shards"], storage["token_dtype"])
        if stated != (layout.shards, layout.token_dtype.name):
            raise MismatchError(f"expected {layout.shards} shards of {layout.token_dtype.name}, found {stated!r:.80}")
        return layout
    except (KeyError, TypeError, MismatchError) as error:
        raise CorruptError(f"{where / MANIFEST} describes no token shards: {error}") from error


def remedy(path: Path) -> str:
    """Advice for an error: how to make a damaged file of a folder again."""
    if path.parent.name == "commits":
        record = path
    else:
        number = path.stem.rpartition("-")[2]
        if not number.isdigit():
            return "tokenize into a new folder"
        record = commit_path(path.parent, int(number))
    return f"delete {record} and run `ghoststore tokenize` again, which makes that shard again"


def committed_shards(folder: Path, layout: ShardLayout) -> list[int]:
    """The shards with a commit record, in order. CorruptError for a record beyond the last shard."""
    try:
        shards = committed(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptError(f"{folder} has no commits folder: tokenize into a new folder") from None
    if shards and shards[-1] >= layout.shards:
        raise CorruptError(
            f"{commit_path(folder, shards[-1])} is beyond the {layout.shards:,} shards that {MANIFEST} names"
        )
    return shards


def read_shard_commit(folder: Path, layout: ShardLayout, shard: int) -> Commit:
    """The commit record of a shard, after the sizes and headers of its files are checked. CorruptError names the wrong
    file.
    """
    commit = read_commit(folder, shard)
    path = commit_path(folder, shard)
    names = shard_files(shard)
    rows = commit.stop - commit.start
    if (commit.start, commit.stop) != layout.span_of(shard) or sorted(commit.files) != sorted(names):
        raise CorruptError(f"{path} is the record of other samples or files than those of shard {shard}")
    dtypes = (layout.token_dtype, SAMPLE, np.dtype("u1"))
    for name, dtype, count in zip(names, dtypes, (commit.tokens, rows, None), strict=True):
        _check_array(folder / name, dtype, count, commit.files[name].bytes)
    return commit


def _check_array(path: Path, dtype: np.dtype[Any], count: int | None, size: int) -> None:
    """CorruptError unless ``path`` is an .npy file of ``size`` bytes with ``count`` numbers (None: any number) of
    ``dtype``.
    """
    with reading(path, advice=remedy(path)):
        try:
            opened = open_regular(path, path.parent)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError("it is missing") from None
        with BufferedReader(opened) as file:
            found_size = os.fstat(file.fileno()).st_size
            if found_size != size:
                raise ValueError(f"it has {found_size} bytes, {size} were committed")
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("it is another version of .npy")
            try:
                shape, _, own = np.lib.format.read_array_header_1_0(file)
            except (SyntaxError, TokenError) as error:  # NumPy may parse the header as Python tokens
                raise ValueError(f"its header is none: {error}") from error
            if own != dtype or len(shape) != 1 or shape[0] < 0 or (count is not None and shape[0] != count):
                raise ValueError(f"expected {count} × {dtype.name}, found {shape!r:.40} × {own!r:.40}")
            if file.tell() + shape[0] * dtype.itemsize != size:
                raise ValueError(f"it has {size} bytes and names {shape[0]} × {dtype.itemsize}")
