"""Token shards as a form of corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ghoststore.corpus.formats.base import KeyedRow
from ghoststore.tokens.shards import TokenShards


@dataclass(frozen=True, slots=True)
class ShardsForm:
    """Rows of :meth:`TokenShards.row`, numbered from 0."""

    shards: TokenShards
    name: str = "token-shards"
    has_offsets: bool = False
    adds_nulls: bool = False
    largest: int | None = None

    def fields(self, path: Path) -> Sequence[str] | None:
        return None

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
