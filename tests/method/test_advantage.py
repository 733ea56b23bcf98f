"""Advantages of whole responses: those of a prompt's or a step's rewards, by plain arithmetic."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_opd.method.advantage import advantages, equal_groups

REWARDS = st.lists(st.one_of(st.none(), st.floats(-100, 100)), min_size=8, max_size=8)


def test_an_advantage_is_the_distance_from_the_groups_mean_in_its_standard_deviations() -> None:
    got = advantages([1, 0, 0, 1, 5, None, 5, 8], 4, "group")
    half = math.sqrt(1 / 3)  # (n - 1): deviations of .5 each
    assert got[:4] == pytest.approx([0.5 / half, -0.5 / half, -0.5 / half, 0.5 / half])
    assert got[4:] == pytest.approx([-1 / math.sqrt(3), 0, -1 / math.sqrt(3), 2 / math.sqrt(3)])


def test_nothing_can_be_learnt_of_rewards_that_are_alike_or_alone() -> None:
    assert advantages([1, 1, 1, None, 0.1 + 0.2, 0.3], 2, "group") == [0] * 6
    assert advantages([None, 3, None, None], 2, "batch") == [0] * 4
    assert advantages([], 2, "batch") == []
    assert equal_groups([1, 1, 1, None, 0, 1], 2) == 0.5  # the second prompt has one reward and says nothing
    assert equal_groups([1, None], 2) is None


@given(REWARDS)
def test_over_a_batch_the_scored_ones_have_mean_0_and_standard_deviation_1(rewards: list[float | None]) -> None:
    got = advantages(rewards, 2, "batch")
    known = [value for value, reward in zip(got, rewards, strict=True) if reward is not None]
    assert all(value == 0 for value, reward in zip(got, rewards, strict=True) if reward is None)
    if any(got):
        assert statistics.fmean(known) == pytest.approx(0, abs=1e-6)
        assert statistics.stdev(known) == pytest.approx(1, rel=1e-6)


@given(REWARDS)
def test_none_leaves_the_rewards_as_they_are(rewards: list[float | None]) -> None:
    assert advantages(rewards, 4, "none") == [reward or 0.0 for reward in rewards]
