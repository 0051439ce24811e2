"""Words beside gradients, ``ghoststore query --lexical``: BM25 of the rows' texts for the val samples' texts.

score = (1 − W)·z(similarity) + W·z(BM25), z over the rows that rank. Fused by z-scores and not by ranks: where a row
shares no word with the val set its BM25 is 0, as that of most rows, and it keeps the place that its gradient gives it.
Ranks throw away by how much the best rows lead, and lose these rows (docs/design/0016-words-and-tokens.md has the
measurements).

Legend: Q queries, N rows of a part, S documents (one for each sample of the part).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.corpus import Corpus
from ghoststore.errors import CorruptError, MismatchError, UsageError
from ghoststore.progress import Progress
from ghoststore.settings.shared import Data
from ghoststore.store import Part
from query.ask.blend import blended
from query.ask.encoder import ValVectors
from query.common.texts import corpus_behind
from query.common.unchanged import read_unchanged

FUSION = "(1-W)·z(similarity) + W·z(BM25)"
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words of ``text`` in order, in lower case: runs of letters, digits and underscores."""
    return _WORD.findall(text.lower())


class WordIndex:
    """BM25 over ``texts``, by bm25s with its defaults (Lucene's form, k1 = 1.5, b = 0.75).

    Memory: 4 bytes a word of the texts; and for each text and distinct word of it 8, and 45 while the index is made.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        from bm25s import BM25  # here: it imports accelerators that happen to be installed

        vocabulary: dict[str, int] = {}
        documents = [
            array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in words_of(text)]) for text in texts
        ]
        self._vocabulary, self._documents = vocabulary, len(documents)
        self._index = None
        if vocabulary:  # bm25s divides by the mean length
            self._index = BM25()
            self._index.index((documents, vocabulary), create_empty_token=False, show_progress=False)

    def scores(self, text: str) -> NDArray[np.float64]:
        """(S,): BM25 of each document for ``text``; 0 where no word is shared. A word counts as often as it stands."""
        known = [self._vocabulary[word] for word in words_of(text) if word in self._vocabulary]
        if self._index is None or not known:
            return np.zeros(self._documents)
        return np.asarray(self._index.get_scores_from_ids(known), dtype=np.float64)


class PartWords:
    """The words of the rows of ``part``, read from its stored texts, or else from its corpus (``data``, default: where
    the user's own build read it). A window of a long sample has the words of its sample.

    UsageError if the corpus cannot be read, MismatchError if it is no longer the one of the part.
    """

    def __init__(self, part: Part, data: Data | None, progress: Progress) -> None:
        self._documents: list[int] = []
        self.index = WordIndex(self._texts(part, data, progress))
        source_row_S, row_N = np.asarray(self._documents), part.row_numbers
        self._document_N = np.full(part.layout.rows, -1, dtype=np.int64)
        self._document_N[row_N] = np.searchsorted(source_row_S, part.column("source_row"))

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


@dataclass(frozen=True, slots=True)
class Hybrid:
    """Similarities, BM25 and their blend, (Q, N) each; NaN for a row without a similarity."""

    similarity: NDArray[np.float64]
    lexical: NDArray[np.float64]
    scores: NDArray[np.float64]
    weight: float

    @classmethod
    def of(cls, similarity_QN: NDArray[np.float64], lexical_QN: NDArray[np.float64], weight: float) -> Hybrid:
        """Blend them by :data:`FUSION`. Where all rows have the same BM25, as where no word is shared, the similarity
        alone ranks.
        """
        pairs = zip(similarity_QN, lexical_QN, strict=True)
        scores = [blended(similarity_N[None], lexical_N, weight)[0] for similarity_N, lexical_N in pairs]
        return cls(similarity_QN, lexical_QN, np.concatenate(scores), weight)

    def settings(self) -> dict[str, Any]:
        """What the settings of a result say about the blend."""
        return {"lexical": self.weight, "hybrid": FUSION}


def _texts_behind(val: ValVectors, val_set: Corpus, max_samples: int | None) -> list[list[str]]:
    """For each vector of ``val`` the texts of its samples, each once."""
    wanted = {place for places in val.samples_of for place in places}
    texts = {
        sample.source_row: sample.preview()
        for sample in islice(val_set.samples(), max_samples)
        if sample.source_row in wanted
    }
    return [[texts[place] for place in dict.fromkeys(places)] for places in val.samples_of]
