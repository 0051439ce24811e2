"""Words beside gradients, ``ghoststore query --lexical``: BM25 of the rows' texts for the val samples' texts.

What they are blended to is in :mod:`query.ask.hybrid`.

Legend: Q queries, N rows of a part, S documents (one for each sample of the part).
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.corpus import Corpus
from ghoststore.errors import CorruptError, MismatchError, UsageError
from ghoststore.progress import Progress
from ghoststore.settings.shared import Data
from ghoststore.store import Part
from query.ask.encoder import ValVectors
from query.common.texts import corpus_behind
from query.common.unchanged import read_unchanged
from query.search.part_cache import PartCache

KEPT: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys(("scores", "places", "starts", "words", "source_rows")),
    "texts": (),
}
"""The tensors of a kept index of words, and their shapes."""
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words of ``text`` in order, in lower case: runs of letters, digits and underscores."""
    return _WORD.findall(text.lower())


class WordIndex:
    """BM25 over ``texts``, by bm25s with its defaults (Lucene's form, k1 = 1.5, b = 0.75).

    Memory: 8 bytes for each text and distinct word of it; while it is made 45, and 4 a word of the texts.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        from bm25s import BM25  # here: it imports accelerators that happen to be installed

        vocabulary: dict[str, int] = {}
        documents = [
            array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in words_of(text)]) for text in texts
        ]
        self.documents = len(documents)
        self.scores_of = np.zeros(0, dtype=np.float32)
        """Of each word in the texts that have it: word after word, those of word w from ``starts[w]`` on."""
        self.places = np.zeros(0, dtype=np.int32)
        """The texts."""
        self.starts = np.zeros(1, dtype=np.int64)
        if vocabulary:  # bm25s divides by the mean length
            index = BM25()
            index.index((documents, vocabulary), create_empty_token=False, show_progress=False)
            self.scores_of = np.asarray(index.scores["data"], dtype=np.float32)
            self.places = np.asarray(index.scores["indices"], dtype=np.int32)
            self.starts = np.asarray(index.scores["indptr"], dtype=np.int64)
        self._vocabulary = vocabulary

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`of_tensors` takes."""
        words = np.frombuffer("\n".join(self._vocabulary).encode(), dtype=np.uint8)  # no word has a line break
        arrays = {"scores": self.scores_of, "places": self.places, "starts": self.starts, "words": words.copy()}
        return {name: torch.from_numpy(x) for name, x in arrays.items()} | {"texts": torch.tensor(self.documents)}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> WordIndex:
        """The index that :meth:`tensors` gave. ValueError if they do not fit together."""
        kinds = {"scores": torch.float32, "places": torch.int32, "starts": torch.int64, "words": torch.uint8}
        if any(tensors[name].dtype != kind or tensors[name].dim() != 1 for name, kind in kinds.items()):
            raise ValueError("they are of another kind")
        index = cls(())
        index.scores_of, index.places, index.starts = (tensors[x].numpy() for x in ("scores", "places", "starts"))
        index.documents, joined = int(tensors["texts"]), tensors["words"].numpy().tobytes().decode()
        index._vocabulary = {word: place for place, word in enumerate(joined.split("\n") if joined else [])}
        starts, places = index.starts, index.places
        ordered = len(starts) == len(index._vocabulary) + 1 and starts[0] == 0 and bool((np.diff(starts) >= 0).all())
        inside = not len(places) or 0 <= places.min() <= places.max() < index.documents
        if not (ordered and inside and starts[-1] == len(places) == len(index.scores_of)):
            raise ValueError("they are of no index of words")
        return index

    def scores(self, text: str) -> NDArray[np.float64]:
        """(S,): BM25 of each document for ``text``; 0 where no word is shared. A word counts as often as it stands."""
        scores_S = np.zeros(self.documents)
        for word, count in Counter(words_of(text)).items():
            place = self._vocabulary.get(word)
            if place is not None:
                having = slice(self.starts[place], self.starts[place + 1])
                scores_S[self.places[having]] += count * self.scores_of[having].astype(np.float64)
        return scores_S


class PartWords:
    """The words of the rows of ``part``, read from its stored texts, or else from its corpus (``data``, default: where
    the user's own build read it). A window of a long sample has the words of its sample. With ``keep`` their index is
    kept among the caches of the part, where later ones find it.

    UsageError if the corpus cannot be read, MismatchError if it is no longer the one of the part.
    """

    def __init__(self, part: Part, data: Data | None, progress: Progress, *, keep: bool = False) -> None:
        self._documents: list[int] = []
        cache = PartCache(part, "words", progress)
        index = self._cached(cache.tensors(KEPT), progress)
        if index is None:
            self._documents.clear()
            index = WordIndex(self._texts(part, data, progress))
            if keep:
                cache.keep(index.tensors() | {"source_rows": torch.tensor(self._documents, dtype=torch.int64)})
        self.index = index
        source_row_S, row_N = np.asarray(self._documents), part.row_numbers
        self._document_N = np.full(part.layout.rows, -1, dtype=np.int64)
        self._document_N[row_N] = np.searchsorted(source_row_S, part.column("source_row"))

    def _cached(self, tensors: Mapping[str, Tensor] | None, progress: Progress) -> WordIndex | None:
        if tensors is None:
            return None
        try:
            index = WordIndex.of_tensors(tensors)
        except ValueError as error:
            progress.note(f"the kept index of words is damaged ({error}): it is a cache, and is made anew")
            return None
        self._documents.extend(tensors["source_rows"].tolist())
        return index if len(self._documents) == index.documents else None

    def _texts(self, part: Part, data: Data | None, progress: Progress) -> Iterator[str]:
        """The text of each sample that has rows, in order; their places go to ``_documents``."""
        for member in part.members:
            yield from self._texts_of(member, part.first_source_row(member), data, progress)

    def _texts_of(self, part: Part, before: int, data: Data | None, progress: Progress) -> Iterator[str]:
        """Those of a part whose places are counted from ``before`` on."""
        if part.layout.store_text:
            last = -1
            for span in part.spans:
                places, texts = (part.read(name, *part.layout.span_of(span)) for name in ("source_row", "text"))
                for place, text in zip(places.tolist(), texts, strict=True):
                    if place != last:
                        self._documents.append(before + place)
                        yield str(text)
                    last = place
            return
        try:
            samples = read_unchanged(corpus_behind(part, data), part, progress)
            for sample in samples:
                self._documents.append(before + sample.source_row)
                yield sample.preview()
        except MismatchError:
            raise
        except (UsageError, CorruptError) as error:
            raise UsageError(
                f"`lexical` compares words, and part {part.name!r} keeps no texts: {error}. Give `data`, the corpus "
                "that the part was built from, or leave `lexical` out"
            ) from error

    def scores(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(N,): the mean over ``texts`` of BM25 for each; of all of them joined it is as many times that. NaN for rows
        that are not committed.
        """
        total_S = np.zeros(len(self._documents))
        for text in texts:
            total_S += self.index.scores(text)
        return np.where(self._document_N >= 0, total_S[self._document_N] / max(len(texts), 1), np.nan)


def lexical_scores(
    words: PartWords,
    val: ValVectors,
    val_set: Corpus,
    max_samples: int | None,
    minus: tuple[ValVectors, Corpus] | None = None,
) -> NDArray[np.float64]:
    """(Q, N): BM25 of the rows for the texts behind each vector of ``val``: their mean, for a mean.

    Less those of the val set that is subtracted, as gradients are.
    """
    scores_QN = np.stack([words.scores(texts) for texts in _texts_behind(val, val_set, max_samples)])
    if minus is not None:
        scores_QN -= words.scores(*_texts_behind(*minus, None))
    return scores_QN


def _texts_behind(val: ValVectors, val_set: Corpus, max_samples: int | None) -> list[list[str]]:
    """For each vector of ``val`` the texts of its samples, each once."""
    wanted = {place for places in val.samples_of for place in places}
    texts = {
        sample.source_row: sample.preview()
        for sample in islice(val_set.samples(), max_samples)
        if sample.source_row in wanted
    }
    return [[texts[place] for place in dict.fromkeys(places)] for places in val.samples_of]
