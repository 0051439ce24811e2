"""Budgets and quotas over a ranking, against the obvious loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghoststore.errors import UsageError
from query.select.budget import Budget, Pools, Room, apportion, check_quotas, make_pools, ranked

PART = "part 'part'"
DOMAINS = ["code", "math", "prose"]
scores = st.lists(st.one_of(st.just(math.nan), st.integers(-3, 3).map(float)), min_size=1, max_size=20)


def slowly(ranking: list[int], pools: Pools) -> list[int]:
    """From the top: a sample is taken while its pool has room; a pool closes at the first that does not fit."""
    left, closed, chosen = list(pools.limits), set(), []
    for sample in ranking:
        pool, cost = int(pools.pool_M[sample]), int(pools.cost_M[sample])
        if pool in closed or cost > left[pool]:
            closed.add(pool)
            continue
        left[pool] -= cost
        chosen.append(sample)
    return chosen


@st.composite
def samples(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, tokens, domains."""
    score = np.array(draw(scores))
    numbers = st.lists(st.integers(1, 9), min_size=len(score), max_size=len(score))  # no usable sample is empty
    return score, np.array(draw(numbers)), np.array([n % 4 - 1 for n in draw(numbers)], dtype=np.int16)


budgets = st.one_of(
    st.floats(0.01, 1).map(lambda x: Budget(fraction=x)),
    st.integers(1, 30).map(lambda n: Budget(count=n)),
    st.integers(1, 80).map(lambda n: Budget(token_budget=n)),
)
quotas = st.one_of(
    st.none(),
    st.sampled_from(["proportional", "equal"]),
    st.dictionaries(st.sampled_from(DOMAINS), st.floats(0, 0.33), min_size=1),
)


@given(samples(), budgets, quotas)
def test_every_way_is_the_obvious_loop(given: Any, budget: Budget, quotas: Any) -> None:
    score, tokens, domain = given
    pools = make_pools(budget, quotas, score_M=score, tokens_M=tokens, domain_M=domain, domains=DOMAINS, source=PART)
    ranking = ranked(score)
    by_hand = sorted((i for i, s in enumerate(score) if not math.isnan(s)), key=lambda i: (-score[i], i))
    assert ranking.tolist() == by_hand
    chosen = pools.best(ranking)
    assert chosen.tolist() == slowly(by_hand, pools)
    assert sum(pools.limits) == (budget.size(score) if len(by_hand) or not isinstance(quotas, str) else 0)
    assert all(spent <= limit for spent, limit in zip(pools.spent(chosen), pools.limits, strict=True))
    room, greedy = Room(pools, ranking), []
    while room.open_C.any():
        candidate = int(np.argmax(room.open_C))
        if room.take(candidate):
            greedy.append(by_hand[candidate])
    assert greedy == chosen.tolist()


@given(samples(), st.integers(-4, 4))
def test_a_threshold_takes_all_above_it(given: Any, threshold: int) -> None:
    score, tokens, domain = given
    pools = make_pools(
        Budget(threshold=threshold),
        None,
        score_M=score,
        tokens_M=tokens,
        domain_M=domain,
        domains=[],
        source=PART,
    )
    assert sorted(pools.best(ranked(score)).tolist()) == [i for i, s in enumerate(score) if s >= threshold]


@given(st.integers(0, 1000), st.lists(st.floats(0, 1e6), min_size=1, max_size=9))
def test_apportion(total: int, weights: list[float]) -> None:
    dealt = apportion(total, weights)
    if sum(weights) <= 0:
        assert dealt == [0] * len(weights)
        return
    assert sum(dealt) == total
    assert all(abs(d - total * w / sum(weights)) < 1 + 1e-6 for d, w in zip(dealt, weights, strict=True))


def pools_of(quotas: Any, budget: Budget, domains: list[int]) -> dict[str, int]:
    count = len(domains)
    pools = make_pools(
        budget,
        quotas,
        score_M=np.zeros(count),
        tokens_M=np.full(count, 7),
        source=PART,
        domain_M=np.array(domains, dtype=np.int16),
        domains=DOMAINS,
    )
    return dict(zip(pools.names, pools.limits, strict=True))


def test_what_quotas_mean() -> None:
    """Shares of the budget, counts, and what is left for the others; by domain of the usable samples, or alike."""
    domains = [0] * 6 + [1] * 3 + [2]
    assert pools_of({"code": 0.3, "math": 5}, Budget(count=20), domains) == {"code": 6, "math": 5, "(others)": 9}
    assert pools_of({"code": 0.5, "math": 0.5}, Budget(count=5), domains) == {"code": 3, "math": 2, "(others)": 0}
    assert pools_of({"code": 0.29}, Budget(count=100), domains) == {"code": 29, "(others)": 71}
    assert pools_of({"code": 0.25}, Budget(token_budget=100), domains) == {"code": 25, "(others)": 75}
    everyone = {"(none)": 0, "code": 6, "math": 3, "prose": 1}
    assert pools_of("proportional", Budget(count=10), domains) == everyone
    assert pools_of("proportional", Budget(token_budget=100), domains) == {k: 10 * v for k, v in everyone.items()}
    assert pools_of("equal", Budget(count=10), domains) == {"(none)": 0, "code": 4, "math": 3, "prose": 3}
    assert pools_of("equal", Budget(fraction=0.8), [*domains, -1]) == {"(none)": 3, "code": 2, "math": 2, "prose": 2}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give one of `fraction`, `count`, `threshold`, `threshold_nats` and `token_budget`, not none of them"),
        ({"count": 3, "token_budget": 4}, "not `count` and `token_budget`"),
        ({"fraction": 0.0}, "`fraction` must be above 0 and at most 1, not 0.0"),
        ({"fraction": 1.5}, "`fraction` must be above 0"),
        ({"fraction": math.nan}, "`fraction` must be above 0"),
        ({"count": 0}, "`count` must be at least 1"),
        ({"threshold": math.nan}, "`threshold` must be a finite number, not nan"),
        ({"threshold": math.inf}, "`threshold` must be a finite number"),
        ({"threshold_nats": math.nan}, "`threshold_nats` must be a finite number, not nan"),
        ({"threshold": 1.0, "threshold_nats": 1.0}, "not `threshold` and `threshold_nats`"),
        ({"token_budget": 0}, "`token_budget` must be at least 1"),
    ],
)
def test_budgets_that_cannot_be(budget: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Budget(**budget)


@pytest.mark.parametrize(
    ("quotas", "budget", "message"),
    [
        ({"code": 0.7, "math": 0.6}, Budget(count=5), "the shares add up to 1.3, more than 1"),
        ({"code": 1.5}, Budget(count=5), "code=1.5: a share lies between 0 and 1"),
        ({"code": -0.5}, Budget(count=5), "a share lies between 0 and 1"),
        ({"code": math.nan}, Budget(count=5), "a share lies between 0 and 1"),
        ({"code": -1}, Budget(count=5), "cannot be negative"),
        ({"code": True}, Budget(count=5), "expected a share .* or a number"),
        ({"code": 3}, Budget(token_budget=5), "with `token_budget` give a share"),
        ({"code": 0.3}, Budget(threshold=0.1), "give `count`, `fraction` or `token_budget`, not `threshold`"),
    ],
)
def test_quotas_that_cannot_be(quotas: Any, budget: Budget, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_quotas(quotas, budget)


def test_quotas_that_do_not_fit_the_part() -> None:
    with pytest.raises(UsageError, match=r"quota law=0\.1: part 'part' has no such domain; it has code, math, prose"):
        pools_of({"law": 0.1}, Budget(count=5), [0, 1])
    with pytest.raises(UsageError, match=r"4 samples and shares of 2\.5 are more than the 5 to choose"):
        pools_of({"code": 4, "math": 0.5}, Budget(count=5), [0, 1])
    with pytest.raises(UsageError, match="part 'part' has no domains"):
        make_pools(
            Budget(count=1),
            "equal",
            score_M=np.zeros(1),
            tokens_M=np.ones(1, dtype=np.int64),
            domain_M=np.array([-1], dtype=np.int16),
            domains=[],
            source=PART,
        )
