"""Balancing: nothing lost, budgets kept, loads close."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlctl_train.data.balance import balance, micro_batches, workload

LENGTHS = st.lists(st.integers(1, 200), max_size=40)


@given(LENGTHS, st.integers(1, 6), st.booleans())
def test_every_row_lands_in_exactly_one_part(lengths: list[int], num_parts: int, equal_size: bool) -> None:
    parts = balance(lengths, num_parts, equal_size)
    assert len(parts) == num_parts
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 6))
def test_equal_parts_differ_by_one_row_at_most(lengths: list[int], num_parts: int) -> None:
    sizes = [len(part) for part in balance(lengths, num_parts, equal_size=True)]
    assert max(sizes) - min(sizes) <= 1


@given(LENGTHS, st.integers(2, 6))
def test_loads_differ_by_one_row_at_most(lengths: list[int], num_parts: int) -> None:
    loads = [sum(lengths[i] for i in part) for part in balance(lengths, num_parts, equal_size=False)]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_the_textbook_example_of_the_differencing_method() -> None:
    loads = [sum([8, 7, 6, 5, 4][i] for i in part) for part in balance([8, 7, 6, 5, 4], 2, equal_size=False)]
    assert sorted(loads) == [14, 16]


@given(LENGTHS, st.integers(200, 600), st.integers(1, 5))
def test_micro_batches_hold_every_row_within_the_budget(lengths: list[int], budget: int, min_parts: int) -> None:
    parts = micro_batches(lengths, budget, min_parts)
    assert len(parts) >= min_parts
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in part) <= budget for part in parts)


def test_a_row_longer_than_the_budget_travels_alone() -> None:
    assert [0] in micro_batches([300, 10, 10], 100)


def test_workload_grows_faster_than_length() -> None:
    assert workload(200, 1000, 64) > 2 * workload(100, 1000, 64)
    assert workload(1, 1000, 64) == 2 * 1000 + 2 * 64
