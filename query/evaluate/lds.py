"""The linear datamodeling score: do scores add up to what training on some of the samples does?

For random halves S_m of the corpus a model is trained on each; its loss on val sample q is ℓ_q(m). The prediction is
-Σ_{i∈S_m} score_qi. LDS = the mean over q of Spearman's rank correlation between both, over m (Park et al. 2023, "TRAK:
attributing model behavior at scale", section 2; Ilyas et al. 2022). 1 is perfect, 0 is noise.

Legend: Q val samples (or groups of them), M halves, N samples of the corpus.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from indexer.projection import draws
from query.common.rank_correlation import spearman

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Lds:
    """One score's LDS, with the interval that resampling the halves gives."""

    value: float
    low: float
    high: float
    targets: int
    """Val samples, or groups, that it is a mean over."""


def half(seed: int, number: int, samples: int) -> NDArray[np.bool_]:
    """(N,): half ``number`` of ``samples``: ⌊N/2⌋ at random, the same on every machine."""
    mask = np.zeros(samples, dtype=bool)
    mask[draws.permutation(f"ghoststore/1|half|seed={seed}|number={number}", samples)[: samples // 2]] = True
    return mask


def lds(scores_QN: NDArray[np.float64], kept_MN: NDArray[np.bool_], losses_QM: NDArray[np.float64]) -> Lds:
    """See the head of this file. Resamples halves with replacement, seeded, for the interval (percentiles).

    ValueError for fewer than 3 halves. A val sample whose losses, or predictions, are all equal counts as 0.
    """
    if len(kept_MN) < 3:
        raise ValueError(f"a rank correlation needs at least 3 halves, not {len(kept_MN)}")
    predicted_QM = scores_QN @ kept_MN.T.astype(np.float64)
    actual_QM = -losses_QM
    value = float(spearman(predicted_QM, actual_QM).mean())
    rng = np.random.default_rng(0)
    resampled = np.empty(RESAMPLES)
    for place in range(RESAMPLES):
        chosen = rng.integers(0, len(kept_MN), len(kept_MN))
        resampled[place] = spearman(predicted_QM[:, chosen], actual_QM[:, chosen]).mean()
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Lds(value=value, low=float(low), high=float(high), targets=len(scores_QN))
