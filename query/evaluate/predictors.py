"""The methods that are evaluated. Each gives one score for each val sample and each sample of the corpus.

Legend: V val samples, N samples of the corpus, R rows of a part (samples, or windows of long ones).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.corpus import Corpus
from ghoststore.errors import UsageError
from ghoststore.store import Part
from query.evaluate.tf_idf import TfIdf
from query.exact.products import SHARES, Share
from query.search.part_score import Metric

GRADIENTS: dict[str, dict[str, Any]] = {
    "dot": {"metric": "dot"},
    "cosine": {"metric": "cosine"},
    "preconditioned-dot": {"metric": "dot", "precondition": "second-moment"},
    "preconditioned-cosine": {"metric": "cosine", "precondition": "second-moment"},
}
"""Methods that use the vectors of a store, with the options of their question."""
WITH_WORDS = "+bm25"
"""What the name of a method that is blended with words ends with."""
BASELINES = ("bm25", "tf-idf", "random")
"""Methods that use no gradients."""
EXACT: dict[str, tuple[tuple[Share, ...], Metric]] = {
    "exact-dot": (SHARES, "dot"),
    "exact-cosine": (SHARES, "cosine"),
    "exact-layers-dot": (("layers",), "dot"),
    "exact-layers-cosine": (("layers",), "cosine"),
}
"""Methods that use exact gradients, of all parameters or of the projected layers, with their metric. They are slow, and
so not among the defaults."""
MOST_NUMBERS = 1 << 28
"""Most numbers in the dense TF-IDF vectors: 1 GiB."""


def refuse_other_val(usable: list[int], places: list[int]) -> None:
    """UsageError unless the val samples that are ``usable`` for a part are those at ``places`` of the val set.

    Both are places, not ids, because ids may repeat.
    """
    if usable != places:
        first = min(set(usable) ^ set(places), default=None)
        which = "" if first is None else f", the first that only one of them can use at row {first}"
        raise UsageError(
            f"the val set has {len(usable)} usable samples for the store and {len(places)} for the trainings{which}; "
            "remove those that cannot be used"
        )


def by_sample(scores_VR: NDArray[np.float64], part: Part, samples: int) -> NDArray[np.float64]:
    """(V, N): the scores of rows, summed over the windows of each sample. A row without a score (NaN) adds 0."""
    source, rows = part.column("source_row"), part.row_numbers
    scores_VN = np.zeros((len(scores_VR), samples))
    for score_N, score_R in zip(scores_VN, scores_VR, strict=True):
        np.add.at(score_N, source, np.nan_to_num(score_R[rows], nan=0.0))
    return scores_VN


def tf_idf_scores(corpus: Corpus, val_texts: list[str], samples: int) -> NDArray[np.float64]:
    """(V, N): cosines of the TF-IDF vectors of texts. UsageError for a corpus too large for dense vectors."""
    texts = [sample.preview() for sample in corpus.samples()][:samples]
    words = len({word for text in texts for word in text.lower().split()})
    if len(texts) * words > MOST_NUMBERS:
        raise UsageError(f"`methods=tf-idf`: {len(texts):,} samples of {words:,} words are too many; leave it out")
    index = TfIdf(texts)
    return np.asarray(index.vectors(val_texts) @ index.rows.T, dtype=np.float64)


def random_scores(val: int, samples: int, seed: int) -> NDArray[np.float64]:
    """(V, N): standard normal random numbers, a baseline."""
    return np.random.default_rng(seed).standard_normal((val, samples))


def grouped(scores_VN: NDArray[np.float64], groups: Mapping[str, list[int]]) -> NDArray[np.float64]:
    """(groups, N): the mean of ``scores_VN`` over the val samples of each group."""
    return np.stack([scores_VN[places].mean(0) for places in groups.values()])
