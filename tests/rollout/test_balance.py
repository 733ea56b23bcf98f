"""Dealing rows to data-parallel ranks and micro-batches: what holds for any lengths, and what padding would cost."""

from __future__ import annotations

import random
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_opd.errors import UserError
from prune_opd.rollout.balance import Deal, deal, packing_record, padded_size


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `deal` with enough rows; short and equal lengths, and rows beyond the budget, are frequent."""
    ranks, multiple_of = draw(st.integers(1, 5)), draw(st.sampled_from([1, 1, 2, 3]))
    length = st.one_of(st.integers(1, 8), st.integers(1, 300), st.sampled_from([64, 128]))
    least = ranks * multiple_of
    lengths = draw(st.lists(length, min_size=least, max_size=least + 40))
    return {
        "lengths": lengths,
        "rows": range(len(lengths)),
        "ranks": ranks,
        "token_budget": draw(st.sampled_from([1, 64, 100, 128, 1000, 10**6])),
        "multiple_of": multiple_of,
    }


def micro_batches(dealt: Deal) -> list[list[int]]:
    return [rows for rank in dealt for rows in rank]


@given(cases())
def test_every_row_is_dealt_exactly_once(case: dict[str, Any]) -> None:
    dealt = micro_batches(deal(**case))
    assert sorted(row for rows in dealt for row in rows) == list(case["rows"])


@given(cases())
def test_the_budget_is_kept_and_a_longer_row_stands_alone(case: dict[str, Any]) -> None:
    for rows in micro_batches(deal(**case)):
        assert len(rows) <= 1 or sum(case["lengths"][row] for row in rows) <= case["token_budget"]


@given(cases())
def test_every_rank_has_rows_and_the_same_number_of_micro_batches(case: dict[str, Any]) -> None:
    dealt = deal(**case)
    assert len(dealt) == case["ranks"]
    assert {len(rank) for rank in dealt} == {len(dealt[0])} and len(dealt[0]) % case["multiple_of"] == 0
    assert all(any(rank) for rank in dealt)


@given(cases())
def test_a_micro_batch_is_empty_only_where_the_rows_cannot_fill_as_many_as_the_budget_asks_for(
    case: dict[str, Any],
) -> None:
    dealt = deal(**case)
    if not all(micro_batches(dealt)):
        assert all(len(rows) <= 1 for rows in micro_batches(dealt))
        # One step fewer would have had a row for each: it did not keep the budget.
        assert case["ranks"] * (len(dealt[0]) - case["multiple_of"]) <= len(case["lengths"])


@given(cases())
def test_ranks_and_the_micro_batches_that_run_together_differ_by_at_most_the_longest_row(case: dict[str, Any]) -> None:
    lengths, dealt = case["lengths"], deal(**case)
    tokens = [[sum(lengths[row] for row in rows) for rows in rank] for rank in dealt]
    totals = [sum(rank) for rank in tokens]
    assert max(totals) - min(totals) <= max(lengths)
    mean = sum(lengths) / len(totals)
    assert all(abs(total - mean) <= max(lengths) for total in totals)
    for together in zip(*tokens, strict=True):
        assert max(together) - min(together) <= max(lengths)


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_nothing_but_their_numbers(case: dict[str, Any], shuffled: random.Random) -> None:
    """Rows of equal length are interchangeable: numbered in another order, the ranks still get the same lengths."""
    order = list(case["rows"])
    shuffled.shuffle(order)
    again = deal(**{**case, "lengths": [case["lengths"][row] for row in order]})

    def by_length(dealt: Deal, lengths: list[int]) -> list[list[list[int]]]:
        return [[sorted(lengths[row] for row in rows) for rows in rank] for rank in dealt]

    assert by_length(again, [case["lengths"][row] for row in order]) == by_length(deal(**case), case["lengths"])


@given(cases())
def test_the_same_rows_are_dealt_the_same(case: dict[str, Any]) -> None:
    assert deal(**case) == deal(**case)


def test_a_share_of_the_batch_keeps_its_numbers_in_the_batch() -> None:
    lengths = [9, 1, 2, 3, 9]
    assert deal(lengths, range(1, 4), 1, 6) == [[[1, 2, 3]]]
    assert deal(lengths, range(1, 4), 1, 3) == [[[3], [1, 2]]]


def test_three_rows_of_a_whole_budget_leave_one_of_two_ranks_an_empty_micro_batch() -> None:
    assert deal([100, 100, 100], range(3), 2, 100) == [[[0], [2]], [[1], []]]


def test_as_few_micro_batches_as_the_budget_allows() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(50, 300) for _ in range(256)]
    dealt = deal(lengths, range(256), 4, 4096)
    assert len(dealt[0]) == ceil(sum(lengths) / 4096 / 4)


def test_long_rows_are_spread_where_taking_turns_would_heap_them_up() -> None:
    """Every second row is long: in turns one of two ranks would get all of them."""
    lengths = [1000, 10] * 8
    tokens = [sum(lengths[row] for rows in rank for row in rows) for rank in deal(lengths, range(16), 2, 4096)]
    assert tokens == [4040, 4040]


@pytest.mark.parametrize(("rows", "ranks", "multiple_of"), [(1, 2, 1), (7, 2, 4), (0, 1, 1)])
def test_too_few_rows_are_one_clear_error(rows: int, ranks: int, multiple_of: int) -> None:
    with pytest.raises(UserError, match=f"{rows} responses .* too few for {ranks} .* at least {ranks * multiple_of} "):
        deal([5] * rows, range(rows), ranks, 100, multiple_of)


# ---------------------------------------------------------------------------------------------------- the record


def test_a_micro_batch_is_filled_up_to_the_next_multiple_and_never_empty() -> None:
    assert [padded_size(tokens, 8) for tokens in (0, 1, 8, 9)] == [8, 8, 8, 16]
    assert [padded_size(tokens, 1) for tokens in (0, 5)] == [1, 5]


def test_the_record_counts_padding_to_the_longest_and_what_packing_leaves() -> None:
    lengths = [10, 4, 4, 2]
    record = packing_record(lengths, [[[[0], [1]], [[2], [3]]]], multiple=8)
    assert record["padding_waste_padded"] == pytest.approx(1 - 20 / 40)
    assert record["padding_waste_packed"] == pytest.approx(1 - 20 / (16 + 8 + 8 + 8))
    assert record["dp_imbalance"] == pytest.approx(24 / 20)
    assert packing_record(lengths, [[[[0], [1]], [[2], [3]]]])["padding_waste_packed"] == 0


def test_imbalance_adds_up_what_the_ranks_wait_in_every_update() -> None:
    """Each of two updates has another slow rank: over the batch the ranks have equal work, but they still wait."""
    lengths = [6, 2, 2, 6]
    assert packing_record(lengths, [[[[0]], [[1]]], [[[2]], [[3]]]])["dp_imbalance"] == pytest.approx(12 / 8)
    assert packing_record(lengths, [[[[0], [1]], [[2], [3]]]])["dp_imbalance"] == 1
