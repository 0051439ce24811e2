"""The manifest of an index, ``index.json``: its settings, the rows it covers, and its measured recall.

``docs/format.md`` specifies it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ghoststore.errors import MismatchError
from ghoststore.store.base.opening import read_bounded
from ghoststore.store.base.records import LARGEST_RECORD, FileRecord, json_digest, reading, seal, unseal

INDEX_VERSION = 1
CHECKSUM = "manifest_sha256"
ROW_BYTES = 24
"""Bytes of an entry in the file of rows: the row, the digest of its numbers, its length."""
LARGEST_COUNT = 1 << 30
SUFFIXES = {"faiss": ".faiss", "rows": ".rows"}
"""By kind of file, the suffix of its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """The share of the exact best rows that the index finds, measured when it was built."""

    queries: int
    at_10: float
    at_100: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexManifest:
    """Settings, coverage and measured recall of an index."""

    factory: str
    """FAISS's factory string."""
    metric: Literal["dot", "cosine"]
    dimension: int
    """Numbers of a vector of the part."""
    front_dimension: int
    """Numbers that FAISS sees: fewer if a sketch precedes it."""
    front_key: str | None
    """The key from which the sketch is drawn; None without a sketch."""
    scale: float
    """The factor of vectors for the dot product, so that any dtype can hold them; a power of two."""
    rows: int
    """Rows in the index: those that have a vector."""
    spans: int
    coverage: str
    """The :meth:`ghoststore.store.spans.group.Spanned.fingerprint` of the part that it was built from."""
    effort: int | None
    """``nprobe`` or ``efSearch``; None for factories with neither."""
    candidates: int
    """Number of rows that are scored exactly for each query."""
    target_recall: float
    recall: dict[str, Recall]
    """By kind of query: ``row`` for single rows of the part, ``mean`` for means of rows."""
    seconds: float
    """Seconds of wall time for building and measuring."""
    software: dict[str, str]
    files: dict[str, FileRecord]
    """By kind, see ``SUFFIXES``. Each is named by the first 16 digits of its SHA-256."""

    def __post_init__(self) -> None:
        if self.metric not in ("dot", "cosine") or not 0 < self.scale < float("inf"):
            raise ValueError(f"it ranks by {self.metric!r}, scaled by {self.scale}")
        effort = 1 if self.effort is None else self.effort
        counts = (self.dimension, self.front_dimension, self.rows, self.spans, self.candidates, effort)
        if not all(isinstance(count, int) and 0 < count <= LARGEST_COUNT for count in counts):
            raise ValueError(f"its counts are out of range: {counts}")
        if self.front_dimension > self.dimension or (self.front_key is None) != (
            self.front_dimension == self.dimension
        ):
            raise ValueError(f"its front maps {self.dimension} numbers to {self.front_dimension}")
        shares = [share for recall in self.recall.values() for share in (recall.at_10, recall.at_100)]
        measured = [*shares, self.target_recall, self.seconds, *(recall.queries for recall in self.recall.values())]
        if not all(isinstance(number, (int, float)) for number in measured):
            raise TypeError(f"what was measured is no number: {measured}")
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"its recall is out of range: {shares}")
        if set(self.files) != set(SUFFIXES) or self.files["rows"].bytes != self.rows * ROW_BYTES:
            raise ValueError(f"its files are not those of {self.rows} rows")

    @property
    def size(self) -> int:
        """Bytes of its files, without the manifest."""
        return sum(record.bytes for record in self.files.values())

    @property
    def recall_at_10(self) -> float:
        """The recall of single rows or of means, whichever is lower."""
        return min(recall.at_10 for recall in self.recall.values())

    @property
    def reached(self) -> bool:
        """Whether the recall reaches ``target_recall``."""
        return self.recall_at_10 >= self.target_recall

    def to_json(self) -> dict[str, Any]:
        """The JSON that the commands print."""
        values = {name: value for name, value in asdict(self).items() if name not in ("files", "coverage")}
        return {**values, "bytes": self.size, "bytes_per_row": self.size / self.rows, "reached": self.reached}

    def path_of(self, folder: Path, kind: str) -> Path:
        """The file of one kind."""
        return folder / (self.files[kind].sha256[:16] + SUFFIXES[kind])

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest. It covers the files, too."""
        return json_digest(asdict(self))

    def encode(self) -> bytes:
        """The bytes of ``index.json``, with its own checksum."""
        return seal({"ghoststore_index": INDEX_VERSION, **asdict(self)}, CHECKSUM)

    @classmethod
    def read(cls, path: Path, within: Path | None = None) -> IndexManifest:
        """Read an ``index.json``, which must lie ``within`` the folder of its part.

        FileNotFoundError if there is none, MismatchError for another version, CorruptError if it is damaged.
        """
        remedy = "`ghoststore index … --rebuild` makes it again"
        with reading(path, "is not the manifest of an index", remedy):
            value = unseal(read_bounded(path, LARGEST_RECORD, within), CHECKSUM)
            version = value.pop("ghoststore_index")
            if version != INDEX_VERSION:
                raise MismatchError(f"{path} has version {version!r}; this release reads {INDEX_VERSION}: {remedy}")
            recall = {str(kind): Recall(**shares) for kind, shares in value.pop("recall").items()}
            files = {str(kind): FileRecord.from_json(record) for kind, record in value.pop("files").items()}
            return cls(**value, recall=recall, files=files)
