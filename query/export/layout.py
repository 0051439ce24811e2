"""Places on a map for rows whose nearest ones are known: t-SNE of scikit-learn.

Legend: N rows, K neighbours, n numbers of a sketch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PERPLEXITY = 30.0


def perplexity_of(count: int) -> float:
    """The perplexity for ``count`` rows: `PERPLEXITY`, less for few rows."""
    return min(PERPLEXITY, (count - 1) / 3)


def neighbors_needed(count: int) -> int:
    """How many neighbours of each of ``count`` rows :func:`places_on_map` reads, at least."""
    return min(count - 1, int(3 * perplexity_of(count) + 1))


def places_on_map(
    place_NK: NDArray[np.int64], cosine_NK: NDArray[np.float64], sketch_Nn: NDArray[np.float32], seed: int
) -> NDArray[np.float32]:
    """(N, 2): rows that are near in cosine lie near each other.

    ``place_NK`` and ``cosine_NK`` have at least :func:`neighbors_needed` neighbours of each row, the nearest first. The
    map begins with the two principal components of the sketches. The same input gives the same map, on the same machine
    and software: all is computed by one thread.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        begin = _principal(sketch_Nn)
        return begin if len(begin) < 4 else _tsne(place_NK, cosine_NK, begin, seed)


def _principal(sketch_Nn: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, 2): the two principal components; of fewer than three rows what there is."""
    from sklearn.decomposition import PCA

    begin = np.zeros((len(sketch_Nn), 2), dtype=np.float32)
    parts = min(2, len(sketch_Nn) - 1, sketch_Nn.shape[1])
    if parts:
        begin[:, :parts] = PCA(n_components=parts, svd_solver="full").fit_transform(sketch_Nn.astype(np.float64))
    return begin


def _tsne(
    place_NK: NDArray[np.int64], cosine_NK: NDArray[np.float64], begin_N2: NDArray[np.float32], seed: int
) -> NDArray[np.float32]:
    from scipy.sparse import csr_matrix
    from sklearn.manifold import TSNE

    count = len(begin_N2)
    k = neighbors_needed(count)
    # The distance of vectors of length 1. Each row is its own first neighbour, which scikit-learn takes away again.
    own = np.arange(count)[:, None]
    near = np.concatenate([own, place_NK[:, :k]], axis=1)
    far = np.concatenate([np.zeros((count, 1)), np.sqrt(np.maximum(0.0, 2 - 2 * cosine_NK[:, :k]))], axis=1)
    graph = csr_matrix((far.ravel(), near.ravel(), np.arange(0, count * (k + 1) + 1, k + 1)), shape=(count, count))
    spread = float(begin_N2[:, 0].std()) or 1.0
    tsne = TSNE(
        metric="precomputed",
        perplexity=perplexity_of(count),
        init=begin_N2 / spread * 1e-4,
        random_state=seed,
        n_jobs=1,
    )
    return np.asarray(tsne.fit_transform(graph), dtype=np.float32)
