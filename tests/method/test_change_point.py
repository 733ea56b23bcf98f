"""The change-point gate: what is usual for a pair, and the test that looks for a lasting fall below it."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd.config import GateConfig
from prune_opd.method.calibration import LEAST_DEVIATION, Usual
from prune_opd.method.change_point import LARGEST, ChangePoint

GATE = GateConfig("change_point", slack=0.5, alarm=8)
USUAL = Usual(0.9, 0.1)


def plain(acceptance: list[float], offsets: list[int], gate: GateConfig, usual: Usual) -> list[bool]:
    """Page's recursion, as it is written."""
    events = []
    for begin, end in pairwise(offsets):
        collected = 0.0
        for value in acceptance[begin:end]:
            z = min((usual.mean - value) / usual.deviation, LARGEST)
            collected = max(0.0, collected + z - gate.slack)
            events.append(collected >= gate.alarm)
    return events


def advance(acceptance: list[float], offsets: list[int], cuts: list[int], gate: GateConfig, usual: Usual) -> list[bool]:
    change, events = ChangePoint(offsets, gate, usual), []
    bounds = [0, *sorted(cuts), len(acceptance)]
    for begin, end in pairwise(bounds):
        events += change.advance(torch.tensor(acceptance[begin:end], dtype=torch.float64)).tolist()
    return events


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6),
    st.lists(st.integers(0, 180), max_size=6),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.5, 3.0, 8.0]),
)
@settings(max_examples=100, deadline=None)
def test_every_cut_into_pieces_gives_the_events_of_the_plain_recursion(
    lengths: list[int], cuts: list[int], seed: int, slack: float, alarm: float
) -> None:
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(offsets[-1], generator=generator, dtype=torch.float64)
    acceptance = (0.9 - 0.4 * (level > 0.6) * level).tolist()
    gate = GateConfig("change_point", slack=slack, alarm=alarm)
    within = [min(cut, offsets[-1]) for cut in cuts]
    assert advance(acceptance, offsets, within, gate, USUAL) == plain(acceptance, offsets, gate, USUAL)


def test_one_odd_token_is_no_alarm_and_a_lasting_fall_is() -> None:
    odd = [0.9] * 10 + [0.0] + [0.9] * 10
    assert not any(advance(odd, [0, 21], [], GATE, USUAL))
    fallen = [0.9] * 10 + [0.7] * 10  # two deviations below, 1.5 beyond the slack: 6 tokens
    assert advance(fallen, [0, 20], [], GATE, USUAL) == [False] * 15 + [True] * 5


def test_a_pair_that_disagrees_everywhere_alike_has_no_change_point() -> None:
    """Where a constant threshold sees an event in nearly every token."""
    generator = torch.Generator().manual_seed(0)
    acceptance = (0.4 + 0.15 * torch.randn(400, generator=generator, dtype=torch.float64)).tolist()
    assert not any(advance(acceptance, [0, 200, 400], [], GATE, Usual(0.4, 0.15)))


def test_the_next_response_starts_afresh() -> None:
    acceptance = [0.5] * 10 + [0.9] * 10
    assert advance(acceptance, [0, 10, 20], [13], GATE, USUAL)[10:] == [False] * 10


def test_two_equal_models_see_no_change_in_rounding() -> None:
    usual = Usual(0.999999, LEAST_DEVIATION)
    assert not any(advance([0.99] * 500, [0, 500], [], GATE, usual))
