"""The budget of a selection, its quotas by domain, and the plain selection (best scores first).

A budget, in samples or in tokens, is divided among *pools*: one for each domain with a quota, and one for all others.
Each pool takes samples from the top of the ranking, and closes at the first sample that does not fit.

Legend: M samples of the part, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.settings.question import Quotas as Quotas
from ghoststore.settings.question import Spread as Spread
from query.ask.unit import Unit

THRESHOLDS = ("threshold", "threshold_nats")

OTHERS = "(others)"
"""The pool of domains without a quota."""
NO_DOMAIN = "(none)"
"""The pool of samples without a domain, where every domain has a quota."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much to choose. UsageError unless exactly one of the fields is given."""

    fraction: float | None = None
    """Share of the usable samples, above 0 and at most 1."""
    count: int | None = None
    """Number of samples, at least 1."""
    threshold: float | None = None
    """Lowest score to choose."""
    threshold_nats: float | None = None
    """Lowest score to choose, in the unit of the scores."""
    token_budget: int | None = None
    """Most tokens of all chosen samples together, at least 1."""
    factor: float = 1.0
    """Of the unit of ``threshold_nats``, see :meth:`in_unit`."""

    def __post_init__(self) -> None:
        set_fields = list(self.to_json())
        if len(set_fields) != 1:
            named = " and ".join(f"`{name}`" for name in set_fields) or "none of them"
            raise UsageError(
                "how much to choose: give one of `fraction`, `count`, `threshold`, `threshold_nats` and "
                f"`token_budget`, not {named}"
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise UsageError(f"`fraction` must be above 0 and at most 1, not {self.fraction}")
        if self.count is not None and self.count < 1:
            raise UsageError(f"`count` must be at least 1, not {self.count}")
        for name in THRESHOLDS:
            lowest = getattr(self, name)
            if lowest is not None and not math.isfinite(lowest):
                raise UsageError(f"`{name}` must be a finite number, not {lowest}")
        if self.token_budget is not None and self.token_budget < 1:
            raise UsageError(f"`token_budget` must be at least 1, not {self.token_budget}")

    def in_unit(self, unit: Unit | None) -> Budget:
        """With a ``threshold_nats``, this budget for scores in ``unit``. UsageError if they have none."""
        if self.threshold_nats is None:
            return self
        if unit is None:
            raise UsageError(
                "`threshold_nats`: these scores have no unit (cosines, sums over parts or steps, and mixtures have "
                "none): give `threshold`, or `metric=dot` for one part"
            )
        return replace(self, factor=unit.factor)

    @property
    def threshold_name(self) -> str | None:
        """The threshold that is given, by its name; None without one."""
        return next((name for name in THRESHOLDS if getattr(self, name) is not None), None)

    def size(self, score_M: NDArray[np.float64]) -> int:
        """How many samples (or tokens, see ``in_tokens``) to choose among samples with these scores (NaN: unusable).

        A fraction of the samples is rounded to the nearest whole number, half up, and is at least 1.
        """
        if self.token_budget is not None:
            return self.token_budget
        if self.count is not None:
            return self.count
        if self.fraction is not None:
            return max(1, math.floor(self.fraction * int(np.isfinite(score_M).sum()) + 0.5))
        if self.threshold_nats is not None:
            return int((score_M * self.factor >= self.threshold_nats).sum())
        assert self.threshold is not None
        return int((score_M >= self.threshold).sum())

    @property
    def in_tokens(self) -> bool:
        """Whether the budget is in tokens, and not in samples."""
        return self.token_budget is not None

    def to_json(self) -> dict[str, Any]:
        """The field that is given, by its name."""
        limits = ("fraction", "count", *THRESHOLDS, "token_budget")
        return {name: getattr(self, name) for name in limits if getattr(self, name) is not None}


def check_quotas(quotas: Quotas | None, budget: Budget) -> None:
    """UsageError for quotas that are impossible for any part, or that do not fit the kind of budget."""
    if quotas is None:
        return
    if name := budget.threshold_name:
        raise UsageError(f"quotas share out a budget: give `count`, `fraction` or `token_budget`, not `{name}`")
    if isinstance(quotas, str):
        return
    for domain, quota in quotas.items():
        shown = f"quota {domain}={quota}"
        if isinstance(quota, bool) or not isinstance(quota, int | float):
            raise UsageError(f"{shown}: expected a share (0.3) or a number of samples (100)")
        if isinstance(quota, int):
            if quota < 0:
                raise UsageError(f"{shown}: a number of samples cannot be negative")
            if budget.in_tokens:
                raise UsageError(f"{shown} is a number of samples: with `token_budget` give a share of the tokens")
        elif not 0 <= quota <= 1:
            raise UsageError(f"{shown}: a share lies between 0 and 1; a number of samples has no decimal point")
    shares = sum(quota for quota in quotas.values() if isinstance(quota, float))
    if shares > 1 + 1e-9:
        raise UsageError(f"quotas: the shares add up to {shares:g}, more than 1")


@dataclass(frozen=True, slots=True)
class Pools:
    """The pools of a selection: their limits, and for each sample its pool and its cost."""

    names: list[str]
    """One name for each pool."""
    limits: list[int]
    """The most samples or tokens of each pool."""
    pool_M: NDArray[np.int64]
    """(M,): the pool of each sample."""
    cost_M: NDArray[np.int64]
    """(M,): the cost of each sample in its pool: 1, or its number of tokens."""

    def scaled(self, factor: int) -> Pools:
        """The same pools with ``factor`` times the limits."""
        return Pools(self.names, [limit * factor for limit in self.limits], self.pool_M, self.cost_M)

    def in_samples(self, count: int) -> Pools:
        """The same pools for ``count`` samples, divided in proportion to the limits."""
        return Pools(self.names, apportion(count, self.limits), self.pool_M, np.ones_like(self.cost_M))

    def best(self, ranked: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples of ``ranked`` (best first) that fit into the pools, in the same order."""
        fits = np.zeros(len(ranked), dtype=bool)
        for pool, limit in enumerate(self.limits):
            (members,) = np.nonzero(self.pool_M[ranked] == pool)
            fits[members] = np.cumsum(self.cost_M[ranked[members]]) <= limit
        return ranked[fits]

    def spent(self, chosen: NDArray[np.int64]) -> list[int]:
        """How much of each limit the ``chosen`` samples use."""
        sums = np.bincount(self.pool_M[chosen], weights=self.cost_M[chosen], minlength=len(self.limits))
        return [int(spent) for spent in sums]


class Room:
    """What is left of the limits while a greedy algorithm chooses among candidates: the samples at ``places``."""

    def __init__(self, pools: Pools, places: NDArray[np.int64]) -> None:
        self._left = list(pools.limits)
        self._pool_C = pools.pool_M[places]
        self._cost_C = pools.cost_M[places]
        self.open_C: NDArray[np.bool_] = np.ones(len(places), dtype=bool)
        """(C,): true for a candidate that is not chosen yet and whose pool is open."""

    def take(self, candidate: int) -> bool:
        """Choose ``candidate`` if it fits; otherwise close its pool. Returns whether it was chosen."""
        pool, cost = self._pool_C[candidate], int(self._cost_C[candidate])
        if cost > self._left[pool]:
            self.open_C &= self._pool_C != pool
            return False
        self._left[pool] -= cost
        self.open_C[candidate] = False
        return True


def ranked(score_M: NDArray[np.float64]) -> NDArray[np.int64]:
    """The samples with a score, best first; equal scores by lower place."""
    order = np.argsort(-score_M, kind="stable")  # NaN last
    return order[: int((~np.isnan(score_M)).sum())]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divide ``total`` into whole numbers in proportion to ``weights``, by the method of largest remainders.

    Of equal remainders the first one comes first.
    """
    weight_sum = sum(weights)
    if weight_sum <= 0:
        return [0] * len(weights)
    exact = [total * weight / weight_sum for weight in weights]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: (counts[place] - exact[place], place))
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return counts


def make_pools(
    budget: Budget,
    quotas: Quotas | None,
    *,
    score_M: NDArray[np.float64],
    tokens_M: NDArray[np.int64],
    domain_M: NDArray[np.int16],
    domains: Sequence[str],
    source: str,
) -> Pools:
    """The pools of a selection among samples with these scores (NaN: unusable), tokens and places in ``domains`` (-1:
    none). ``source`` is named in errors.

    ``proportional`` shares are those of the domains among the usable samples (with a token budget: of their tokens).
    UsageError for quotas without domains, of a domain that the part lacks, and of more than there is to share.
    """
    size = budget.size(score_M)
    cost_M = tokens_M if budget.in_tokens else np.ones(len(score_M), dtype=np.int64)
    if quotas is None:
        return Pools(["all"], [size], np.zeros(len(score_M), dtype=np.int64), cost_M)
    if not domains:
        raise UsageError(
            f"quotas by domain: {source} has no domains. Make it with `fields.domain`, or leave the quotas out"
        )
    if isinstance(quotas, str):
        usable = np.isfinite(score_M)
        weights = np.ones(usable.sum()) if quotas == "equal" else cost_M[usable].astype(float)
        sums = np.bincount(domain_M[usable] + 1, weights=weights, minlength=len(domains) + 1)
        if quotas == "equal":
            sums = np.minimum(sums, 1.0)
        return Pools([NO_DOMAIN, *domains], apportion(size, sums.tolist()), domain_M.astype(np.int64) + 1, cost_M)
    unknown = [domain for domain in quotas if domain not in domains]
    if unknown:
        available = ", ".join(domains[:20]) + (" …" if len(domains) > 20 else "")
        raise UsageError(f"quota {unknown[0]}={quotas[unknown[0]]}: {source} has no such domain; it has {available}")
    pool_of = np.full(len(domains) + 1, len(quotas), dtype=np.int64)  # index -1, no domain, is the last entry
    pool_of[[domains.index(domain) for domain in quotas]] = np.arange(len(quotas))
    return Pools([*quotas, OTHERS], _limits(list(quotas.values()), size), pool_of[domain_M], cost_M)


def _limits(quotas: list[float], size: int) -> list[int]:
    """The limit of each quota for a budget of ``size``, and last what remains for the other domains."""
    counts = sum(quota for quota in quotas if isinstance(quota, int))
    shares = [quota * size for quota in quotas if isinstance(quota, float)]
    remaining = size - counts - sum(shares)
    if remaining < -1e-6 * size:
        raise UsageError(f"quotas: {counts} samples and shares of {sum(shares):g} are more than the {size} to choose")
    divided = iter(apportion(size - counts, [*shares, max(remaining, 0.0)]))
    return [quota if isinstance(quota, int) else next(divided) for quota in quotas] + [next(divided)]
