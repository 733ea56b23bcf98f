"""KAT's gate: persistent low KL is an event, by what is usual for the run as it is now."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd.config import GateConfig
from prune_opd.method.agreement import AgreementTrap, along_responses
from prune_opd.method.calibration import Calibration, Usual
from prune_opd.method.change_point import ChangePoint
from prune_opd.method.gate import apply_gate

GATE = GateConfig("kl_agreement", threshold=0.1, low_tokens=4, w_drop=1, w_base=0)
USUAL = Usual(0.0, 0.0, kl=1.0)  # so a trap is a mean below .1 nats


def advance(kl: list[float], offsets: list[int], cuts: list[int], gate: GateConfig = GATE) -> list[bool]:
    watch, events = AgreementTrap(offsets, gate, USUAL), []
    for begin, end in pairwise([0, *sorted(cuts), len(kl)]):
        events += watch.advance(torch.tensor(kl[begin:end], dtype=torch.float64)).tolist()
    return events


def plain(kl: list[float], offsets: list[int], gate: GateConfig) -> list[bool]:
    """The formula, token by token."""
    events = []
    for begin, end in pairwise(offsets):
        for t in range(begin, end):
            last = kl[max(begin, t - gate.low_tokens + 1) : t + 1]
            events.append(len(last) == gate.low_tokens and sum(last) < gate.threshold * gate.low_tokens * USUAL.kl)
    return events


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6),
    st.lists(st.integers(0, 180), max_size=6),
    st.integers(0, 10_000),
    st.sampled_from([1, 3, 8]),
)
@settings(max_examples=100, deadline=None)
def test_every_cut_into_pieces_gives_the_events_of_the_plain_formula(
    lengths: list[int], cuts: list[int], seed: int, low_tokens: int
) -> None:
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    draw = torch.Generator().manual_seed(seed)
    kl = (torch.rand(offsets[-1], generator=draw, dtype=torch.float64) * 0.2).tolist()
    gate = GateConfig("kl_agreement", threshold=0.1, low_tokens=low_tokens)
    within = [min(cut, offsets[-1]) for cut in cuts]
    assert advance(kl, offsets, within, gate) == plain(kl, offsets, gate)


def test_a_lost_text_that_both_go_on_with_ends_once_the_agreement_has_lasted() -> None:
    kl = [0.5, 2.0, 0.4, 3.0] + [0.001] * 10
    events = advance(kl, [0, 14], [])
    assert events.index(True) == 7  # four tokens of agreement
    gate = apply_gate(torch.tensor([events]), torch.ones(1, 14, dtype=torch.bool), GATE)
    assert gate.reliable_length_B.tolist() == [7] and gate.weight_BT[0, 7:].sum() == 0


def test_a_spike_now_and_then_is_no_trap_and_an_unknown_kl_is_none() -> None:
    assert not any(advance(([0.001] * 3 + [2.0]) * 10, [0, 40], [11]))
    assert not any(advance([float("nan")] * 20, [0, 20], [7]))


def test_before_anything_is_known_of_the_run_there_is_no_event() -> None:
    watch = AgreementTrap([0, 9], GATE, None)
    assert not watch.advance(torch.zeros(9)).any()


def test_what_is_usual_follows_the_last_steps() -> None:
    gate = GateConfig("kl_agreement", k=1, calibration_steps=2)
    calibration, early = Calibration(gate), [4, 9, 9, 0, 4]
    assert calibration.usual is None and calibration.record() == {}
    for kl in (8.0, 4.0, 0.4):
        calibration.update(early, kl)
    assert calibration.usual == pytest.approx((0, 0, 0, 4.4 / 8)) and calibration.record() == {"usual_kl": 0.55}
    again = Calibration(gate)
    again.load_state_dict(json.loads(json.dumps(calibration.state_dict())))
    for one in (again, calibration):
        one.update(early, 0.0)
    assert again.usual == calibration.usual == pytest.approx((0, 0, 0, 0.05))


def test_each_gate_has_its_own_watch() -> None:
    assert along_responses([0, 1], None, USUAL) is None and along_responses([0, 1], GateConfig(), USUAL) is None
    assert isinstance(along_responses([0, 1], GATE, USUAL), AgreementTrap)
    assert isinstance(along_responses([0, 1], GateConfig("change_point"), USUAL), ChangePoint)
