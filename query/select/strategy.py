"""How ``ghoststore select`` chooses: the options, checked, and the choice itself.

Legend: M samples of the part, C candidates, D numbers of a vector.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from query.ask.scorer import Scorer
from query.select.budget import Budget, Pools, Quotas, Room, check_quotas, make_pools, ranked
from query.select.diversity import Diversity, cosines, facility_location, greats, greats_step, mmr
from query.select.samples import Samples, vectors_of

DEFAULT_WEIGHTS = {"mmr": 0.5, "greats": 1.0}
CANDIDATES = 4
"""Default number of candidates for each sample to choose."""
MEMORY = 4 << 30
"""Most bytes in memory for the candidates: their vectors and, for facility location, the cosines of all pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """How to choose. The fields are options of ``ghoststore select``. UsageError for options that exclude
    each other.
    """

    budget: Budget
    quotas: Quotas | None = None
    diversity: Diversity
    diversity_weight: float | None = None
    candidates: int | None = None

    def __post_init__(self) -> None:
        check_quotas(self.quotas, self.budget)
        if self.diversity == "none":
            for name, value in (("diversity_weight", self.diversity_weight), ("candidates", self.candidates)):
                if value is not None:
                    raise UsageError(f"`{name}` belongs to `diversity=mmr`, facility-location or greats")
        elif threshold := self.budget.threshold_name:
            raise UsageError(
                f"`{threshold}` takes every sample above it, which leaves `diversity` nothing to choose: give `count`, "
                "`fraction` or `token_budget`"
            )
        if self.candidates is not None and self.candidates < 1:
            raise UsageError(f"`candidates` must be at least 1, not {self.candidates}")
        self._check_weight()

    def _check_weight(self) -> None:
        weight = self.diversity_weight
        if weight is None:
            return
        if self.diversity not in DEFAULT_WEIGHTS:
            raise UsageError(f"`diversity={self.diversity}` has no weight: leave `diversity_weight` out")
        highest = 1.0 if self.diversity == "mmr" else math.inf
        if not 0 <= weight <= highest or not math.isfinite(weight):
            wanted = "between 0 (score alone) and 1 (diversity alone)" if self.diversity == "mmr" else "0 or more"
            raise UsageError(f"`diversity_weight` of {self.diversity} must be {wanted}, not {weight}")

    @property
    def weight(self) -> float | None:
        """``diversity_weight`` or its default; None if the kind of diversity has no weight."""
        return DEFAULT_WEIGHTS.get(self.diversity) if self.diversity_weight is None else self.diversity_weight

    def settings(self) -> dict[str, Any]:
        """What the settings in the report say about the choice."""
        quotas = self.quotas if self.quotas is None or isinstance(self.quotas, str) else dict(self.quotas)
        diverse = {} if self.diversity == "none" else {"diversity_weight": self.weight, "candidates": self.candidates}
        return {**self.budget.to_json(), "quotas": quotas, "diversity": self.diversity, **diverse}

    def choose(
        self, scorer: Scorer | None, samples: Samples, score_M: NDArray[np.float64], progress: Progress
    ) -> ChosenSamples:
        """Choose among the samples with a score in ``score_M`` (NaN: may not be chosen). ``scorer`` is needed for
        ``diversity``.

        UsageError if nothing can be chosen, for quotas that do not fit the part, and for more candidates than fit in
        memory.
        """
        pools = make_pools(
            self.budget,
            self.quotas,
            score_M=score_M,
            tokens_M=samples.tokens,
            domain_M=samples.domain,
            domains=samples.source.domains,
            source=samples.name,
        )
        ranking = ranked(score_M)
        picked = best = pools.best(ranking)
        if not len(best):
            raise UsageError(_nothing_chosen(samples, score_M, ranking, self.budget))
        considered = len(ranking)
        if self.diversity != "none":
            assert scorer is not None
            places = self._candidates(scorer, pools, ranking, len(best))
            considered = len(places)
            picked = self._diverse(scorer, samples, score_M, places, Room(pools, places), len(best), progress)
        rank = np.zeros(len(score_M), dtype=np.int64)
        rank[ranking] = np.arange(1, len(ranking) + 1)
        return ChosenSamples(picked, rank, considered, _short(pools, ranking, picked))

    def _candidates(self, scorer: Scorer, pools: Pools, ranking: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """The best samples of each pool, several times as many as to choose, but no more than fit into memory."""
        most = self._most_candidates(sum(term.part.layout.dimension for term in scorer.terms))
        wanted = count if self.candidates is None else min(self.candidates, len(ranking))
        if wanted > most:
            raise UsageError(
                f"`diversity={self.diversity}`: {wanted:,} candidates do not fit in {MEMORY >> 30} GiB, {most:,} do. "
                "Choose fewer, or without `diversity`"
            )
        if self.candidates is None:
            places = pools.scaled(CANDIDATES).best(ranking)
            if len(places) <= most:
                return places
        elif self.candidates < count:
            raise UsageError(f"`candidates={self.candidates}` is less than the {count} samples that are asked for")
        dealt = pools.in_samples(self.candidates or most)
        return ranking[np.isin(ranking, np.concatenate([dealt.best(ranking), pools.best(ranking)]))]

    def _most_candidates(self, dimension: int) -> int:
        """The largest C for which 4·C·D bytes, or 4·C·(C + D) with the cosines of all pairs, fit into ``MEMORY``."""
        numbers = MEMORY // 4
        if self.diversity != "facility-location":
            return numbers // dimension
        return (math.isqrt(dimension * dimension + 4 * numbers) - dimension) // 2

    def _diverse(
        self,
        scorer: Scorer,
        samples: Samples,
        score_M: NDArray[np.float64],
        places: NDArray[np.int64],
        room: Room,
        count: int,
        progress: Progress,
    ) -> NDArray[np.int64]:
        """The candidates that the algorithm chooses, in its order, out of ``places``. ``count`` is an estimate of how
        many, for the progress bar and the step size of GREATS.
        """
        score_C = score_M[places]
        unit = self.diversity != "greats" or scorer.metric == "cosine"
        vectors_CD = vectors_of(scorer, samples.best_row[places], unit=unit)
        weight = 0.0 if self.weight is None else self.weight
        with closing(progress.task("choosing", count)) as task:
            if self.diversity == "facility-location":
                chosen = facility_location(score_C, cosines(vectors_CD), room, task.advance)
            elif self.diversity == "mmr":
                chosen = mmr(score_C, vectors_CD, room, weight, task.advance)
            else:
                eta = greats_step(score_C, vectors_CD, count, weight)
                chosen = greats(score_C, vectors_CD, room, eta, task.advance)
        return places[chosen]


@dataclass(frozen=True, slots=True)
class ChosenSamples:
    """The samples that were chosen."""

    places: NDArray[np.int64]
    """Places in `Samples`, in the order in which they were chosen."""
    rank: NDArray[np.int64]
    """(M,): place in the ranking by score, counted from 1; 0 for a sample that could not be chosen."""
    considered: int
    """Number of samples that could be chosen; with ``diversity``, the number of candidates."""
    short: list[dict[str, Any]]
    """Pools with too few samples: ``domain``, and ``asked`` (the limit) and ``chosen`` in samples or tokens."""


def _short(pools: Pools, ranking: NDArray[np.int64], picked: NDArray[np.int64]) -> list[dict[str, Any]]:
    available = pools.spent(ranking)
    return [
        {"domain": name, "asked": limit, "chosen": spent}
        for name, limit, total, spent in zip(pools.names, pools.limits, available, pools.spent(picked), strict=True)
        if total < limit
    ]


def _nothing_chosen(samples: Samples, score_M: NDArray[np.float64], ranking: NDArray[np.int64], budget: Budget) -> str:
    if not len(ranking):
        return (
            f"{samples.name} has no sample that can be chosen (usable, and no near-duplicate of the val "
            "set): nothing was written"
        )
    best, threshold = ranking[0], budget.threshold_name or "threshold"
    score = f"{score_M[best]:.4g}" if budget.threshold_nats is None else f"{score_M[best] * budget.factor:.2e}"
    return (
        f"nothing was chosen, and nothing was written: the best of {len(ranking):,} samples has the score "
        f"{score} and {samples.tokens[best]:,} tokens. Lower `{threshold}`, or raise the budget or the quotas"
    )
