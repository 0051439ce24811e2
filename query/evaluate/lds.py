"""The linear datamodeling score (LDS): do sums of scores predict the losses of models trained on subsets of the corpus?

One model is trained on each of M random halves S_m of the corpus; its loss on val sample q is ℓ_q(m). The scores
predict -Σ_{i∈S_m} score_qi for it. LDS is Spearman's rank correlation over m between predictions and losses, averaged
over q (Park et al. 2023, "TRAK: attributing model behavior at scale", section 2; Ilyas et al. 2022). 1 is perfect, 0 is
noise.

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
    """The LDS of one method, with a 95 % interval from resampling the halves."""

    value: float
    low: float
    high: float
    targets: int
    """Number of val samples, or of groups, that it is the mean over."""


def half(seed: int, number: int, samples: int) -> NDArray[np.bool_]:
    """(N,): true for the ⌊N/2⌋ random samples of half ``number``. The same on every machine."""
    mask = np.zeros(samples, dtype=bool)
    mask[draws.permutation(f"ghoststore/1|half|seed={seed}|number={number}", samples)[: samples // 2]] = True
    return mask


def lds(scores_QN: NDArray[np.float64], kept_MN: NDArray[np.bool_], losses_QM: NDArray[np.float64]) -> Lds:
    """The LDS of ``scores_QN``, defined at the head of this file. ``kept_MN`` are the halves, ``losses_QM`` the losses.

    The interval is between percentiles of 1,000 resamples of the halves, with replacement and a fixed seed. A val
    sample whose losses or predictions are all equal counts as 0. ValueError for fewer than 3 halves.
    """
    return _with_interval(*_resampled(scores_QN, kept_MN, losses_QM), len(scores_QN))


def lds_difference(
    one_QN: NDArray[np.float64],
    other_QN: NDArray[np.float64],
    kept_MN: NDArray[np.bool_],
    losses_QM: NDArray[np.float64],
) -> Lds:
    """The LDS of one less that of the other, paired: each resample of the halves is the same for both."""
    (value, resampled), (less, less_resampled) = (
        _resampled(scores_QN, kept_MN, losses_QM) for scores_QN in (one_QN, other_QN)
    )
    return _with_interval(value - less, resampled - less_resampled, len(one_QN))


def _resampled(
    scores_QN: NDArray[np.float64], kept_MN: NDArray[np.bool_], losses_QM: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """(LDS, that of each resample)."""
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
    return value, resampled


def _with_interval(value: float, resampled: NDArray[np.float64], targets: int) -> Lds:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Lds(value=value, low=float(low), high=float(high), targets=targets)
