"""The baseline that every ranking of texts must be read beside: TF-IDF and cosine, words alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")


class TfIdf:
    """Vectors of texts over the words of a corpus: (1 + log count) · log(N / rows with the word), unit length.

    For the few thousand rows of the demo; dense.
    """

    def __init__(self, corpus: Sequence[str]) -> None:
        counts = [Counter(_words(text)) for text in corpus]
        seen = Counter(word for count in counts for word in count)
        self._place = {word: place for place, word in enumerate(sorted(seen))}
        self._idf = np.array([math.log(len(corpus) / seen[word]) + 1.0 for word in self._place], dtype=np.float32)
        self.rows = self.vectors(corpus)
        """(rows, words) float32."""

    def vectors(self, texts: Iterable[str]) -> NDArray[np.float32]:
        """(texts, words) float32, each of length 1, or 0 where no word is known."""
        made = []
        for text in texts:
            vector = np.zeros(len(self._place), dtype=np.float32)
            for word, count in Counter(_words(text)).items():
                if word in self._place:
                    vector[self._place[word]] = 1.0 + math.log(count)
            vector *= self._idf
            made.append(vector / max(float(np.linalg.norm(vector)), 1e-12))
        return np.stack(made)

    def nearest(self, query: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        """The k rows nearest to each query (queries, words), best first; equal scores by lower row."""
        return np.argsort(-(query @ self.rows.T), axis=1, kind="stable")[:, :k]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
