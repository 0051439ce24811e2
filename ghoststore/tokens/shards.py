"""Token shards: a corpus as tokens. Each shard holds a range of samples. ``docs/shards.md`` specifies the format.

Legend: M samples of the folder, S tokens of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.corpus.content import Tokenized
from ghoststore.corpus.repeated import Repeated
from ghoststore.errors import CheckpointError, CorpusError, CorruptError
from ghoststore.store.base.records import check_file
from ghoststore.store.spans.commits import Commit
from ghoststore.tokens.manifest import (
    TOKENIZER,
    committed_shards,
    layout_of,
    read_manifest,
    read_shard_commit,
    remedy,
    shard_files,
)

SHARDS_OPEN = 4096
"""Most shards that are mapped at once, with three files each. Linux allows a process 65,530 maps."""


@dataclass(frozen=True, slots=True)
class _Shard:
    tokens: NDArray[Any]
    """(S,) uint16 or uint32, memory-mapped."""
    samples: NDArray[Any]
    """(samples,) of dtype SAMPLE, memory-mapped."""
    ids: NDArray[np.uint8]
    """The sample ids in UTF-8, one after another, memory-mapped."""


class TokenShards:
    """A complete folder of token shards, memory-mapped. :meth:`open` opens it.

    Any number of threads may read it. It can be pickled for other processes, which open it again.
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
        """M, the number of samples."""
        self.tokens = sum(commit.tokens for commit in commits)
        """Tokens in all shards."""
        self.domains: list[str] = list(manifest["corpus"]["domains"] or [])
        """The names of the domains. :attr:`domain` holds places in this list."""
        self.tokenizer_identity: dict[str, Any] = {
            name: value for name, value in manifest["tokenizer"].items() if name not in ("vocabulary", "template_date")
        }
        """The identity of the tokenizer: see :func:`ghoststore.checkpoint.tokenizer_identity.tokenizer_identity`."""
        self.template_date: str | None = manifest["tokenizer"]["template_date"]
        """The date (ISO 8601) that the chat template has written; None if it writes no date."""
        self.corpus_fingerprint: str = manifest["corpus"]["fingerprint"]
        self.repeated_ids: Repeated | None = manifest["corpus"]["repeated_ids"]
        """None if every id is unique."""
        self._files = files
        self._commits = commits
        self._verify_on_read = verify_on_read
        self._verified: set[int] = set()
        self._shard = lru_cache(maxsize=SHARDS_OPEN)(self._map)
        self._columns: dict[str, NDArray[Any]] = {}

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False, verify_on_read: bool = False) -> TokenShards:
        """The shards in ``folder``, after the manifest, the records, and the sizes and headers of all files are
        checked.

        With ``verify`` the SHA-256 of every file is checked, too; with ``verify_on_read`` those of a shard when it is
        first read. Raises CorpusError for a folder without shards or with missing ones, CorruptError, with the name of
        the file, for a damaged file, MismatchError for another format version.
        """
        folder = Path(folder)
        manifest, files = read_manifest(folder)
        layout = layout_of(manifest, folder)
        committed = committed_shards(folder, layout)
        if len(committed) != layout.shards:
            raise CorpusError(
                f"{folder} is incomplete: {len(committed):,} of {layout.shards:,} shards are there; run `ghoststore "
                "tokenize` again with the same options to continue"
            )
        commits = [read_shard_commit(folder, layout, shard) for shard in committed]
        for name in files:
            if not (folder / name).is_file():
                raise CorruptError(f"{folder / name} is missing: {remedy(folder / name)}")
        opened = cls(folder, manifest, files, commits, verify_on_read)
        if verify:
            opened.verify()
        return opened

    def verify(self) -> None:
        """Check the SHA-256 of every file. CorruptError names the first damaged file."""
        for name, sha256 in self._files.items():
            check_file(self.folder / name, sha256, advice=remedy(self.folder / name), within=self.folder)
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(self._verify_shard, range(self.layout.shards)):
                pass

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the path of the folder, which is opened again."""
        return _reopen, (self.folder.absolute(), self._verify_on_read)

    @property
    def source(self) -> dict[str, Any]:
        """The corpus that the tokens were made from: ``data`` (path, or "-"), ``form``, ``tokenizer``, ``fields``,
        ``max_samples`` and ``only_domains``.
        """
        corpus = self.manifest["corpus"]
        return {
            **self.manifest["source"],
            **{key: corpus[key] for key in ("fields", "max_samples", "only_domains")},
        }

    @property
    def domain(self) -> NDArray[np.int16]:
        """(M,): place in :attr:`domains`; -1 for a sample without a domain."""
        return self._column("domain")

    @property
    def source_row(self) -> NDArray[np.int64]:
        """(M,): the sample's row in the corpus."""
        return self._column("source_row")

    @property
    def source_file(self) -> NDArray[np.int32]:
        """(M,): place of the sample's file among the files of the corpus, which are sorted by name."""
        return self._column("source_file")

    @property
    def source_offset(self) -> NDArray[np.int64]:
        """(M,): the byte at which the row begins in that file, after decompression; -1 in forms without offsets."""
        return self._column("source_offset")

    @property
    def source_digest(self) -> NDArray[np.uint64]:
        """(M,): hash of the row, see `Sample.digest`."""
        return self._column("source_digest")

    @property
    def length(self) -> NDArray[np.int32]:
        """(M,): number of tokens of each sample."""
        return self._column("length")

    @property
    def first_target(self) -> NDArray[np.int32]:
        """(M,): the first token that is a target, at least 1; past the end if there is no target."""
        return self._column("first_target")

    @cached_property
    def sample_id(self) -> NDArray[np.object_]:
        """(M,): the ids of the samples, as strings."""
        ids = [name for shard in range(self.layout.shards) for name in self._ids_of(shard)]
        return np.array(ids, dtype=object)

    def tokens_of(self, sample: int, start: int = 0, stop: int | None = None) -> NDArray[np.int32]:
        """(length,) int32: the token ids of one sample, or only those from ``start`` to ``stop``. Only these are read.

        IndexError for a sample that does not exist, CorruptError for ids beyond the vocabulary.
        """
        shard, row = self._place(sample)
        begin, length = int(shard.samples["start"][row]), int(shard.samples["length"][row])
        stop = length if stop is None else min(stop, length)
        return self._checked(sample, shard.tokens[begin + start : begin + stop].astype(np.int32))

    def row(self, sample: int) -> dict[str, object]:
        """One sample as a row of a corpus with the fields "id", "domain" and "tokens"."""
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
        """The tokenizer that is saved in the folder. CorruptError if its files have changed."""
        return load_own_tokenizer(self.folder)

    def decode(self, ids: NDArray[np.int32]) -> str:
        """The text of ``ids``, decoded by the tokenizer in the folder."""
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
        """The files of a shard, memory-mapped, after all places in them are checked. CorruptError if one is outside."""
        if self._verify_on_read and shard not in self._verified:
            self._verify_shard(shard)
            self._verified.add(shard)
        paths = [self.folder / name for name in shard_files(shard)]
        try:
            # Plain arrays over the maps, because indexing an np.memmap is slow.
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
            raise CorruptError(f"{paths[1]} names places that are not there: {remedy(paths[1])}")
        return _Shard(tokens, samples, ids)

    def _checked(self, sample: int, ids: NDArray[Any]) -> NDArray[Any]:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.layout.vocabulary:
            path = self.folder / shard_files(sample // self.layout.shard_samples)[0]
            raise CorruptError(
                f"{path}: sample {sample} has token {int(ids.max())}, the vocabulary {self.layout.vocabulary}: "
                f"{remedy(path)}"
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
            raise CorruptError(f"{path}: the id of sample {sample} is not UTF-8: {remedy(path)}") from error

    def _verify_shard(self, shard: int) -> None:
        for name, record in self._commits[shard].files.items():
            record.check(self.folder / name, remedy(self.folder / name), self.folder)


def _reopen(folder: Path, verify_on_read: bool) -> TokenShards:
    return TokenShards.open(folder, verify_on_read=verify_on_read)


def load_own_tokenizer(folder: Path) -> Any:
    """The tokenizer that is saved in a folder of shards, which may be incomplete. CorruptError if its files have
    changed.
    """
    from ghoststore.checkpoint.load import load_tokenizer
    from ghoststore.checkpoint.tokenizer_identity import fingerprint_tokenizer

    manifest, files = read_manifest(folder)
    for name, sha256 in files.items():
        check_file(folder / name, sha256, advice=remedy(folder / name), within=folder)
    try:
        loaded = load_tokenizer(folder / TOKENIZER)
    except CheckpointError as error:
        raise CorruptError(f"{folder / TOKENIZER} is damaged: {error}") from error
    expected, own = manifest["tokenizer"]["fingerprint"], fingerprint_tokenizer(loaded)
    if own != expected:
        raise CorruptError(f"{folder / TOKENIZER} is not the manifest's tokenizer: expected {expected}, found {own}")
    return loaded
