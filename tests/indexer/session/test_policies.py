"""Policies by themselves: what they do with ties, with scores that are none, and with candidates that are alike."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghoststore import Candidates
from ghoststore.errors import UsageError
from indexer.session.policies import decide, policy_of, seeded


def candidates(scores: Any, keep: int = 2, **rest: Any) -> Candidates:
    count = len(scores)
    return Candidates(
        scores=np.asarray(scores, dtype=np.float64),
        losses=np.ones(count),
        tokens=np.full(count, 5),
        rows=np.arange(count),
        step=3,
        keep=keep,
        generator=seeded("test"),
        **rest,
    )


@pytest.mark.parametrize(
    ("policy", "scores", "expected"),
    [
        ("top-k", [1, 2, 2, 2], [0, 1, 1, 0]),
        ("bottom-k", [1, 1, 1, 0], [1, 0, 0, 1]),
        ("top-k", [np.nan, 1, np.inf, -1], [0, 1, 0, 1]),
        ("top-k", [np.nan, -np.inf, 5, np.nan], [0, 0, 1, 0]),
        ("random", [np.nan, np.nan, np.nan, np.nan], [1, 1, 0, 0]),
        ("random", [np.nan, 1, 2, np.nan], [0, 1, 1, 0]),
    ],
)
def test_ties_and_scores_that_are_none(policy: str, scores: list[float], expected: list[int]) -> None:
    assert decide(policy_of(policy), candidates(scores)).tolist() == expected


def test_thresholds() -> None:
    assert decide(policy_of("threshold", 2.0), candidates([1, 2, 3, np.nan])).tolist() == [0, 1, 1, 0]
    assert decide(policy_of("threshold", 9.0), candidates([1, 4, 3, 4])).tolist() == [0, 1, 0, 0]


def test_reweighting() -> None:
    """N times a softmax, in standard deviations; alike where scores are; shifted and scaled scores weigh the same."""
    assert decide(policy_of("reweight"), candidates([4, 4, 4])).tolist() == [1, 1, 1]
    one, other = (decide(policy_of("reweight"), candidates(s)) for s in ([1.0, 2.0, 4.0], [110.0, 120.0, 140.0]))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    assert one.sum() == pytest.approx(3)
    steep = decide(policy_of("reweight", temperature=1e-3), candidates([1.0, 2.0, 4.0]))
    assert steep.tolist() == [0, 0, 3]


@given(st.integers(1, 40), st.integers(0, 99), st.data())
def test_random_is_uniform_in_size_and_repeatable(count: int, key: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, count))
    draws = [
        decide(policy_of("random"), Candidates(**{**vars_of(candidates(np.zeros(count), keep)), "generator": g}))
        for g in (seeded(str(key)), seeded(str(key)))
    ]
    assert draws[0].sum() == keep
    np.testing.assert_array_equal(*draws)


def vars_of(made: Candidates) -> dict[str, Any]:
    return {name: getattr(made, name) for name in made.__dataclass_fields__}


def test_greats_leaves_out_what_is_taken_already() -> None:
    """Two of three candidates are the same; without interactions both would be taken. Against all orders, greedily."""
    gradients = np.array([[3.0, 0.0], [3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    val = np.array([1.0, 1.0])
    scores, interactions = gradients @ val, 0.2 * gradients @ gradients.T
    weights = decide(policy_of("greats"), candidates(scores, interactions=interactions))
    assert decide(policy_of("top-k"), candidates(scores)).tolist() == [1, 1, 0, 0]
    first = int(np.argmax(scores))
    second = max(
        (place for place in range(4) if place != first), key=lambda place: scores[place] - interactions[place, first]
    )
    assert np.flatnonzero(weights).tolist() == sorted([first, second]) == [0, 2]
    gains = {pair: sum(scores[list(pair)]) - interactions[pair] for pair in itertools.combinations(range(4), 2)}
    assert max(gains, key=lambda pair: gains[pair]) == (0, 2)
    unknown = decide(policy_of("greats"), candidates([np.nan, *scores[1:]], interactions=interactions))
    assert unknown.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_may_be_a_tensor(dtype: torch.dtype) -> None:
    weights = torch.tensor([1.0, 0.0, 2.0], dtype=dtype, requires_grad=True)
    assert decide(lambda _: weights, candidates([3.0, 2.0, 1.0])).tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    "weights", [np.array([1j, 1, 1]), torch.tensor([1j, 1, 1]), np.ma.array([1.0, 1.0, 1.0], mask=[1, 0, 0])]
)
def test_weights_are_real_numbers(weights: Any) -> None:
    with pytest.raises(UsageError, match="real numbers are due"):
        decide(lambda _: weights, candidates([3.0, 2.0, 1.0]))


def test_a_policy_that_fails_is_named() -> None:
    def broken(_: Candidates) -> Any:
        return 1 / 0

    with pytest.raises(UsageError, match=r"broken` failed in step 3: ZeroDivisionError"):
        decide(broken, candidates([3.0, 2.0, 1.0]))


def test_without_scores_the_first_with_a_loss_are_taken() -> None:
    blind = candidates([np.nan] * 4)
    assert decide(policy_of("top-k"), replace(blind, losses=np.array([np.nan, 1.0, 2.0, 3.0]))).tolist() == [0, 1, 1, 0]
