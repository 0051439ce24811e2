"""Token ids of Megatron-LM: a .bin with the ids, and an .idx that says where each document lies in it.

The index is "MMIDIDX\\0\\0", version (uint64, 1), code of the ids' type (uint8), numbers of sequences and of entries of
the document index (uint64 each), then the lengths (int32) and places in bytes (int64) of all sequences, and the first
sequence of each document (int64), ended by the number of sequences. What follows is not read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.corpus.content import Tokenized
from ghoststore.corpus.formats.base import KeyedRow, NumberedForm, open_again, open_file, reading, row_place
from ghoststore.corpus.formats.compressed import too_large
from ghoststore.errors import CorpusError

MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<QBQQ")
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""The types of ids by their code; 6 and 7 are floats, which no ids are."""
AT_ONCE = 4096
"""Documents whose entries are in memory at once."""


class NamelessVocabulary:
    """The vocabulary of ids of which nobody says which tokenizer made them. Its identity is empty."""

    tokenizer_identity: dict[str, Any] = {}  # noqa: RUF012 - nothing is ever put in

    def decode(self, ids: NDArray[np.int32]) -> str:
        """The ids themselves."""
        return " ".join(map(str, ids.tolist()))


NAMELESS = NamelessVocabulary()


@dataclass(frozen=True, slots=True)
class MegatronForm(NumberedForm):
    """The documents of a .bin file, in the order of its index. All tokens but the first are targets."""

    name: str = "megatron"
    largest: int | None = None

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        with _Files(path, self.largest) as files:
            for first in range(start, files.documents, AT_ONCE):
                yield from files.read(range(first, min(first + AT_ONCE, files.documents)))

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        with _Files(path, self.largest) as files:
            for key in keys:
                if key < files.documents:
                    yield from files.read(range(key, key + 1))

    def count(self, path: Path) -> int:
        with _Files(path, self.largest) as files:
            return int(files.documents)


class _Files:
    """The two files, open. CorpusError for an index that is none, or that leads beyond the ids."""

    def __init__(self, path: Path, largest: int | None) -> None:
        self._path, self._index_path, self._largest = path, path.with_suffix(".idx"), largest
        with reading(self._index_path):
            # Each table has a file of its own, which is read on: from object storage that takes few requests.
            self._index = open_file(self._index_path)
            self._of_lengths, self._of_places = (open_again(self._index_path, self._index) for _ in range(2))
        with reading(path):
            self._ids = open_file(path)
        self._bytes = self._ids.seek(0, 2)
        size = self._index.seek(0, 2)
        head = self._read_index(0, len(MAGIC) + _HEADER.size)
        if not head.startswith(MAGIC) or len(head) < len(MAGIC) + _HEADER.size:
            raise self._damaged("it does not begin as an index of Megatron-LM")
        version, code, self._sequences, entries = _HEADER.unpack_from(head, len(MAGIC))
        if version != 1 or code not in TYPES:
            raise self._damaged(f"version {version}, type {code}: expected version 1 and a type of integers")
        self._dtype = np.dtype(TYPES[code])
        self._lengths = len(head)
        self._places = self._lengths + 4 * self._sequences
        self._firsts = self._places + 8 * self._sequences
        if self._firsts + 8 * entries > size:
            raise self._damaged(f"{self._sequences:,} sequences do not fit into its {size:,} bytes: cut short")
        self.documents = max(entries - 1, 0)
        ends = (
            [int(self._entries(self._firsts, "<i8", place, 1)[0]) for place in (0, self.documents)]
            if entries
            else [0, 0]
        )
        if ends != [0, self._sequences]:
            raise self._damaged(f"its documents are sequences {ends[0]:,} to {ends[1]:,} of {self._sequences:,}")

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._index, self._of_lengths, self._of_places, self._ids):
            file.close()

    def read(self, documents: range) -> Iterator[KeyedRow]:
        """(number, row) of each of some documents that stand one after another."""
        firsts = self._entries(self._firsts, "<i8", documents.start, len(documents) + 1)
        if (np.diff(firsts) < 0).any() or firsts[0] < 0 or firsts[-1] > self._sequences:
            raise self._damaged("its documents are not in order")
        for document, begin, end in zip(documents, firsts[:-1].tolist(), firsts[1:].tolist(), strict=True):
            lengths = self._entries(self._lengths, "<i4", begin, end - begin, self._of_lengths).astype(np.int64)
            places = self._entries(self._places, "<i8", begin, end - begin, self._of_places)
            sizes = lengths * self._dtype.itemsize
            if (lengths < 0).any() or (places < 0).any() or (places > self._bytes - sizes).any():
                raise self._damaged(
                    f"document {document + 1:,} lies beyond the {self._bytes:,} bytes of {self._path.name}"
                )
            if self._largest is not None and int(sizes.sum()) > self._largest:
                raise too_large(row_place(self._path, document), self._largest, advice=True)
            with reading(self._path):
                pieces = [self._sequence(*pair) for pair in zip(places.tolist(), sizes.tolist(), strict=True)]
            ids = np.concatenate([np.zeros(0, self._dtype), *pieces]).astype(np.int64)
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 31:
                raise CorpusError(
                    f"{row_place(self._path, document)}: {int(ids.min())} to {int(ids.max())} are no token ids"
                )
            yield document, {"id": None, "domain": None, "tokens": Tokenized(ids.astype("<i4").tobytes(), 1, NAMELESS)}

    def _sequence(self, place: int, size: int) -> NDArray[Any]:
        self._ids.seek(place)
        return np.frombuffer(self._ids.read(size) or b"", self._dtype)

    def _entries(self, begin: int, dtype: str, first: int, count: int, file: FileIO | None = None) -> NDArray[Any]:
        """``count`` numbers of a table of the index, from its entry ``first`` on."""
        size = np.dtype(dtype).itemsize
        if self._largest is not None and count * size > max(self._largest, 8 * (AT_ONCE + 1)):
            raise self._damaged(f"a document of {count:,} sequences")
        return np.frombuffer(self._read_index(begin + first * size, count * size, file), dtype)

    def _read_index(self, place: int, size: int, file: FileIO | None = None) -> bytes:
        file = file or self._index
        with reading(self._index_path):
            file.seek(place)
            return file.read(size) or b""

    def _damaged(self, why: str) -> CorpusError:
        return CorpusError(f"{self._index_path}: damaged: {why}")
