"""The lexical baseline that every ranking of texts must be compared with: the cosine of TF-IDF vectors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from query.ask.lexical import words_of


class TfIdf:
    """TF-IDF vectors over the words of a corpus: (1 + log count) · (1 + log(N / rows with the word)), of length 1.

    The vectors are dense, which suits a few thousand rows.
    """

    def __init__(self, corpus: Sequence[str]) -> None:
        counts = [Counter(words_of(text)) for text in corpus]
        rows_with = Counter(word for count in counts for word in count)
        self._place = {word: place for place, word in enumerate(sorted(rows_with))}
        self._idf = np.array([math.log(len(corpus) / rows_with[word]) + 1.0 for word in self._place], dtype=np.float32)
        self.rows = self.vectors(corpus)
        """(rows, words) float32: the vectors of the corpus."""

    def vectors(self, texts: Iterable[str]) -> NDArray[np.float32]:
        """(texts, words) float32: each of length 1, or zero if the corpus has none of its words."""
        rows = []
        for text in texts:
            vector = np.zeros(len(self._place), dtype=np.float32)
            for word, count in Counter(words_of(text)).items():
                if word in self._place:
                    vector[self._place[word]] = 1.0 + math.log(count)
            vector *= self._idf
            rows.append(vector / max(float(np.linalg.norm(vector)), 1e-12))
        return np.stack(rows)

    def nearest(self, query: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        """(queries, k): the rows nearest to each query vector, best first; equal scores by lower row."""
        return np.argsort(-(query @ self.rows.T), axis=1, kind="stable")[:, :k]
