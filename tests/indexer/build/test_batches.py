"""Batches hold each place once, within the budget, in an order that the lengths fix."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from indexer.encode.batching import plan_batches

lengths = st.lists(st.integers(1, 60), max_size=80)
budgets = st.integers(1, 400)


@given(lengths, budgets)
def test_each_place_once(lengths: list[int], budget: int) -> None:
    assert sorted(place for batch in plan_batches(lengths, budget) for place in batch) == list(range(len(lengths)))


@given(lengths, budgets)
def test_the_padded_batch_keeps_the_budget_or_stands_alone(lengths: list[int], budget: int) -> None:
    for batch in plan_batches(lengths, budget):
        longest = max(lengths[place] for place in batch)
        assert len(batch) * longest <= budget or len(batch) == 1


@given(lengths, budgets)
def test_as_many_as_fit(lengths: list[int], budget: int) -> None:
    for batch in plan_batches(lengths, budget)[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > budget


@given(lengths, budgets)
def test_longest_first_equal_ones_by_place(lengths: list[int], budget: int) -> None:
    order = [place for batch in plan_batches(lengths, budget) for place in batch]
    assert [(-lengths[place], place) for place in order] == sorted((-n, place) for place, n in enumerate(lengths))
    assert plan_batches(list(lengths), budget) == plan_batches(tuple(lengths), budget)
