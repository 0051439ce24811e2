"""Token shards: a corpus as tokens, one shard a span of samples. The format is specified in ``docs/shards.md``.

Legend: M samples of the folder, S tokens of a shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.corpus.fields import Tokenized
from ghoststore.corpus.formats import KeyedRow
from ghoststore.corpus.repeated import Repeated
from ghoststore.corpus.scan import MAX_DOMAINS
from ghoststore.errors import CheckpointError, CorpusError, CorruptError, MismatchError
from ghoststore.store.base.manifest import Kind, is_whole_tokenizer
from ghoststore.store.base.records import Commit, FileRecord, committed, json_digest, read_commit, record_path

SHARDS_VERSION = 1
MANIFEST = "shards.json"
TOKENIZER = "tokenizer"
LARGEST_MANIFEST = 64 << 20
SHARDS_OPEN = 4096
"""Shards that stay mapped at once."""
SHARDS = Kind(
    name="folder",
    made="tokenized",
    identity=("tokenizer", "corpus", "storage"),
    description=("source", "software"),
    option="--out",
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
"""One sample in ``samples-*.npy``."""

_TOKENIZER_FILE = re.compile(rf"{TOKENIZER}(/[A-Za-z0-9_-][A-Za-z0-9._-]*){{1,3}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLayout:
    """What fixes the files of a folder. Raises MismatchError for numbers that fit no folder."""

    samples: int
    shard_samples: int
    vocabulary: int
    """Every id is below it."""
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
        """uint16 where the vocabulary fits, else uint32."""
        return np.dtype("<u2" if self.vocabulary <= 1 << 16 else "<u4")

    def span_of(self, shard: int) -> tuple[int, int]:
        """First sample and one past the last of ``shard``."""
        return shard * self.shard_samples, min((shard + 1) * self.shard_samples, self.samples)


def shard_files(shard: int) -> list[str]:
    """The files of a shard: tokens, samples, ids."""
    return [f"{kind}-{shard:08d}.npy" for kind in ("tokens", "samples", "ids")]


def npy_bytes(array: NDArray[Any]) -> bytes:
    """``array`` as an .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def seal_shards(manifest: Mapping[str, Any], files: Mapping[str, str]) -> bytes:
    """The bytes of ``shards.json``: format version, manifest, SHA-256 of the tokenizer's files, and a checksum."""
    value = {"ghoststore_shards": SHARDS_VERSION, "manifest": manifest, "files": dict(sorted(files.items()))}
    value["sha256"] = json_digest(value)
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The manifest of a folder and the SHA-256 of its tokenizer's files; see :func:`seal_shards`.

    Raises CorpusError if there is none, MismatchError for another version, CorruptError if it is damaged.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise CorruptError(f"{path} is {path.stat().st_size} bytes: not a manifest of token shards")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict) or "ghoststore_shards" not in value:
            raise ValueError("it has no 'ghoststore_shards'")
        if value["ghoststore_shards"] != SHARDS_VERSION:
            raise MismatchError(
                f"{path} has format version {value['ghoststore_shards']!r:.20}; this release reads version "
                f"{SHARDS_VERSION}. Use a release that reads it"
            )
        stated = value.pop("sha256", None)
        if stated != json_digest(value):
            raise ValueError("its checksum does not hold")
        manifest, files = value["manifest"], value["files"]
        lacking = [name for name in (*SHARDS.identity, *SHARDS.description) if not isinstance(manifest[name], dict)]
        if lacking or not isinstance(files, dict):
            raise ValueError(f"its sections {lacking or 'files'} are no objects")
        wrong = [name for name in files if not _TOKENIZER_FILE.fullmatch(name)]
        if wrong or not all(isinstance(sha256, str) for sha256 in files.values()):
            raise ValueError(f"it names other files than those of a tokenizer: {wrong[:3]!r:.200}")
        domains = manifest["corpus"]["domains"]
        if domains is not None and not (isinstance(domains, list) and all(isinstance(d, str) for d in domains)):
            raise ValueError("its domains are no list of names")
        for section in ("tokenizer", "corpus"):
            if not isinstance(manifest[section]["fingerprint"], str):
                raise ValueError(f"the fingerprint of its {section} is no string")
        _refuse_incomplete(folder, manifest)
        return manifest, files
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusError(f"{folder} holds no token shards (it has no {MANIFEST})") from None
    except MismatchError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError(f"{path} is damaged: {error}") from error


def _refuse_incomplete(folder: Path, manifest: Mapping[str, Any]) -> None:
    """MismatchError for a manifest that does not say which tokenizer it is of, but for its vocabulary."""
    if is_whole_tokenizer(manifest["tokenizer"]):
        return
    source = manifest["source"]
    command = shlex.join(
        ["ghoststore", "tokenize", "--data", str(source["data"]), "--tokenizer", str(source["tokenizer"]), "--out"]
    )
    raise MismatchError(
        f"{folder} was tokenized by an unreleased version of ghoststore: its manifest does not identify the whole of "
        f"the tokenizer. Tokenize the corpus again, into a new folder:\n  {command} …"
    )


def layout_of(manifest: Mapping[str, Any], where: Path) -> ShardLayout:
    """The files that a manifest describes; CorruptError if it describes none."""
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


def _check_sha256(path: Path, record: FileRecord) -> None:
    try:
        found = FileRecord.of(path)
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error}") from error
    if found != record:
        raise CorruptError(f"{path} is not what was written: {_again(path)}")


def _again(path: Path) -> str:
    """How a damaged file is made again."""
    if path.parent.name == "commits":
        record = path
    else:
        number = path.stem.rpartition("-")[2]
        if not number.isdigit():
            return "tokenize into a new folder"
        record = record_path(path.parent, int(number))
    return f"delete {record} and run `ghoststore tokenize` again, which makes that shard again"


@dataclass(frozen=True, slots=True)
class _Shard:
    tokens: NDArray[Any]
    """(S,) uint16 or uint32, mapped."""
    samples: NDArray[Any]
    """SAMPLE, mapped."""
    ids: NDArray[np.uint8]
    """UTF-8 of the sample ids, one after another, mapped."""


class TokenShards:
    """A complete folder of token shards, memory-mapped. Opened with :meth:`open`; read by any number of threads, and by
    other processes, where it is opened again.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        files: dict[str, str],
        commits: Sequence[Commit],
        verify_on_read: bool,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.layout = layout_of(manifest, folder)
        self.samples = self.layout.samples
        """M."""
        self.tokens = sum(commit.tokens for commit in commits)
        """Tokens in all shards."""
        self.domains: list[str] = list(manifest["corpus"]["domains"] or [])
        """Names that ``domain`` indexes."""
        self.tokenizer_identity: dict[str, Any] = {
            name: value for name, value in manifest["tokenizer"].items() if name != "vocabulary"
        }
        """See :func:`ghoststore.checkpoint.tokenizer_identity.tokenizer_identity`."""
        self.corpus_fingerprint: str = manifest["corpus"]["fingerprint"]
        self.repeated_ids: Repeated | None = manifest["corpus"].get("repeated_ids")
        """None where every id is unique."""
        self._files = files
        self._commits = commits
        self._verify_on_read = verify_on_read
        self._verified: set[int] = set()
        self._shard = lru_cache(maxsize=SHARDS_OPEN)(self._map)
        self._columns: dict[str, NDArray[Any]] = {}

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False, verify_on_read: bool = False) -> TokenShards:
        """The shards in ``folder``: manifest, records, sizes and headers of all files are checked.

        With ``verify`` the SHA-256 of every file, too; with ``verify_on_read`` that of a shard when it is first
        read. Raises CorpusError for a folder without shards or with some still missing, CorruptError naming a
        file that is not what was written, MismatchError for another format version.
        """
        folder = Path(folder)
        manifest, files = read_manifest(folder)
        layout = layout_of(manifest, folder)
        spans = committed_shards(folder, layout)
        if len(spans) != layout.shards:
            raise CorpusError(
                f"{folder} is incomplete: {len(spans):,} of {layout.shards:,} shards are there; run `ghoststore "
                "tokenize` again with the same options to continue"
            )
        commits = [read_shard_commit(folder, layout, shard) for shard in spans]
        for name in files:
            if not (folder / name).is_file():
                raise CorruptError(f"{folder / name} is missing: {_again(folder / name)}")
        opened = cls(folder, manifest, files, commits, verify_on_read)
        if verify:
            opened.verify()
        return opened

    def verify(self) -> None:
        """Check the SHA-256 of every file; CorruptError naming the first that is not what was written."""
        for name, sha256 in self._files.items():
            _check_tokenizer_file(self.folder / name, sha256)
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(self._verify_shard, range(self.layout.shards)):
                pass

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the folder, which is opened again."""
        return _reopen, (self.folder.absolute(), self._verify_on_read)

    @property
    def source(self) -> dict[str, Any]:
        """The corpus that the tokens come from: ``data`` (path, or "-"), ``form``, ``tokenizer``, ``fields``,
        ``max_samples`` and ``only_domains``.
        """
        corpus = self.manifest["corpus"]
        return {
            **self.manifest["source"],
            **{key: corpus.get(key) for key in ("fields", "max_samples", "only_domains")},
        }

    @property
    def domain(self) -> NDArray[np.int16]:
        """(M,) place in ``domains``; -1 for none."""
        return self._column("domain")

    @property
    def source_row(self) -> NDArray[np.int64]:
        """(M,) row of the corpus."""
        return self._column("source_row")

    @property
    def source_file(self) -> NDArray[np.int32]:
        """(M,) place of the row's file among the files of the corpus, by name."""
        return self._column("source_file")

    @property
    def source_offset(self) -> NDArray[np.int64]:
        """(M,) byte of that file (decompressed) at which the row begins; -1 in forms without offsets."""
        return self._column("source_offset")

    @property
    def source_digest(self) -> NDArray[np.uint64]:
        """(M,) hash of the row, see `Sample.digest`."""
        return self._column("source_digest")

    @property
    def length(self) -> NDArray[np.int32]:
        """(M,) tokens of each sample."""
        return self._column("length")

    @property
    def first_target(self) -> NDArray[np.int32]:
        """(M,) tokens before it are no targets; at least 1, and past the end where there is no target."""
        return self._column("first_target")

    @cached_property
    def sample_id(self) -> NDArray[np.object_]:
        """(M,) ids as strings."""
        ids = [name for shard in range(self.layout.shards) for name in self._ids_of(shard)]
        return np.array(ids, dtype=object)

    def tokens_of(self, sample: int, start: int = 0, stop: int | None = None) -> NDArray[np.int32]:
        """(length,) ids of one sample, or of its tokens ``start`` to ``stop``; a copy. Only these are read.

        IndexError beyond the last sample, CorruptError for ids that no vocabulary has.
        """
        shard, row = self._place(sample)
        begin, length = int(shard.samples["start"][row]), int(shard.samples["length"][row])
        stop = length if stop is None else min(stop, length)
        return self._checked(sample, shard.tokens[begin + start : begin + stop].astype(np.int32))

    def row(self, sample: int) -> dict[str, object]:
        """One sample as a row of a corpus: "id", "domain", "tokens"."""
        shard, row = self._place(sample)
        entry = shard.samples[row]
        start, domain = int(entry["start"]), int(entry["domain"])
        ids = self._checked(sample, shard.tokens[start : start + int(entry["length"])].astype("<i4"))
        begin = int(shard.samples["id_stop"][row - 1]) if row else 0
        return {
            "id": self._text(sample, shard.ids[begin : int(entry["id_stop"])]),
            "domain": self.domains[domain] if domain >= 0 else None,
            "tokens": Tokenized(ids.tobytes(), int(entry["first_target"]), self),
        }

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the folder. CorruptError if it is not the one that was saved there."""
        return load_copy(self.folder)

    def decode(self, ids: NDArray[np.int32]) -> str:
        """The text of ``ids``, by the tokenizer in the folder."""
        return str(self.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))

    def _column(self, name: str) -> NDArray[Any]:
        if name not in self._columns:
            shards = range(self.layout.shards)
            self._columns[name] = np.concatenate([self._shard(shard).samples[name] for shard in shards])
        return self._columns[name]

    def _place(self, sample: int) -> tuple[_Shard, int]:
        if not 0 <= sample < self.samples:
            raise IndexError(f"sample {sample} of {self.samples}")
        shard, row = divmod(int(sample), self.layout.shard_samples)
        return self._shard(shard), row

    def _map(self, shard: int) -> _Shard:
        """The files of a shard, mapped, and the places in them checked: nothing points outside."""
        if self._verify_on_read and shard not in self._verified:
            self._verify_shard(shard)
            self._verified.add(shard)
        paths = [self.folder / name for name in shard_files(shard)]
        try:
            # Plain arrays over the maps: indexing a np.memmap is slow.
            tokens, samples, ids = (np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)) for path in paths)
        except (OSError, ValueError) as error:
            raise CorruptError(f"a file of shard {shard} of {self.folder} cannot be mapped: {error}") from error
        stops = np.cumsum(samples["length"], dtype=np.int64)
        id_stops = samples["id_stop"]
        sound = (
            bool((samples["length"] >= 0).all())
            and bool((samples["start"] == stops - samples["length"]).all())
            and int(stops[-1]) == len(tokens)
            and int(id_stops[0]) >= 0
            and bool((np.diff(id_stops) >= 0).all())
            and int(id_stops[-1]) == len(ids)
            and bool(((samples["domain"] >= -1) & (samples["domain"] < self.layout.domains)).all())
            and bool((samples["first_target"] >= 1).all())
        )
        if not sound:
            raise CorruptError(f"{paths[1]} names places that are not there: {_again(paths[1])}")
        return _Shard(tokens, samples, ids)

    def _checked(self, sample: int, ids: NDArray[Any]) -> NDArray[Any]:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.layout.vocabulary:
            path = self.folder / shard_files(sample // self.layout.shard_samples)[0]
            raise CorruptError(
                f"{path}: sample {sample} has token {int(ids.max())}, the vocabulary {self.layout.vocabulary}: "
                f"{_again(path)}"
            )
        return ids

    def _ids_of(self, shard: int) -> list[str]:
        mapped = self._shard(shard)
        data, first = mapped.ids.tobytes(), shard * self.layout.shard_samples
        names, begin = [], 0
        for row, stop in enumerate(mapped.samples["id_stop"].tolist()):
            names.append(self._text(first + row, data[begin:stop]))
            begin = stop
        return names

    def _text(self, sample: int, data: NDArray[np.uint8] | bytes) -> str:
        try:
            return bytes(data).decode()
        except UnicodeDecodeError as error:
            path = self.folder / shard_files(sample // self.layout.shard_samples)[2]
            raise CorruptError(f"{path}: the id of sample {sample} is not UTF-8: {_again(path)}") from error

    def _verify_shard(self, shard: int) -> None:
        for name, record in self._commits[shard].files.items():
            _check_sha256(self.folder / name, record)


def _reopen(folder: Path, verify_on_read: bool) -> TokenShards:
    return TokenShards.open(folder, verify_on_read=verify_on_read)


def load_copy(folder: Path) -> Any:
    """The tokenizer in a folder of shards, complete or not. CorruptError if it is not the one that was saved there."""
    from ghoststore.checkpoint.load import load_tokenizer
    from ghoststore.checkpoint.tokenizer_identity import fingerprint_tokenizer

    manifest, files = read_manifest(folder)
    for name, sha256 in files.items():
        _check_tokenizer_file(folder / name, sha256)
    try:
        loaded = load_tokenizer(folder / TOKENIZER)
    except CheckpointError as error:
        raise CorruptError(f"{folder / TOKENIZER} is damaged: {error}") from error
    expected, found = manifest["tokenizer"]["fingerprint"], fingerprint_tokenizer(loaded)
    if found != expected:
        raise CorruptError(f"{folder / TOKENIZER} is not the manifest's tokenizer: expected {expected}, found {found}")
    return loaded


def _check_tokenizer_file(path: Path, sha256: str) -> None:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error}") from error
    if found != sha256:
        raise CorruptError(f"{path} is not what was written: {_again(path)}")


def committed_shards(folder: Path, layout: ShardLayout) -> list[int]:
    """Shards that have a record, in order; CorruptError for records that no shard can have."""
    try:
        found = committed(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptError(f"{folder} has no commits folder: tokenize into a new folder") from None
    if found and found[-1] >= layout.shards:
        raise CorruptError(
            f"{record_path(folder, found[-1])} is beyond the {layout.shards:,} shards that {MANIFEST} names"
        )
    return found


def read_shard_commit(folder: Path, layout: ShardLayout, shard: int) -> Commit:
    """The record of a shard, its files' sizes and headers checked. CorruptError naming the file that is wrong."""
    commit = read_commit(folder, shard)
    path = record_path(folder, shard)
    names = shard_files(shard)
    rows = commit.stop - commit.start
    if (commit.start, commit.stop) != layout.span_of(shard) or sorted(commit.files) != sorted(names):
        raise CorruptError(f"{path} is the record of other samples or files than those of shard {shard}")
    dtypes = (layout.token_dtype, SAMPLE, np.dtype("u1"))
    for name, dtype, count in zip(names, dtypes, (commit.tokens, rows, None), strict=True):
        _check_array(folder / name, dtype, count, commit.files[name].bytes)
    return commit


def _check_array(path: Path, dtype: np.dtype[Any], count: int | None, size: int) -> None:
    """CorruptError unless ``path`` is an .npy file of ``size`` bytes with ``count`` (None: any number of) ``dtype``."""
    try:
        if not path.is_file():
            raise ValueError("it is missing")
        found = path.stat().st_size
        if found != size:
            raise ValueError(f"it has {found} bytes, {size} were committed")
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("it is another version of .npy")
            shape, _, there = np.lib.format.read_array_header_1_0(file)
            if there != dtype or len(shape) != 1 or shape[0] < 0 or (count is not None and shape[0] != count):
                raise ValueError(f"expected {count} × {dtype.name}, found {shape!r:.40} × {there!r:.40}")
            if file.tell() + shape[0] * dtype.itemsize != size:
                raise ValueError(f"it has {size} bytes and names {shape[0]} × {dtype.itemsize}")
    except (ValueError, OSError, TypeError, OverflowError) as error:
        raise CorruptError(f"{path} is damaged: {error}; {_again(path)}") from error


@dataclass(frozen=True, slots=True)
class ShardsForm:
    """Token shards as a form of corpus: rows of :meth:`TokenShards.row`, numbered from 0."""

    shards: TokenShards
    name: str = "token-shards"
    has_offsets: bool = False

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        for sample in range(start, self.shards.samples):
            yield sample, self.shards.row(sample)

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        for key in keys:
            if key < self.shards.samples:
                yield key, self.shards.row(key)

    def count(self, path: Path) -> int:
        return self.shards.samples

    def where(self, path: Path, key: int) -> str:
        return f"{path}, sample {key}"
